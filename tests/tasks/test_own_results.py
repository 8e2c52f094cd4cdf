"""What every client gets: each on its own examples, in one pass or by models of their own, as a plain loop has it."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from test_task import Quantiles, data_for, net_for, torchs
from torch import nn
from torch.nn import functional

import fedmom
from fedmom.backends.local import make_local
from fedmom.config.build import make_plan, make_problem
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.batches import Sampler
from fedmom.data.datasets import Dataset
from fedmom.data.given.held_out import OwnTests, held_out, held_out_sizes, split
from fedmom.data.partition import Partition, make_partition
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.errors import InputError
from fedmom.method.state import ClientState
from fedmom.records.history import read_clients
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning
from fedmom.rounds.results import STATISTICS, ClientResults, client_results, statistics, summary, summary_names
from fedmom.tasks import evaluation
from fedmom.tasks.kinds import Asked, make_task
from fedmom.tasks.supervised import Supervised
from laws import table
from runs import F64, LOCAL, give_digits, run_plan, simple_plan

ASKED = {
    "classification": Asked(metrics="accuracy,top5,f1,auc,perplexity", class_weights=(1.0, 3.0, 0.5)),
    "per-token": Asked(metrics="accuracy,top5,perplexity"),
    "multi-label": Asked(metrics="accuracy,f1,auc"),
    "regression": Asked(metrics="mae,rmse,r2"),
    "own": Asked(),
}


def parts(sizes):
    """A partition of examples 0, 1, … in an order of their own."""
    order = np.random.default_rng(5).permutation(sum(sizes))
    return Partition(order, np.concatenate([[0], np.cumsum(sizes)]))


def problem_for(kind, sizes, net=None):
    """Clients whose own test examples, `sizes` of them, are the data set's test examples."""
    x, y, outputs = data_for(kind, max(60, sum(sizes)))
    task = Quantiles() if kind == "own" else make_task(kind, ASKED[kind])
    train = make_partition("iid", np.zeros(len(y), np.int64), len(sizes), seed=1)
    data = Dataset(x, y, x, y, outputs, (), (), "none")
    own = OwnTests(x, y, parts(sizes))
    return Supervised(data, net or net_for(kind, outputs), train, batch_size=4, task=task, dtype=F64, own=own)


def plain_values(problem, model, rows, kind):
    """The loss by torch, and the task's measures of all these examples at once (test_task holds them to others)."""
    x, y = problem.dataset.x_test[rows], problem.dataset.y_test[rows]
    with torch.no_grad():
        outputs = model.eval()(x)
        loss = torchs(kind, ASKED[kind])(outputs, y).item()
    found = {**problem.task.values(problem.task.judge(outputs, problem._judged(y))), "loss": loss}
    return found | dict.fromkeys(says_nothing(kind, outputs, y, found), math.nan)


def says_nothing(kind, outputs, y, found):
    """Measures of which these examples say nothing: no token counts, no label has both kinds, nothing varies."""
    if kind == "per-token":
        return [*found] if bool((y == -100).all()) else []
    several = len(y.unique(dim=0)) > 1
    if kind == "multi-label":
        return [*([] if several else ["auc"]), *([] if bool(((outputs > 0) | (y > 0)).any()) else ["f1"])]
    return [] if several else {"classification": ["auc"], "regression": ["r2"]}.get(kind, [])


@table("kind", ASKED)
def test_x_is_judged_on_every_clients_own_examples(kind, monkeypatch):
    """Pieces of 1, 3 and 500 examples; N = 1, 2, 5 and 12, clients without an example first, last and between."""
    for sizes in ((7,), (2, 0), (0, 3, 1, 0, 11), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9, 0)):
        problem = problem_for(kind, sizes)
        state = problem.start()
        for piece in (1, 3, 500):
            monkeypatch.setattr(evaluation, "_PIECE", piece)
            monkeypatch.setattr(evaluation, "_FEW", 1)
            found = problem.evaluate_own(state)
            assert set(found) == {"loss", *problem.task.metrics}
            for c, size in enumerate(sizes):
                got = {name: values[c] for name, values in found.items()}
                if not size:
                    assert all(np.isnan(value) for value in got.values())
                    continue
                want = plain_values(problem, problem.model, problem.own.partition.of(c), kind)
                assert got == pytest.approx(want, rel=1e-11, abs=1e-12, nan_ok=True), (sizes, piece, c)


def shifted(net, c):
    """Another model for every client, its buffers too."""
    model, generator = copy.deepcopy(net), torch.Generator().manual_seed(c)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=F64)
    return model


def rows_for(models, problem):
    state = problem.start()
    given = [model.state_dict() for model in models]
    return ClientState(*({n: torch.stack([one[n] for one in given]) for n in tree} for tree in state[:3]))


@table("kind", ASKED)
def test_clients_own_models_are_judged_each_on_its_own_examples(kind):
    for sizes in ((7,), (2, 0), (0, 40, 1, 33, 5, 0)):
        problem = problem_for(kind, sizes)
        models = [shifted(problem.model, c) for c in range(len(sizes))]
        ids = torch.arange(len(sizes)).flip(0)  # rows may come in any order
        found = problem.evaluate_own_rows(rows_for([models[c] for c in ids], problem), ids)
        for place, c in enumerate(ids.tolist()):
            got = {name: values[place] for name, values in found.items()}
            if not sizes[c]:
                assert all(np.isnan(value) for value in got.values())
                continue
            want = plain_values(problem, models[c], problem.own.partition.of(c), kind)
            assert got == pytest.approx(want, rel=1e-11, abs=1e-12, nan_ok=True), (sizes, c)


class Odd(nn.Module):
    """What torch.vmap does not take: it looks at a number."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3).double()

    def forward(self, x):
        return self.inner(x) * (2.0 if float(x.sum()) > -1e9 else 1.0)


def test_models_go_forward_together_where_torch_maps_them():
    """With BatchNorm's own statistics too; what cannot be mapped has the same numbers one after another."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    for model, stacks in ((net, True), (Odd(), False)):
        problem = problem_for("regression", (3, 40, 1), model)
        problem.task = problem.evaluation.task = make_task("classification", Asked(metrics="accuracy"))
        labels = torch.arange(60) % 3
        problem.dataset = problem.dataset._replace(y_test=labels)
        problem.own = problem.own._replace(y=labels)
        models = [shifted(model, c) for c in range(3)]
        found = problem.evaluate_own_rows(rows_for(models, problem), torch.arange(3))
        assert problem.evaluation.stacks is stacks
        for c, one in enumerate(models):
            rows = problem.own.partition.of(c)
            with torch.no_grad():
                outputs = one.eval()(problem.dataset.x_test[rows])
            assert found["loss"][c] == pytest.approx(functional.cross_entropy(outputs, labels[rows]).item(), rel=1e-12)
            assert found["accuracy"][c] == float((outputs.argmax(1) == labels[rows]).double().mean())


def test_every_client_holds_out_its_share_and_no_other_client_matters():
    sizes = np.array([1, 2, 3, 10, 100, 0, 7])
    for share in (0.01, 0.2, 0.5, 0.99):
        out, counts = held_out(sizes, share, 3), held_out_sizes(sizes, share)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        assert np.bincount(owner[out], minlength=len(sizes)).tolist() == counts.tolist()
        some = sizes > 1
        assert (counts[~some] == 0).all()
        assert ((counts[some] >= 1) & (counts[some] < sizes[some])).all()
        halves_up = [math.floor(share * n + 0.5) for n in sizes[some]]
        assert counts[some].tolist() == [min(max(one, 1), n - 1) for one, n in zip(halves_up, sizes[some], strict=True)]
        for c in range(len(sizes)):  # a node that knows its own examples alone draws the same
            assert (held_out(sizes[c : c + 1], share, 3, np.array([c])) == out[owner == c]).all()
    assert (held_out(sizes, 0.5, 3) != held_out(sizes, 0.5, 4)).any()
    same_sizes = held_out(np.full(40, 10), 0.5, 3).reshape(40, 10)
    assert len(np.unique(same_sizes, axis=0)) > 30  # of 252: clients of one size hold out examples of their own
    whole = parts(sizes.tolist())
    training, tests = split(whole, 0.2, 3)
    for c in range(len(sizes)):
        assert sorted([*training.of(c), *tests.of(c)]) == sorted(whole.of(c))
    drawn = np.array([held_out(np.array([10]), 0.5, seed) for seed in range(400)]).mean(0)
    assert np.abs(drawn - 0.5).max() < 0.1  # 4 standard deviations


def as_taken(problem, x):
    """Images as the model takes them, by hand."""
    data = problem.dataset
    mean, std = (torch.tensor(one, dtype=F64)[:, None, None] for one in (data.mean, data.std))
    return (x.double() / 255 - mean) / std


def settings(**more):
    keys = {"data.num-clients": 5, "data.client-test-share": 0.3, "model.name": "mlp", "model.hidden": 8}
    keys |= {"run.dtype": "float64", "run.num-rounds": 4, "algorithm.num-local-steps": 3, "run.client-eval-every": 3}
    keys |= {"engine.path": "loop", "data.batch-size": 4}
    return keys | {name.replace("__", ".").replace("_", "-"): value for name, value in more.items()}


@table("policy, nesterov", [("average", False), ("average", True), ("reset", False), ("local", True)])
def test_personal_steps_are_plain_torchs_from_x_and_u(policy, nesterov):
    """k steps of every client from x̂ and û (0, its own), on the minibatches that it draws next; N = 5, of which 3.

    With the γ of the ninth and last step of the run, which is a tenth of the others.
    """
    more = {"algorithm__momentum_policy": policy, "algorithm__nesterov": nesterov, "algorithm__cohort_size": 3}
    more |= {"algorithm__lr_schedule": "step", "algorithm__lr_milestones": "0.85"}
    config = resolve(load(settings(**more, run__personal_steps=4, run__num_rounds=3))).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    found = {}
    for path in ("loop", "vmap", "stack"):
        done, records = run_plan(problem, plan, path=path, chunk_size=2)
        found[path] = done.results.values
        assert {name: records[-1][name] for name in done.results.record()} == done.results.record()
    assert all("own_mean_loss" not in record for record in records[:-1])
    state, data = done.state, problem.dataset
    sampler, tests = Sampler(Partition(problem.sampler.indices.numpy(), problem.sampler.offsets), 4), problem.own
    for c in range(5):
        model = copy.deepcopy(problem.model)
        model.load_state_dict(state.params)
        sgd = torch.optim.SGD(model.parameters(), 0.005, 0.9, nesterov=nesterov)
        own = {"average": state.momentum, "reset": {}, "local": done.own and done.own.momentum}[policy]
        for name, p in model.named_parameters():
            begin = own[name][c] if policy == "local" else own.get(name, torch.zeros_like(p))
            sgd.state[p]["momentum_buffer"] = begin.clone()
        drawn = sampler.draw(torch.tensor([c]), torch.tensor([9]), 4)[0]
        for rows in drawn:
            sgd.zero_grad()
            functional.cross_entropy(model(as_taken(problem, data.x_train[rows])), data.y_train[rows]).backward()
            sgd.step()
        rows = tests.partition.of(c)
        with torch.no_grad():
            loss = functional.cross_entropy(model(as_taken(problem, data.x_train[rows])), data.y_train[rows]).item()
        for path, values in found.items():
            assert values["personal_loss"][c] == pytest.approx(loss, rel=1e-10), (path, c)


@table("more", [{"run__personal_steps": 1}, {"algorithm__personal": "head"}, {"algorithm__name": "d-sgd-m"}])
def test_no_more_models_are_held_at_a_time_than_are_stacked(more, monkeypatch):
    """So the memory of a look does not grow with N; each client is judged once."""
    config = resolve(load(settings(**more, data__num_clients=11, run__num_rounds=1))).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    monkeypatch.setattr("fedmom.rounds.clients._CHUNK", 4)
    held, judge = list[list[int]](), problem.evaluate_own_rows

    def watched(rows, ids):
        assert all(len(value) == len(ids) for tree in rows for value in tree.values())
        held.append(ids.tolist())
        return judge(rows, ids)

    problem.evaluate_own_rows = watched
    if plan.topology is not None:
        engine = Engine(problem, plan.method, path="stack", chunk_size=4)
        list(run_rounds(problem, plan, GossipRounds(engine, plan.topology, "cpu"), beginning(problem, plan)))
    else:
        run_plan(problem, plan, path="stack", chunk_size=4)
    assert [c for ids in held for c in ids] == list(range(11))
    assert max(map(len, held)) == 4


def test_statistics_are_those_of_the_clients_that_have_examples():
    for n in (1, 2, 5, 11, 250):
        values = np.random.default_rng(n).random(n)
        said = ClientResults(
            3, {"own_accuracy": np.append(values, np.nan), "own_loss": np.append(values, np.nan)}
        ).record()
        worst = -(-n // 10)
        rising, falling = np.sort(values)[:worst].mean(), np.sort(values)[-worst:].mean()
        assert said["own_mean_accuracy"] == said["own_mean_loss"] == pytest.approx(np.mean(values))
        assert (said["own_worst10_accuracy"], said["own_worst10_loss"]) == pytest.approx((rising, falling))
        quartiles = [said[f"own_{name}_loss"] for name in ("q25", "median", "q75")]
        assert quartiles == pytest.approx(np.percentile(values, [25, 50, 75]))
        assert said["own_accuracy_jain"] == pytest.approx(values.sum() ** 2 / n / (values**2).sum())
        assert sum(said["own_accuracy_histogram"]["counts"]) == sum(said["own_loss_histogram"]["counts"]) == n
        assert "own_loss_jain" not in said
        for name in ("own_accuracy", "own_loss"):
            assert [key for key in said if key in summary_names(name)] == [*summary_names(name)]
            assert set(statistics(name)) < set(summary_names(name))
    assert summary("own_accuracy", np.zeros(3))["own_accuracy_jain"] == 1.0  # nobody gets anything, alike
    assert summary("own_accuracy", np.array([1.0, 0.0, 0.0, 0.0]))["own_accuracy_jain"] == 0.25
    assert summary("own_accuracy", np.zeros(0)) == {}
    assert len(STATISTICS) == 5


def lines(folder, name):
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("wall_seconds", "client_steps_per_second")} for one in found]


def test_a_run_tells_and_keeps_them_and_a_resumed_one_has_the_same(tmp_path):
    keys = settings(run__personal_steps=2, run__checkpoint_every=1)
    whole = fedmom.run(keys, out=tmp_path / "whole")
    history = read_clients(tmp_path / "whole")
    assert [one.round for one in history.results] == [3, 4]
    assert (history.examples + history.test_examples).sum() == 1437
    assert ["own_mean_accuracy" in record for record in whole.rounds] == [False, False, True, True]
    last = history.results[-1]
    assert {name: whole.rounds[-1][name] for name in last.record()} == last.record()
    assert set(last.values) == {"own_loss", "own_accuracy", "personal_loss", "personal_accuracy"}
    # Cut at round 2, and a run that ended there and is now longer: it looked at its clients when it ended.
    fedmom.run({**keys, "run.num-rounds": 2}, out=tmp_path / "short")
    assert [one.round for one in read_clients(tmp_path / "short").results] == [2]
    fedmom.run(sets={"run.num-rounds": 4}, resume=tmp_path / "short")
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert lines(tmp_path / "short", name) == lines(tmp_path / "whole", name)
    assert (tmp_path / "short/final.safetensors").read_bytes() == (tmp_path / "whole/final.safetensors").read_bytes()
    with open(tmp_path / "whole/clients.jsonl", "a") as file:
        file.write('{"round": 5, "own_l')  # a kill cut it short
    assert [one.round for one in read_clients(tmp_path / "whole").results] == [3, 4]


def test_other_test_examples_of_the_clients_are_another_run(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((30, 4), np.float32), "y_train": np.arange(30) % 3, "who": np.arange(30) % 5}
    arrays |= {"x_test": rng.random((20, 4), np.float32), "y_test": np.arange(20) % 3, "who_test": np.arange(20) % 5}
    np.savez(tmp_path / "data.npz", **arrays)
    keys = {"data.dataset": str(tmp_path / "data.npz"), "data.partition": "natural", "data.clients": "who"}
    keys |= {"data.num-clients": 0, "model.name": "logistic", "run.num-rounds": 2, "run.client-eval-every": 1}
    fedmom.run(keys, out=tmp_path / "run")
    np.savez(tmp_path / "data.npz", **arrays | {"who_test": np.arange(20) % 4})
    with pytest.raises(InputError, match=r"client-eval-every = 1: the clients' own test examples was changed"):
        fedmom.run(sets={"run.num-rounds": 3}, resume=tmp_path / "run")


def test_a_model_of_a_clients_own_that_diverges_ends_no_run():
    """x̂ has not: the client is counted, and the others make the statistics."""
    values = np.array([0.5, np.inf, 0.7, np.nan])
    said = ClientResults(1, {"personal_loss": values, "own_loss": np.array([0.1, 0.2, 0.3, np.nan])}).record()
    assert (said["personal_num_diverged"], said["personal_mean_loss"]) == (1, 0.6)
    assert ClientResults(1, {"own_loss": values}).record()["own_mean_loss"] == math.inf  # the run diverged
    both = {"personal_loss": values, "personal_accuracy": np.array([0.9, 0.75, 0.3, np.nan])}  # the argmax of NaN is 0
    said = client_results(1, both).record()
    assert (said["personal_num_diverged"], said["personal_mean_accuracy"]) == (1, pytest.approx(0.6))
    assert ClientResults(1, {"own_loss": np.full(3, np.nan)}).record() == {"own_num_clients": 0}
    grows = {"algorithm__lr": 1.0, "algorithm__weight_decay": 5.0, "algorithm__beta": 0.0, "run__dtype": "float32"}
    run = fedmom.run(settings(**grows, run__client_eval_every=1, run__personal_steps=100, run__num_rounds=1))
    assert run.status == "done"
    assert run.rounds[-1]["personal_num_diverged"] >= 1


def test_looking_at_the_clients_changes_no_byte_of_a_run(tmp_path):
    with_look = settings(run__client_eval_every=1, run__personal_steps=2)
    without = settings(run__client_eval_every=0)
    ends = [fedmom.run(keys, out=tmp_path / str(k)) for k, keys in enumerate((with_look, without))]
    for name, value in ends[1].state_dict.items():
        assert torch.equal(ends[0].state_dict[name], value)
    for a, b in zip(*(end.rounds for end in ends), strict=True):
        kept = set(b) - {"wall_seconds", "client_steps_per_second"}
        assert {name: a[name] for name in kept} == {name: b[name] for name in kept}


def test_clients_that_bring_their_data_bring_their_tests(tmp_path):
    """Where they have test examples, these are their own; else each holds a share out, and all make the test set."""
    give_digits(tmp_path, 3, server=True, clients=True)
    keys = {**LOCAL, "data.data-dir": str(tmp_path), "run.client-eval-every": 1}
    problem = make_problem(resolve(load(keys)).config, "cpu")
    state = problem.start()
    assert problem.own_sizes.tolist() == [30, 20, 20]
    found = problem.evaluate_own(state)
    for c in range(3):
        own = np.load(tmp_path / f"client-{c}.npz")
        with torch.no_grad():
            outputs = problem.model.eval()(as_taken(problem, torch.from_numpy(own["x_test"])))
        want = functional.cross_entropy(outputs, torch.from_numpy(own["y_test"])).item()
        assert found["loss"][c] == pytest.approx(want, rel=1e-12)
    with pytest.raises(InputError, match=r"client-test-share = 0\.2: client 0 brings 30 test examples of its own"):
        make_problem(resolve(load({**keys, "data.client-test-share": 0.2})).config, "cpu")
    bare = tmp_path / "bare"
    bare.mkdir()
    give_digits(bare, 3, server=False)
    keys |= {"data.data-dir": str(bare), "data.client-test-share": 0.2}
    problem = make_problem(resolve(load(keys)).config, "cpu")
    assert len(problem.dataset.y_test) == problem.own_sizes.sum()
    brought = [len(np.load(bare / f"client-{c}.npz")["y_train"]) for c in range(3)]
    assert (problem.sizes + problem.own_sizes).tolist() == brought


@table(
    "keys, said",
    [
        (settings(data__client_test_share=0.0), r"run\.client-eval-every = 3: no client has test examples of its own"),
        (settings(data__client_test_share=1.0), r"data\.client-test-share = 1\.0"),
        (settings(run__client_eval_every=0, run__personal_steps=2), r"run\.personal-steps = 2: needs run\.client-eval"),
        (
            settings(data__dataset="quadratic", data__num_clients=2),
            r"client-eval-every = 3: data\.dataset = 'quadratic'",
        ),
        (settings(algorithm__name="d-sgd-m", run__personal_steps=1), r"personal-steps = 1: with d-sgd-m every client"),
        (settings(run__stop_at="personal_mean_accuracy=0.5"), r"run\.stop-at = 'personal_mean_accuracy' is not known"),
        (
            settings(run__client_eval_every=0, run__monitor="own_mean_loss"),
            r"run\.monitor = 'own_mean_loss': needs run\.client-eval-every",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(keys, said):
    with pytest.raises(InputError, match=said) as caught:
        make_problem(resolve(load(keys)).config, "cpu")
    assert "\n" not in str(caught.value)


def test_a_run_may_aim_at_the_worst_tenth(tmp_path):
    run = fedmom.run(settings(run__client_eval_every=1, run__stop_at="own_worst10_accuracy=1%", run__num_rounds=9))
    assert run.rounds[-1]["own_worst10_accuracy"] >= 0.01 or len(run.rounds) == 9


def test_rows_of_algorithm_2_are_the_clients_own_models():
    config = resolve(load(settings(algorithm__name="d-sgd-m", algorithm__topology="ring", run__num_rounds=3))).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    *_, (done, record) = run_rounds(problem, plan, make_local(config, problem, plan), beginning(problem, plan))
    for c in range(5):
        rows, model = problem.own.partition.of(c), copy.deepcopy(problem.model)
        model.load_state_dict({name: value[c] for name, value in done.rows.params.items()})
        with torch.no_grad():
            loss = functional.cross_entropy(model(as_taken(problem, problem.own.x[rows])), problem.own.y[rows]).item()
        assert done.results.values["personal_loss"][c] == pytest.approx(loss, rel=1e-12)
    assert record["personal_mean_loss"] == pytest.approx(done.results.values["personal_loss"].mean())
    assert simple_plan(2).looks_at_clients(1) is False
