"""The steps of K clients by the other optimizers: the page of each, with the client axis before its tensors.

Where torch has the step in few passes (fused.py), it is taken, and tests hold the two equal.
"""

import torch
from torch import Tensor

from fedmom.engine.stacked.updates.fused import fast_first_step, fast_step, is_fast
from fedmom.engine.stacked.updates.sgd import Number
from fedmom.method.algorithms import Method
from fedmom.method.state import CLOCK, Tree, full_name


def first_step(method: Method, start: Tree, common: Tree, own: Tree, grads: Tree, lr: Number) -> tuple[Tree, Tree]:
    """From the common x [...], and states that are common [...] or the clients' own [K, ...], to rows [K, ...].

    grads: [K, ...] by parameter. Gives x and the states of these parameters.
    """
    if is_fast(method, grads, lr):
        return fast_first_step(method, start, common, own, grads, lr)  # type: ignore[arg-type]  # γ is a number
    params, momentum = dict[str, Tensor](), dict[str, Tensor]()
    for name, g in grads.items():
        states = {s: own.get(full_name(s, name), common[full_name(s, name)]) for s in method.by.kept()}
        params[name], after = _stepped(method, start[name], states, g, lr)
        for state, value in after.items():
            momentum[full_name(state, name)] = value.expand(len(g), *common[full_name(state, name)].shape).contiguous()
    return params, momentum


def step(method: Method, params: Tree, momentum: Tree, grads: Tree, lr: Number) -> None:
    """In place, of rows [K, ...]: x and the states of the parameters that have gradients."""
    if is_fast(method, grads, lr):
        fast_step(method, params, momentum, grads, lr)  # type: ignore[arg-type]  # γ is a number
        return
    for name, g in grads.items():
        states = {s: momentum[full_name(s, name)] for s in method.by.kept()}
        x, after = _stepped(method, params[name], states, g, lr)
        params[name].copy_(x)
        for state, value in after.items():
            states[state].copy_(value)


def _stepped(method: Method, x: Tensor, states: Tree, g: Tensor, lr: Number) -> tuple[Tensor, Tree]:
    """One tensor's step: a clock [K] lies along the clients."""
    if method.weight_decay and not method.by.decoupled:
        g = g + method.weight_decay * x
    along = (-1, *[1] * (g.ndim - 1))
    given = {s: t.reshape(along) if s.endswith(CLOCK) and t.ndim else t for s, t in states.items()}
    rate = lr.to(x.dtype) if isinstance(lr, torch.Tensor) else lr
    x, after = method.by.step(x, given, g, rate, method.numbers)  # type: ignore[arg-type]
    return x, {s: t.reshape(states[s].shape) if s.endswith(CLOCK) else t for s, t in after.items()}
