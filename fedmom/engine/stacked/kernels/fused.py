"""What the stacked engine does with activations between its products, as operators that read and write them once.

Each operator of the namespace `fedmom` is one kernel on a CUDA device (kernels/, by Triton) and a function of plain
torch elsewhere, which says what the kernel computes. Activations are [K·B, C, ...], dense, in plain or in channels-last
memory, and what belongs together lies alike. float64 is computed in float64, all else in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import max_pool2d, pad

from fedmom.engine.stacked.kernels.registry import Fused, register, wanted
from fedmom.tasks.dropout import kept

enabled: bool | None = None if wanted else False  # None: on a CUDA device; True: everywhere; False: nowhere

_NOTHING = 255  # in the place of an index: nothing in the window is positive
_PROGRAMS, _MOST_PARTS = 1024, 64  # of a reduction, and of its parts of a client
ops = torch.ops.fedmom


def on(x: Tensor, K: int) -> bool:
    """Whether activations of K clients go through these operators."""
    asked = x.is_cuda if enabled is None else enabled
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return bool(asked and x.ndim > 1 and x.dtype in floats and 0 < x.numel() < K << 31 and len(x) % K == 0)


def part_rows(K: int, rows: int, C: int) -> int:
    """Of a client's so many rows how many are one part of a sum: enough parts to fill a device, few to combine."""
    parts = min(_MOST_PARTS, math.isqrt(rows // 4), -(-_PROGRAMS // (K * -(-C // 32))))
    return -(-rows // max(1, parts))


# --- in plain torch -------------------------------------------------------------------------------------------


def layout(x: Tensor) -> torch.memory_format:
    """One of the two that operators know."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _other(known: torch.memory_format) -> torch.memory_format:
    return torch.contiguous_format if known == torch.channels_last else torch.channels_last


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matrix(x: Tensor, K: int) -> Tensor:
    """[K·B, C, ...] -> [K, M, C]."""
    return x.unflatten(0, (K, -1)).movedim(2, -1).flatten(1, -2).to(_wide(x))


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """[K, M, C] -> [K·B, C, ...], as x is."""
    K, C = len(rows), x.shape[1]
    y = rows.reshape(K, len(x) // K, *x.shape[2:], C).movedim(-1, 2).flatten(0, 1)
    return y.to(x.dtype).contiguous(memory_format=layout(x))


def _dropout(x: Tensor, keys: Tensor, layer: int, p: float, channels: bool, turned: bool) -> Tensor:
    """x · mask, of addressed dropout; turned: in channels-last memory where x is in plain, and the other way round."""
    one = (len(x) // len(keys), *x.shape[1:])
    mask = kept(keys, layer, p, one, channels=channels, dtype=x.dtype).flatten(0, 1)
    return (x * mask).contiguous(memory_format=_other(layout(x)) if turned else layout(x))


def _relu_pool(x: Tensor, bias: Tensor | None, K: int, pool: list[int]) -> tuple[Tensor, Tensor]:
    """y = max over windows of relu(x + bias); which place of its window each is, of the equal ones the first."""
    if bias is not None:
        x = (x.unflatten(0, (K, -1)) + bias[:, None, :, None, None]).flatten(0, 1)
    y = torch.relu(x)
    place = torch.zeros_like(y, dtype=torch.int64)
    if pool != [1, 1]:
        width = y.shape[-1]
        y, at = max_pool2d(y, pool, return_indices=True)
        place = at // width % pool[0] * pool[1] + at % width % pool[1]
    index = torch.where(y <= 0, _NOTHING, place).to(torch.uint8)
    return y.contiguous(memory_format=layout(x)), index.contiguous(memory_format=layout(x))


def _relu_pool_back(
    d: Tensor, index: Tensor, K: int, size: list[int], pool: list[int], rows: int
) -> tuple[Tensor, Tensor]:
    """The gradient of x of `size`, and sums [K, S, C] over parts of so many windows each: rows = 0, no sums."""
    (kh, kw), (height, width) = pool, (-(-n // k) for n, k in zip(size, pool, strict=True))
    known = (0, width - d.shape[3], 0, height - d.shape[2])  # windows that stand over the edge pool nothing
    g, at = pad(d, known), pad(index, known, value=_NOTHING)
    places = torch.where(at[..., None] == torch.arange(kh * kw, device=d.device), g[..., None], 0.0)
    wide = places.unflatten(-1, (kh, kw)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    before = wide[:, :, : size[0], : size[1]].contiguous(memory_format=layout(d))
    if not rows:
        return before, d.new_empty(0, dtype=_wide(d))
    found = _matrix(torch.where(at == _NOTHING, 0.0, g), K)
    return before, torch.stack([part.sum(1) for part in found.split(rows, 1)], 1)


def _norm_sums(x: Tensor, K: int, rows: int) -> tuple[Tensor, Tensor]:
    """[K, S, C] means, and squares of the distances from them, of parts of so many rows."""
    parts = _matrix(x, K).split(rows, 1)
    means = [part.mean(1) for part in parts]
    squares = [(part - mean[:, None]).square().sum(1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack(means, 1), torch.stack(squares, 1)


def _norm_apply(
    x: Tensor, means: Tensor, squares: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, residual: Tensor | None,
    K: int, rows: int, momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """BatchNorm by each client's own statistics, plus `residual`, through a ReLU; mean and 1/√(var + ε) [K, C]."""
    M = x.numel() // (K * x.shape[1])
    first = torch.arange(means.shape[1], device=x.device) * rows
    count = (M - first).clamp(max=rows)[:, None].to(means.dtype)
    start = means[:, :1]
    mean = start[:, 0] + ((means - start) * count).sum(1) / M
    square = (squares + (means - mean[:, None]).square() * count).sum(1)
    if running_mean is not None:
        running_mean.copy_(running_mean.to(mean.dtype) * (1 - momentum) + mean * momentum)
    if running_var is not None:
        running_var.copy_(running_var.to(mean.dtype) * (1 - momentum) + square / (M - 1) * momentum)
    scale = (square / M + eps).rsqrt()
    y = _affine((_matrix(x, K) - mean[:, None]) * scale[:, None], weight, bias)
    y = y if residual is None else y + _matrix(residual, K)
    return _like(torch.relu(y) if relu else y, x), mean, scale


def _affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = rows if weight is None else rows * weight.to(rows.dtype)[:, None]
    return rows if bias is None else rows + bias.to(rows.dtype)[:, None]


def _norm_back_sums(
    d: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    K: int, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """[K, S, C] Σ g and Σ g·x̂ of parts of so many rows; with y, the result after a residual, g itself, else nothing."""
    hat = (_matrix(x, K) - mean[:, None]) * scale[:, None]
    g = _through(
        _matrix(d, K), hat if y is None else _matrix(y, K), *((None, None) if y is not None else (weight, bias)), relu
    )
    sums = [torch.stack([part.sum(1) for part in t.split(rows, 1)], 1) for t in (g, g * hat)]
    return sums[0], sums[1], x.new_empty(0) if y is None else _like(g, x)


def _through(d: Tensor, hat: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    """What comes back through the ReLU of an affine map of x̂."""
    return torch.where(_affine(hat, weight, bias) <= 0, 0.0, d) if relu else d


def _norm_back(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    one: Tensor, two: Tensor, K: int, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, of weight and of bias; relu: g is still to come through it."""
    hat = (_matrix(x, K) - mean[:, None]) * scale[:, None]
    g, M = _through(_matrix(d, K), hat, weight, bias, relu), hat.shape[1]
    one, two = one.sum(1), two.sum(1)
    own = scale if weight is None else scale * weight.to(scale.dtype)
    before = (g - one[:, None] / M - hat * two[:, None] / M) * own[:, None]
    return _like(before, x), two, one


# --- operators ------------------------------------------------------------------------------------------------

_AFFINE = "Tensor? weight, Tensor? bias"
OPERATORS = {
    "dropout": Fused(
        "(Tensor x, Tensor keys, int layer, float p, bool channels, bool turned) -> Tensor", "dropout", _dropout
    ),
    "relu_pool": Fused("(Tensor x, Tensor? bias, int K, int[] pool) -> (Tensor, Tensor)", "pool", _relu_pool),
    "relu_pool_back": Fused(
        "(Tensor d, Tensor index, int K, int[] size, int[] pool, int rows) -> (Tensor, Tensor)",
        "pool",
        _relu_pool_back,
    ),
    "norm_sums": Fused("(Tensor x, int K, int rows) -> (Tensor, Tensor)", "batch_norm", _norm_sums),
    "norm_apply": Fused(
        f"(Tensor x, Tensor means, Tensor squares, {_AFFINE}, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? residual, int K, int rows, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
        "batch_norm",
        _norm_apply,
    ),
    "norm_back_sums": Fused(
        f"(Tensor d, Tensor x, Tensor? y, Tensor mean, Tensor scale, {_AFFINE}, int K, int rows, bool relu) "
        "-> (Tensor, Tensor, Tensor)",
        "batch_norm",
        _norm_back_sums,
    ),
    "norm_back": Fused(
        f"(Tensor d, Tensor x, Tensor mean, Tensor scale, {_AFFINE}, Tensor one, Tensor two, int K, int rows, "
        "bool relu) -> (Tensor, Tensor, Tensor)",
        "batch_norm",
        _norm_back,
    ),
}


register(OPERATORS)


# --- with gradients -------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=layout(x))


def _rows_of(values: Tensor | None) -> Tensor | None:
    """[K, C] whose rows are dense; how far they lie apart does not matter, and shared ones lie on each other."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()


class Dropped(torch.autograd.Function):
    """x [K·B, ...] · mask of addressed dropout, keys [K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, layer: int, p: float, channels: bool, turned: bool) -> Tensor:
        ctx.save_for_backward(keys)
        x = _dense(x)
        ctx.options, ctx.layout = (layer, p, channels, turned), _other(layout(x)) if turned else layout(x)
        y: Tensor = ops.dropout(x, keys, *ctx.options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d = grads[0].contiguous(memory_format=ctx.layout)
        return ops.dropout(d, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


class ReluPooled(torch.autograd.Function):
    """Max-pooling of relu(x + bias), windows side by side: x [K·B, C, H, W], bias [K, C] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, K: int, pool: tuple[int, int]) -> Tensor:
        x = _dense(x)
        y, index = ops.relu_pool(x, _rows_of(bias), K, list(pool))
        ctx.save_for_backward(index)
        ctx.options, ctx.layout = (K, list(x.shape[2:]), list(pool)), layout(x)
        ctx.bias = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (index,), (K, size, pool) = grads, ctx.saved_tensors, ctx.options
        windows = math.prod(-(-n // k) for n, k in zip(size, pool, strict=True))
        rows = part_rows(K, len(d) // K * windows, d.shape[1]) if ctx.bias else 0
        before, parts = ops.relu_pool_back(d.contiguous(memory_format=ctx.layout), index, K, size, pool, rows)
        return before, parts.sum(1).to(ctx.bias) if ctx.bias else None, None, None


class Normalised(torch.autograd.Function):
    """BatchNorm of K clients in training, plus a residual like x, through a ReLU; running statistics [K, C] move."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None], K: int, momentum: float, eps: float, relu: bool,
    ) -> Tensor:  # fmt: skip
        M = x.numel() // (K * x.shape[1])
        if M == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        x, rows = _dense(x), part_rows(K, M, x.shape[1])
        weight, bias = _rows_of(weight), _rows_of(bias)
        residual = None if residual is None else residual.contiguous(memory_format=layout(x))
        sums = ops.norm_sums(x, K, rows)
        y, mean, scale = ops.norm_apply(x, *sums, weight, bias, *running, residual, K, rows, momentum, eps, relu)
        ctx.save_for_backward(x, y if residual is not None else None, mean, scale, weight, bias)
        ctx.options = K, rows, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, scale, weight, bias = ctx.saved_tensors
        K, rows, relu = ctx.options
        d = grads[0].contiguous(memory_format=layout(x))
        one, two, through = ops.norm_back_sums(d, x, y, mean, scale, weight, bias, K, rows, relu)
        g, relu = (d, relu) if y is None else (through, False)
        before, w, b = ops.norm_back(g, x, mean, scale, weight, bias, one, two, K, rows, relu)
        w, b = (None if p is None else grad.to(p.dtype) for p, grad in ((weight, w), (bias, b)))
        return before, w, b, None if y is None else g, None, None, None, None, None
