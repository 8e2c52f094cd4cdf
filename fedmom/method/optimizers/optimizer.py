"""What a local optimizer is: a step of one tensor, and the names of what it remembers of it.

All that it remembers lies in ClientState.momentum, under the names that `fedmom.method.state.full_name` gives.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.method.state import CLOCK, ClientState, Tree, full_name
from fedmom.method.states.rules import StateRule


class Numbers(NamedTuple):
    """What the steps of a run have in common."""

    beta: float  # β, or β₁
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # λ
    nesterov: bool = False


# (x [*shape], {state: [*shape], clock: []}, g [*shape], γ, the run's numbers) -> (x, the states after the step)
Step = Callable[[Tensor, Tree, Tensor, float, Numbers], tuple[Tensor, Tree]]


class Optimizer(NamedTuple):
    """A local optimizer, as the rest of fedmom knows it."""

    step: Step
    summary: str
    states: tuple[str, ...]  # what it remembers of a tensor
    clocks: bool = False  # whether every state has a clock beside it
    decoupled: bool = False  # whether λ shrinks x in the step; else it is L2, and part of g
    reads: tuple[str, ...] = ("beta",)  # the keys of [algorithm] that are its own
    beta2: float = 0.0  # the β₂ that it takes where none is given
    linear: bool = False  # whether x and u after a step are linear in x, u and g
    gossip_only: bool = False  # whether it means something under Algorithm 2 alone
    rules: Mapping[str, StateRule] = MappingProxyType({})  # what it is defined by, where it leaves no choice

    def kept(self) -> tuple[str, ...]:
        """The states and their clocks."""
        return (*self.states, *(state + CLOCK for state in self.states)) if self.clocks else self.states


def zeros(optimizer: Optimizer, params: Tree) -> Tree:
    """What it remembers before the first step."""
    found = {}
    for state in optimizer.kept():
        for name, x in params.items():
            # A clock counts what its state has seen: one number, whatever the tensor's shape.
            found[full_name(state, name)] = x.new_zeros(()) if state.endswith(CLOCK) else torch.zeros_like(x)
    return found


def optimizer_step(optimizer: Optimizer, state: ClientState, grads: Tree, lr: float, numbers: Numbers) -> ClientState:
    """One client's step on all its tensors."""
    kept, momentum, params = optimizer.kept(), dict[str, Tensor](), dict[str, Tensor]()
    for name, x in state.params.items():
        own = {part: state.momentum[full_name(part, name)] for part in kept}
        params[name], after = optimizer.step(x, own, grads[name], lr, numbers)
        momentum |= {full_name(part, name): value for part, value in after.items()}
    return state._replace(params=params, momentum={name: momentum[name] for name in state.momentum})
