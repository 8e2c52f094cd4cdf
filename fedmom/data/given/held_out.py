"""Examples that every client holds out of its own, to judge by them what it gets."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.inputs import Inputs
from fedmom.data.partition import Partition
from fedmom.method.randomness import HELD_OUT, random_bits


class OwnTests(NamedTuple):
    """The clients' own test examples, and who holds which."""

    x: Inputs  # [n, ...]
    y: Tensor  # [n, ...]
    partition: Partition
    names: np.ndarray | None = None  # [N] what the data call the clients, where they are natural


class OwnSplit(NamedTuple):
    """How clients that bring their own data hold some of them out."""

    share: float = 0.0
    seed: int = 0


def held_out_sizes(sizes: np.ndarray, share: float) -> np.ndarray:
    """[N] int64: ⌊share·n + ½⌋ of n examples, at least one and at most n − 1; none of a single one."""
    wanted = np.floor(share * sizes + 0.5).astype(np.int64)
    return np.where(sizes > 1, np.clip(wanted, 1, np.maximum(sizes - 1, 1)), 0) if share else np.zeros_like(sizes)


def held_out(sizes: np.ndarray, share: float, seed: int, clients: np.ndarray | None = None) -> np.ndarray:
    """[Σ n] bool: which examples of clients [N], one client after another, are held out.

    They are drawn uniformly without replacement, by the seed, the client's number and the place among its examples
    alone: so a client that knows no other draws the same. `clients`: their numbers; left out, 0 … N − 1.
    """
    numbers = np.arange(len(sizes)) if clients is None else clients
    first = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(owner)) - first[owner]
    keys = random_bits(HELD_OUT, seed, torch.from_numpy(numbers[owner]), torch.from_numpy(place)).numpy()
    order = np.lexsort((keys, owner))  # stable: each client's own, by their keys
    found = np.empty(len(owner), dtype=bool)
    found[order] = place < held_out_sizes(sizes, share)[owner]
    return found


def split(partition: Partition, share: float, seed: int) -> tuple[Partition, Partition]:
    """(what each client trains on, what it holds out)."""
    out = held_out(partition.sizes, share, seed)
    owner = np.repeat(np.arange(partition.num_clients), partition.sizes)

    def part(mask: np.ndarray) -> Partition:
        sizes = np.bincount(owner[mask], minlength=partition.num_clients)
        return Partition(partition.indices[mask], np.concatenate([[0], np.cumsum(sizes)]))

    return part(~out), part(out)
