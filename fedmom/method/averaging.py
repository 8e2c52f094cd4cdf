"""The exchange: weighted means of x, u and buffers over clients, added up a chunk at a time.

Memory does not grow with the number of clients, and sums are kept in float64 and taken in client order, so any
chunk size gives the same mean to rounding. Means and squared deviations are merged as in Chan, Golub, LeVeque
(1983), which gives 0 to rounding for clients that agree, where E‖x‖² − ‖Ex‖² would give noise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedmom.machine.graphs import sent
from fedmom.method.state import ClientState, Tree, is_momentum

F64 = torch.float64
MEAN, VAR = "running_mean", "running_var"  # how the names of BatchNorm's statistics end


class _Moments:
    """Running weighted mean and squared deviation of one tensor; `each`: of every element, else summed."""

    def __init__(self, each: bool) -> None:
        self.weight, self.each = 0.0, each
        self.total: Tensor | None = None  # Σ w row, float64
        self.deviation: Tensor | None = None  # Σ w (row − mean)²

    def add(self, rows: Tensor, weights: Tensor, chunk: float) -> None:
        """Rows [K, ...] with weights [K], which sum to `chunk`."""
        total = torch.tensordot(weights, rows.to(F64), 1)
        mean = total / chunk
        difference = rows - mean.to(rows.dtype)
        if self.each:
            deviation = torch.tensordot(weights, difference.to(F64) ** 2, 1)
        else:
            axes = list(range(1, rows.ndim))
            squares = torch.linalg.vector_norm(difference, dim=axes, dtype=F64) if axes else difference.to(F64)
            deviation = weights @ squares**2
        if self.total is None or self.deviation is None:
            self.total, self.deviation, self.weight = total, deviation, chunk
            return
        between = (mean - self.total / self.weight) ** 2 * (chunk * self.weight / (chunk + self.weight))
        self.deviation += deviation + (between if self.each else between.sum())
        self.total += total
        self.weight += chunk


class _SummedOneByOne:
    """The same for rows that come one at a time, in three passes over each: what a server does with big models."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.total: Tensor | None = None
        self.first: Tensor | None = None
        self.squares = 0.0  # Σ w ‖row − first‖²: small where rows are close, so the subtraction below loses nothing

    def add(self, row: Tensor, weight: float) -> None:
        self.weight += weight
        if self.total is None or self.first is None:
            self.total, self.first = row.to(F64) * weight, row
            return
        self.total.add_(row, alpha=weight)
        away = (row - self.first).reshape(-1)
        self.squares += weight * float(torch.dot(away, away))

    @property
    def deviation(self) -> float:
        if self.total is None or self.first is None:
            return 0.0
        away = (self.total / self.weight - self.first).reshape(-1)
        return max(0.0, self.squares - self.weight * float(torch.dot(away, away)))


class WeightedMean:
    """Σ p_i · of client states, p_i = weight_i / Σ weights: the same p_i on x, u and buffers.

    Buffers: `running_mean` by weights; `running_var` pooled, Σp·var + Σp·mean² − (Σp·mean)², the variance of all
    clients' activations together (or the plain mean with running_var="mean"); other real buffers by weights;
    integers (num_batches_tracked) take the largest, for a mean would make them real.
    """

    def __init__(self, running_var: str = "pooled") -> None:
        self.pooled = running_var == "pooled"
        self.weight = 0.0
        self.moments: dict[tuple[str, str], _Moments | _SummedOneByOne] = {}
        self.integers: Tree = {}
        self.dtypes: dict[tuple[str, str], torch.dtype] = {}

    def add(self, rows: ClientState, weights: Tensor) -> None:
        """Add K clients: tensors [K, ...] and weights [K] (float64, positive, best in main memory)."""
        chunk = float(weights.sum())
        self.weight += chunk
        weights = sent(weights, next((value.device for tree in rows for value in tree.values()), weights.device))
        for part, tree in rows._asdict().items():
            for name, value in tree.items():
                if not value.is_floating_point():
                    largest = value.amax(dim=0)
                    known = self.integers.get(name)
                    self.integers[name] = largest if known is None else torch.maximum(known, largest)
                    continue
                moments = self.moments.get((part, name)) or _Moments(each=part == "buffers")
                assert isinstance(moments, _Moments), "add after add_one"
                moments.add(value, weights, chunk)
                self.moments[part, name], self.dtypes[part, name] = moments, value.dtype

    def add_one(self, row: ClientState, weight: float) -> None:
        """Add one client (or one block's mean), unstacked, on the CPU. Not to be mixed with `add`."""
        self.weight += weight
        weights = torch.tensor([weight], dtype=F64)
        for part, tree in row._asdict().items():
            for name, value in tree.items():
                if not value.is_floating_point():
                    known = self.integers.get(name)
                    self.integers[name] = value if known is None else torch.maximum(known, value)
                    continue
                at = (part, name)
                if at not in self.moments:
                    self.moments[at] = _Moments(each=True) if part == "buffers" else _SummedOneByOne()
                    self.dtypes[at] = value.dtype
                moments = self.moments[at]
                if isinstance(moments, _SummedOneByOne):
                    moments.add(value, weight)
                else:
                    moments.add(value[None], weights, weight)

    def mean(self) -> ClientState:
        """The mean of all clients added, in their dtypes."""
        means = {at: m.total / m.weight for at, m in self.moments.items() if m.total is not None}
        if self.pooled:
            pool(means, {at: (m.deviation, self.weight) for at, m in self.moments.items()})
        return in_parts({at: value.to(self.dtypes[at]) for at, value in means.items()}, self.integers)

    def spread(self, part: str) -> float:
        """Σ p_i ‖·_i − mean‖² of "params" (consensus distance) or "momentum" (momentum spread)."""
        found = [m.deviation for (p, n), m in self.moments.items() if p == part and is_measured(p, n)]
        return float(sum(float(d) for d in found if d is not None)) / self.weight


def is_measured(part: str, name: str) -> bool:
    """Whether the spread of a part is measured on this tensor: of the optimizer's states on a momentum alone."""
    return part != "momentum" or is_momentum(name)


def pool(means: dict[tuple[str, str], Tensor], spreads: Mapping[tuple[str, str], tuple[Any, float]]) -> None:
    """Add to a mean of variances the variance of their means: its squared deviation, by its weight."""
    for part, name in means:
        partner = (part, name.removesuffix(VAR) + MEAN)
        if part == "buffers" and name.endswith(VAR) and partner in means:
            deviation, weight = spreads[partner]
            means[part, name] += 0 if deviation is None else deviation / weight


def in_parts(values: Mapping[tuple[str, str], Tensor], integers: Tree) -> ClientState:
    """A state of tensors by (part, name), and the integers among its buffers."""
    parts: dict[str, Tree] = {part: {} for part in ClientState._fields}
    for (part, name), value in values.items():
        parts[part][name] = value
    parts["buffers"].update(integers)
    return ClientState(**parts)
