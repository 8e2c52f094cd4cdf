"""Dropout with addressed masks as a Triton kernel: the hash of every place is taken where its number is read.

Bits are those of method/randomness.py: splitmix64 in 64 wrapping bits, of (key, layer, place // 2); a place takes the
lower or the upper 32 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _SIDE = 1024, 32


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit(do_not_specialize=["layer"])
def _drop(
    x, y, keys, layer, N, BLOCKS, C: tl.constexpr, HW: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x · mask, of N numbers per client: [B, C, HW], which LAST lie as [B, HW, C]."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    program = tl.program_id(0)
    client = (program // BLOCKS).to(tl.int64)
    at = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    place = at
    if LAST:
        channel, rest = at % C, at // C
        place = rest // HW * C + channel
        if not CHANNELS:
            place = place * HW + rest % HW
    elif CHANNELS:
        place = at // HW
    key = tl.load(keys + client).to(tl.uint64)
    base = _mix(_mix((key + 1) * GOLDEN) + (layer.to(tl.uint64) + 1) * GOLDEN)
    bits = _mix(base + ((place // 2).to(tl.uint64) + 1) * GOLDEN)
    word = tl.where(place % 2 == 0, bits & 0xFFFFFFFF, bits >> 32)
    # As the product of numbers and a mask gives it: NaN and infinity times 0 are NaN. The mask has the dtype of x.
    scale = tl.full((BLOCK,), SCALE, SUM)  # a bare constant would be float32
    mask = tl.where(word >= THRESHOLD, scale, 0.0).to(y.dtype.element_ty).to(SUM)
    v = tl.load(x + client * N + at, mask=at < N, other=0.0).to(SUM)
    tl.store(y + client * N + at, v * mask, mask=at < N)


@triton.jit(do_not_specialize=["layer"])
def _drop_and_turn(
    x, y, keys, layer, B, C: tl.constexpr, HW: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = x · mask, tile by tile of [HW, C]: x lies so where it is LAST, and y as [C, HW]; else the other way round."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    last, plain = at * C + channel, channel * HW + at
    place = image % B * C + (channel if CHANNELS else 0)
    place = place + 0 * at if CHANNELS else place * HW + plain
    key = tl.load(keys + image // B).to(tl.uint64)
    base = _mix(_mix((key + 1) * GOLDEN) + (layer.to(tl.uint64) + 1) * GOLDEN)
    bits = _mix(base + ((place // 2).to(tl.uint64) + 1) * GOLDEN)
    word = tl.where(place % 2 == 0, bits & 0xFFFFFFFF, bits >> 32)
    scale = tl.full((ROWS, COLUMNS), SCALE, SUM)
    mask = tl.where(word >= THRESHOLD, scale, 0.0).to(y.dtype.element_ty).to(SUM)
    there = (at < HW) & (channel < C)
    v = tl.load(x + image * (C * HW) + (last if LAST else plain), mask=there, other=0.0).to(SUM)
    tl.store(y + image * (C * HW) + (plain if LAST else last), v * mask, mask=there)


def dropout(x: Tensor, keys: Tensor, layer: int, p: float, channels: bool, turned: bool) -> Tensor:
    """fused.dropout as one launch."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    K, places, y = len(keys), x[0, 0].numel() if x.ndim > 1 else 1, torch.empty_like(x)
    numbers = x.numel() // K
    blocks = triton.cdiv(numbers, _BLOCK)
    C = x.shape[1] if x.ndim > 1 else 1
    scale = 0.0 if p == 1 else 1 / (1 - p)
    total = tl.float64 if x.dtype == torch.float64 else tl.float32
    if turned:
        y = torch.empty_like(x, memory_format=torch.contiguous_format if last else torch.channels_last)
        _drop_and_turn[(len(x), triton.cdiv(C, _SIDE), triton.cdiv(places, _SIDE))](
            x, y, keys.contiguous(), layer, len(x) // K,
            C, places, round(p * 2**32), scale, channels, last, total, _SIDE, _SIDE,
        )  # fmt: skip
        return y
    _drop[(K * blocks,)](
        x, y, keys.contiguous(), layer, numbers, blocks,
        C, places, round(p * 2**32), scale, channels and x.ndim > 2, last, total, _BLOCK,
    )  # fmt: skip
    return y
