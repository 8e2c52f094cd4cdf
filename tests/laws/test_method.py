"""The laws of Algorithm 1, on both engine paths and both options; and the known mistakes, which they must catch."""

import numpy as np
import pytest
import torch

import laws
from laws import Problem, minimal_set, sample_problem, table
from runs import engine_runner
from wrong import NESTEROV_VARIANTS, VARIANTS, simulate

PATHS = ["vmap", "loop"]
OPTIONS = table("nesterov", [False, True])
paths = table("path", PATHS)


@OPTIONS
@paths
def test_interval_one_is_large_batch_momentum_sgd(path, nesterov):
    for num_clients in (1, 2, 3, 5):
        laws.law_large_batch(engine_runner(path), nesterov, num_clients)


@OPTIONS
@paths
def test_one_client_is_torch_sgd(path, nesterov):
    laws.law_single_client(engine_runner(path), nesterov)


@OPTIONS
@paths
def test_golden_run_bit_for_bit(path, nesterov):
    for dtype in (torch.float32, torch.float64):
        laws.law_golden(engine_runner(path), nesterov, dtype)


@OPTIONS
@paths
def test_clients_are_equal_after_each_exchange_and_at_no_other_step(path, nesterov):
    for num_clients in (1, 2, 3, 5):
        laws.law_restart_together(engine_runner(path), nesterov, num_clients)


@table("path, nesterov", [("vmap", False), ("loop", True)])
def test_fixed_point(path, nesterov):
    laws.law_fixed_point(engine_runner(path), nesterov)


@table("policy", laws.FIXED_POINTS)
def test_fixed_point_formula_gives_the_published_numbers(policy):
    point = laws.fixed_point(laws.FIXED_H, laws.FIXED_C, 0.05, 0.9, 5, False, policy)
    assert point - laws.FIXED_OPTIMUM == pytest.approx(laws.FIXED_POINTS[policy], abs=5e-7)
    at_one = laws.fixed_point(laws.FIXED_H, laws.FIXED_C, 0.05, 0.9, 1, False, policy)
    assert at_one == pytest.approx(laws.FIXED_OPTIMUM, abs=1e-12)


@table(
    "path, nesterov, num_clients, chunk_size",
    [
        ("vmap", False, 1, 64),
        ("vmap", True, 2, 1),
        ("vmap", False, 7, 2),
        ("vmap", True, 7, 64),
        ("loop", True, 1, 64),
        ("loop", False, 3, 2),
    ],
)
def test_engine_is_the_method_step_by_step(path, nesterov, num_clients, chunk_size):
    """Against the plain numpy version, every client at every step, several rounds and odd chunks."""
    problem = sample_problem(num_clients, nesterov, interval=4, lrs=[0.07] * 12)
    got, want = engine_runner(path, chunk_size)(problem), simulate("none")(problem)
    laws.close(got.x, want.x)
    laws.close(got.u, want.u)


@OPTIONS
@paths
def test_means_obey_the_mean_recursion(path, nesterov):
    """ū_t = β ū_{t−1} + ḡ_{t−1} and x̄_t = x̄_{t−1} − γ ū_t (− γ(β ū_t + ḡ) for option II), for every I."""
    for interval in (1, 2, 4):
        mean_recursion(path, nesterov, interval)


def mean_recursion(path, nesterov, interval):
    problem = sample_problem(3, nesterov, interval=interval, lrs=[0.07] * 8)
    got = engine_runner(path)(problem)
    g = (np.array(problem.h) * (got.x - np.array(problem.c))).mean(1)
    x, u = got.x.mean(1), got.u.mean(1)
    laws.close(u[1:], 0.9 * u[:-1] + g[:-1])
    laws.close(x[1:], x[:-1] - 0.07 * ((0.9 * u[1:] + g[:-1]) if nesterov else u[1:]))


@OPTIONS
def test_the_right_variant_breaks_no_law(nesterov):
    assert minimal_set(simulate("none"), nesterov) == []


@OPTIONS
def test_every_known_mistake_breaks_a_law(nesterov):
    variants = [*VARIANTS[1:], *(NESTEROV_VARIANTS if nesterov else ())]
    assert [variant for variant in variants if not minimal_set(simulate(variant), nesterov)] == []


def test_unaveraged_momentum_escapes_the_mean_laws():
    """Why five laws are needed: with one common curvature nobody sees un-averaged momentum in x̄."""
    problem = sample_problem(3, False, interval=4, lrs=[0.07] * 12)
    common = Problem([[1.0, 1.0]] * 3, *problem[1:])
    right, wrong = simulate("none")(common), simulate("momentum kept local")(common)
    laws.close(wrong.x.mean(1), right.x.mean(1))
    assert abs(wrong.u - right.u).max() > 1


@OPTIONS
def test_clones_stay_equal(nesterov):
    """Clients with one and the same objective take the same path as one client alone."""
    one = sample_problem(1, nesterov, interval=3, lrs=[0.1] * 6)
    for num_clients in (2, 3, 4):
        many = one._replace(h=one.h * num_clients, c=one.c * num_clients)
        laws.close(engine_runner("vmap")(many).x, engine_runner("vmap")(one).x)
