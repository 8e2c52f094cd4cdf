"""`algorithm.correction`: the user's own change of a client's gradient, on every path that can take it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
import fedmom.config.build.plan
from fedmom.engine.engine import Engine
from fedmom.errors import InputError
from fedmom.method.algorithms import Method
from fedmom.method.randomness import random_bits
from fedmom.method.schedules import LearningRate
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning
from fedmom.tasks.quadratic import Quadratic
from laws import table
from runs import F64, image_problem, run_plan, simple_plan

MU = 0.3
FEDPROX = """
def correct(grads, params, start):
    return {name: g + 0.3 * (params[name] - start[name]) for name, g in grads.items()}
"""
LOOKS = """
def correct(grads, params, start):
    norm = sum(g.square().sum() for g in grads.values()).sqrt()
    return {name: g / norm for name, g in grads.items()} if norm > 1 else grads
"""


def fedprox(grads, params, start):
    return {name: g + MU * (params[name] - start[name]) for name, g in grads.items()}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed twice in a second would be taken from it
    yield
    sys.modules.pop("mine", None)


def write(text):
    Path("mine.py").write_text(text)
    sys.modules.pop("mine", None)
    return {"algorithm.correction": "mine:correct"}


@pytest.mark.parametrize(
    ("path", "nesterov", "num_clients"), [("loop", False, 3), ("loop", True, 1), ("vmap", False, 1), ("vmap", True, 2)]
)
def test_fedprox_on_quadratics_is_the_recursion_written_out(path, nesterov, num_clients):
    """g_i = h_i (x_i − c_i) + μ (x_i − x̂), x̂ from the start of the round; then Algorithm 1 as ever."""
    h, c = np.array([1.0, 3.0, 0.5])[:num_clients, None], np.array([4.0, -2.0, 1.0])[:num_clients, None]
    problem = Quadratic(h.tolist(), c.tolist(), (0.5,), dtype=F64)
    lr, beta, interval, rounds = 0.1, 0.5, 3, 4
    plan = Plan(Method(beta, nesterov, correction=fedprox), LearningRate(lr), rounds, num_clients, 1, num_local_steps=3)
    engine = Engine(problem, plan.method, path=path, chunk_size=2)
    *_, (done, _) = run_rounds(problem, plan, engine, beginning(problem, plan))

    x, u = np.full_like(h, 0.5), np.zeros_like(h)
    for _ in range(rounds):
        start = x.copy()
        for _ in range(interval):
            g = h * (x - c) + MU * (x - start)
            u = beta * u + g
            x = x - lr * (beta * u + g if nesterov else u)
        x, u = np.full_like(x, x.mean()), np.full_like(u, u.mean())
    np.testing.assert_allclose(done.state.params["x"], x[0], rtol=1e-12)
    np.testing.assert_allclose(done.state.momentum["x"], u[0], rtol=1e-12)


@pytest.mark.parametrize("policy", ["average", "local"])
def test_loop_and_vmap_agree_on_a_network(policy):
    problem, plan = image_problem("mlp", 3), simple_plan(3, momentum_policy=policy, weight_decay=0.01)
    plan = plan._replace(method=plan.method._replace(correction=fedprox))
    ends = [run_plan(problem, plan, path=path)[0].state for path in ("loop", "vmap")]
    plain = run_plan(problem, plan._replace(method=plan.method._replace(correction=None)))[0].state
    for name, x in ends[0].params.items():
        torch.testing.assert_close(x, ends[1].params[name], rtol=1e-11, atol=1e-12)
    assert any(not torch.equal(x, plain.params[name]) for name, x in ends[0].params.items())


@pytest.mark.parametrize("sets", [{}, {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}], ids=["1", "2"])
def test_one_that_changes_nothing_changes_no_byte(sets):
    sets = {"data.dataset": "digits", "model.name": "logistic", "data.num-clients": 3, "run.num-rounds": 2, **sets}
    sets |= {"engine.path": "vmap", "engine.chunk-size": 3}
    same = write("def correct(grads, params, start):\n    return grads\n")
    plain, with_it = (fedmom.run({**sets, **more}, out=name) for name, more in (("a", {}), ("b", same)))
    for name, x in plain.state_dict.items():
        assert torch.equal(x, with_it.state_dict[name])


def test_auto_takes_a_path_that_can_and_says_why_and_the_folded_ones_refuse():
    sets = {"model.name": "mlp", "model.hidden": 8, "data.num-clients": 3, "run.num-rounds": 1, **write(FEDPROX)}
    assert fedmom.run(sets).config.engine.path in ("loop", "vmap")
    for path in ("stack", "factors"):
        with pytest.raises(InputError, match=rf"engine\.path = '{path}': algorithm\.correction"):
            fedmom.run({**sets, "engine.path": path})


def test_one_that_looks_at_values_runs_in_the_loop():
    """Clipping with an `if` cannot be stacked; `auto` sees that, and vmap says so."""
    sets = {"model.name": "logistic", "data.num-clients": 2, "run.num-rounds": 1, **write(LOOKS)}
    assert fedmom.run(sets).config.engine.path == "loop"
    with pytest.raises(InputError, match=r"engine\.path = 'vmap'"):
        fedmom.run({**sets, "engine.path": "vmap"})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def other(): pass", "has no attribute 'correct'"),
        ("def correct(grads, params, start):\n    return None\n", "must return a dict of the gradients"),
        ("def correct(grads, params, start):\n    return {n: g.sum() for n, g in grads.items()}\n", "keep its shape"),
        ("def correct(grads, params, start):\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def correct(grads):\n    return grads\n", "TypeError"),
    ],
)
def test_a_wrong_one_is_one_line_before_the_first_round(text, why):
    sets = {"model.name": "logistic", "data.num-clients": 2, "run.num-rounds": 1, **write(text)}
    with pytest.raises(InputError, match=why) as error:
        fedmom.run(sets, out="run")
    assert str(error.value).startswith("algorithm.correction = 'mine:correct': ")
    assert "\n" not in str(error.value)
    assert not Path("run").exists()


NOISE = """
from fedmom.method.randomness import normal_like
def correct(grads, params, start, key):
    return {name: g + 0.1 * normal_like(g, key, i) for i, (name, g) in enumerate(grads.items())}
"""


def test_addressed_noise_is_the_same_on_every_path_and_another_for_every_client_step_and_seed():
    """Local differential privacy is such a correction: its noise must be there again when the run is resumed."""
    sets = {"data.dataset": "digits", "model.name": "logistic", "data.num-clients": 3, "run.num-rounds": 2}
    sets |= {"run.dtype": "float64", **write(NOISE)}
    ends = [fedmom.run({**sets, "engine.path": path}).state_dict for path in ("loop", "vmap")]
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], rtol=1e-11, atol=1e-12)
    seen = set()
    correct = fedmom.config.build.plan._correction("mine:correct", 0)
    other = fedmom.config.build.plan._correction("mine:correct", 1)
    zero = {"x": torch.zeros(2, dtype=F64)}
    for function in (correct, other):
        for client in range(2):
            for step in range(2):
                key = random_bits(torch.tensor(client), torch.tensor(step))
                seen |= set(function(zero, zero, zero, key)["x"].tolist())
    assert len(seen) == 16


@table(
    "body, why",
    [
        ("return {n: g + torch.randn(g.shape) for n, g in grads.items()}", "draws random numbers of torch"),
        ("return {n: g * np.random.rand() for n, g in grads.items()}", "draws random numbers of numpy"),
        (
            "return {n: g * calls.append(0) or g * len(calls) for n, g in grads.items()}",
            "changes 'calls' of mine, a global",
        ),
        ("return {n: g * int.from_bytes(os.urandom(4), 'big') for n, g in grads.items()}", "gives two answers"),
        ("return {n: g.half() for n, g in grads.items()}", "must keep its shape .* dtype torch.float32"),
        ("params['1.weight'].mul_(0.9); return grads", "writes into the parameters"),
        ("params['1.weight'].data.mul_(0.9); return grads", "writes into the parameter 1.weight"),
        ("[x.zero_() for x in start.values()]; return grads", "writes into the parameters"),
    ],
)
def test_one_that_breaks_the_contract_is_refused_before_the_first_round(body, why):
    body = body.replace("g * calls.append(0) or g * len(calls)", "(calls.append(0), g * len(calls))[1]")
    text = f"import os\nimport numpy as np, torch\ncalls = []\ndef correct(grads, params, start):\n    {body}\n"
    sets = {"model.name": "logistic", "data.num-clients": 2, "run.num-rounds": 1, "engine.path": "loop", **write(text)}
    with pytest.raises(InputError, match=rf"^algorithm\.correction.*{why}") as error:
        fedmom.run(sets, out="run")
    assert "\n" not in str(error.value)
    assert not Path("run").exists()
