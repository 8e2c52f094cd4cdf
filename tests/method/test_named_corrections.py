"""Corrections that forget and that are told of the round, named ones between rounds, and what stays with a client."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_presets import C, H, Q, begun

import fedmom
from fedmom.config.build import make_plan, make_problem
from fedmom.config.build.watched import watched_class
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.engine.engine import Engine
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.errors import InputError
from fedmom.method.corrections import Correction
from fedmom.method.named.table import NAMED_CORRECTIONS, CorrectionNumbers
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from runs import image_problem, simple_plan


def test_a_resumed_run_has_the_bytes_of_a_whole_one(in_tmp):
    """With a cohort, and an outer step on top."""
    keys = Q | {"algorithm.cohort-size": 2, "engine.path": "loop", "run.num-rounds": 5, "algorithm.outer": "fedavgm"}
    for name, files in (("scaffold", 3), ("fedcm", 2), ("mime-lite", 2)):
        sets = keys | {"algorithm.name": name}
        fedmom.run(sets, out=f"{name}-whole")
        fedmom.run({**sets, "run.num-rounds": 2}, out=f"{name}-parts")
        fedmom.run(resume=f"{name}-parts", sets={"run.num-rounds": 5})
        names = {path.name for path in Path(f"{name}-whole").glob("*.safetensors")}
        assert len(names) == files  # clients.safetensors where clients keep a state
        for file in names:
            assert Path(f"{name}-whole", file).read_bytes() == Path(f"{name}-parts", file).read_bytes(), file


class Short(Correction):
    """Counts its client's steps of a round, and the rounds; the server is told x before the round and after it."""

    def start(self, params):
        return {"steps": torch.zeros(()), "rounds": torch.zeros(())}, {n: 0 * x for n, x in params.items()}

    def gradient(self, g, x, x_start, client, server):
        return g, {"steps": client["steps"] + 1, "rounds": client["rounds"]}

    def finish(self, x, x_start, client, server, num_steps, total_lr):
        after = {"steps": client["steps"], "rounds": client["rounds"] + 1}
        return after, {"steps": client["steps"].double()}

    def gather(self, server, mean_message, share, x_mean, total_lr, x_start):
        assert mean_message["steps"].item() == 5
        return {n: (x_start[n] - x_mean[n]) / total_lr for n in server}

    def forgets(self, name):
        return name == "steps"


def test_a_correction_of_ones_own_may_forget_and_be_told_of_the_round():
    for path in ("loop", "vmap"):
        problem, plan, _ = begun({"algorithm.name": "local-sgd", "algorithm.outer": "fedavgm"})
        watched = watched_class("algorithm.correction", Short, 0)
        plan = plan._replace(method=plan.method._replace(correction=watched))
        engine = Engine(problem, plan.method, path=path, chunk_size=2)
        done = beginning(problem, plan)
        for new, _ in run_rounds(problem, plan, engine, done):
            assert set(new.client_correction) == {"rounds"}
            assert new.client_correction["rounds"].tolist() == [new.round] * 3
            # Of x̂ before the outer step: the mean of the clients' own ways from where they began.
            x, ys = done.state.params["x"].item(), []
            for h, c in zip(H, C, strict=True):
                ys.append(c + (1 - 0.05 * h) ** 5 * (x - c))
            assert new.state.correction["x"].item() == pytest.approx((x - np.mean(ys)) / 0.25, rel=1e-12)
            done = new


def test_what_stays_with_a_client_is_corrected_by_nobody():
    """The last layer is each client's own: the server's states and the messages are of the rest alone."""
    keys = {"data.num-clients": 3, "model.name": "mlp", "model.hidden": 4, "run.num-rounds": 2}
    keys |= {"data.dataset": "digits", "data.batch-size": 4, "algorithm.personal": "head", "engine.path": "loop"}
    for name in ("scaffold", "fedcm", "mime-lite"):
        config = resolve(load({**keys, "algorithm.name": name, "algorithm.num-local-steps": 2})).config
        problem, plan = make_problem(config, "cpu"), make_plan(config)
        engine = Engine(problem, plan.method, path="loop", chunk_size=1)
        *_, (end, _) = run_rounds(problem, plan, engine, beginning(problem, plan))
        shared = set(end.state.params) - problem.personal
        assert set(end.state.correction) == shared
        sent = sum(end.state.params[n].numel() for n in shared) * 4 * (1 if name == "fedcm" else 2)
        assert end.bytes_sent == 2 * 3 * sent


def test_every_way_of_running_them_is_compared_with_plain_torch(monkeypatch):
    """By clients of unequal steps: states within a round, and FedNova's scaled ways on the folded paths too."""
    numbers = CorrectionNumbers(mu=0.3, alpha=0.2, beta=0.9)
    for name in ("scaffold", "mime-lite", "fedprox", "fednova"):
        problem = image_problem("mlp", 3)
        problem.sizes = np.array([5, 11, 18])
        plan = simple_plan(3, momentum_policy="reset", local_epochs=1, beta=0.9)._replace(normalised=name == "fednova")
        made = None if name == "fednova" else NAMED_CORRECTIONS[name].make(numbers)
        plan = plan._replace(method=plan.method._replace(correction=made))
        job = round_job(problem, plan, beginning(problem, plan))
        yardstick = Yardstick(problem, plan.method, job, own_rows=False)
        for path in {"fedprox": ("stack",), "fednova": ("vmap", "stack")}.get(name, ("vmap",)):
            assert yardstick.differs(path) == "", (name, path)
    for runner in ("fedmom.engine.engine", "fedmom.engine.stacked.runner"):
        monkeypatch.setattr(f"{runner}.scaled", lambda x_start, rows, by: rows)
    yardstick = Yardstick(problem, plan.method, job, own_rows=False)
    assert all("differs from plain torch's" in yardstick.differs(path) for path in ("vmap", "stack"))


def test_a_resume_with_another_number_of_the_method_is_refused(in_tmp):
    keys = Q | {"algorithm.name": "fedprox", "engine.path": "loop", "run.num-rounds": 1}
    fedmom.run(keys, out="run")
    with pytest.raises(InputError, match=r"algorithm\.prox-mu"):
        fedmom.run(resume="run", sets={"run.num-rounds": 2, "algorithm.prox-mu": 0.5})


def test_fedprox_holds_what_stays_with_a_client_to_its_own_start():
    """Rows of the clients' own, through the folded model as one after another, in a cohort of unequal steps."""
    keys = {"data.num-clients": 3, "data.partition": "quantity", "run.num-rounds": 3, "run.seed": 4}
    keys |= {"data.dataset": "oracle:examples", "data.batch-size": 8}
    keys |= {"algorithm.name": "fedprox", "algorithm.prox-mu": 2.0, "algorithm.local-epochs": 2}
    keys |= {"model.name": "oracle:squares", "algorithm.personal": "linear.bias", "run.dtype": "float64"}
    config = resolve(load({**keys, "algorithm.cohort-size": 2})).config
    problem, plan, ends = make_problem(config, "cpu"), make_plan(config), []
    for path in ("loop", "stack"):
        engine = Engine(problem, plan.method, path=path, chunk_size=2)
        *_, (end, _) = run_rounds(problem, plan, engine, beginning(problem, plan))
        ends.append(end.own.params["linear.bias"])
    assert len({*plan.steps_of(problem.sizes).tolist()}) > 1
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)
    free = plan._replace(method=plan.method._replace(correction=None))
    engine = Engine(problem, free.method, path="loop", chunk_size=1)
    *_, (end, _) = run_rounds(problem, free, engine, beginning(problem, free))
    assert (end.own.params["linear.bias"] - ends[0]).abs().max() > 1e-3
