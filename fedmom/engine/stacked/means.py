"""How far clients went from their common start, added up: the means of stacked clients in few passes over rows.

Σ_i w_i (x_i − base) and Σ_i w_i ‖x_i − base‖² of every tensor are all that the means and the spreads need, so chunks
can be of any size. `base` is the round's start, or what dense layers in factors would have come to without gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.engine.stacked.factors import Factors
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import ClientState, Tree

F64 = torch.float64
_SMALL = 1 << 14  # numbers: tensors up to this are taken together, since calls cost more there than passes
_HELD = 64  # clients: so many clients' buffers are averaged at once

At = tuple[str, tuple[str, ...]]  # ("params" or "momentum", names), numbers in the order of the names


class RowsEnded(NamedTuple):
    """K clients after their local steps."""

    params: Tree  # [K, ...] of the tensors that have rows
    momentum: Tree
    buffers: Tree  # [K, ...]
    factors: dict[str, Factors]  # of the dense weights that have none
    losses: Tensor  # [K] float64, mean over each client's own steps
    weights: Tensor  # [K] float64


class Distances(NamedTuple):
    """What remains of K clients for the means."""

    sums: dict[At, tuple[Tensor, Tensor, Tensor]]  # {tensors: (Σ w (· − base) [d], Σ w ‖·‖², base [d])}
    buffers: Tree  # [K, ...]
    losses: Tensor  # [K]


def distances(start: ClientState, ended: RowsEnded) -> Distances:
    """From `start` to where K clients ended. Their rows are used up: they hold differences afterwards."""
    sums: dict[At, tuple[Tensor, Tensor, Tensor]] = {}
    for part in ("params", "momentum"):
        rows, bases = getattr(ended, part), getattr(start, part)
        for names in _together(rows):
            away, base = _side_by_side(rows, names, 1), _side_by_side(bases, names, 0)
            away.sub_(base)
            norms = row_norms(away)
            sums[part, names] = (ended.weights.to(away.dtype) @ away, ended.weights @ norms**2, base)
    for name, factors in ended.factors.items():
        for part, (total, square), base in zip(("params", "momentum"), factors.sums(), factors.base(), strict=True):
            sums[part, (name,)] = (total.reshape(-1), square, base.reshape(-1))
    return Distances(sums, ended.buffers, ended.losses)


def row_norms(rows: Tensor) -> Tensor:
    """[K] float64 norms of rows [K, d]; squares of numbers beyond 1e19 do not fit into float32."""
    if rows.is_cuda:  # to look whether they are finite would wait for the device
        return torch.linalg.vector_norm(rows, dim=1, dtype=F64)
    norms = torch.linalg.vector_norm(rows, dim=1).to(F64)
    return norms if bool(torch.isfinite(norms).all()) else torch.linalg.vector_norm(rows, dim=1, dtype=F64)


def _together(rows: Tree) -> list[tuple[str, ...]]:
    """Every large tensor alone, the small ones of a dtype together; whatever the order of the dict, the same order."""
    alone, small = list[tuple[str, ...]](), dict[torch.dtype, list[str]]()
    for name in sorted(rows):
        if rows[name][0].numel() > _SMALL:
            alone.append((name,))
        else:
            small.setdefault(rows[name].dtype, []).append(name)
    return alone + [tuple(names) for names in small.values()]


def _side_by_side(tree: Tree, names: tuple[str, ...], axes: int) -> Tensor:
    """Tensors as one, [*first axes, d]; of a single one no copy is made."""
    flat = [tree[name].reshape(*tree[name].shape[:axes], -1) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=axes)


class RoundSums:
    """The sums over all chunks of a round, and what they come to."""

    def __init__(self, start: ClientState, running_var: str) -> None:
        self.start, self.count = start, 0
        self.weight = torch.zeros((), dtype=F64)  # where the clients are: to fetch it would wait for the device
        self.buffers = WeightedMean(running_var)
        self.held: list[tuple[Tree, Tensor]] = []  # buffers that are still to be averaged
        self.total: dict[At, Tensor] = {}
        self.square: dict[At, Tensor] = {}
        self.base: dict[At, Tensor] = {}

    def add(self, found: Distances, weights: Tensor) -> None:
        """Add K clients with weights [K]. Nothing of `found` is kept: its memory may be written again."""
        self.weight = self.weight + weights.sum()
        self.count += len(weights)
        for at, (total, square, base) in found.sums.items():
            if at in self.total:
                self.total[at] += total
                self.square[at] += square
            else:
                self.total[at], self.square[at] = total.to(F64, copy=True), square.clone()
                self.base[at] = base.clone()
        if found.buffers:
            self.held.append(({name: b.clone() for name, b in found.buffers.items()}, weights))
            if sum(len(held) for _, held in self.held) >= _HELD:
                self._average_buffers()

    def _average_buffers(self) -> None:
        if self.held:
            trees, weights = zip(*self.held, strict=True)
            rows = {name: torch.cat([tree[name] for tree in trees]) for name in trees[0]}
            self.buffers.add(ClientState({}, {}, rows), torch.cat(weights))
            self.held.clear()

    def mean(self) -> ClientState:
        """x̂, û and the buffers' means, in their dtypes."""
        parts: dict[str, Tree] = {"params": {}, "momentum": {}}
        weight = float(self.weight)
        for (part, names), total in self.total.items():
            tree = getattr(self.start, part)
            flat = self.base[part, names] + total / weight
            for name, value in zip(names, flat.split([tree[name].numel() for name in names]), strict=True):
                parts[part][name] = value.reshape(tree[name].shape).to(tree[name].dtype)
        for part, found in parts.items():
            parts[part] = {name: found[name] for name in getattr(self.start, part)}
        self._average_buffers()
        return ClientState(**parts, buffers=self.buffers.mean().buffers if self.start.buffers else {})

    def spread(self, part: str) -> float:
        """Σ p_i ‖·_i − mean‖², to rounding of how far the clients went."""
        if self.count == 1:
            return 0.0
        found, weight = torch.zeros((), dtype=F64), float(self.weight)
        for at in self.total:
            if at[0] == part:
                mean = torch.linalg.vector_norm(self.total[at]) / weight
                found = found + (self.square[at] / weight - mean**2).cpu()
        return max(0.0, float(found))
