"""Whether a replay gave what the same steps give without it, told also of steps that are chaotic.

A replay of the wrong memory is off by about as much as the steps themselves. In their first steps deep networks amplify
rounding to nearly as much: ResNet-56 by 10⁵ and more in four steps, and a card sums gradients in no fixed order, so
that two runs of the same steps may be that far apart. Short steps amplify nothing, and read the same memory: where the
results differ, both ways are taken once more with γ so small that all steps together are a thousandth of one. What is
left is noise that does not come from chaos; how much of that there is, the short steps say by being taken twice.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmom.engine.stacked.means import Distances
from fedmom.method.state import ClientState, parameter_of, state_of

_CLOSE = 0.02  # in parts of each quantity: far more than rounding that is not amplified
_SHORT = 1e-3  # of one step: all short steps together; in float32 x still moves by more than its last digit
_TIMES = 4  # as far as two plain runs are from each other a third one may be from either
_FAR, _FAR_LOSSES = 0.5, _CLOSE  # at most: other minibatches are that far
_STEADY = 1e-3  # two losses of one client may happen to be closer to each other than a third one is


def short(lrs: Sequence[float]) -> list[float]:
    return [lr * _SHORT / len(lrs) for lr in lrs]


def agrees(found: Distances, want: Distances) -> bool:
    return max(_apart(found, want)) <= _CLOSE


def trouble_between(found: Distances, steps: Callable[[], Distances]) -> str:
    """Why the replay that gave `found` may not be used, or "". steps: takes the same steps as they are."""
    want = steps()
    if agrees(found, want):
        return ""
    off, noise = _apart(found, want), _apart(steps(), want)
    near = off.rest <= min(max(_CLOSE, _TIMES * noise.rest), _FAR)
    if near and off.losses <= min(max(_STEADY, _TIMES * noise.losses), _FAR_LOSSES):
        return ""
    if _TIMES * noise.rest > _FAR or _TIMES * noise.losses > _FAR_LOSSES:
        return f"the steps differ from themselves by {100 * max(noise):.2g} %, so that a replay cannot be told right"
    return "a replay gave another result"


class _Apart(NamedTuple):
    """The largest distances, in parts of what they are distances from."""

    losses: float
    rest: float  # of x, u and the buffers


def _apart(one: Distances, other: Distances) -> _Apart:
    rest = [*zip(one.groups(), other.groups(), strict=True), *zip(one.squares, other.squares, strict=True)]
    rest += [(one.buffers[kind], other.buffers[kind]) for kind in other.buffers]
    rest += [(one.bases[at], other.bases[at]) for at in other.bases]
    return _Apart(_largest([(one.losses, other.losses)]), _largest(rest))


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖got − want‖ / ‖want‖; a run that diverges says so itself, and tells nothing here."""
    most = 0.0
    for got, want in pairs:
        away, size = (float(torch.linalg.vector_norm(t.double())) for t in (got - want, want))
        if math.isfinite(size) and not away <= 1e-9:
            most = max(most, away / size if size and math.isfinite(away) else math.inf)
    return most


# --- a way of running clients beside plain torch --------------------------------------------------------------------


class Reached(NamedTuple):
    """What clients came to: plainly, or by some way."""

    states: list[ClientState]  # by name in `parts`: the mean, or every client's own
    losses: Tensor  # [C] float64
    spreads: tuple[float, float]  # of x and of u, where they are means


def distance(got: Reached, want: Reached, begun: Sequence[ClientState]) -> tuple[float, str]:
    """(the largest distance, in parts of the whole step, and what is so far); begun: where each state came from."""
    found: list[tuple[float, str]] = []
    squares: dict[str, list[tuple[float, float, str]]] = {}  # of x, and of every state, which has a size of its own
    for one, other, before in zip(got.states, want.states, begun, strict=True):
        for part in ("params", "momentum"):
            for name, value in getattr(other, part).items():
                away = float((getattr(one, part)[name] - value).abs().double().square().sum())
                step = float((value - getattr(before, part)[name]).abs().double().square().sum())
                squares.setdefault(_kind(part, name), []).append((away, step, name))
    for kind, each in squares.items():
        aways, steps, names = zip(*each, strict=True)
        worst = names[aways.index(max(aways))]
        where = worst if kind == "x" else parameter_of(worst)
        found.append((_ratio(sum(aways) ** 0.5, sum(steps) ** 0.5), f"{kind} of {where}"))
    for one, other, before in zip(got.states, want.states, begun, strict=True):
        for name, value in other.buffers.items():
            off = float((one.buffers[name].double() - value.double()).square().sum()) ** 0.5
            moved = float((value.double() - before.buffers[name].double()).square().sum()) ** 0.5
            size = float(value.double().square().sum()) ** 0.5
            found.append((_ratio(off, moved + size), f"the buffer {name}"))
        for name, value in other.correction.items():  # a state or a message, by its own size: it may be of any kind
            off = float((one.correction[name].double() - value.double()).square().sum()) ** 0.5
            size = float(value.double().square().sum()) ** 0.5
            found.append((_ratio(off, size + 1e-3), f"the correction's {name}"))
    off = float((got.losses - want.losses).abs().max())
    found.append((_ratio(off, 1 + float(want.losses.abs().max())), "the loss"))
    for name, a, b in zip(("consensus distance", "momentum spread"), got.spreads, want.spreads, strict=True):
        moved = float(sum(t.double().square().sum() for t in want.states[0].params.values()))
        found.append((_ratio(abs(a - b), b + 1e-12 * moved), f"the {name}"))
    return max(found)


def _kind(part: str, name: str) -> str:
    """x, u, m, m.clock, …"""
    return "x" if part == "params" else "u" if state_of(name) == "u" else name.partition("/")[0]


def _ratio(away: float, step: float) -> float:
    """away / step; infinite for what is not a number."""
    return 0.0 if away == 0 else away / step if step > 0 and math.isfinite(away) else math.inf


def is_all_finite(reached: Reached) -> bool:
    tensors = [t for state in reached.states for tree in state for t in tree.values() if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in [*tensors, reached.losses])
