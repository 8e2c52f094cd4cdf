"""Learning rates: one number per step for all clients, changing exactly where the schedule says."""

import itertools
import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmom.method.schedules import SCHEDULES, UNITS, Horizon, LearningRate
from laws import table

# The paper's CIFAR-10 run: 8 clients, 64 examples each per step, 160 passes over 50,000 examples.
PER_EPOCH = 50_000 / (8 * 64)  # 97.65625 steps
PAPER = Horizon(math.ceil(160 * PER_EPOCH), 8, PER_EPOCH)
PAPER_RATE = LearningRate(0.1, "step", (80, 120), 0.1, "joint-epochs")

HORIZONS = [Horizon(1, 1, 0.5), Horizon(2, 3, 1.0), Horizon(100, 8, 7.3), PAPER]


def rates(rate: LearningRate, horizon: Horizon) -> list[float]:
    return [rate.at(step, horizon) for step in range(horizon.num_steps)]


def some_rate(schedule: str, **options) -> LearningRate:
    return LearningRate(0.5, schedule, (0.5, 0.75), 0.1, "fraction", **options)


def test_constant_is_constant():
    for horizon in HORIZONS:
        assert set(rates(LearningRate(0.3), horizon)) == {0.3}


def test_the_papers_decay_changes_at_its_joint_epochs_to_the_step():
    series = rates(PAPER_RATE, PAPER)
    # A step belongs to the new rate if it begins at or after the milestone: 80 · 97.65625 = 7812.5, 120 · … = 11718.75.
    assert [series[t] for t in (0, 7812, 7813, 11718, 11719, 15624)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12
    )
    changes = [t for t in range(1, len(series)) if series[t] != series[t - 1]]
    assert changes == [7813, 11719]
    assert len(series) == 15625


def test_decay_begins_with_the_first_step_past_the_milestone():
    examples, epochs = 1437, 3
    rate = LearningRate(1.0, "step", (epochs,), 0.5, "joint-epochs")
    for num_clients, batch_size in itertools.product((1, 2, 4, 8, 3, 7), (1, 32, 64, 100)):
        horizon = Horizon(10**6, num_clients, examples / (num_clients * batch_size))
        first = -(-epochs * examples // (num_clients * batch_size))  # ⌈3 n / (N B)⌉ in whole numbers
        assert [rate.at(t, horizon) for t in (first - 1, first)] == [1.0, 0.5]


@given(st.integers(1, 10**6), st.integers(1, 10**6))
@example(29, 7)  # 7 · (29 / 7) = 29.000000000000004
def test_a_milestone_on_a_step_is_met_there_though_the_division_is_uneven(numerator, denominator):
    # (m · examples per epoch) / (N B) may come out an ulp above a whole number of steps.
    horizon = Horizon(10**9, 1, numerator / denominator)
    rate = LearningRate(1.0, "step", (denominator,), 0.5, "joint-epochs")
    assert rate.at(numerator, horizon) == 0.5
    assert numerator == 1 or rate.at(numerator - 1, horizon) == 1.0


def test_decay_at_fractions_of_the_run():
    for num_steps in (1, 2, 3, 4, 10, 160):
        expected = [0.5 * 0.1 ** ((4 * t >= 2 * num_steps) + (4 * t >= 3 * num_steps)) for t in range(num_steps)]
        assert rates(some_rate("step"), Horizon(num_steps, 5, 3.0)) == pytest.approx(expected, rel=1e-12)


def test_a_milestone_at_zero_and_repeated_milestones_count():
    horizon = Horizon(10, 1, 1.0)
    assert set(rates(LearningRate(1.0, "step", (0.0,), 0.5, "fraction"), horizon)) == {0.5}
    assert set(rates(LearningRate(1.0, "step", (0.5, 0.5), 0.5, "fraction"), horizon)) == {1.0, 0.25}


@table("num_steps, minimum", [(2, 0.01), (3, 0.0), (15625, 0.0)])
def test_cosine_goes_from_lr_to_the_minimum_and_never_up(num_steps, minimum):
    horizon = Horizon(num_steps, 8, 10.0)
    rate = LearningRate(0.4, "cosine", minimum=minimum)
    series = rates(rate, horizon)
    assert series[0] == 0.4
    assert all(a > b for a, b in pairwise(series))
    assert rate.at(num_steps, horizon) == pytest.approx(minimum, abs=1e-16)
    assert rate.at(10 * num_steps, horizon) == pytest.approx(minimum, abs=1e-16)
    middle = rate.at(num_steps // 2, horizon)
    assert num_steps % 2 or middle == pytest.approx((0.4 + minimum) / 2)


def test_cosine_after_a_warm_up_starts_from_lr_at_its_end():
    horizon = Horizon(100, 1, 10.0)
    rate = LearningRate(0.4, "cosine", unit="joint-epochs", warmup=2.0)  # 20 steps
    assert rate.at(19, horizon) == rate.at(20, horizon) == 0.4
    assert rate.at(60, horizon) == pytest.approx(0.2)
    assert rate.at(100, horizon) == pytest.approx(0, abs=1e-16)


@table(
    "schedule, length", itertools.product(["constant", "step", "theory"], [("fraction", 0.2), ("joint-epochs", 2.5)])
)
def test_warm_up_is_linear_and_then_gone(schedule, length):
    """A fifth of 100 steps, or 2.5 joint epochs of 10 steps each."""
    (unit, amount), steps = length, {"fraction": 20, "joint-epochs": 25}[length[0]]
    horizon = Horizon(100, 4, 10.0)
    cold = LearningRate(0.5, schedule, (0.5,), 0.1, unit)
    warm = cold._replace(warmup=amount)
    ramp = [a / b for a, b in zip(rates(warm, horizon), rates(cold, horizon), strict=True)]
    assert ramp[:steps] == pytest.approx([(t + 1) / steps for t in range(steps)])
    assert ramp[steps - 1 :] == [1.0] * (101 - steps)
    assert warm.at(0, horizon) > 0


def test_theory_is_c_times_the_root_of_n_over_t():
    for T, N in [(1, 1), (100, 4), (400, 4), (100, 16), (15625, 8)]:
        assert set(rates(LearningRate(0.5, "theory"), Horizon(T, N, 3.0))) == {0.5 * math.sqrt(N / T)}


@table("schedule", SCHEDULES)
def test_rates_are_positive_and_at_most_lr(schedule):
    for horizon, warmup in itertools.product(HORIZONS[:3], (0.0, 0.3)):
        ceiling = 0.5 * max(1.0, math.sqrt(horizon.num_clients / horizon.num_steps))
        assert all(0 < lr <= ceiling for lr in rates(some_rate(schedule, warmup=warmup), horizon))


@table("schedule", SCHEDULES)
def test_only_schedules_that_say_so_need_the_length(schedule):
    for unit in UNITS:
        rate = LearningRate(0.5, schedule, (0.5, 0.75), 0.1, unit)
        short, long = (Horizon(T, 4, 10.0) for T in (100, 200))
        differ = any(rate.at(t, short) != rate.at(t, long) for t in range(100))
        assert differ == (SCHEDULES[schedule].needs_length or (schedule == "step" and unit == "fraction"))
