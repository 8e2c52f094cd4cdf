"""How kernels with products are cut into programs: tiles, warps, stages and parts of sums, by shape alone.

A card's own timing has no say, so the same shape is summed in the same order in every run and on every card. It was
chosen by counting for an H100, and then by timing some 900 choices on an H200 (benchmarks/gpu_tiles.py, docs/log.md).
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

Geometry = tuple[int, int, int]  # stride, padding, dilation, each the same in both directions

GENERATION = 3  # of kernels, tiles and how they are timed, counted up when they change
MULTIPROCESSORS = 132  # of an H100 or an H200
PROGRAMS = 4 * MULTIPROCESSORS  # that a sum over positions is cut into
_SHORTEST = 4  # steps of a part of a sum: fewer would not fill the pipeline of loads


def sides_after(source: Tensor, kernel: Iterable[int], geometry: Geometry) -> tuple[int, int]:
    """Height and width of what a convolution of source [..., H, W] gives."""
    stride, padding, dilation = geometry
    height, width = (
        (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for size, k in zip(source.shape[-2:], kernel, strict=True)
    )
    return height, width


def product_precision(operand: Tensor, *, tf32: bool) -> str:
    """How Triton multiplies: by TF32 where that is allowed, and three times for a float32 product that must be exact.

    The three are of the operands' upper and lower halves, and lose about as little as a float32 product; on the tensor
    cores they are three to five times as fast (docs/log.md). Numbers of 16 bits lose nothing in TF32.
    """
    if operand.dtype == torch.float64:
        return "ieee"
    return "tf32x3" if operand.dtype == torch.float32 and not tf32 else "tf32"


class Launch(NamedTuple):
    """All that a kernel is told beside its tensors."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]  # by the names of the kernel's parameters
    warps: int
    stages: int  # of loads under way while products are taken

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a call of the kernel, and of a compilation ahead of time."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}


def activation_launch(
    source: Tensor, taps: Tensor, sides: Iterable[int], geometry: Geometry, precision: str, *, back: bool, bias: bool
) -> Launch:
    """Of the product that gives activations of `sides`, from source [K·B, C, H, W] and taps [K, kh, kw, N, C].

    BM positions by BN channels of the result. Where channels come in fours they are loaded 16 bytes at a time, tap by
    tap, BK channels in a step; fewer than 16, and odd numbers of them, lie beside the taps in one sum.
    """
    K, KH, KW, results, channels = taps.shape
    rows, columns = sides
    M, double = len(source) // K * rows * columns, source.dtype == torch.float64
    BN = _tile(results, 32 if double else 64)
    flat = channels < 16 or channels % 4 != 0
    BK = 16 if precision == "ieee" else 32 if flat else _tile(channels, 32)  # ieee with 32: registers spill
    BM = 64
    if not double and _up(M, 128) * _up(results, BN) * K >= MULTIPROCESSORS:
        BM = 128  # weights are loaded half as often
    constants = _shape(source, (rows, columns), (channels, results, KH, KW), geometry)
    constants |= {"BACK": back, "BIAS": bias, "FLAT": flat, "PRECISION": precision, "BM": BM, "BN": BN, "BK": BK}
    return Launch((_up(M, BM), _up(results, BN), K), constants, warps=4, stages=3)


def weight_launch(
    source: Tensor, gradient: Tensor, kernel: Sequence[int], K: int, geometry: Geometry, precision: str
) -> Launch:
    """Of the gradient of the weights, from source [K·B, C, H, W] and gradient [K·B, N, H', W'].

    BM channels of the result by BN pairs of (tap, channel), and a sum over B·H'·W' positions in PARTS of PART: as many
    parts as make PROGRAMS programs, or half of them where that would write much, if none is shorter than a few steps
    of BK. The widest tiles have one part, which was the fastest.
    """
    channels, results, sides = source.shape[1], gradient.shape[1], gradient.shape[2:]
    M, double = len(source) // K * prod(sides), source.dtype == torch.float64
    pairs = channels * prod(kernel)
    BN, BK = 32 if pairs <= 32 else 64, 16 if double else 32
    # TF32 with 64 rows by four warps would be Hopper's own product, which wants what it sums over innermost: loads of
    # activations would be of 4 bytes. Two warps take the older one.
    wide = precision == "tf32" and results >= 64 and _up(results, 64) * _up(pairs, BN) * K >= MULTIPROCESSORS
    BM, warps = (64, 2) if wide else (_tile(results, 32), 4)
    tiles = _up(results, BM) * _up(pairs, BN)
    # The sums of parts are written and read again: beside what they are made of that should be little.
    dear = 4 * _up(PROGRAMS, tiles * K) * K * results * pairs > source.numel() + gradient.numel()
    parts = max(1, min(_up(PROGRAMS // (2 if dear else 1), tiles * K), M // (_SHORTEST * BK)))
    parts = 1 if wide else parts
    part = max(1, M // parts // BK) * BK  # whole steps: no fewer parts than that
    parts = _up(M, part)
    constants = _shape(source, sides, (channels, results, *kernel), geometry)
    constants |= {"PARTS": parts, "PART": part, "PRECISION": precision, "BM": BM, "BN": BN, "BK": BK}
    return Launch((_up(results, BM), _up(pairs, BN), K * parts), constants, warps, stages=3)


def gram_launch(a: Tensor, b: Tensor, precision: str) -> Launch:
    """Of a bᵀ for every client, a [K, M, C] with a few rows and b [K, J, C]: a grid of clients, parts and tiles.

    It takes as long as b is read, so there are some four programs for each multiprocessor, for more loads under way, if
    no part of the sum is shorter than a few steps of BK: longer steps than these, and registers spill.
    """
    (K, M, C), J, double = a.shape, b.shape[1], a.dtype == torch.float64
    BM, BJ = 16, 32 if double else _tile(J, 64)
    BK = {"tf32": 64, "tf32x3": 32}.get(precision, 16)
    tiles, steps = _up(M, BM) * _up(J, BJ), _up(C, BK)
    parts = max(1, min(PROGRAMS // (tiles * K), steps // _SHORTEST))
    each = _up(steps, parts)
    constants = {"STEPS": each, "PRECISION": precision, "BM": BM, "BJ": BJ, "BK": BK}
    return Launch((K, _up(steps, each), tiles), constants, warps=4, stages=3 if BK == 64 else 4)


def _shape(source: Tensor, sides: Iterable[int], sizes: Iterable[int], geometry: Geometry) -> dict[str, Any]:
    """Shapes are constants: a network has few, and the index arithmetic of a known one is a shift or a product."""
    values = (*source.shape[2:], *sides, *sizes, *geometry)
    names = "HEIGHT WIDTH ROWS COLUMNS CHANNELS RESULTS KH KW STRIDE PAD DILATION"
    return dict(zip(names.split(), values, strict=True))


def _tile(size: int, most: int) -> int:
    """The power of two that holds `size`: 16 at least, which the tensor cores ask for, and `most` at most."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def _up(size: int, by: int) -> int:
    return -(-size // by)
