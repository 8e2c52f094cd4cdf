"""The parts of the model that take turns at the exchange: Streaming DiLoCo (Douillard et al., 2025).

Of F parts the one f = 1 … F is exchanged at the end of the rounds r with r ≡ f (mod F), so a round sends about d/F
numbers. The other parts go on with their clients, as every state does between two exchanges. The paper's delay and its
blending of the two values are left out.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedmom.method.state import Tree


class Fragments(NamedTuple):
    """How the model is parted."""

    num_parts: int = 1  # F; 1: everything is exchanged in every round
    parts: Mapping[str, int] = MappingProxyType({})  # {name of x or of a buffer: 1 … F}; what is personal has none

    def due(self, name: str, number: int) -> bool:
        """Whether it is the turn of a parameter or a buffer at the end of round 1, 2, …; 0: before the first, all."""
        return (
            number == 0
            or self.num_parts == 1
            or name not in self.parts
            or (number - self.parts[name]) % self.num_parts == 0
        )


def fragments_of(params: Tree, buffers: Tree, count: int, order: Sequence[str]) -> Fragments:
    """F = `count` parts of x and the buffers. ValueError where x has fewer tensors than that.

    A part is tensors of x that follow one another in the model. No tensor is cut, and of all ways to part them that
    with the least Σ (numbers of a part)² is taken, the first part as short as that allows. A buffer is in the part of
    its module's first parameter; one whose module has none is in the part of the parameter before it in the model.
    order: names of x and the buffers as the model has them.
    """
    if count > len(params):
        raise ValueError(f"x has {len(params)} tensors")
    parts, ends = dict[str, int](), _ends([value.numel() for value in params.values()], count)
    for place, name in enumerate(params):
        parts[name] = 1 + sum(place >= end for end in ends)
    firsts = dict[str, int]()
    for name in params:
        firsts.setdefault(name.rpartition(".")[0], parts[name])
    found, before = dict(parts), 1
    for name in (*order, *buffers):
        before = parts.get(name, before)
        if name in buffers:
            found.setdefault(name, firsts.get(name.rpartition(".")[0], before))
    return Fragments(count, found)


def _ends(sizes: Sequence[int], count: int) -> list[int]:
    """Where each part but the last ends: the places of the tensors behind it."""
    sums = np.concatenate([[0], np.cumsum(sizes, dtype=np.float64)])
    squares = (sums[None] - sums[:, None]) ** 2  # [from, to]
    squares[np.tril_indices(len(sums))] = np.inf  # no part is empty
    costs, froms = squares[0], list[np.ndarray]()  # costs of parting the first `to` tensors
    for _ in range(count - 1):
        both = costs[:, None] + squares
        froms.append(both.argmin(0))
        costs = both.min(0)
    ends = [len(sizes)]
    for places in reversed(froms):
        ends.insert(0, int(places[ends[0]]))
    return ends[:-1]
