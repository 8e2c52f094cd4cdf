"""Convolutions with the weights of K clients as operators of torch, `fedmom::convolve` and its two gradients.

One operator is one launch on a card: there it is a Triton kernel of convolution.py, on a CPU one convolution after
another in plain torch, which is the reference. So whatever watches operators, counts them or records them sees the
kernels too. Triton is imported when the first kernel is launched.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad, unfold
from torch.nn.grad import conv2d_input

from fedmom.engine.stacked.kernels.registry import Fused, register
from fedmom.engine.stacked.kernels.tiles import Geometry, weight_launch


class Implicit(torch.autograd.Function):
    """x [K·B, in, H, W], weight [K, out, in, kh, kw], bias [K, out] or None -> [K·B, out, H', W'].

    Stride, padding and dilation are the same in both directions, and there are no groups. The weights of each product
    are copied with the channels that it sums over innermost: a launch of a few microseconds, without which the kernel
    would load weights 4 bytes at a time, 36 bytes apart in a 3 × 3 kernel, in every tile of positions anew.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: Any) -> Tensor:
        ctx.kernels, ctx.geometry = kernels_for(x), tuple(value[0] for value in options[:3])
        ctx.shared, ctx.has_bias = shared, bias is not None
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        one = slice(0, 1 if shared else None)  # of shared weights all examples are one client's
        taps, bias = weight[one].permute(0, 3, 4, 1, 2).contiguous(), None if bias is None else bias[one]
        y: Tensor = ctx.kernels.convolve(x, taps, bias, ctx.geometry)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (x, weight), K = grads, ctx.saved_tensors, len(ctx.saved_tensors[1])
        d = d.contiguous(memory_format=torch.channels_last)
        before = None
        if ctx.needs_input_grad[0]:
            taps = weight[: 1 if ctx.shared else None].permute(0, 3, 4, 2, 1).contiguous()
            before = ctx.kernels.convolve_back(d, taps, x.shape[2:], ctx.geometry)
        parts = ctx.kernels.convolve_weights(x, d, K, weight.shape[3:], ctx.geometry)
        own = parts[0] if len(parts) == 1 else parts.sum(0)  # in one order: no atomics, the same bits in every run
        bias = d.reshape(K, -1, *d.shape[1:]).sum((1, 3, 4)) if ctx.has_bias else None
        return before, own, bias, None, None


def kernels_for(x: Tensor) -> Any:
    """The operators; on a CPU, where Triton's interpreter may be asked for, what they launch on a card."""
    return torch.ops.fedmom if x.is_cuda else _triton()


def _triton() -> ModuleType:
    try:
        from fedmom.engine.stacked.kernels import convolution
    except ImportError as error:
        raise RuntimeError("Triton is not installed") from error
    return convolution


# --- in plain torch -------------------------------------------------------------------------------------------


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    biases = [None] * len(taps) if bias is None else bias.unbind()
    rows = zip(x.chunk(len(taps)), taps.permute(0, 3, 4, 1, 2), biases, strict=True)
    return _joined([conv2d(own, w, b, stride, padding, dilation) for own, w, b in rows])


def _convolve_back(d: Tensor, taps: Tensor, sides: list[int], geometry: Geometry) -> Tensor:
    size = (len(d) // len(taps), taps.shape[3], *sides)
    rows = zip(d.chunk(len(taps)), taps.permute(0, 4, 3, 1, 2), strict=True)
    return _joined([conv2d_input(size, w, own, *geometry) for own, w in rows])


def _convolve_weights(x: Tensor, d: Tensor, K: int, kernel: list[int], geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    plan = weight_launch(x, d, kernel, K, geometry, "ieee").constants
    parts, rest = plan["PARTS"], plan["PARTS"] * plan["PART"] - len(d) // K * d[0, 0].numel()
    found = []
    for own, gradient in zip(x.chunk(K), d.chunk(K), strict=True):
        patches = unfold(own, tuple(kernel), dilation, padding, stride).transpose(1, 2).flatten(0, 1)  # [M, in·kh·kw]
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # [M, out]
        cut = [pad(t, (0, 0, 0, rest)).reshape(parts, -1, t.shape[1]) for t in (rows, patches)]
        found.append(torch.bmm(cut[0].transpose(1, 2), cut[1]))
    return torch.stack(found, 1).reshape(parts, K, d.shape[1], x.shape[1], *kernel)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


# --- the operators --------------------------------------------------------------------------------------------


register(
    {
        "convolve": Fused("(Tensor x, Tensor taps, Tensor? bias, int[] geometry) -> Tensor", "convolution", _convolve),
        "convolve_back": Fused(
            "(Tensor d, Tensor taps, int[] sides, int[] geometry) -> Tensor", "convolution", _convolve_back
        ),
        "convolve_weights": Fused(
            "(Tensor x, Tensor d, int K, int[] kernel, int[] geometry) -> Tensor", "convolution", _convolve_weights
        ),
    }
)
