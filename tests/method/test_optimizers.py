"""The local optimizers: torch.optim's at N = 1, the golden numbers of three quadratics, and what holds for every round.

Each client's f_i is h_i/2 (x − c_i)² with exact gradients, or a plane, whose gradient is the same everywhere.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.schedules import LearningRate
from fedmom.method.states.rules import StateRule
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning
from fedmom.tasks.quadratic import Quadratic
from laws import table

F64 = torch.float64
H, C = [[0.5], [2.0], [1.0]], [[-1.0], [3.0], [0.0]]


def ran(problem, method, *, rounds, lr, steps=2, path="loop", chunk_size=64, rate=None, topology=None, **options):
    """[the state after every round]."""
    options.setdefault("cohort_size", len(problem.sizes))
    rate = rate or LearningRate(lr)
    plan = Plan(method, rate, rounds, batch_size=1, num_local_steps=steps, topology=topology, **options)
    engine = Engine(problem, method, path=path, chunk_size=chunk_size)
    backend = engine if topology is None else GossipRounds(engine, topology, "cpu")
    return [done for done, _ in run_rounds(problem, plan, backend, beginning(problem, plan))]


def averaged(optimizer, policy="average", *, m=0, v=0, **numbers):
    """A method whose states all have one policy, or are averaged every m and v rounds."""
    states = {s: StateRule("average", k) for s, k in (("m", m), ("v", v)) if k}
    return Method(
        numbers.pop("beta", 0.9),
        optimizer=optimizer,
        momentum_policy=policy,
        states=states,
        **{"beta2": 0.999} | numbers,
    )


# --- one client -------------------------------------------------------------------------------------------------

TORCH = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-10}),
}


@table("optimizer, decay", itertools.product(TORCH, [0.0, 0.1]))
def test_one_client_is_torch_optim(optimizer, decay):
    """50 steps in ten rounds, γ decayed twice; the states and their clocks too."""
    h, c, x0 = [[1.5, 0.2, 3.0]], [[2.0, -1.0, 0.5]], [0.0, 1.0, -3.0]
    kind, options = TORCH[optimizer]
    rate = LearningRate(0.05, "step", (0.4, 0.8), 0.1, "fraction")
    method = averaged(optimizer, weight_decay=decay, eps=options["eps"])
    done = ran(Quadratic(h, c, x0), method, rounds=10, steps=5, lr=0.0, rate=rate)[-1]
    x = torch.tensor(x0, dtype=F64, requires_grad=True)
    by = kind([x], lr=0.05, weight_decay=decay, **options)
    for step in range(50):
        by.param_groups[0]["lr"] = 0.05 * 0.1 ** ((step >= 20) + (step >= 40))
        by.zero_grad()
        (torch.tensor(h[0], dtype=F64) * (x - torch.tensor(c[0], dtype=F64)) ** 2).sum().div(2).backward()
        by.step()
    kept = by.state[x]
    want = {"m/x": kept.get("exp_avg"), "v/x": kept.get("exp_avg_sq", kept.get("sum"))}
    want |= {f"{s}.clock/x": torch.tensor(1 - b**50, dtype=F64) for s, b in (("m", 0.9), ("v", 0.999))}
    torch.testing.assert_close(done.state.params["x"], x.detach(), rtol=2e-14, atol=2e-14)
    for name, value in done.state.momentum.items():
        torch.testing.assert_close(value, want[name], rtol=2e-14, atol=2e-14, msg=name)


def test_one_client_is_lions_algorithm_2():
    h, c, lr, b1, b2 = np.array([1.5, 0.2, 3.0]), np.array([2.0, -1.0, 0.5]), 0.03, 0.9, 0.99
    for decay in (0.0, 0.1):
        x, m = np.zeros(3), np.zeros(3)
        for _ in range(50):
            g = h * (x - c)
            update = np.sign(b1 * m + (1 - b1) * g)  # the paper's c_t, of the old m
            x = x - lr * (update + decay * x)
            m = b2 * m + (1 - b2) * g
        method = averaged("lion", weight_decay=decay, beta2=b2)
        done = ran(Quadratic([h.tolist()], [c.tolist()], [0.0] * 3), method, rounds=10, steps=5, lr=lr)[-1]
        np.testing.assert_allclose(done.state.params["x"].numpy(), x, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(done.state.momentum["m/x"].numpy(), m, rtol=1e-13, atol=1e-13)


# --- golden numbers ---------------------------------------------------------------------------------------------

# x̄ after T = 8 of h = (.5, 2, 1), c = (−1, 3, 0), x⁰ = 1/2, γ = 1/8, β₁ = 1/2, β₂ = 3/4, I = 2. Wrong ways give others:
# roots of v averaged .665093, v summed .576103, no clock .667529, averaged before the update .713009, v and m reset but
# not their clocks .184471, Lion with the new m 1/3.
GOLDEN = [
    (averaged("adamw"), 0.650632892891),
    (averaged("adamw", "local"), 0.204008810554),
    (averaged("adamw", "reset"), 0.178749105787),
    (averaged("adamw", m=2, v=4), 0.416593444967),
    (averaged("adamw", m=1, v=2), 0.634852809507),
    (averaged("adamw", weight_decay=0.5), 0.460980591444),
    (averaged("adam", weight_decay=0.5), 0.594079323650),
    (averaged("adagrad", eps=1e-10), 0.531174946452),
    (averaged("adagrad", "local", eps=1e-10), 0.339468494184),
    (averaged("adagrad", "reset", eps=1e-10), 0.242722728178),
    (averaged("lion"), 2 / 3),
    (averaged("lion", "local"), 1 / 6),
    (averaged("lion", "reset"), 1 / 6),
]


@table("path, chunk_size", [("loop", 64), ("vmap", 2)])
def test_golden_numbers(path, chunk_size):
    for method, want in GOLDEN:
        method = method._replace(beta=0.5, beta2=0.75)
        done = ran(Quadratic(H, C, [0.5]), method, rounds=4, lr=0.125, path=path, chunk_size=chunk_size)[-1]
        got = float(done.state.params["x"])
        assert got == pytest.approx(want, abs=2e-12), f"{method.optimizer} {method.momentum_policy} {method.states}"


def test_v_that_is_averaged_less_often_than_m_divides_by_nothing():
    """A client without a gradient on a coordinate has v = 0 there; from x⁰ = 0 that is the third (c₃ = 0)."""
    ends = {}
    for v in (1, 2):
        method = averaged("adamw", m=1, v=v, beta=0.5, beta2=0.75)
        ends[v] = float(ran(Quadratic(H, C, [0.0]), method, rounds=2, lr=0.125)[-1].state.params["x"])
    assert ends[1] == pytest.approx(0.105, abs=5e-4)
    assert ends[2] > 100


# --- what holds for every number of clients -----------------------------------------------------------------------

POLICIES = [("average", 0, 0), ("local", 0, 0), ("reset", 0, 0), ("average", 2, 3), ("average", 3, 1)]


@table("optimizer", ["adamw", "adam", "lion", "adagrad"])
def test_clones_are_one_client(optimizer):
    """Clients with the same f, whoever takes part, come to what one alone comes to."""
    h, c, x0 = [1.5, 0.2], [2.0, -1.0], [0.0, 1.0]
    has = averaged(optimizer).by.states
    for policy, m, v in POLICIES:
        method = averaged(optimizer, policy, m=m if "m" in has else 0, v=v if "v" in has else 0, weight_decay=0.1)
        wants = ran(Quadratic([h], [c], x0), method, rounds=4, lr=0.05, steps=2)
        many = ran(Quadratic([h] * 3, [c] * 3, x0), method, rounds=4, lr=0.05, steps=2, path="vmap", chunk_size=2)
        for got, want in zip(many, wants, strict=True):
            torch.testing.assert_close(got.state.params["x"], want.state.params["x"], rtol=1e-13, atol=1e-13)


class Planes(Quadratic):
    """f_i(x) = g·x: the gradient is `centers`, wherever x is."""

    def gradient(self, params, buffers, sample):
        return {"x": sample.c}, buffers, (sample.c * params["x"]).sum()


SLOPES = [3.0, -1e-3, 1e3]


def test_every_step_is_the_sign_of_a_constant_gradient():
    """λ = ε = 0: x moves by γ a step whatever the policy, the period and the cohort, in rounds of any γ.

    Not so where m or v is reset and its clock is not, or where a clock goes on while its state does not.
    """
    moved = torch.tensor(SLOPES, dtype=F64).sign()
    rate = LearningRate(0.1, "step", (0.5,), 0.3, "fraction")
    for (policy, m, v), cohort in itertools.product(POLICIES, (1, 3)):
        method = averaged("adamw", policy, m=m, v=v, eps=0.0)
        problem = Planes([[1.0] * 3] * 4, [SLOPES] * 4, [0.0] * 3)
        states = ran(problem, method, rounds=8, steps=2, lr=0.0, rate=rate, cohort_size=cohort, path="vmap")
        for number, done in enumerate(states, 1):
            far = 0.1 * 2 * min(number, 4) + 0.03 * 2 * max(0, number - 4)
            torch.testing.assert_close(
                done.state.params["x"], -far * moved, rtol=1e-12, atol=0, msg=f"{method} {cohort}"
            )


def test_every_step_is_the_sign_of_a_constant_gradient_under_algorithm_2():
    moved = torch.tensor(SLOPES, dtype=F64).sign()
    for policy, m, v in POLICIES:
        method = averaged("adam", policy, m=m, v=v, eps=0.0)
        problem = Planes([[1.0] * 3] * 4, [SLOPES] * 4, [0.0] * 3)
        topology = make_topology("one-peer-exponential", 4)
        states = ran(problem, method, rounds=7, steps=2, lr=0.1, topology=topology)
        for number, done in enumerate(states, 1):
            assert done.rows is not None
            want = (-0.2 * number * moved).expand(4, 3)
            torch.testing.assert_close(done.rows.params["x"], want, rtol=1e-12, atol=0)


def test_one_step_averages_m_as_a_large_batch_and_v_as_no_batch():
    """I = 1: m is that of the mean gradient, and v of the mean square, weighted as x is."""
    problem = Quadratic(H, C, [0.0])
    problem.sizes = np.array([1, 2, 5])
    method = averaged("adamw", beta=0.5, beta2=0.75)
    done = ran(problem, method, rounds=1, steps=1, lr=0.1, client_weights="samples")[-1].state.momentum
    g, p = np.array([0.5, -6.0, 0.0]), np.array([1, 2, 5]) / 8
    assert float(done["m/x"]) == pytest.approx(0.5 * p @ g, rel=1e-14)
    assert float(done["v/x"]) == pytest.approx(0.25 * p @ g**2, rel=1e-14)
    assert float(done["v/x"]) != pytest.approx(0.25 * (p @ g) ** 2, rel=0.1)


# --- unequal steps, weights and cohorts, against numbers ----------------------------------------------------------


def by_numbers(rounds, cohorts, steps, weights, *, lr, b1, b2, eps, decay):
    """x of AdamW averaged: one client after another, in numbers."""
    x, common = 0.5, (0.0, 0.0, 0.0, 0.0)
    found = []
    for r in range(rounds):
        ends = []
        for i in cohorts[r]:
            y, (m, v, zm, zv) = x, common
            for _ in range(steps[i]):
                g = H[i][0] * (y - C[i][0])
                y -= lr * decay * y
                m, zm = b1 * m + (1 - b1) * g, b1 * zm + 1 - b1
                v, zv = b2 * v + (1 - b2) * g * g, b2 * zv + 1 - b2
                y -= lr * (m / zm) / (math.sqrt(v / zv) + eps)
            ends.append((y, m, v, zm, zv))
        p = np.array([weights[i] for i in cohorts[r]], dtype=float)
        x, *rest = (p / p.sum()) @ np.array(ends)
        common = tuple(rest)
        found.append((x, *common))
    return np.array(found)


def test_clocks_of_unequal_steps_are_averaged_with_their_weights(monkeypatch):
    cohorts = [[0, 2], [1, 2], [0, 1], [0, 2]]
    monkeypatch.setattr("fedmom.rounds.plan.cohort", lambda n, size, seed, r: np.array(cohorts[r]))
    problem = Quadratic(H, C, [0.5])
    problem.sizes = np.array([1, 4, 2])
    method = averaged("adamw", beta=0.5, beta2=0.75, weight_decay=0.1)
    numbers = {"lr": 0.125, "b1": 0.5, "b2": 0.75, "eps": 1e-8, "decay": 0.1}
    want = by_numbers(4, cohorts, problem.sizes, problem.sizes, **numbers)
    options = {"cohort_size": 2, "local_epochs": 1, "client_weights": "samples"}
    states = ran(problem, method, rounds=4, lr=0.125, path="vmap", **options)
    names = ("m/x", "v/x", "m.clock/x", "v.clock/x")
    got = [[float(s.state.params["x"]), *(float(s.state.momentum[n]) for n in names)] for s in states]
    np.testing.assert_allclose(got, want, rtol=1e-12)
