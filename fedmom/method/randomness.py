"""Addressed random numbers: the same address gives the same number on every device, in any order.

Nothing is consumed, so a client draws the same minibatch, crop or dropout mask whoever asks for it: alone or
stacked with a thousand others, on the CPU or a GPU, in an uninterrupted run or after a resume. Everything is
int64 arithmetic that wraps, so the bits are equal on all devices and under torch.vmap.
"""

import math

import torch
from torch import Tensor

# The first word of an address says what the numbers are for, so that no two purposes share a stream.
COHORT, SHUFFLE, REPLACEMENT, CROP, FLIP, DROPOUT, NOISE, CORRECTION, CLIENTS, HELD_OUT, CODEC = range(1, 12)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as an unsigned word."""
    return word - (1 << 64) if word >= 1 << 63 else word


# splitmix64 (Steele, Lea, Flood, OOPSLA 2014): the golden-ratio increment and the mixer's two multipliers.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_M1, _M2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift; torch's >> on int64 copies the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _M1
    bits = (bits ^ _shift_right(bits, 27)) * _M2
    return bits ^ _shift_right(bits, 31)


def random_bits(*address: int | Tensor) -> Tensor:
    """64 random bits per address, as int64; integer tensors among the address words broadcast.

    The result is on the tensors' device; whole numbers take part as constants, so no copy between devices is made.
    """
    device = next((word.device for word in address if isinstance(word, Tensor)), torch.device("cpu"))
    bits: int | Tensor = 0
    for word in address:
        stepped = _signed((word + 1) * _GOLDEN % (1 << 64)) if isinstance(word, int) else (word.long() + 1) * _GOLDEN
        total = bits + stepped
        bits = _mix(torch.full((), _signed(total % (1 << 64)), device=device) if isinstance(total, int) else total)
    if isinstance(bits, int):
        raise ValueError("an address needs at least one word")
    return bits


def uniform(*address: int | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24 so that float32 and float64 hold the same ones."""
    return _shift_right(random_bits(*address), 40).to(dtype) * 2.0**-24


def integers(high: int | Tensor, *address: int | Tensor) -> Tensor:
    """Integers in [0, high), high < 2^31, by multiplication and shift (bias below high / 2^32)."""
    return (_shift_right(random_bits(*address), 32) * high) >> 32


def normal(*address: int | Tensor) -> Tensor:
    """Standard normal float64 numbers (Box and Muller, 1958)."""
    bits = random_bits(*address)
    # 32 bits each; the first is moved off zero, whose logarithm is infinite.
    first = (_shift_right(bits, 32).to(torch.float64) + 0.5) * 2.0**-32
    second = (bits & 0xFFFFFFFF).to(torch.float64) * 2.0**-32
    return torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)


def normal_like(tensor: Tensor, *address: int | Tensor) -> Tensor:
    """Standard normal numbers in the shape, dtype and device of `tensor`, by an address: noise that can be repeated.

    In an `algorithm.correction`: normal_like(g, key, number of g), with the key of the client's step.
    """
    places = torch.arange(tensor.numel(), device=tensor.device)
    return normal(*address, places).reshape(tensor.shape).to(tensor.dtype)
