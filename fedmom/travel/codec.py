"""What a codec is: rows of clients become arrays of fewer bytes, and these become rows that are close to the first.

Every codec works on rows [K, *shape] of one tensor at once, and a client's bits depend on its own row and address
alone: not on how many rows there are, nor on who computes them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.method.randomness import CODEC, random_bits
from fedmom.method.state import Tree

Payload = dict[str, Tensor]  # {part of the message: [K, ...]}: the arrays in the bytes that they take
SERVER = -1  # who encodes what goes down, among the clients of an address
_BITS = 24  # of a uniform number, so that float32 and float64 hold the same ones


class Address(NamedTuple):
    """What the random numbers of a message depend on, with the place in the tensor."""

    seed: int
    clients: Tensor  # [K] int64
    round_index: int
    tensor: int  # a number that the tensor's name gives

    def bits(self, count: int, device: torch.device) -> Tensor:
        """[K, count] 64 random bits each."""
        clients = self.clients.to(device)[:, None]
        places = torch.arange(count, device=device)
        return random_bits(CODEC, self.seed, clients, self.round_index, self.tensor, places)

    def uniform(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[K, count] numbers ξ in [0, 1), two of 64 bits, for most of the time goes into the bits."""
        bits = self.bits((count + 1) // 2, device)
        halves = torch.stack((bits >> 40, bits >> 16), dim=-1).bitwise_and_((1 << _BITS) - 1)
        return halves.flatten(1)[:, :count].to(dtype).mul_(2.0**-_BITS)


class Codec:
    """One way to send a tensor. The attributes say what may be asked of it.

    `encode` and `decode` are each other's other end: what the second makes of the first's payload is C(v).
    """

    unbiased = False  # whether E C(v) = v over the addresses
    alone = False  # whether it may go without feedback: it is unbiased, or errs by a small part of every number
    fine = False  # whether every number keeps its sign and its digits, up to a relative error; what v needs
    fills = False  # whether a number that is 0 may arrive as another
    keeps = False  # whether clients keep more than e between rounds

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        """(the message of rows [K, *shape], what the clients keep: `state` after it)."""
        raise NotImplementedError

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        """C(v), rows [K, *shape], from the message and what both ends know."""
        raise NotImplementedError

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        """What arrays one client's message has, of a tensor in the run's dtype: [...], without numbers in them."""
        raise NotImplementedError

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """What one client's message takes, of a tensor in the run's dtype."""
        return sum(array.numel() * array.element_size() for array in self.form(shape, dtype).values())

    def faults(self, payload: Payload, shape: Sequence[int]) -> Iterable[tuple[str, str]]:
        """(part, what it has) of arrays [1, ...] that are of the right form and finite, and that no `encode` makes."""
        return ()

    def start(self, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tree:
        """[K, ...] what the clients keep before the first message, besides e."""
        return {}


def flat_rows(rows: Tensor) -> Tensor:
    """[K, *shape] -> [K, d], also of single numbers."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def array_form(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An array of this shape and dtype that takes no memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def payload_bytes(payload: Payload) -> int:
    """What the message of one of its clients takes."""
    return sum(math.prod(value.shape[1:]) * value.element_size() for value in payload.values())


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a codec computes in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def count_of(share: float, numbers: int) -> int:
    """k of k/d: rounded up, but for the rounding of k/d itself; at least 1 where there are numbers."""
    return min(numbers, max(1, math.ceil(share * numbers - 1e-9)))
