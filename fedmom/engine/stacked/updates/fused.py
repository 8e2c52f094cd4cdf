"""The steps of K clients on a CPU in few passes, by torch's fused optimizers where it has them.

torch counts the steps of Adam and has no clock, but a clock is all that its bias corrections are made of: with
γ' = γ√z_v/z_m, ε' = ε√z_v and no correction of its own its step is γ (m/z_m) / (√(v/z_v) + ε). λ' is such that γ'λ' is
γλ. These are numbers for a whole call, so whoever has the same clocks is moved in one. γ must be a number too: where it
is on the device, nothing may be asked of a clock.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.engine.stacked.updates.sgd import Number
from fedmom.method.algorithms import Method
from fedmom.method.state import CLOCK, Tree, full_name

_FOREVER = math.inf  # steps that torch takes for done: its own corrections 1 − β^t are 1
_BLOCK = 1 << 18  # numbers: rows that are made together, so that their first step finds them in the cache


class Clocks(NamedTuple):
    """The clocks of tensors that move together, after the step; 1 where the optimizer has none."""

    m: float = 1.0
    v: float = 1.0


class _Part(NamedTuple):
    """Clients of one tensor that have the same clocks."""

    name: str
    rows: slice
    z: Clocks


# (method, γ, clocks, x, g, the states in the optimizer's order; lists of tensors, all but g written in place)
Move = Callable[[Method, float, Clocks, list[Tensor], list[Tensor], list[list[Tensor]]], None]


def is_fast(method: Method, grads: Tree, lr: Number) -> bool:
    """Whether there is a fast step for such tensors that is right. In 16 bits these kernels round elsewhere."""
    every = bool(grads) and all(g.is_cpu and g.dtype.itemsize >= 4 for g in grads.values())
    return every and method.optimizer in MOVES and not isinstance(lr, Tensor)


def fast_first_step(method: Method, start: Tree, common: Tree, own: Tree, grads: Tree, lr: float) -> tuple[Tree, Tree]:
    """From the common x [...], and states that are common [...] or own [K, ...], to the clients' rows (x, states).

    The first state is written over g [K, ...]: memory that is there already, where new pages would take as long as the
    step. A few rows are made at a time, so that the step finds them in the cache.
    """
    params, momentum = {name: torch.empty_like(g) for name, g in grads.items()}, dict[str, Tensor]()
    written, *rest = method.by.states
    for name, g in grads.items():
        momentum |= {full_name(s, name): torch.empty_like(g) for s in rest}
        for full in (full_name(s, name) for s in method.by.kept() if s.endswith(CLOCK)):
            momentum[full] = own.get(full, common[full]).expand(len(g)).clone()
    for name, rows, z in _parts(method, momentum, grads):
        x, g = params[name][rows], grads[name][rows]
        states = [momentum[full_name(s, name)][rows] for s in rest]
        count = max(1, _BLOCK // max(1, start[name].numel()))
        first = g.new_empty(min(count, len(g)), *g.shape[1:])
        for place in range(0, len(g), count):
            some = slice(place, place + count)
            block = [first[: len(g) - place], *(s[some] for s in states)]
            for s, into in zip(method.by.states, block, strict=True):
                known = full_name(s, name)
                into.copy_(own[known][rows][some] if known in own else common[known])
            x[some].copy_(start[name])
            MOVES[method.optimizer](method, lr, z, [x[some]], [g[some]], [[s] for s in block])
            g[some].copy_(block[0])
    momentum |= {full_name(written, name): g for name, g in grads.items()}
    return params, momentum


def fast_step(method: Method, params: Tree, momentum: Tree, grads: Tree, lr: float) -> None:
    """In place, of rows [K, ...]: x and the states of the parameters that have gradients."""
    alike: dict[tuple[torch.dtype, Clocks], list[_Part]] = {}
    for part in _parts(method, momentum, grads):
        alike.setdefault((grads[part.name].dtype, part.z), []).append(part)
    for parts in alike.values():
        _move(method, lr, parts, params, momentum, grads)


def _move(method: Method, lr: float, parts: list[_Part], params: Tree, momentum: Tree, grads: Tree) -> None:
    x, g = ([tree[name][rows] for name, rows, _ in parts] for tree in (params, grads))
    states = [[momentum[full_name(s, name)][rows] for name, rows, _ in parts] for s in method.by.states]
    MOVES[method.optimizer](method, lr, parts[0].z, x, g, states)


def _parts(method: Method, momentum: Tree, grads: Tree) -> Iterator[_Part]:
    """Each tensor's clients, by their clocks, which are advanced: all of them at once where they agree."""
    if not method.by.clocks:
        yield from (_Part(name, slice(0, len(g)), Clocks()) for name, g in grads.items())
        return
    of = [[momentum[full_name(state + CLOCK, name)] for name in grads] for state in ("m", "v")]
    for clocks, beta in zip(of, (method.beta, method.beta2), strict=True):
        torch._foreach_mul_(clocks, beta)
        torch._foreach_add_(clocks, 1 - beta)
    every = torch.stack([clock.to(torch.float64) for clocks in of for clock in clocks])
    if bool((every == every[:, :1]).all()):
        every = every[:, :1]
    known = every.reshape(2, len(grads), -1).permute(1, 2, 0).tolist()
    for (name, g), pairs in zip(grads.items(), known, strict=True):
        if len(pairs) == 1:
            yield _Part(name, slice(0, len(g)), Clocks(*pairs[0]))
        else:
            yield from (_Part(name, slice(row, row + 1), Clocks(*pair)) for row, pair in enumerate(pairs))


def _adam(method: Method, lr: float, z: Clocks, x: list[Tensor], g: list[Tensor], states: list[list[Tensor]]) -> None:
    decay, root = method.weight_decay, math.sqrt(z.v)
    decoupled, (m, v) = method.by.decoupled, states
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fused(
        x,
        g,
        m,
        v,
        [],
        [torch.tensor(_FOREVER)] * len(x),
        lr=lr * root / z.m,
        beta1=method.beta,
        beta2=method.beta2,
        weight_decay=decay * z.m / root if decoupled else decay,
        eps=method.eps * root,
        amsgrad=False,
        maximize=False,
    )


def _adagrad(
    method: Method, lr: float, z: Clocks, x: list[Tensor], g: list[Tensor], states: list[list[Tensor]]
) -> None:
    steps = [torch.tensor(1.0)] * len(x)  # which no γ that falls with them reads
    decay, eps = method.weight_decay, method.eps
    torch._fused_adagrad_(x, g, states[0], steps, lr=lr, lr_decay=0.0, weight_decay=decay, eps=eps, maximize=False)


def _lion(method: Method, lr: float, z: Clocks, x: list[Tensor], g: list[Tensor], states: list[list[Tensor]]) -> None:
    keep = 1 - lr * method.weight_decay
    for one, grad, m in zip(x, g, states[0], strict=True):
        count = max(1, _BLOCK // max(1, one[0].numel()))
        for rows, grads, memory in zip(one.split(count), grad.split(count), m.split(count), strict=True):
            sign = torch.lerp(grads, memory, method.beta).sign_()
            memory.lerp_(grads, 1 - method.beta2)
            (rows.mul_(keep) if method.weight_decay else rows).sub_(sign, alpha=lr)


MOVES: dict[str, Move] = {"adamw": _adam, "adam": _adam, "adagrad": _adagrad, "lion": _lion}
