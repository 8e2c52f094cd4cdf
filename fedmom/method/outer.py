"""The outer step: what the server makes of the change that a round came to, Δ = x − x̂ with x before the round.

"none" is the paper: everybody goes on from x̂. The others have a memory of their own between rounds. No outer step moves
a fixed point: where x̂ = x nothing moves. Buffers are never stepped: a variance could become negative.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedmom.method.state import Tree


class OuterNumbers(NamedTuple):
    """What the outer steps of a run have in common."""

    lr: float  # η
    momentum: float  # α of SlowMo, μ, or β₁
    beta2: float = 0.99
    tau: float = 1e-3  # τ


# (x before the round, x̂, the memory {slot: tensors}, γ of the round's first step, the numbers) -> (x, the memory)
OuterStep = Callable[[Tree, Tree, dict[str, Tree], float, OuterNumbers], tuple[Tree, dict[str, Tree]]]


def slowmo(
    before: Tree, mean: Tree, memory: dict[str, Tree], lr: float, by: OuterNumbers
) -> tuple[Tree, dict[str, Tree]]:
    """u_s <- α u_s + (x − x̂)/γ;  x <- x − ηγ u_s.

    SlowMo (Wang, Tantia, Ballas, Rabbat, ICLR 2020), Algorithm 1, with γ of the round's first step. With α = 0 and
    η = 1 it gives x̂ back (to rounding).
    """
    slow = {name: by.momentum * memory["b"][name] + (x - mean[name]) / lr for name, x in before.items()}
    return {name: x - by.lr * lr * slow[name] for name, x in before.items()}, {"b": slow}


def fedavgm(
    before: Tree, mean: Tree, memory: dict[str, Tree], lr: float, by: OuterNumbers
) -> tuple[Tree, dict[str, Tree]]:
    """b <- μb + Δ;  x <- x − ηb.

    FedAvgM (Hsu, Qi, Brown, 2019): torch.optim.SGD(momentum=μ) on Δ.
    """
    b = {name: by.momentum * memory["b"][name] + (x - mean[name]) for name, x in before.items()}
    return {name: x - by.lr * b[name] for name, x in before.items()}, {"b": b}


def nesterov(
    before: Tree, mean: Tree, memory: dict[str, Tree], lr: float, by: OuterNumbers
) -> tuple[Tree, dict[str, Tree]]:
    """b <- μb + Δ;  x <- x − η(Δ + μb) with the new b.

    DiLoCo's (Douillard et al., 2023): torch.optim.SGD(momentum=μ, nesterov=True) on Δ.
    """
    delta = {name: x - mean[name] for name, x in before.items()}
    b = {name: by.momentum * memory["b"][name] + d for name, d in delta.items()}
    return {name: x - by.lr * (delta[name] + by.momentum * b[name]) for name, x in before.items()}, {"b": b}


def _adaptive(yogi: bool) -> OuterStep:
    def step(
        before: Tree, mean: Tree, memory: dict[str, Tree], lr: float, by: OuterNumbers
    ) -> tuple[Tree, dict[str, Tree]]:
        x, m, v = dict[str, torch.Tensor](), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, old in before.items():
            delta, second = old - mean[name], memory["v"][name]
            square = delta * delta
            m[name] = by.momentum * memory["m"][name] - (1 - by.momentum) * delta
            if yogi:
                v[name] = second - (1 - by.beta2) * square * torch.sign(second - square)
            else:
                v[name] = by.beta2 * second + (1 - by.beta2) * square
            x[name] = old + by.lr * m[name] / (v[name].sqrt() + by.tau)
        return x, {"m": m, "v": v}

    return step


class Outer(NamedTuple):
    """An outer step, as the rest of fedmom knows it."""

    step: OuterStep | None
    summary: str
    slots: tuple[str, ...] = ()  # what it remembers of every tensor
    lr: float = 1.0  # η where none is given
    reads: tuple[str, ...] = ()  # the keys of [algorithm] that it reads, and others do not


_ADAPTIVE = ("outer-beta2", "outer-tau")
OUTERS = {
    "none": Outer(None, "everybody goes on from x̂: the paper"),
    "slowmo": Outer(slowmo, "SlowMo: u_s <- α u_s + (x − x̂)/γ, x <- x − ηγ u_s (Wang et al. 2020)", ("b",)),
    "fedavgm": Outer(fedavgm, "FedAvgM: b <- μb + Δ, x <- x − ηb (Hsu et al. 2019)", ("b",)),
    "nesterov": Outer(nesterov, "DiLoCo: b <- μb + Δ, x <- x − η(Δ + μb) (Douillard et al. 2023)", ("b",), lr=0.7),
    "fedadam": Outer(
        _adaptive(yogi=False),
        "FedAdam: m <- β₁m − (1−β₁)Δ, v <- β₂v + (1−β₂)Δ², x <- x + ηm/(√v + τ) (Reddi et al. 2021)",
        ("m", "v"),
        lr=0.1,
        reads=_ADAPTIVE,
    ),
    "fedyogi": Outer(
        _adaptive(yogi=True),
        "FedYogi: as FedAdam, with v <- v − (1−β₂)Δ² sign(v − Δ²) (Reddi et al. 2021)",
        ("m", "v"),
        lr=0.1,
        reads=_ADAPTIVE,
    ),
}


class OuterRule(NamedTuple):
    """The outer step of a run: which, with which numbers, and on which states."""

    name: str
    numbers: OuterNumbers
    states: tuple[str, ...] = ("x",)

    def start(self, tensors: Tree) -> dict[str, Tree]:
        """The memory before the first step, of the tensors that it will move. v⁰ = τ² (Reddi et al. 2021)."""
        slots = OUTERS[self.name].slots
        first = {"v": self.numbers.tau**2}
        return {slot: {n: torch.full_like(t, first.get(slot, 0.0)) for n, t in tensors.items()} for slot in slots}

    def step(self, before: Tree, mean: Tree, memory: dict[str, Tree], lr: float) -> tuple[Tree, dict[str, Tree]]:
        """(the tensors that everybody goes on from, the memory); of `before` and `mean` the same tensors by name."""
        step = OUTERS[self.name].step
        assert step is not None
        return step(before, mean, memory, lr, self.numbers)
