"""The test bench itself: its gradients, its optimum, and the noise laws of docs/method.md's source."""

import numpy as np
import pytest
import torch

from fedmom.tasks.quadratic import Quadratic, X
from laws import table
from runs import run_plan, simple_plan


def test_gradient_is_the_derivative_of_the_loss():
    problem = Quadratic([[0.5, 2.0], [1.0, 3.0]], [[1.0, -1.0], [0.0, 2.0]], [0.3, 0.7])
    sample = next(problem.round_batches(torch.tensor([1]), torch.tensor([0]), 1))
    single = type(sample)(*(field[0] for field in sample))
    x = problem.x0.clone().requires_grad_()
    grads, _, loss = problem.gradient({X: x}, {}, single)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], grads[X])


def test_optimum_is_where_the_mean_gradient_is_zero():
    problem = Quadratic([[0.5, 2.0], [1.0, 3.0]], [[1.0, -1.0], [0.0, 2.0]], [0.3, 0.7])
    best = problem.optimum()
    assert (problem.h * (best - problem.c)).mean(0).abs().max() < 1e-15
    at_best = problem.evaluate(problem.start()._replace(params={X: best}))
    assert at_best["distance"] == 0
    assert at_best["loss"] == at_best["optimal_loss"]
    assert problem.evaluate(problem.start())["loss"] > at_best["loss"]


def many_copies(num_copies, **options):
    """Independent noisy problems as coordinates of one: h = 1, all centers 0."""
    num_clients = options.pop("num_clients")
    ones, zeros = [[1.0] * num_copies] * num_clients, [[0.0] * num_copies] * num_clients
    return Quadratic(ones, zeros, [0.0] * num_copies, noise_sigma=1.0, **options)


@table("num_clients, interval", [(1, 1), (4, 4)])
def test_stationary_variance_falls_like_one_over_clients(num_clients, interval):
    """Var x̄ = γσ²(1+β) / (N h (1−β)(2(1+β) − γh)) for option I, whatever I."""
    gamma, beta, copies = 0.05, 0.9, 4000
    problem = many_copies(copies, num_clients=num_clients)
    plan = simple_plan(
        num_clients, num_rounds=240 // interval, lr=gamma, beta=beta, batch_size=1, num_local_steps=interval
    )
    done, _ = run_plan(problem, plan, path="vmap")
    want = gamma * (1 + beta) / (num_clients * (1 - beta) * (2 * (1 + beta) - gamma))
    # 4,000 independent copies: the deviation of a sample variance is √(2/4000) = 2.2 %.
    assert float(done.state.params[X].var()) == pytest.approx(want, rel=0.09)


@table("policy, want", [("average", 0.00829), ("local", 0.02988)])
def test_spread_just_before_the_exchange(policy, want):
    """(1 − 1/N) σ² [Σ_{k<I} A^k b bᵀ A^kᵀ]_xx for averaged momentum: N = 4, β = 0.9, γ = 0.05, h = σ = 1, I = 2."""
    copies = 4000
    problem = many_copies(copies, num_clients=4)
    plan = simple_plan(4, num_rounds=60, momentum_policy=policy, batch_size=1, num_local_steps=2)
    _, records = run_plan(problem, plan, path="vmap")
    assert records[-1]["consensus_distance"] / copies == pytest.approx(want, rel=0.05)


def test_published_spread_is_the_formula():
    A, b = np.array([[0.9, 1.0], [-0.045, 0.95]]), np.array([1.0, -0.05])
    total = sum(np.outer(v, v) for v in (np.linalg.matrix_power(A, k) @ b for k in range(2)))
    assert 0.75 * total[1, 1] == pytest.approx(0.00829, abs=5e-6)
