"""int8 and int4 per block, rounded up or down by chance: unbiased.

In blocks of B numbers s = max|v| / L, L = 127 or 7, and q = ⌊v/s + ξ⌋ with ξ by address. E q s = v, and
E‖C(v) − v‖² <= B/(4L²) ‖v‖². Bytes: b/8 a number, and 4 for s of each block.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmom.method.state import Tree
from fedmom.travel.codec import Address, Codec, Payload, array_form, flat_rows, working


class Integers(Codec):
    """C(v) = q s."""

    unbiased = alone = True

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block = bits, block
        self.levels = 2 ** (bits - 1) - 1  # L

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        flat, dtype = flat_rows(rows), working(rows.dtype)
        count = flat.shape[1]
        block = self._block(count)
        whole = -(-count // block) * block
        blocks = pad(flat.to(dtype), (0, whole - count)).unflatten(1, (-1, block))
        scales = (blocks.abs().amax(2) / self.levels).to(torch.float32)
        # A block of zeros has no scale; it must not become 0/0.
        steps = torch.where(scales == 0, 1, scales).to(dtype)[:, :, None]
        scaled = (blocks / steps).flatten(1)[:, :count]
        drawn = scaled + address.uniform(count, rows.device, dtype)
        # Of the largest number v/s may exceed L by rounding.
        q = drawn.floor_().clamp_(-self.levels, self.levels).to(torch.int8)
        return {"q": q if self.bits == 8 else _packed(q), "scales": scales}, {}

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        count, q = math.prod(shape), payload["q"]
        q = q if self.bits == 8 else _unpacked(q, count)
        scales = payload["scales"].to(working(dtype)).repeat_interleave(self._block(count), dim=1)[:, :count]
        return scales.mul_(q).to(dtype).reshape(-1, *shape)

    def _block(self, count: int) -> int:
        """Numbers of a block: no more than there are, whatever was asked for."""
        return max(1, min(self.block, count))

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        count = math.prod(shape)
        q = array_form((count,), torch.int8) if self.bits == 8 else array_form((-(-count // 2),), torch.uint8)
        return {"q": q, "scales": array_form((-(-count // self.block),), torch.float32)}

    def faults(self, payload: Payload, shape: Sequence[int]) -> Iterator[tuple[str, str]]:
        q, count = payload["q"], math.prod(shape)
        q = q if self.bits == 8 else _unpacked(q, 2 * q.shape[1])
        if bool((q[:, :count] < -self.levels).any()):  # more than L does not fit into the bits
            yield "q", f"integers beyond {self.levels}"
        if bool((q[:, count:] != -8).any()):
            yield "q", "bits behind its last number"
        if bool((payload["scales"] < 0).any()):
            yield "scales", "scales below 0"


def _packed(q: Tensor) -> Tensor:
    """[K, ⌈d/2⌉] uint8, two numbers each."""
    nibbles = pad(q + 8, (0, q.shape[1] % 2)).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The inverse of `_packed`, [K, count]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :count].to(torch.int8) - 8
