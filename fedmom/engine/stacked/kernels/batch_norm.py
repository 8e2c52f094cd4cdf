"""BatchNorm of K clients as Triton kernels, two forward and two backward, with what is added and a ReLU in them.

A client's activations are a matrix: M = B·H·W rows, C channels. S programs share its rows, R each; what they find of a
channel is combined in a fixed order by whoever needs it. Nothing lies side by side, and no sum is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def sums(operand: Tensor) -> tl.dtype:
    """What sums are held in."""
    return tl.float64 if operand.dtype == torch.float64 else tl.float32


def tile(C: int, last: bool, dtype: torch.dtype, numbers: int) -> tuple[int, int]:
    """(rows, channels) of a tile: neighbours in it are neighbours in memory."""
    numbers = numbers // 2 if dtype == torch.float64 else numbers
    channels = min(32, triton.next_power_of_2(C)) if last else 1
    return numbers // channels, channels


@triton.jit
def _at(m, c, C, HW, LAST: tl.constexpr):
    """Where rows m, channels c of one client lie."""
    if LAST:  # noqa: SIM108 (a choice at compile time)
        found = m[:, None] * C + c[None, :]
    else:
        found = (m // HW * (C * HW) + m % HW)[:, None] + c[None, :] * HW
    return found


@triton.jit
def _norm_sums(
    x, means, squares, M, C, HW, R, S,
    LAST: tl.constexpr, SUM: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of R rows the mean, and the squares of the distances from it: Welford's by lane, then Chan's over lanes."""
    program = tl.program_id(0)
    client, s = (program // S).to(tl.int64), program % S
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    end = tl.minimum(s * R + R, M)
    mean = tl.zeros((BM, BC), SUM)
    square = tl.zeros((BM, BC), SUM)
    count = tl.zeros((BM,), SUM)
    for first in range(0, R, BM):
        m = s * R + first + tl.arange(0, BM)
        there = (m < end)[:, None] & (c < C)[None, :]
        v = tl.load(x + client * M * C + _at(m, c, C, HW, LAST), mask=there, other=0.0).to(SUM)
        count += tl.where(m < end, 1.0, 0.0)
        away = tl.where(there, v - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += away * tl.where(there, v - mean, 0.0)
    # From the first lane's mean: where all numbers are equal, so is their mean.
    start = tl.sum(tl.where((tl.arange(0, BM) == 0)[:, None], mean, 0.0), 0)
    away = tl.where((count > 0)[:, None], mean - start[None, :], 0.0)
    shift = tl.sum(away * count[:, None], 0) / (end - s * R).to(SUM)
    away = tl.where((count > 0)[:, None], away - shift[None, :], 0.0)
    at = (client * S + s) * C + c
    tl.store(means + at, start + shift, mask=c < C)
    tl.store(squares + at, tl.sum(square + away * away * count[:, None], 0), mask=c < C)


@triton.jit
def _combined(means, squares, client, c, M, C, R, S, SUM: tl.constexpr, SP: tl.constexpr):
    """The mean and the sum of squares of all rows, of channels c."""
    s = tl.arange(0, SP)
    there = (s < S)[:, None] & (c < C)[None, :]
    at = (client * S + s)[:, None] * C + c[None, :]
    mean = tl.load(means + at, mask=there, other=0.0)
    count = tl.where(s < S, tl.minimum(R, M - s * R), 0).to(SUM)
    start = tl.sum(tl.where((s == 0)[:, None], mean, 0.0), 0)
    away = tl.where(there, mean - start[None, :], 0.0)
    shift = tl.sum(away * count[:, None], 0) / count_of(M, SUM)
    away = tl.where(there, away - shift[None, :], 0.0)
    square = tl.load(squares + at, mask=there, other=0.0)
    return start + shift, tl.sum(square + away * away * count[:, None], 0)


@triton.jit
def count_of(M, SUM: tl.constexpr):
    """An integer, which may be a constant, as a number."""
    return tl.full((), 0, SUM) + M


@triton.jit
def _of_channel(values, client, stride, c, C, GIVEN: tl.constexpr, otherwise: tl.constexpr, SUM: tl.constexpr):
    """One number per channel, or the same for all."""
    found = tl.zeros(c.shape, SUM) + otherwise
    if GIVEN:
        found = tl.load(values + client * stride + c, mask=c < C, other=0.0).to(SUM)
    return found


@triton.jit
def _norm_apply(
    x, residual, y, means, squares, weight, bias, old_mean, old_var, mean_found, scale_found,
    w_client, b_client, m_client, v_client, M, C, HW, R, S, EPS: tl.constexpr, MOMENTUM: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OLD_MEAN: tl.constexpr, OLD_VAR: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = relu((x − mean)/√(var + ε) · weight + bias + residual); a client's first program moves its statistics."""
    program = tl.program_id(0)
    client, s = (program // S).to(tl.int64), program % S
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean, square = _combined(means, squares, client, c, M, C, R, S, SUM, SP)
    n = count_of(M, SUM)
    scale = 1.0 / tl.sqrt(square / n + EPS)
    w = _of_channel(weight, client, w_client, c, C, WEIGHT, 1.0, SUM)
    b = _of_channel(bias, client, b_client, c, C, BIAS, 0.0, SUM)
    if s == 0:
        tl.store(mean_found + client * C + c, mean, mask=c < C)
        tl.store(scale_found + client * C + c, scale, mask=c < C)
        if OLD_MEAN:
            old = _of_channel(old_mean, client, m_client, c, C, True, 0.0, SUM)
            tl.store(old_mean + client * m_client + c, old * (1 - MOMENTUM) + mean * MOMENTUM, mask=c < C)
        if OLD_VAR:
            old = _of_channel(old_var, client, v_client, c, C, True, 0.0, SUM)
            new = old * (1 - MOMENTUM) + square / (n - 1) * MOMENTUM
            tl.store(old_var + client * v_client + c, new, mask=c < C)
    end = tl.minimum(s * R + R, M)
    for first in range(0, R, BM):
        m = s * R + first + tl.arange(0, BM)
        there = (m < end)[:, None] & (c < C)[None, :]
        at = _at(m, c, C, HW, LAST)
        v = tl.load(x + client * M * C + at, mask=there, other=0.0).to(SUM)
        v = (v - mean[None, :]) * scale[None, :] * w[None, :] + b[None, :]
        if RESIDUAL:
            v += tl.load(residual + client * M * C + at, mask=there, other=0.0).to(SUM)
        if RELU:
            v = tl.where(v <= 0, 0.0, v)  # NaN stays
        tl.store(y + client * M * C + at, v, mask=there)


@triton.jit
def _known(
    means, scales, weight, bias, w_client, b_client, C, S,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Which client, part and channels a program of the gradients has, and what is known of those channels."""
    program = tl.program_id(0)
    client, s = (program // S).to(tl.int64), program % S
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = _of_channel(means, client, C, c, C, True, 0.0, SUM)
    scale = _of_channel(scales, client, C, c, C, True, 0.0, SUM)
    w = _of_channel(weight, client, w_client, c, C, WEIGHT, 1.0, SUM)
    b = _of_channel(bias, client, b_client, c, C, BIAS, 0.0, SUM)
    return client, s, c, mean, scale, w, b


@triton.jit
def _norm_back_sums(
    d, x, y, through, means, scales, weight, bias, firsts, seconds, w_client, b_client, M, C, HW, R, S,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, LAST: tl.constexpr,
    SUM: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ over R rows, g being what of d comes through the ReLU; with a residual g is its gradient."""
    client, s, c, mean, scale, w, b = _known(
        means, scales, weight, bias, w_client, b_client, C, S, WEIGHT, BIAS, SUM, BC
    )
    one = tl.zeros((BM, BC), SUM)
    two = tl.zeros((BM, BC), SUM)
    end = tl.minimum(s * R + R, M)
    for first in range(0, R, BM):
        m = s * R + first + tl.arange(0, BM)
        there = (m < end)[:, None] & (c < C)[None, :]
        at = client * M * C + _at(m, c, C, HW, LAST)
        g = tl.load(d + at, mask=there, other=0.0).to(SUM)
        hat = (tl.load(x + at, mask=there, other=0.0).to(SUM) - mean[None, :]) * scale[None, :]
        if RESIDUAL:
            g = tl.where(tl.load(y + at, mask=there, other=0.0) <= 0, 0.0, g)
            tl.store(through + at, g, mask=there)
        elif RELU:
            g = tl.where(hat * w[None, :] + b[None, :] <= 0, 0.0, g)
        one += g
        two += tl.where(there, g * hat, 0.0)  # beyond the end x̂ may be infinite
    at = (client * S + s) * C + c
    tl.store(firsts + at, tl.sum(one, 0), mask=c < C)
    tl.store(seconds + at, tl.sum(two, 0), mask=c < C)


@triton.jit
def _norm_back(
    d, x, before, means, scales, weight, bias, firsts, seconds, w_found, b_found, w_client, b_client, M, C, HW, R, S,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, LAST: tl.constexpr,
    SUM: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """weight/√(var + ε) · (g − Σg/M − x̂ Σ(g·x̂)/M); the first program of a client gives the sums to its affine part."""
    client, s, c, mean, scale, w, b = _known(
        means, scales, weight, bias, w_client, b_client, C, S, WEIGHT, BIAS, SUM, BC
    )
    part = tl.arange(0, SP)
    found = (client * S + part)[:, None] * C + c[None, :]
    known = (part < S)[:, None] & (c < C)[None, :]
    one = tl.sum(tl.load(firsts + found, mask=known, other=0.0), 0)
    two = tl.sum(tl.load(seconds + found, mask=known, other=0.0), 0)
    if s == 0:
        tl.store(b_found + client * C + c, one, mask=c < C)
        tl.store(w_found + client * C + c, two, mask=c < C)
    n = count_of(M, SUM)
    one, two = one / n, two / n
    end = tl.minimum(s * R + R, M)
    for first in range(0, R, BM):
        m = s * R + first + tl.arange(0, BM)
        there = (m < end)[:, None] & (c < C)[None, :]
        at = client * M * C + _at(m, c, C, HW, LAST)
        g = tl.load(d + at, mask=there, other=0.0).to(SUM)
        hat = (tl.load(x + at, mask=there, other=0.0).to(SUM) - mean[None, :]) * scale[None, :]
        if RELU:
            g = tl.where(hat * w[None, :] + b[None, :] <= 0, 0.0, g)
        tl.store(before + at, (g - one[None, :] - hat * two[None, :]) * (scale * w)[None, :], mask=there)


class _Grid:
    """How K clients' activations are shared out: S programs of R rows to each, by blocks of channels."""

    def __init__(self, x: Tensor, K: int, rows: int) -> None:
        self.K, self.C = K, x.shape[1]
        self.M = x.numel() // (K * self.C)
        self.S = triton.cdiv(self.M, rows)
        self.last = x.ndim == 2 or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        self.sizes = (self.M, self.C, self.M * K // len(x), rows, self.S)
        self.BM, self.BC = tile(self.C, self.last, x.dtype, 2048)
        self.programs = (K * self.S, triton.cdiv(self.C, self.BC))
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def parts(self, x: Tensor) -> Tensor:
        """[K, S, C]."""
        return torch.empty((self.K, self.S, self.C), dtype=self.wide, device=x.device)

    def channels(self, like: Tensor) -> Tensor:
        """[K, C]."""
        return torch.empty((self.K, self.C), dtype=self.wide, device=like.device)


def _given(values: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int]:
    """A kernel's operand [K, C] and how far its clients lie apart; of what is not given no number is read."""
    if values is None:
        return otherwise, 0
    assert values.stride(-1) == 1 or values.shape[-1] == 1
    return values, values.stride(0)


def norm_sums(x: Tensor, K: int, rows: int) -> tuple[Tensor, Tensor]:
    """fused.norm_sums as one launch."""
    grid = _Grid(x, K, rows)
    means, squares = grid.parts(x), grid.parts(x)
    _norm_sums[grid.programs](x, means, squares, *grid.sizes, grid.last, sums(x), grid.BM, grid.BC)
    return means, squares


def norm_apply(
    x: Tensor, means: Tensor, squares: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, residual: Tensor | None,
    K: int, rows: int, momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fused.norm_apply as one launch."""
    grid = _Grid(x, K, rows)
    y, mean, scale = torch.empty_like(x), grid.channels(x), grid.channels(x)
    (w, w_client), (b, b_client) = _given(weight, x), _given(bias, x)
    (m, m_client), (v, v_client) = _given(running_mean, x), _given(running_var, x)
    there = [t is not None for t in (weight, bias, running_mean, running_var, residual)]
    _norm_apply[grid.programs](
        x, x if residual is None else residual, y, means, squares, w, b, m, v, mean, scale,
        w_client, b_client, m_client, v_client, *grid.sizes, eps, momentum,
        *there, relu, grid.last, sums(x), triton.next_power_of_2(grid.S), grid.BM, grid.BC,
    )  # fmt: skip
    return y, mean, scale


def norm_back_sums(
    d: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    K: int, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fused.norm_back_sums as one launch."""
    grid = _Grid(x, K, rows)
    one, two = grid.parts(x), grid.parts(x)
    through = x.new_empty(0) if y is None else torch.empty_like(x)
    (w, w_client), (b, b_client) = _given(weight, x), _given(bias, x)
    _norm_back_sums[grid.programs](
        d, x, x if y is None else y, through, mean, scale, w, b, one, two, w_client, b_client, *grid.sizes,
        weight is not None, bias is not None, relu, y is not None, grid.last, sums(x), grid.BM, grid.BC,
    )  # fmt: skip
    return one, two, through


def norm_back(
    d: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    one: Tensor, two: Tensor, K: int, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """fused.norm_back as one launch."""
    grid = _Grid(x, K, rows)
    before, w_found, b_found = torch.empty_like(x), grid.channels(x), grid.channels(x)
    (w, w_client), (b, b_client) = _given(weight, x), _given(bias, x)
    _norm_back[grid.programs](
        d, x, before, mean, scale, w, b, one, two, w_found, b_found, w_client, b_client, *grid.sizes,
        weight is not None, bias is not None, relu, grid.last, sums(x), triton.next_power_of_2(grid.S),
        grid.BM, grid.BC,
    )  # fmt: skip
    return before, w_found, b_found
