"""Local steps, exchanges by policy and period, and an outer step: plain loops over clients and tensors, in float64.

Nothing here is fedmom's but what the caller gives: who takes part, with what weight, and a function for the gradient.
A client's tensors are {(state, name): array}, where a state is "x", "buffers", an optimizer's, or a clock as "m.clock".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Tensors = dict[tuple[str, str], Any]
Named = dict[str, Any]
STATES = {"sgd": ("u",), "adamw": ("m", "m.clock", "v", "v.clock"), "lion": ("m",), "adagrad": ("v",)}


class Rule(NamedTuple):
    policy: str = "average"
    every: int = 1


class World(NamedTuple):
    """A problem and a method."""

    start: Named
    weights: Sequence[float]  # [N], of the means
    steps: Sequence[int]  # [N] of a round
    # (x, buffers, client, step of the run) -> (g, loss, buffers after it)
    gradient: Callable[[Named, Named, int, int], tuple[Named, float, Named]]
    lrs: Callable[[int], float]  # γ of round 1, 2, …
    rules: Mapping[str, Rule]  # of x and the optimizer's states
    beta: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    nesterov: bool = False
    optimizer: str = "sgd"
    buffers: Mapping[str, Any] = MappingProxyType({})
    personal: Sequence[str] = ()
    outer: Callable[..., tuple[Any, Any]] | None = None  # (before, mean, memory, γ) -> (after, memory), of one tensor
    outer_states: Sequence[str] = ("x",)
    W: Callable[[int], np.ndarray] | None = None  # of round 1, 2, …, of Algorithm 2
    period_from: int = 0  # the wrong variant: 1 exchanges after rounds 1, 1 + k, …


class Came(NamedTuple):
    """What a round came to."""

    mean: Tensors  # over all N clients, of where each goes on from
    clients: list[Tensors]  # [N] where each goes on from
    losses: list[float]  # [C] means over each client's steps
    spreads: tuple[float, float]  # of x and of u, m or y just before the exchange, over the cohort


def rounds(world: World, cohorts: Sequence[Sequence[int]]) -> Iterator[Came]:
    """One round for each cohort."""
    common: Tensors = {("x", name): value for name, value in world.start.items()}
    common |= {("buffers", name): value for name, value in world.buffers.items()}
    for state in STATES[world.optimizer]:
        for name, x in world.start.items():
            common[state, name] = np.zeros(()) if state.endswith("clock") else x * 0.0
    own: list[Tensors] = [{} for _ in world.weights]
    memory: dict[tuple[str, str], Any] = {}
    for number, cohort in enumerate(cohorts, 1):
        lr, rows, losses = world.lrs(number), dict[int, Tensors](), list[float]()
        for client in cohort:
            row, told = common | own[client], list[float]()
            for s in range(world.steps[client]):
                row, loss = _step(world, row, client, (number - 1) * world.steps[client] + s, lr)
                told.append(loss)
            rows[client] = row
            losses.append(float(np.mean(told)))
        total = sum(world.weights[c] for c in cohort)
        p = {c: world.weights[c] / total for c in cohort}
        spreads = _spread(world, rows, p, ("x",)), _spread(world, rows, p, ("u", "m", "y"))
        for at in common:
            rule = world.rules.get(_state(at[0]), Rule())
            if at[1] in world.personal or rule.policy == "local" or (number + world.period_from) % rule.every:
                for client in cohort:
                    own[client][at] = rows[client][at]
            elif world.W is not None:
                for i in rows:
                    own[i][at] = _value(world, at, rows, dict(enumerate(world.W(number)[:, i])), rule, i)
            else:
                found = _value(world, at, rows, p, rule)
                if world.outer is not None and at[0] in world.outer_states:
                    found, memory[at] = world.outer(common[at], found, memory.get(at), lr)
                common[at] = found
                for tensors in own:
                    tensors.pop(at, None)
        everybody = {c: common | own[c] for c in range(len(own))}
        shares = {c: w / sum(world.weights) for c, w in enumerate(world.weights)}
        mean = {at: _value(world, at, everybody, shares, Rule()) for at in common}
        yield Came(mean, list(everybody.values()), losses, spreads)


def _state(name: str) -> str:
    return "x" if name == "buffers" else name.partition(".")[0]


def _step(world: World, row: Tensors, client: int, t: int, lr: float) -> tuple[Tensors, float]:
    x, buffers = ({n: v for (part, n), v in row.items() if part == kind} for kind in ("x", "buffers"))
    grads, loss, buffers = world.gradient(x, buffers, client, t)
    new = dict(row) | {("buffers", name): value for name, value in buffers.items()}
    for name, g in grads.items():
        old = x[name]
        if world.optimizer == "adamw":
            old = old - lr * world.decay * old
        else:
            g = g + world.decay * old
        if world.optimizer == "sgd":
            u = world.beta * row["u", name] + g
            new["u", name], new["x", name] = u, old - lr * (world.beta * u + g if world.nesterov else u)
            continue
        corrected = {}
        for state, beta, seen in (("m", world.beta, g), ("v", world.beta2, g * g)):
            new[state, name] = beta * row[state, name] + (1 - beta) * seen
            new[f"{state}.clock", name] = beta * row[f"{state}.clock", name] + (1 - beta)
            corrected[state] = new[state, name] / new[f"{state}.clock", name]
        new["x", name] = old - lr * corrected["m"] / (np.sqrt(corrected["v"]) + world.eps)
    return new, loss


def _value(
    world: World, at: tuple[str, str], rows: Mapping[int, Tensors], p: Mapping[int, float], rule: Rule, i: int = 0
) -> Any:
    """Of rows the mean by p, 0 under "reset"; integers the largest, under Algorithm 2 client i's own."""
    values = {c: row[at] for c, row in rows.items()}
    first = next(iter(values.values()))
    if rule.policy == "reset":
        return first * 0.0
    if not np.issubdtype(np.asarray(first).dtype, np.floating):
        return values[i] if world.W is not None else np.maximum.reduce(list(values.values()))
    mean = sum(p[c] * value for c, value in values.items())
    if at[1].endswith("running_var"):
        middles = {c: row[at[0], at[1].replace("running_var", "running_mean")] for c, row in rows.items()}
        mean = mean + sum(p[c] * m**2 for c, m in middles.items()) - sum(p[c] * m for c, m in middles.items()) ** 2
    return mean


def _spread(world: World, rows: Mapping[int, Tensors], p: Mapping[int, float], states: Sequence[str]) -> float:
    """Σ p_i ‖·_i − mean‖², without what is personal."""
    total = 0.0
    for at in next(iter(rows.values())):
        if at[0] in states and at[1] not in world.personal:
            mean = sum(p[c] * row[at] for c, row in rows.items())
            total += sum(p[c] * float(np.sum((row[at] - mean) ** 2)) for c, row in rows.items())
    return total


# The outer steps, of one tensor: (x before, x̂, memory or None, γ) -> (x, memory).
def fedavgm(lr: float, momentum: float) -> Callable[..., tuple[Any, Any]]:
    def step(before: Any, mean: Any, b: Any, gamma: float) -> tuple[Any, Any]:
        b = (0 if b is None else momentum * b) + (before - mean)
        return before - lr * b, b

    return step


def nesterov(lr: float, momentum: float) -> Callable[..., tuple[Any, Any]]:
    def step(before: Any, mean: Any, b: Any, gamma: float) -> tuple[Any, Any]:
        b = (0 if b is None else momentum * b) + (before - mean)
        return before - lr * ((before - mean) + momentum * b), b

    return step


def slowmo(lr: float, momentum: float) -> Callable[..., tuple[Any, Any]]:
    def step(before: Any, mean: Any, b: Any, gamma: float) -> tuple[Any, Any]:
        b = (0 if b is None else momentum * b) + (before - mean) / gamma
        return before - lr * gamma * b, b

    return step


def adaptive(lr: float, momentum: float, beta2: float, tau: float, yogi: bool) -> Callable[..., tuple[Any, Any]]:
    """FedAdam and FedYogi of Reddi et al. (2021), Algorithm 2, by Δ of theirs: x̂ − x."""

    def step(before: Any, mean: Any, memory: Any, gamma: float) -> tuple[Any, Any]:
        change = mean - before
        m, v = (0 * change, 0 * change + tau**2) if memory is None else memory
        m = momentum * m + (1 - momentum) * change
        square = change**2
        v = v - (1 - beta2) * square * np.sign(v - square) if yogi else beta2 * v + (1 - beta2) * square
        return before + lr * m / (np.sqrt(v) + tau), (m, v)

    return step
