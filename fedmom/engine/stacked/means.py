"""How far clients went from their common start, added up: the means of stacked clients in few passes over rows.

Σ_i w_i (x_i − base) and Σ_i w_i ‖x_i − base‖² of every tensor are all that the means and the spreads need, so chunks
can be of any size. `base` is the round's start, or what dense layers in factors would have come to without gradients.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.engine.stacked.factors import Factors
from fedmom.machine.graphs import coming
from fedmom.method.averaging import MEAN, VAR, WeightedMean
from fedmom.method.state import ClientState, Tree, is_momentum

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

    total: Tensor  # [D] float64, Σ w (· − base) of all tensors, one after the other as in `layout`
    squares: Tensor  # [G] float64, Σ w ‖· − base‖² of each group of tensors
    buffers: Tree  # {kind: [K, n]}, as `beside` lays them
    losses: Tensor  # [K] float64
    bases: dict[At, Tensor]  # float64, of the groups whose base is not the round's start
    layout: dict[At, int]  # the groups, and how many numbers each has

    def groups(self) -> Sequence[Tensor]:
        """`total` by groups."""
        return self.total.split(list(self.layout.values()))


def distances(start: ClientState, ended: RowsEnded) -> Distances:
    """From `start` to where K clients ended. Their rows are used up: most hold differences afterwards."""
    groups = dict[At, int]()
    for part in ("params", "momentum"):
        for names in [*_together(getattr(ended, part)), *((name,) for name in ended.factors)]:
            groups[part, names] = sum(getattr(start, part)[name].numel() for name in names)
    total = torch.empty(sum(groups.values()), dtype=F64, device=ended.losses.device)
    into = dict(zip(groups, total.split(list(groups.values())), strict=True))
    squares, bases = dict[At, Tensor](), dict[At, Tensor]()
    for part in ("params", "momentum"):
        rows = getattr(ended, part)
        for names in _together(rows):
            away = _side_by_side(rows, names, 1)
            if part == "momentum" and not is_momentum(names[0]):
                # No spread is wanted of them, and a sum from 0 keeps v positive, whatever is rounded.
                bases[part, names] = total.new_zeros(()).expand(groups[part, names])
                squares[part, names] = total.new_zeros(())
            else:
                away.sub_(_side_by_side(getattr(start, part), names, 0))
                squares[part, names] = ended.weights @ row_norms(away) ** 2
            into[part, names].copy_(_weighed(ended.weights.to(away.dtype), away))
    for name, factors in ended.factors.items():
        for part, found, base in zip(("params", "momentum"), factors.sums(), factors.base(), strict=True):
            at: At = (part, (name,))
            into[at].copy_(found[0].reshape(-1))
            squares[at], bases[at] = found[1], base.reshape(-1)
    stacked = torch.stack([squares[at] for at in groups]) if groups else total
    return Distances(total, stacked, beside(ended.buffers), ended.losses, bases, groups)


def beside(buffers: Tree) -> Tree:
    """{kind: [K, n]} of buffers [K, ...]: those that are averaged alike, side by side."""
    return {kind: _side_by_side(buffers, names, 1) for kind, names in kinds(buffers).items()}


def kinds(buffers: Tree) -> dict[str, tuple[str, ...]]:
    """{kind: names} of buffers that are averaged alike; a variance lies where its mean does, as a pooled one needs."""
    found: dict[str, list[str]] = {}
    for name in sorted(buffers):
        own, stem = buffers[name], name.removesuffix(VAR)
        other = buffers.get(stem + MEAN)
        if name.endswith(VAR) and other is not None and (other.shape, other.dtype) == (own.shape, own.dtype):
            for suffix in (MEAN, VAR):
                found.setdefault(f"{own.dtype} {suffix}", []).append(stem + suffix)
    paired = {name for names in found.values() for name in names}
    for name in sorted(buffers.keys() - paired):
        found.setdefault(f"{buffers[name].dtype} other", []).append(name)
    return {kind: tuple(names) for kind, names in found.items()}


def _weighed(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ w_i row_i [d]. On a GPU not by a matrix product, which TF32 would round to three digits."""
    return rows.T.mv(weights) if rows.is_cuda else weights @ rows


def row_norms(rows: Tensor) -> Tensor:
    """[K] float64 norms of rows [K, d]; squares of numbers beyond 1e19 do not fit into float32."""
    if rows.is_cuda:  # to look whether they are finite would wait for the device
        return torch.linalg.vector_norm(rows, dim=1, dtype=F64)
    norms = torch.linalg.vector_norm(rows, dim=1).to(F64)
    return norms if bool(torch.isfinite(norms).all()) else torch.linalg.vector_norm(rows, dim=1, dtype=F64)


def _together(rows: Tree) -> list[tuple[str, ...]]:
    """Every large tensor alone, the small ones of a dtype together; whatever the order of the dict, the same order.

    Of the optimizer's states those that are a momentum stay apart from the others, which the spread leaves out.
    """
    alone, small = list[tuple[str, ...]](), dict[tuple[torch.dtype, bool], list[str]]()
    for name in sorted(rows):
        if rows[name][0].numel() > _SMALL:
            alone.append((name,))
        else:
            small.setdefault((rows[name].dtype, is_momentum(name)), []).append(name)
    return alone + [tuple(names) for names in small.values()]


def _side_by_side(tree: Tree, names: tuple[str, ...], axes: int) -> Tensor:
    """Tensors as one, [*first axes, d]; of a single one no copy is made."""
    flat = [tree[name].reshape(*tree[name].shape[:axes], -1) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=axes)


class RoundEnd(NamedTuple):
    """What the host wants to know of a round."""

    losses: Tensor  # [C] float64 in main memory
    consensus_distance: float  # Σ p_i ‖x_i − x̂‖², to rounding of how far the clients went
    momentum_spread: float  # Σ p_i ‖u_i − û‖²
    broken: str | None  # the part of the mean that is NaN or infinite, or ""; None: nobody has looked


class RoundSums:
    """The sums over all chunks of a round, and what they come to."""

    def __init__(self, start: ClientState, running_var: str) -> None:
        self.start, self.count = start, 0
        self.weight = 0.0
        self.buffers = WeightedMean(running_var)  # by kinds
        self.held: list[tuple[Tree, Tensor]] = []  # buffers that are still to be averaged
        self.layout: dict[At, int] = {}
        self.total = self.squares = torch.empty(0, dtype=F64)  # as in Distances
        self.bases: dict[At, Tensor] = {}

    def add(self, found: Distances, weights: Tensor) -> None:
        """Add K clients, their weights [K] in main memory. Nothing of `found` is kept: it may be written again."""
        self.weight += float(weights.sum())
        self.count += len(weights)
        if self.layout:
            self.total += found.total
            self.squares += found.squares
        else:
            self.layout, self.total, self.squares = found.layout, found.total.clone(), found.squares.clone()
            self.bases = {at: base.clone() for at, base in found.bases.items()}
        if found.buffers:
            self.held.append(({kind: b.clone() for kind, b in found.buffers.items()}, weights))
            if sum(len(held) for _, held in self.held) >= _HELD:
                self._average_buffers()

    def _average_buffers(self) -> None:
        if self.held:
            trees, weights = zip(*self.held, strict=True)
            rows = {
                kind: torch.cat([t[kind] for t in trees]) if len(trees) > 1 else trees[0][kind] for kind in trees[0]
            }
            self.buffers.add(ClientState({}, {}, rows), torch.cat(weights))
            self.held.clear()

    def finish(self, losses: Tensor) -> tuple[ClientState, Callable[[], RoundEnd]]:
        """The means, and all that the host wants to know, in one wait for the device. losses: [C] float64."""
        parts: dict[str, Tree] = {"params": {}, "momentum": {}}
        means, sizes = self._means(), list(self.layout.values())
        for (part, names), flat in zip(self.layout, means.split(sizes), strict=True):
            parts[part] |= _apart(flat, names, getattr(self.start, part))
        parts = {part: {name: found[name] for name in getattr(self.start, part)} for part, found in parts.items()}
        self._average_buffers()
        found, own = self.buffers.mean().buffers, dict[str, Tensor]()
        for kind, names in kinds(self.start.buffers).items():
            own |= _apart(found[kind], names, self.start.buffers)
        order = sorted(self.start.buffers, key=lambda name: not own[name].is_floating_point())  # as WeightedMean has it
        mean = ClientState(**parts, buffers={name: own[name] for name in order})
        looks = self._looks(means, found) if means.is_cuda else {}
        norms = torch._foreach_norm(list(self.total.split(sizes))) if sizes else []
        facts = coming(torch.cat([losses, *(norm.reshape(1) for norm in norms), self.squares, *looks.values()]))
        counts = [len(losses), len(sizes), len(sizes), len(looks)]
        spread = [part if part == "params" or is_momentum(names[0]) else "" for part, names in self.layout]
        known = spread, self.weight, self.count, list(looks)  # and no sums, which are large
        return mean, lambda: _round_end(*known, *facts().split(counts))

    def _means(self) -> Tensor:
        """[D] x̂ and û, one tensor after the other; on a GPU in their dtype, so that the parts are views of one."""
        pieces = list[Tensor]()
        for at in self.layout:
            part, names = at
            tree = getattr(self.start, part)
            pieces += [self.bases[at]] if at in self.bases else [tree[name].reshape(-1) for name in names]
        if not pieces:
            return self.total
        means = torch.cat(pieces).to(F64) + self.total / self.weight
        dtypes = {value.dtype for tree in self.start[:2] for value in tree.values()}
        return means.to(dtypes.pop()) if means.is_cuda and len(dtypes) == 1 else means

    def _looks(self, means: Tensor, buffers: Tree) -> dict[str, Tensor]:
        """{part: [1] float64}: of x̂, û and the buffers' means the largest number, which is finite if all are."""
        half = sum(count for (part, _), count in self.layout.items() if part == "params")
        flat = {"params": means[:half], "momentum": means[half:]}
        flat |= {f"buffers {kind}": value for kind, value in buffers.items() if value.is_floating_point()}
        norm = partial(torch.linalg.vector_norm, ord=torch.inf, dtype=F64)  # in one launch; isfinite takes five
        return {name: norm(value).reshape(1) for name, value in flat.items() if value.numel()}


def _round_end(
    parts: list[str],
    weight: float,
    count: int,
    looks: list[str],
    losses: Tensor,
    norms: Tensor,
    squares: Tensor,
    largest: Tensor,
) -> RoundEnd:
    """Of `count` clients' sums: ‖Σ w (· − base)‖ and Σ w ‖· − base‖² of each group, and its part."""
    spreads = {"params": 0.0, "momentum": 0.0, "": 0.0}
    for part, away, square in zip(parts, norms.tolist(), squares.tolist(), strict=True):
        spreads[part] += square / weight - (away / weight) * (away / weight)
    if count == 1:
        spreads = dict.fromkeys(spreads, 0.0)
    bad = next((name for name, size in zip(looks, largest.tolist(), strict=True) if not math.isfinite(size)), "")
    broken = bad.partition(" ")[0] if looks else None
    return RoundEnd(losses, max(0.0, spreads["params"]), max(0.0, spreads["momentum"]), broken)


def _apart(flat: Tensor, names: Sequence[str], like: Tree) -> Tree:
    """The inverse of `_side_by_side`, for tensors of the shapes and dtypes of `like`."""
    parts = flat.split([like[name].numel() for name in names])
    return {n: v.reshape(like[n].shape).to(like[n].dtype) for n, v in zip(names, parts, strict=True)}
