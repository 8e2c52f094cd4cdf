"""2d convolutions with the weights of K clients as Triton kernels: matrix products whose operands are never unfolded.

Activations are dense channels-last, [K·B, H, W, C] in memory, and the weights of a product have the channels it sums
over innermost as well: what lies side by side is loaded together, 16 bytes at a time. Needs CUDA, or Triton's
interpreter for tests (TRITON_INTERPRET=1). Sums are float32, or float64 for float64 operands.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmom.engine.stacked.kernels.tiles import (
    Geometry,
    Launch,
    activation_launch,
    product_precision,
    sides_after,
    weight_launch,
)
from fedmom.machine.precision import convolves_in_tf32


@triton.jit
def _met(
    row, column, r, q, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    DILATION: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Where tap (r, q) of position (row, column) meets the source: the place in its image, and whether there is one."""
    if BACK:
        y, x = row + PAD - r * DILATION, column + PAD - q * DILATION
        there = (y >= 0) & (x >= 0)
        if STRIDE > 1:
            there = there & (y % STRIDE == 0) & (x % STRIDE == 0)
            y, x = y // STRIDE, x // STRIDE
    else:
        y, x = row * STRIDE - PAD + r * DILATION, column * STRIDE - PAD + q * DILATION
        there = (y >= 0) & (x >= 0)
    return y * WIDTH + x, there & (y < HEIGHT) & (x < WIDTH)


@triton.jit(do_not_specialize=["B"])
def _convolve(
    source, taps, bias, result, B, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, RESULTS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """result[k, b, y, x, n] = Σ_{r,q,c} source[k, b, ·, ·, c] taps[k, r, q, n, c]: HEIGHT × WIDTH -> ROWS × COLUMNS.

    BACK: the gradient of the activations, where n and c have changed places and so has the stride.
    """
    client, M = tl.program_id(2).to(tl.int64), B * (ROWS * COLUMNS)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    image, row, column = m // (ROWS * COLUMNS), m // COLUMNS % ROWS, m % COLUMNS
    images = source + (client * B + image) * (HEIGHT * WIDTH * CHANNELS)
    taps += client * (KH * KW * RESULTS * CHANNELS)
    total = tl.zeros((BM, BN), dtype=result.dtype.element_ty)
    if FLAT:  # one sum over pairs of tap and channel: every element has a place of its own to be found
        for first in range(0, KH * KW * CHANNELS, BK):
            p = first + tl.arange(0, BK)
            channel, tap = p % CHANNELS, p // CHANNELS
            r, q = tap // KW, tap % KW
            place, there = _met(
                row[:, None], column[:, None], r[None, :], q[None, :], HEIGHT, WIDTH, STRIDE, PAD, DILATION, BACK
            )
            there = there & (m < M)[:, None] & (p < KH * KW * CHANNELS)[None, :]
            a = tl.load(images[:, None] + (place * CHANNELS + channel[None, :]), mask=there, other=0.0)
            at = (tap * (RESULTS * CHANNELS) + channel)[:, None] + n[None, :] * CHANNELS
            b = tl.load(taps + at, mask=(p < KH * KW * CHANNELS)[:, None] & (n < RESULTS)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    else:  # tap by tap: a place is found for a row, and its channels follow it in memory
        STEPS: tl.constexpr = (CHANNELS + BK - 1) // BK
        for step in range(KH * KW * STEPS):
            tap, channel = step // STEPS, step % STEPS * BK + tl.arange(0, BK)
            place, there = _met(row, column, tap // KW, tap % KW, HEIGHT, WIDTH, STRIDE, PAD, DILATION, BACK)
            there = there & (m < M)
            at = (place * CHANNELS)[:, None] + channel[None, :]
            a = tl.load(images[:, None] + at, mask=there[:, None] & (channel < CHANNELS)[None, :], other=0.0)
            at = channel[:, None] + (tap * RESULTS + n)[None, :] * CHANNELS
            b = tl.load(taps + at, mask=(channel < CHANNELS)[:, None] & (n < RESULTS)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    if BIAS:
        total += tl.load(bias + client * RESULTS + n, mask=n < RESULTS, other=0.0)[None, :]
    at = (client * M + m)[:, None] * RESULTS + n[None, :]
    tl.store(result + at, total, mask=(m < M)[:, None] & (n < RESULTS)[None, :])


@triton.jit(do_not_specialize=["B"])
def _weights(
    source, gradient, result, B, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, RESULTS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """result[s, k, n, c, r, q] = Σ_{b,y,x} gradient[k, b, y, x, n] source[k, b, ·, ·, c], the s-th part of the sum."""
    part, client, K = tl.program_id(2) % PARTS, (tl.program_id(2) // PARTS).to(tl.int64), tl.num_programs(2) // PARTS
    M = B * (ROWS * COLUMNS)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    channel, tap = p % CHANNELS, p // CHANNELS
    r, q = tap // KW, tap % KW
    source += client * B * (HEIGHT * WIDTH * CHANNELS)
    gradient += client * M * RESULTS
    total = tl.zeros((BM, BN), dtype=result.dtype.element_ty)
    for first in range(part * PART, min(M, part * PART + PART), BK):
        m = first + tl.arange(0, BK)
        image, row, column = m // (ROWS * COLUMNS), m // COLUMNS % ROWS, m % COLUMNS
        at = n[:, None] + m.to(tl.int64)[None, :] * RESULTS
        a = tl.load(gradient + at, mask=(n < RESULTS)[:, None] & (m < M)[None, :], other=0.0)
        place, there = _met(
            row[:, None], column[:, None], r[None, :], q[None, :], HEIGHT, WIDTH, STRIDE, PAD, DILATION, False
        )
        there = there & (m < M)[:, None] & (p < CHANNELS * KH * KW)[None, :]
        images = source + image.to(tl.int64) * (HEIGHT * WIDTH * CHANNELS)
        b = tl.load(images[:, None] + (place * CHANNELS + channel[None, :]), mask=there, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    at = ((part * K + client) * RESULTS + n[:, None]) * (CHANNELS * KH * KW) + (channel * (KH * KW) + tap)[None, :]
    tl.store(result + at, total, mask=(n < RESULTS)[:, None] & (p < CHANNELS * KH * KW)[None, :])


# What the operators of operators.py launch on a card, by their names.


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """x [K·B, in, H, W], taps [K, kh, kw, out, in], bias [K, out] or None -> [K·B, out, H', W']."""
    sides = sides_after(x, taps.shape[1:3], geometry)
    plan = activation_launch(x, taps, sides, geometry, _precision(x), back=False, bias=bias is not None)
    return _activations(plan, x, taps, bias, sides)


def convolve_back(d: Tensor, taps: Tensor, sides: list[int], geometry: Geometry) -> Tensor:
    """d [K·B, out, H', W'], taps [K, kh, kw, in, out], sides H, W -> the gradient of x, [K·B, in, H, W]."""
    plan = activation_launch(d, taps, sides, geometry, _precision(d), back=True, bias=False)
    return _activations(plan, d, taps, None, sides)


def convolve_weights(x: Tensor, d: Tensor, K: int, kernel: list[int], geometry: Geometry) -> Tensor:
    """x [K·B, in, H, W], d [K·B, out, H', W'] -> [S, K, out, in, kh, kw], parts of the sum of the weights' gradient."""
    plan = weight_launch(x, d, kernel, K, geometry, _precision(x))
    size = (plan.constants["PARTS"], K, d.shape[1], x.shape[1], *kernel)
    result = torch.empty(size, dtype=x.dtype, device=x.device)
    _weights[plan.grid](_dense(x), _dense(d), result, len(x) // K, **plan.options)
    return result


def _activations(plan: Launch, source: Tensor, taps: Tensor, bias: Tensor | None, sides: Sequence[int]) -> Tensor:
    shape = (len(source), taps.shape[3], *sides)
    result = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=torch.channels_last)
    bias = taps if bias is None else bias.contiguous()
    _convolve[plan.grid](_dense(source), taps.contiguous(), bias, result, len(source) // len(taps), **plan.options)
    return result


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _precision(operand: Tensor) -> str:
    return product_precision(operand, tf32=convolves_in_tf32(operand))
