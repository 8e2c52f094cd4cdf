"""The exchange in parts: sums over some clients that may be computed anywhere, and joined to the same bits.

Weighted sums, and squared deviations merged as in Chan, Golub, LeVeque (1983), by a binary tree over the clients' (or
blocks') places. The tree depends on how many there are, never on who holds which.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.method.averaging import F64, in_parts, is_measured, pool
from fedmom.method.state import ClientState, Tree, as_tensor, from_arrays, to_arrays


class Partial(NamedTuple):
    """What neighbouring clients, or blocks of them, come to: enough to add it to others'. Tensors are float64."""

    weight: float
    totals: dict[tuple[str, str], Tensor]  # {(part, name): Σ w row}
    deviations: dict[tuple[str, str], Any]  # Σ w (row − mean)², summed; of buffers of every element
    integers: Tree  # the largest of each

    @classmethod
    def of(cls, state: ClientState, weight: float) -> "Partial":
        """Of one client, or of a block's mean."""
        totals, integers = {}, {}
        for part, tree in state._asdict().items():
            for name, value in tree.items():
                if value.is_floating_point():
                    totals[part, name] = value.to(F64, copy=True).mul_(weight)
                else:
                    integers[name] = value
        none = {at: torch.zeros_like(total) if at[0] == "buffers" else 0.0 for at, total in totals.items()}
        return cls(weight, totals, none, integers)

    def joined(self, after: "Partial") -> "Partial":
        """Both together (Chan, Golub, LeVeque, 1983); the tensors of this one become the sums."""
        weight = self.weight + after.weight
        deviations = {}
        for at, total in self.totals.items():
            away = (total / self.weight).sub_(after.totals[at], alpha=1 / after.weight)
            # Of buffers of every element: variances are pooled by it.
            squares: Any = away**2 if at[0] == "buffers" else float(torch.dot(away.reshape(-1), away.reshape(-1)))
            between = squares * (self.weight * after.weight / weight)
            deviations[at] = self.deviations[at] + after.deviations[at] + between
            total.add_(after.totals[at])
        integers = {name: torch.maximum(value, after.integers[name]) for name, value in self.integers.items()}
        return Partial(weight, self.totals, deviations, integers)

    def packed(self) -> tuple[Any, ...]:
        """With arrays, which pickle without a copy, in the place of tensors."""
        totals = {at: total.numpy() for at, total in self.totals.items()}
        deviations = {at: d.numpy() if isinstance(d, Tensor) else d for at, d in self.deviations.items()}
        return self.weight, totals, deviations, to_arrays(self.integers)

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...]) -> "Partial":
        """The same again, with totals of its own."""
        weight, totals, deviations, integers = packed
        values = {at: as_tensor(d) if isinstance(d, np.ndarray) else d for at, d in deviations.items()}
        own = {at: as_tensor(total).clone() for at, total in totals.items()}
        return cls(weight, own, values, from_arrays(integers))

    def spread(self, part: str) -> float:
        """Σ p_i ‖·_i − mean‖² of "params" (consensus distance) or "momentum" (momentum spread)."""
        found = [value for (p, n), value in self.deviations.items() if p == part and is_measured(p, n)]
        return float(sum(map(float, found))) / self.weight

    def mean(self, like: ClientState, running_var: str) -> ClientState:
        """The weighted mean, in the dtypes of `like`."""
        means = {at: total / self.weight for at, total in self.totals.items()}
        if running_var == "pooled":
            pool(means, {at: (value, self.weight) for at, value in self.deviations.items()})
        dtypes = {(part, n): value.dtype for part, tree in like._asdict().items() for n, value in tree.items()}
        return in_parts({at: value.to(dtypes[at]) for at, value in means.items()}, self.integers)


class PairwiseSum:
    """Partials joined in their order by a binary tree that depends on their number alone.

    So whoever joins the partials of an aligned range (`aligned`) comes to the bits that it contributes here, and the
    result has the same bits wherever its parts were computed.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, Partial]] = []  # (how many it holds, a power of two), falling
        self.count = 0

    def add(self, partial: Partial, holds: int = 1) -> None:
        """The next one, or the sum of the next aligned range of 1, 2, 4, …"""
        assert self.count % holds == 0, "not aligned"
        self.count += holds
        while self._open and self._open[-1][0] == holds:
            partial = self._open.pop()[1].joined(partial)
            holds *= 2
        self._open.append((holds, partial))

    def result(self) -> Partial:
        """All of them, of which there is at least one."""
        rest = [partial for _, partial in self._open]
        total = rest.pop()
        while rest:
            total = rest.pop().joined(total)
        self._open = [(self.count, total)]
        return total


def aligned(places: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending places as the fewest ranges (first, length), of 2^k places from a multiple of 2^k on."""
    found: list[tuple[int, int]] = []
    for place in places:
        found.append((place, 1))
        while len(found) > 1:
            (first, length), (second, more) = found[-2:]
            if length != more or first + length != second or first % (2 * length):
                break
            found[-2:] = [(first, 2 * length)]
    return found
