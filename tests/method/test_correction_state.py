"""A correction with state, by its class: what is refused in one line, what is watched, and a resume to the byte."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
from fedmom.config.build import make_plan
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.engine import Engine
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.errors import InputError
from fedmom.method import corrections
from fedmom.method.corrections import Correction
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from runs import F64, image_problem, simple_plan

CLASS = """
import os
import torch, fedmom
calls = []
class Mine(fedmom.Correction):
    count = 0
    def __init__(self):
        self.seen = 0
    def start(self, params):
        return {n: 0 * x for n, x in params.items()}, {n: 0 * x for n, x in params.items()}
    def gradient(self, g, x, x_start, client, server):
        return {n: g[n] - 0.1 * client[n] + 0.1 * server[n] for n in g}
    def finish(self, x, x_start, client, server, num_steps, total_lr):
        new = {n: (x_start[n] - x[n]) / total_lr for n in x}
        return new, {n: new[n] - client[n] for n in x}
    def gather(self, server, mean_message, share):
        return {n: s + share * mean_message[n] for n, s in server.items()}
"""
QUADRATIC = {
    "data.dataset": "quadratic",
    "data.curvatures": "1; 3; 0.5",
    "data.centers": "4; -2; 1",
    "data.start": "0",
    "algorithm.num-local-steps": 2,
    "algorithm.lr": 0.05,
    "run.num-rounds": 1,
    "engine.path": "loop",
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    sys.modules.pop("mine", None)


def write(old="", new="", text=CLASS):
    assert old in text
    Path("mine.py").write_text(text.replace(old, new, 1))
    sys.modules.pop("mine", None)
    return {"algorithm.correction": "mine:Mine"}


GRADIENT = "        return {n: g[n] - 0.1 * client[n] + 0.1 * server[n] for n in g}\n"
FINISH = "        return new, {n: new[n] - client[n] for n in x}\n"
GATHER = "        return {n: s + share * mean_message[n] for n, s in server.items()}\n"
START = "        return {n: 0 * x for n, x in params.items()}, {n: 0 * x for n, x in params.items()}\n"
# What is replaced, by what, and the words of the refusal.
WRONG = [
    (START, "        return {}\n", r"start must return \(client, server\)"),
    (START, "        return {'a': 1.0}, {}\n", "start gives the client's a as float, must be a dense real tensor"),
    (START, "        return [], {}\n", "start: the client's tensors must be in a dict"),
    (GRADIENT, "        return None\n", "gradient must give back a dict of the gradient of tensors"),
    (GRADIENT, "        return g, {}\n", "gradient must give back a dict of the client's tensors"),
    (
        GRADIENT,
        "        return {n: v.sum() for n, v in g.items()}\n",
        "the gradient of x must keep its shape",
    ),
    (GRADIENT, "        client['x'].add_(1)\n        return g\n", "gradient writes into the tensors"),
    (GRADIENT, "        server['x'].data.add_(1)\n        return g\n", "writes into the tensor x that it was given"),
    (GRADIENT, "        return {n: v + torch.randn(v.shape) for n, v in g.items()}\n", "draws random numbers of torch"),
    (GRADIENT, "        self.seen += 1\n        return g\n", "changes the attribute 'seen' of Mine"),
    (GRADIENT, "        Mine.count += 1\n        return g\n", "changes 'count' of the class Mine"),
    (GRADIENT, "        calls.append(0)\n        return g\n", "changes 'calls' of mine, a global variable"),
    (
        GRADIENT,
        "        return {n: v * os.urandom(1)[0] / 7 for n, v in g.items()}\n",
        "gives two answers in the same place",
    ),
    (FINISH, "        return 1 / 0\n", "finish raised ZeroDivisionError"),
    (FINISH, "        return new\n", r"finish must return \(client, message\)"),
    (
        FINISH,
        "        return {n: v.float() for n, v in new.items()}, {}\n",
        "client's x must keep its shape",
    ),
    (
        FINISH,
        "        return new, {'n': num_steps}\n",
        "the message's n as torch.int64; a mean needs real",
    ),
    (FINISH, "        return new, {str(float(x['x'])): new['x']}\n", "finish gives another message than before"),
    (GATHER, "        return {}\n", r"gather must give back a dict of the server's tensors that it was given \(x\)"),
    (GATHER, "        server['x'] *= 2\n        return server\n", "gather writes into the tensors"),
    ("def __init__(self):", "def __init__(self, size):", "making one without arguments raised TypeError"),
]


def test_a_wrong_class_is_one_line_before_the_first_round():
    assert fedmom.run({**QUADRATIC, **write()}).status == "done"
    assert fedmom.run({**QUADRATIC, **write("(fedmom.Correction)")}).status == "done"  # need not derive from it
    for old, new, why in WRONG:
        with pytest.raises(InputError, match=why) as error:
            fedmom.run({**QUADRATIC, **write(old, new)}, out="run")
        assert str(error.value).startswith("algorithm.correction"), new
        assert "\n" not in str(error.value)
        assert not Path("run").exists()
    bare = "class Mine:\n    def start(self, params):\n        return {}, {}\n"
    with pytest.raises(InputError, match=r"the class has no method gradient; derive it from fedmom\.Correction"):
        fedmom.run({**QUADRATIC, **write(text=bare)})


def test_where_there_is_no_server_or_another_strategy_or_a_folded_path_it_is_refused():
    for changes, why in (
        ({"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}, "needs a server, and d-sgd-m has none"),
        (
            {"run.backend": "simulation", "server.strategy": "fedavg"},
            r"^server\.strategy = 'fedavg': .* needs pr-sgd-m",
        ),
    ):
        with pytest.raises(InputError, match=why):
            make_plan(resolve(load({**QUADRATIC, **changes, **write()})).config)
    sets = {"model.name": "logistic", "data.num-clients": 2, "run.num-rounds": 1, **write()}
    with pytest.raises(InputError, match=r"engine\.path = 'stack': algorithm\.correction is written for one client"):
        fedmom.run({**sets, "engine.path": "stack"})


def test_a_resumed_run_has_the_bytes_of_a_whole_one_and_other_code_is_refused():
    sets = {
        **QUADRATIC,
        "run.num-rounds": 5,
        "algorithm.cohort-size": 2,
        "algorithm.momentum-policy": "local",
        **write(),
    }
    fedmom.run(sets, out="whole")
    fedmom.run({**sets, "run.num-rounds": 2}, out="parts")
    write("0.1 * client", "0.2 * client")
    with pytest.raises(InputError, match=r"^algorithm\.correction = 'mine:Mine': its code was changed"):
        fedmom.run(resume="parts", sets={"run.num-rounds": 3})
    write()
    for length in (3, 5):
        fedmom.run(resume="parts", sets={"run.num-rounds": length})
    for name in ("checkpoint", "clients", "final"):
        whole, parts = (Path(folder, f"{name}.safetensors").read_bytes() for folder in ("whole", "parts"))
        assert whole == parts, name
    loaded = fedmom.load("parts")
    assert set(loaded.state_dict) == {"x"}


class Remembers(Correction):
    """Of everything that it is given, something; with noise by the address of the step."""

    def start(self, params):
        return {"own": torch.ones((), dtype=F64), "steps": torch.tensor(0)}, {n: 0 * x for n, x in params.items()}

    def gradient(self, g, x, x_start, client, server, key):
        noise = {n: fedmom.normal_like(v, key) for n, v in g.items()}
        new = {n: v * client["own"].to(v.dtype) + server[n] + 0.1 * (x[n] - x_start[n]) for n, v in g.items()}
        own = client["own"] + sum(v.square().sum().to(F64) for v in g.values())
        return {n: new[n] + 0.01 * noise[n] for n in g}, {"own": own.sqrt(), "steps": client["steps"] + 1}

    def finish(self, x, x_start, client, server, num_steps, total_lr):
        return client, {n: (x_start[n] - x[n]) / (total_lr * num_steps) for n in x}

    def gather(self, server, mean_message, share):
        return {n: s + share * mean_message[n] for n, s in server.items()}


def test_loop_and_vmap_agree_on_a_network_and_with_plain_torch(monkeypatch):
    """By unequal numbers of steps, chunks that are not full, and two policies."""
    for policy in ("average", "local"):
        problem = image_problem("mlp", 3)
        problem.sizes = np.array([5, 11, 18])
        plan = simple_plan(3, momentum_policy=policy, weight_decay=0.01, local_epochs=1, num_rounds=2)
        plan = plan._replace(method=plan.method._replace(correction=Remembers()))
        assert len({*plan.steps_of(problem.sizes).tolist()}) > 1
        begin = beginning(problem, plan)
        yardstick = Yardstick(problem, plan.method, round_job(problem, plan, begin), own_rows=False)
        assert [yardstick.differs(path) for path in ("loop", "vmap")] == ["", ""]
        ends = []
        for path, chunk_size in (("loop", 1), ("vmap", 2), ("vmap", 3)):
            engine = Engine(problem, plan.method, path=path, chunk_size=chunk_size)
            *_, (end, _) = run_rounds(problem, plan, engine, begin)
            ends.append(end)
        for end in ends[1:]:
            for got, want in zip(end.state, ends[0].state, strict=True):
                for name, value in want.items():
                    torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)
            for name, value in ends[0].client_correction.items():
                torch.testing.assert_close(end.client_correction[name], value, rtol=1e-10, atol=1e-12)
        assert ends[0].client_correction["steps"].tolist() == (2 * plan.steps_of(problem.sizes)).tolist()
    # What is wrong in a state or a message alone is seen too.
    right = corrections.finish_round

    def late(correction, state, start, server, num_steps, lrs):
        return right(correction, state, start, server, num_steps, 1.01 * lrs)

    monkeypatch.setattr("fedmom.engine.engine.finish_round", late)
    found = Yardstick(problem, plan.method, round_job(problem, plan, begin), own_rows=False)
    assert re.match(r"the correction's \S+ differs from plain torch's", found.differs("vmap"))
