"""What changes in a run, for all clients alike: the learning rate γ_t, and how many local steps I a round takes.

γ is a function of the step t and of nothing else. I may go by the rounds, or by what the last of them came to.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

THETA = 4.0  # θ of `adaptive`; ours


class Horizon(NamedTuple):
    """How long the run is, in the units a schedule may be written in."""

    num_steps: int  # T
    num_clients: int  # N that take part in a round
    steps_per_joint_epoch: float  # steps until all clients together have seen as many examples as there are

    def steps(self, amount: float, unit: str) -> float:
        """`amount` joint epochs, or that fraction of the run, in steps."""
        return amount * (self.steps_per_joint_epoch if unit == "joint-epochs" else self.num_steps)


class LearningRate(NamedTuple):
    """Plain numbers of a schedule; `at(t, horizon)` is γ of step t = 0, 1, …"""

    lr: float  # γ, or c of the schedule "theory"
    schedule: str = "constant"
    milestones: tuple[float, ...] = ()  # where "step" multiplies by `decay`
    decay: float = 0.1
    unit: str = "joint-epochs"  # of milestones and warmup; or "fraction" of the run
    warmup: float = 0.0  # length of the linear warm-up, in `unit`
    minimum: float = 0.0  # where "cosine" ends

    def at(self, step: int, horizon: Horizon) -> float:
        warmup = horizon.steps(self.warmup, self.unit)
        ramp = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        return ramp * SCHEDULES[self.schedule].lr(self, step, horizon)


def constant(rate: LearningRate, step: int, horizon: Horizon) -> float:
    return rate.lr


def step_decay(rate: LearningRate, step: int, horizon: Horizon) -> float:
    # A step that begins on a milestone is past it; 1e-9 forgives the division by an uneven epoch length.
    passed = sum(step >= horizon.steps(m, rate.unit) * (1 - 1e-9) for m in rate.milestones)
    return rate.lr * rate.decay**passed


def cosine(rate: LearningRate, step: int, horizon: Horizon) -> float:
    """Loshchilov and Hutter (2017), one half period from the end of the warm-up to the end of the run."""
    warmup = min(horizon.steps(rate.warmup, rate.unit), horizon.num_steps - 1)
    done = min(1.0, max(0.0, step - warmup) / max(1.0, horizon.num_steps - warmup))
    return rate.minimum + (rate.lr - rate.minimum) * 0.5 * (1 + math.cos(math.pi * done))


def theory(rate: LearningRate, step: int, horizon: Horizon) -> float:
    """γ = c √(N / T): with it the method converges at O(1/√(NT)) (Yu, Jin, Yang, 2019)."""
    return rate.lr * math.sqrt(horizon.num_clients / horizon.num_steps)


class Schedule(NamedTuple):
    lr: Callable[[LearningRate, int, Horizon], float]
    needs_length: bool  # whether γ_t depends on how long the run will be
    summary: str
    uses_unit: bool = False  # whether it reads lr-milestones, in lr-unit


SCHEDULES = {
    "constant": Schedule(constant, False, "γ"),
    "step": Schedule(step_decay, False, "γ times lr-decay at each of lr-milestones", uses_unit=True),
    "cosine": Schedule(cosine, True, "half a cosine from γ to lr-min over the run"),
    "theory": Schedule(theory, True, "c √(N / T), with c = lr"),
}
UNITS = {"joint-epochs": "passes of all clients together over all data", "fraction": "part of the run"}


class Span(NamedTuple):
    """The local steps of a round whose I is not that of every round."""

    first: int  # steps before it
    steps: int  # I


class Came(NamedTuple):
    """What a round came to, as a rule of I looks at it."""

    number: int  # of the round, 1, 2, …
    spread: float  # Σ p_i ‖x_i − x̂‖² just before the exchange
    moved: float  # ‖x̂ − x_start‖²
    clients: float  # N of equal weights, 1/Σ p_i² of others


class Pacing(NamedTuple):
    """I₀, and what may halve it."""

    first: int  # I₀
    num_rounds: int  # R
    milestones: tuple[float, ...]  # fractions of R

    def halvings(self, round_index: int) -> int:
        """How many milestones round 0, 1, … has behind it; one that begins on a milestone is past it, as with γ."""
        return sum(round_index >= m * self.num_rounds * (1 - 1e-9) for m in self.milestones)

    def num_steps(self) -> int:
        """T = Σ I over all rounds, where the milestones alone halve it."""
        ends = [math.ceil(m * self.num_rounds * (1 - 1e-9)) for m in self.milestones]
        pairs = zip([0, *ends], [*ends, self.num_rounds], strict=True)
        return sum((end - begin) * halved(self.first, k) for k, (begin, end) in enumerate(pairs))


def halved(interval: int, times: int = 1) -> int:
    """I halved so often, rounded down, and at least 1."""
    return max(1, interval >> times)


# (I so far, what the last round came to, the run's numbers) -> I of the next round
Follow = Callable[[int, Came, Pacing], int]


def decaying(interval: int, came: Came, by: Pacing) -> int:
    return halved(by.first, by.halvings(came.number))


def adaptive(interval: int, came: Came, by: Pacing) -> int:
    """I/2 after a round with ρ = Σ p_i ‖x_i − x̂‖² / ((N−1) ‖x̂ − x_start‖²) > θ; ours.

    Where nothing but independent noise moves N clients alike (β = 0), ρ is 1: x̂ moves by 1/N of what each of them does.
    Clients that are driven apart by their data leave x̂ where it is, and ρ grows. Of one client ρ is 0/0, and I stays.
    """
    noise = (came.clients - 1) * came.moved
    return halved(interval) if came.clients > 1 and came.spread > THETA * noise else interval
