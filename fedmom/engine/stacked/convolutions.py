"""One convolution with the weights of K clients, in several ways, and which of them is the fastest for a shape.

Activations are folded, [K·B, C, ...], weights [K, out, in, ...]. `shared`: all rows of the weights are one point, as in
a round's first step; then the forward pass, and the gradient of the activations, are one ordinary convolution over K·B
examples, and only the gradients of the weights are the clients' own.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import unfold

from fedmom.engine.stacked.kernels.operators import Implicit
from fedmom.engine.stacked.kernels.tiles import GENERATION
from fedmom.engine.stacked.timings import Timings
from fedmom.machine.precision import convolves_in_tf32

convolution_backward = torch.ops.aten.convolution_backward

ConvolutionOptions = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups
Convolve = Callable[[Tensor, Tensor, Tensor | None, bool, ConvolutionOptions], Tensor]


class _Loop(torch.autograd.Function):
    """One ordinary convolution per client."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shared, ctx.options, ctx.has_bias = shared, options, bias is not None
        K = len(weight)
        if shared or K == 1:
            return torch.convolution(x, weight[0], None if bias is None else bias[0], *options)
        biases = [None] * K if bias is None else bias.unbind()
        rows = zip(x.chunk(K), weight.unbind(), biases, strict=True)
        return torch.cat([torch.convolution(*row, *options) for row in rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (x, weight) = grads, ctx.saved_tensors
        K, wants_x, together = len(weight), ctx.needs_input_grad[0], ctx.shared and len(weight) > 1
        size = [weight.shape[1]] if ctx.has_bias else None

        def back(d: Tensor, x: Tensor, w: Tensor, wants_x: bool, wants_w: bool) -> tuple[Tensor, Tensor, Tensor]:
            return convolution_backward(d, x, w, size, *ctx.options, [wants_x, wants_w, wants_w and ctx.has_bias])

        rows = zip(d.chunk(K), x.chunk(K), weight.unbind(), strict=True)
        own = [back(*row, wants_x and not together, True) for row in rows]
        before = None
        if wants_x:
            before = back(d, x, weight[0], True, False)[0] if together else _joined([b for b, _, _ in own])
        w = torch.stack([w for _, w, _ in own])
        return before, w, torch.stack([b for _, _, b in own]) if ctx.has_bias else None, None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Grouped(torch.autograd.Function):
    """Clients as groups of one convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shared, ctx.options, ctx.has_bias = shared, options, bias is not None
        if shared:
            return torch.convolution(x, weight[0], None if bias is None else bias[0], *options)
        K, out = weight.shape[:2]
        flat = None if bias is None else bias.reshape(-1)
        y = torch.convolution(_beside(x, K), weight.reshape(K * out, *weight.shape[2:]), flat, *_in_groups(options, K))
        return _apart(y, K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (x, weight), options = grads, ctx.saved_tensors, ctx.options
        K, out = weight.shape[:2]
        wants_x = ctx.needs_input_grad[0]
        before = None
        if wants_x and ctx.shared:
            before = convolution_backward(d, x, weight[0], None, *options, [True, False, False])[0]
        ask = [wants_x and not ctx.shared, True, ctx.has_bias]
        flat = weight.reshape(K * out, *weight.shape[2:])
        size = [K * out] if ctx.has_bias else None
        own, w, b = convolution_backward(_beside(d, K), _beside(x, K), flat, size, *_in_groups(options, K), ask)
        if own is not None and ask[0]:
            before = _apart(own, K)
        return before, w.reshape(weight.shape), b.reshape(K, out) if ctx.has_bias else None, None, None


def _beside(x: Tensor, K: int) -> Tensor:
    """[K·B, C, ...] -> [B, K·C, ...]: the channels of all clients side by side."""
    return x.reshape(K, -1, *x.shape[1:]).transpose(0, 1).reshape(len(x) // K, K * x.shape[1], *x.shape[2:])


def _apart(y: Tensor, K: int) -> Tensor:
    """[B, K·C, ...] -> [K·B, C, ...]."""
    B, channels = y.shape[:2]
    return y.reshape(B, K, channels // K, *y.shape[2:]).transpose(0, 1).reshape(K * B, channels // K, *y.shape[2:])


def _in_groups(options: ConvolutionOptions, K: int) -> ConvolutionOptions:
    *geometry, groups = options
    return (*geometry, K * groups)


def _unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions) -> Tensor:
    """Patches as rows of a batched matrix product."""
    stride, padding, dilation, _, _, groups = options
    if groups != 1 or x.ndim != 4:
        return CONVOLUTIONS["grouped"](x, weight, bias, shared, options)
    K, out, _, *kernel = weight.shape
    B = len(x) // K
    patches = unfold(x, tuple(kernel), dilation, padding, stride)  # [K·B, C·kh·kw, L]
    rows = patches.reshape(K, B, *patches.shape[1:])
    y = torch.einsum("kop,kbpl->kbol", weight.reshape(K, out, -1), rows)
    y = y if bias is None else y + bias[:, None, :, None]
    return y.reshape(K * B, out, *_sizes(x, weight, options))


def _implicit(x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions) -> Tensor:
    """Triton's kernels: 2d, without groups and alike in both directions. RuntimeError where they cannot run.

    On a CPU they are refused unless they are interpreted, so that no CPU's bytes depend on them.
    """
    if options[-1] != 1 or x.ndim != 4 or any(len(set(pair)) > 1 for pair in options[:3]):
        return CONVOLUTIONS["grouped"](x, weight, bias, shared, options)
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError("Triton's kernels need a CUDA device")
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"Triton's kernels were not tried with {x.dtype}")
    if len(x) * math.prod(_sizes(x, weight, options)) >= 1 << 31:
        raise RuntimeError("Triton's kernels count positions in 32 bits")
    y: Tensor = Implicit.apply(x, weight, bias, shared, options)
    return y


PLAIN = "loop"  # one client after another, as torch does it
CONVOLUTIONS: dict[str, Convolve] = {
    PLAIN: _Loop.apply,
    "grouped": _Grouped.apply,
    "unfold": _unfolded,
    "implicit": _implicit,
}

# On a CPU one grouped convolution is faster than one per client where images are small and there is little to do
# (measured: docs/log.md).
_SMALL_OUTPUT = 128  # positions per channel
_SMALL_WORK = 10_000_000  # multiplications of one client


class Ways:
    """The fastest way for each shape: measured once on a GPU and kept on disk; by a rule on a CPU.

    A CPU's results must not depend on timing, so that a configuration gives the same bytes there.
    """

    def __init__(self, timings: Timings | None = None) -> None:
        """timings: measure, and file here; left out, measure on CUDA alone."""
        self.timings, self.measures = timings, timings is not None
        self.chosen: dict[str, str] = {}  # {shape: way}, of the shapes that came by and were measured

    def way(self, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions) -> str:
        """One of CONVOLUTIONS, for x [K·B, in, ...] and weight [K, out, in, ...]."""
        if not (x.is_cuda or self.measures):
            K, positions = len(weight), math.prod(_sizes(x, weight, options))
            work = positions * weight[0].numel() * (len(x) // K)
            return "grouped" if K > 1 and positions <= _SMALL_OUTPUT and work <= _SMALL_WORK else "loop"
        shape = _described(x, weight, bias, shared, options)
        if shape not in self.chosen:
            self.timings = self.timings or Timings.of_device(x.device)
            known = self.timings.get(shape) or {}
            seconds = {name: known[name] for name in CONVOLUTIONS if name in known}  # a file may name others
            seconds = seconds or self._measured(shape, x, weight, bias, shared, options)
            self.chosen[shape] = min(seconds, key=lambda name: seconds[name])
        return self.chosen[shape]

    def _measured(
        self, shape: str, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions
    ) -> dict[str, float]:
        """Seconds of a forward and a backward pass by each way that can do it."""
        assert self.timings is not None
        like = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x, weight)]
        like += [] if bias is None else [bias.detach().clone().requires_grad_()]
        seconds = {}
        for name, convolve in CONVOLUTIONS.items():

            def once(convolve: Convolve = convolve) -> None:
                with torch.enable_grad():
                    y = convolve(like[0], like[1], like[2] if bias is not None else None, shared, options)
                    torch.autograd.grad(y, [t for t in like if t.requires_grad], torch.ones_like(y))

            try:
                seconds[name] = self.timings.measure(once, x.device)
            except Exception:  # out of memory, no kernel for this shape, or one that Triton cannot compile
                continue
        if not seconds:
            raise RuntimeError(f"no convolution runs on {shape}")
        self.timings.put(shape, seconds)
        return seconds


def _described(x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: ConvolutionOptions) -> str:
    """All that the speed depends on, in words."""
    stride, padding, dilation, _, _, groups = options
    parts = [f"{len(weight)}x{len(x) // len(weight)}", "x".join(map(str, x.shape[1:]))]
    parts += ["to", "x".join(map(str, weight.shape[1:])), f"stride {stride} padding {padding} dilation {dilation}"]
    parts += [f"groups {groups}", str(x.dtype).removeprefix("torch."), "bias" if bias is not None else ""]
    tf32 = "tf32" if convolves_in_tf32(x) else ""
    parts += ["shared" if shared else "", "first" if not x.requires_grad else "", tf32, f"kernels {GENERATION}"]
    return " ".join(part for part in parts if part)


def _sizes(x: Tensor, weight: Tensor, options: ConvolutionOptions) -> list[int]:
    """Of a convolution's output, along each side."""
    stride, padding, dilation = options[:3]
    spans = zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    return [(size + 2 * p - step * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, step in spans]
