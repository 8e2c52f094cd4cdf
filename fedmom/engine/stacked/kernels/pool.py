"""Bias, ReLU and max-pooling as one Triton kernel, and its backward pass as another.

Tiles are windows by channels. In plain memory a tile has one channel, so that neighbours in it are neighbours there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmom.engine.stacked.kernels.batch_norm import sums, tile


@triton.jit
def _at(image, channel, row, column, C, H, W, LAST: tl.constexpr):
    """Where the numbers of an activation [B, C, H, W] lie: rows of a tile by its columns, the channels."""
    if LAST:
        found = (((image * H + row) * W + column) * C)[:, None] + channel[None, :]
    else:
        found = ((image * C * H + row) * W + column)[:, None] + channel[None, :] * (H * W)
    return found


@triton.jit
def _relu_pool(
    x, bias, y, index, b_client, B, C, H, W, ROWS, COLUMNS, BLOCKS, KH: tl.constexpr, KW: tl.constexpr,
    BIAS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = max over each window of relu(x + bias); index: which of its places, or 255 where nothing is positive."""
    program = tl.program_id(0)
    client = (program // BLOCKS).to(tl.int64)
    m = program % BLOCKS * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image, place = m // (ROWS * COLUMNS), m % (ROWS * COLUMNS)
    row, column = place // COLUMNS, place % COLUMNS
    there = (m < B * ROWS * COLUMNS)[:, None] & (c < C)[None, :]
    source = x + client * B * C * H * W
    best = tl.zeros((BM, BC), SUM)
    chosen = tl.zeros((BM, BC), tl.int32)
    for tap in tl.static_range(KH * KW):
        at = _at(image, c, row * KH + tap // KW, column * KW + tap % KW, C, H, W, LAST)
        v = tl.load(source + at, mask=there, other=0.0).to(SUM)
        if BIAS:
            v += tl.load(bias + client * b_client + c, mask=c < C, other=0.0).to(SUM)[None, :]
            v = v.to(y.dtype.element_ty).to(SUM)
        v = tl.where(v <= 0, 0.0, v)  # NaN stays
        better = (v > best) | (v != v)  # as torch has it: of equals the first, of NaNs the last
        best = tl.where(better, v, best)
        chosen = tl.where(better, tap, chosen)
    at = client * B * C * ROWS * COLUMNS + _at(image, c, row, column, C, ROWS, COLUMNS, LAST)
    tl.store(y + at, best, mask=there)
    tl.store(index + at, tl.where(best <= 0, 255, chosen).to(tl.uint8), mask=there)


@triton.jit
def _relu_pool_back(
    d, index, before, totals, B, C, H, W, ROWS, COLUMNS, HIGH, WIDE, R, S, KH: tl.constexpr, KW: tl.constexpr,
    BIAS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of every number, of those in no window too (HIGH × WIDE windows cover all); sums of R windows."""
    program = tl.program_id(0)
    client, s = (program // S).to(tl.int64), program % S
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    end = tl.minimum(s * R + R, B * HIGH * WIDE)
    result = before + client * B * C * H * W
    pooled = client * B * C * ROWS * COLUMNS
    total = tl.zeros((BM, BC), SUM)
    for first in range(0, R, BM):
        m = s * R + first + tl.arange(0, BM)
        image, place = m // (HIGH * WIDE), m % (HIGH * WIDE)
        row, column = place // WIDE, place % WIDE
        there = (m < end)[:, None] & (c < C)[None, :]
        known = there & ((row < ROWS) & (column < COLUMNS))[:, None]
        at = pooled + _at(image, c, row, column, C, ROWS, COLUMNS, LAST)
        chosen = tl.load(index + at, mask=known, other=255).to(tl.int32)
        g = tl.load(d + at, mask=known, other=0.0)
        if BIAS:
            total += tl.where(chosen == 255, 0.0, g.to(SUM))
        for tap in tl.static_range(KH * KW):
            y, z = row * KH + tap // KW, column * KW + tap % KW
            inside = there & ((y < H) & (z < W))[:, None]
            tl.store(result + _at(image, c, y, z, C, H, W, LAST), tl.where(chosen == tap, g, 0.0), mask=inside)
    if BIAS:
        tl.store(totals + (client * S + s) * C + c, tl.sum(total, 0), mask=c < C)


def relu_pool(x: Tensor, bias: Tensor | None, K: int, pool: list[int]) -> tuple[Tensor, Tensor]:
    """fused.relu_pool as one launch."""
    N, C, H, W = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    rows, columns = H // pool[0], W // pool[1]
    y = torch.empty((N, C, rows, columns), dtype=x.dtype, device=x.device, memory_format=layout)
    index = torch.empty_like(y, dtype=torch.uint8, memory_format=layout)
    BM, BC = tile(C, last, x.dtype, 1024)
    blocks = triton.cdiv(N // K * rows * columns, BM)
    given = x if bias is None else bias
    _relu_pool[(K * blocks, triton.cdiv(C, BC))](
        x, given, y, index, given.stride(0), N // K, C, H, W, rows, columns, blocks,
        *pool, bias is not None, last, sums(x), BM, BC,
    )  # fmt: skip
    return y, index


def relu_pool_back(
    d: Tensor, index: Tensor, K: int, size: list[int], pool: list[int], rows: int
) -> tuple[Tensor, Tensor]:
    """fused.relu_pool_back as one launch."""
    N, C, ROWS, COLUMNS = d.shape
    last = d.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    before = torch.empty((N, C, *size), dtype=d.dtype, device=d.device, memory_format=layout)
    high, wide = (triton.cdiv(n, k) for n, k in zip(size, pool, strict=True))
    windows = N // K * high * wide
    R = rows or triton.cdiv(windows, triton.cdiv(windows, 512))
    S = triton.cdiv(windows, R)
    wanted = torch.float64 if d.dtype == torch.float64 else torch.float32
    totals = torch.empty((K, S, C) if rows else (0,), dtype=wanted, device=d.device)
    BM, BC = tile(C, last, d.dtype, 1024)
    _relu_pool_back[(K * S, triton.cdiv(C, BC))](
        d, index, before, totals, N // K, C, *size, ROWS, COLUMNS, high, wide, R, S,
        *pool, rows > 0, last, sums(d), BM, BC,
    )  # fmt: skip
    return before, totals
