"""What stays with a client (algorithm.personal): rounds, against a loop over modules and torch.optim.SGD."""

import copy
import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedmom
from both_sides import by_flower
from fedmom.backends.trainer import Node
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.partition import make_partition
from fedmom.engine.auto import _may_factor, choose
from fedmom.engine.engine import Engine
from fedmom.errors import DivergedError, InputError
from fedmom.method.state import flatten
from fedmom.records.files import CHECKPOINT, CLIENTS, FINAL, read_tensors
from fedmom.records.history import read_rounds
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, cohort, round_job
from fedmom.tasks.supervised import Supervised
from runs import F64, run_plan, simple_plan, tiny_images

NORM = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
OWN = {
    "norm": NORM,
    "head": ("last.weight", "last.bias"),
    "first": ("first.weight", "first.bias"),
    " last.bias,norm ": ("last.bias", *NORM),
    "bn.running_mean, bn.running_var, first.weight": ("bn.running_mean", "bn.running_var", "first.weight"),
}


def small_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 4), bn=nn.BatchNorm1d(4), last=nn.Linear(4, 3))
    return nn.Sequential(layers)


class Case(NamedTuple):
    N: int
    personal: str
    cohort: int = 0  # 0: all
    nesterov: bool = False
    policy: str = "average"
    epochs: int = 0
    weights: str = "uniform"
    running_var: str = "pooled"
    decay: float = 0.0
    beta: float = 0.9
    slow: tuple[float, float] = (0.0, 1.0)


CASES = [
    Case(1, "norm", nesterov=True),
    Case(2, "head", policy="reset"),
    Case(2, "norm", policy="local", cohort=1, running_var="mean"),
    Case(5, "first", cohort=2, weights="samples", nesterov=True, decay=0.01),
    Case(5, " last.bias,norm ", cohort=3, epochs=1, weights="samples", policy="local"),
    Case(5, "bn.running_mean, bn.running_var, first.weight", cohort=4, policy="reset", nesterov=True),
    Case(5, "norm", beta=0.0, slow=(0.5, 0.7)),
]


def begun(case, **options):
    data = tiny_images(40)
    partition = make_partition("dirichlet-class", data.y_train.numpy(), case.N, alpha=0.5, min_size=2, seed=1)
    assert case.N == 1 or len({*partition.sizes}) > 1
    problem = Supervised(data, small_net(), partition, dtype=F64, batch_size=5, personal=case.personal, **options)
    names = {"momentum_policy": case.policy, "running_var": case.running_var, "weight_decay": case.decay}
    names |= {"slow": case.slow, "local_epochs": case.epochs}
    names |= {"client_weights": case.weights, "nesterov": case.nesterov, "beta": case.beta, "seed": 2}
    return problem, simple_plan(case.N, cohort_size=case.cohort or case.N, num_rounds=3, **names)


def mean_of(rows, p, running_var):
    """Of clients' tensors {"params/NAME": …}, in the words of docs/method.md."""
    stacks = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    means = {}
    for name, value in stacks.items():
        if not value.is_floating_point():
            means[name] = value.amax(0)
            continue
        means[name] = torch.tensordot(p, value, 1)
        partner = stacks.get(name.replace("running_var", "running_mean"))
        if name.endswith("running_var") and partner is not None and running_var == "pooled":
            means[name] += torch.tensordot(p, partner**2, 1) - torch.tensordot(p, partner, 1) ** 2
    return means


def one_client(model, start, rows, problem, case, lr):
    """Steps of torch.optim.SGD from `start` on minibatches `rows` [I, B] -> (its tensors, its losses)."""
    model, tensors = copy.deepcopy(model).double(), problem.dataset
    moving, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    sgd = torch.optim.SGD(moving.values(), lr, case.beta, weight_decay=case.decay, nesterov=case.nesterov)
    with torch.no_grad():
        for name, p in moving.items():
            p.copy_(start[f"params/{name}"])
            sgd.state[p]["momentum_buffer"] = start[f"momentum/{name}"].clone()
        for name, b in buffers.items():
            b.copy_(start[f"buffers/{name}"])
    losses = []
    for row in rows:
        sgd.zero_grad()
        loss = cross_entropy(model((tensors.x_train[row].double() / 255 - 0.4) / 0.3), tensors.y_train[row])
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    found = {f"params/{n}": p.detach() for n, p in moving.items()}
    # With β = 0 torch keeps no momentum, and u is the gradient.
    found |= {f"momentum/{n}": sgd.state[p]["momentum_buffer"] if case.beta else p.grad for n, p in moving.items()}
    return found | {f"buffers/{n}": b for n, b in buffers.items()}, losses


def plain(case, problem, plan, lr=0.05):
    """Every round's (mean with that of what is personal, every client's own, the record's numbers)."""
    model, sizes = small_net(), problem.sizes
    x = {f"params/{n}": p.detach().double() for n, p in model.named_parameters()}
    state = {**x, **{f"momentum/{n.partition('/')[2]}": 0 * p for n, p in x.items()}}
    state |= {f"buffers/{n}": b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
    personal = {name for name in state if name.partition("/")[2] in OWN[case.personal]}
    own = [{n: state[n] for n in personal} for _ in range(case.N)]
    kept = [{n: state[n] for n in state if n.startswith("momentum/")} for _ in range(case.N)]
    slow = {n: 0 * v for n, v in x.items()}
    weigh = torch.tensor(sizes if case.weights == "samples" else np.ones(case.N), dtype=F64)
    for r in range(plan.num_rounds):
        ids = cohort(case.N, plan.cohort_size, plan.seed, r)
        ends, losses = [], []
        for c in ids:
            steps = case.epochs * -(-int(sizes[c]) // 5) or plan.num_local_steps
            momentum = {n: 0 * v for n, v in kept[c].items()} if case.policy == "reset" else {}
            momentum |= kept[c] if case.policy == "local" else {}
            rows = problem.sampler.draw(torch.tensor([c]), torch.tensor([r * steps]), steps)[0]
            end, loss = one_client(model, {**state, **momentum, **own[c]}, rows, problem, case, lr)
            own[c], kept[c] = {n: end[n] for n in personal}, {n: v for n, v in end.items() if n in kept[c]}
            ends.append({n: v for n, v in end.items() if n not in personal})
            losses.append(np.mean(loss))
        p = weigh[ids] / weigh[ids].sum()
        mean = mean_of(ends, p, case.running_var)
        spreads = [
            sum(float(w * ((end[n] - mean[n]) ** 2).sum()) for end, w in zip(ends, p, strict=True) for n in names)
            for names in ([n for n in mean if n.startswith(part)] for part in ("params/", "momentum/"))
        ]
        for n in [n for n in mean if n in slow]:
            slow[n] = case.slow[0] * slow[n] + (state[n] - mean[n]) / lr
            mean[n] = state[n] - case.slow[1] * lr * slow[n]  # which is the mean itself with α = 0 and η = 1
        state = mean | mean_of(own, weigh / weigh.sum(), case.running_var)
        rows = [one | more for one, more in zip(own, kept, strict=True)] if case.policy == "local" else own
        yield state, rows, {"train_loss": float(p @ torch.tensor(losses)), "spreads": spreads}


@pytest.mark.parametrize("path", ["loop", "vmap", "stack", "factors"])
def test_rounds_are_the_loops_of_plain_torch(path, monkeypatch):
    """By chunks of two clients, and means of what is personal in pieces of two."""
    monkeypatch.setattr("fedmom.rounds.own._HELD", 2)
    for case in CASES:
        problem, plan = begun(case)
        assert problem.personal == set(OWN[case.personal])
        done, records = run_plan(problem, plan, path=path, chunk_size=2)
        *_, (state, own, numbers) = every = [*plain(case, problem, plan)]
        got, rows = flatten(done.state), flatten(done.own)
        assert [*got] == [*flatten(problem.start())], "the model's order"
        assert rows.keys() == own[0].keys()
        for name, want in state.items():
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-10, msg=f"{case} {name}")
        for name in rows:
            want = torch.stack([one[name] for one in own])
            torch.testing.assert_close(rows[name], want, rtol=1e-10, atol=1e-10, msg=f"{case} {name}")
        for record, (_, _, numbers) in zip(records, every, strict=True):
            found = [record["consensus_distance"], record["momentum_spread"]]
            np.testing.assert_allclose(found, numbers["spreads"], rtol=1e-9, atol=1e-15)
            assert record["train_loss"] == pytest.approx(numbers["train_loss"], rel=1e-10)
        # Of 8 bytes each; u where the method sends it.
        sent = [n for n in state if n.partition("/")[2] not in OWN[case.personal]]
        sent = [n for n in sent if not n.startswith("momentum/") or (case.beta and case.policy == "average")]
        each = sum(8 * state[n].numel() for n in sent)
        assert done.bytes_sent == plan.num_rounds * plan.cohort_size * each


def test_the_choice_has_no_common_start_to_count_on():
    """No dense layer goes in factors, though this one would; and the run's own job, without rows, is timed."""
    data = tiny_images(40, side=32)
    partition = make_partition("iid", data.y_train.numpy(), 4)
    chosen = {}
    for personal in ("", "3"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 3))
        problem = Supervised(data, net, partition, batch_size=2, personal=personal)
        plan = simple_plan(4, num_local_steps=2)
        begin = beginning(problem, plan)
        job = round_job(problem, plan, begin)._replace(own=None)
        chosen[personal] = _may_factor(problem, plan.method, begin.state, job)
    assert chosen == {"": True, "3": False}
    found = choose(problem, plan.method, begin.state, job, path="stack", chunk_size=2)
    assert found.path == "stack"
    engine = Engine(problem, plan.method, path=found.path, chunk_size=found.chunk_size)
    engine.replays = SimpleNamespace(num_replayed=0)  # and nothing to replay a round by, as a GPU has it
    assert len([*run_rounds(problem, plan, engine, begin)]) == 3


def test_a_client_whose_own_tensors_break_ends_the_run():
    def breaks(g, x, start):
        return {n: v / 0 if n == "last.bias" else v for n, v in g.items()}

    problem, plan = begun(Case(2, "head"))
    plan = plan._replace(num_local_steps=1, eval_every=3, method=plan.method._replace(correction=breaks))
    with pytest.raises(DivergedError, match=r"a client's own params became NaN or infinite in round 1 at lr = 0\.05"):
        run_plan(problem, plan)


# --- runs --------------------------------------------------------------------------------------------------------

RUN = {
    "data.num-clients": 5,
    "model.name": "tests.apps.models:normed",
    "algorithm.personal": "2,4.bias",
    "algorithm.momentum-policy": "local",
    "algorithm.num-local-steps": 2,
    "algorithm.cohort-size": 3,
    "algorithm.client-weights": "samples",
    "run.num-rounds": 4,
    "run.dtype": "float64",
    "run.checkpoint-every": 1,
    "engine.path": "loop",
    "engine.threads": 1,
}
QUIET = {"callbacks": [fedmom.Callback()]}


class Stops(fedmom.Callback):
    def on_round(self, record, state):
        if record["round"] == 2:
            raise KeyboardInterrupt


def same(one: Path, other: Path) -> None:
    """What two folders hold, to 1e-10."""
    for name in (CLIENTS, FINAL):
        got, want = (read_tensors(folder / name)[0] for folder in (one, other))
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-10, atol=1e-10, msg=key)
    lines = [[record["bytes_sent"] for record in read_rounds(folder)] for folder in (one, other)]
    assert lines[0] == lines[1]


def test_a_resumed_run_has_the_same_bytes(tmp_path):
    keys = {**RUN, "algorithm.slow-momentum": 0.5}
    fedmom.run(keys, out=tmp_path / "whole", **QUIET)
    fedmom.run(keys, out=tmp_path / "parts", callbacks=[Stops()])
    assert fedmom.run(resume=tmp_path / "parts", **QUIET).status == "done"
    for name in (CLIENTS, FINAL, CHECKPOINT):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    names = read_tensors(tmp_path / "whole" / CLIENTS)[0]
    u = {f"momentum/{place}.{kind}" for place in (1, 2, 4) for kind in ("weight", "bias")}
    statistics = {f"buffers/2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {*names} == {*u, *statistics, "params/2.weight", "params/2.bias", "params/4.bias"}


def test_on_flower_who_does_not_answer_keeps_its_own(tmp_path):
    """Nodes that hold one client and two; in round 2 the node of clients 0 and 1 fails."""
    keys = {**RUN, "algorithm.cohort-size": 5, "server.on-failure": "proceed"}
    fedmom.run(keys, out=tmp_path / "engine", **QUIET)
    by_flower(keys, 3, out=tmp_path / "flower")
    same(tmp_path / "flower", tmp_path / "engine")

    def fault(message, node):
        late = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2
        return ValueError("broken") if late and node["partition-id"] == 0 else None

    seen = []
    for length, options in ((1, {}), (2, {"fault": fault})):
        by_flower({**keys, "run.num-rounds": length}, 3, options, out=tmp_path / str(length))
        seen.append(read_tensors(tmp_path / str(length) / CLIENTS)[0])
    for name, before in seen[0].items():
        assert torch.equal(seen[1][name][:2], before[:2])
        assert not torch.equal(seen[1][name][2:], before[2:])
    node = Node(resolve(load(keys)).config)
    for start, words in (
        (node.sent, "the clients' own params/2.weight does not fit algorithm.personal = '2,4.bias'"),
        (node.begin[0], "params/2.weight does not fit model.name = "),
    ):
        with pytest.raises(InputError, match=f"arrays: {words}"):
            node.train([0], 0, start)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("Ray: tasks")
def test_actors_and_a_simulation_are_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    fedmom.run(RUN, out=tmp_path / "engine", **QUIET)
    for name, more in {"workers": {"engine.workers": 2}, "simulation": {"run.backend": "simulation"}}.items():
        ray = {"simulation.num-actors": 2, "simulation.num-cpus": 0.5}
        fedmom.run({**RUN, **more, **ray}, out=tmp_path / name, **QUIET)
        same(tmp_path / name, tmp_path / "engine")
