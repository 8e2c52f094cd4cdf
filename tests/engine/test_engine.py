"""The engine: both paths and every chunk size give one result; policies, weights, cohorts, unequal steps."""

import itertools
import math
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedmom.engine.auto import Choice, choose
from fedmom.engine.engine import Engine, PlainRunner
from fedmom.engine.paths import PATHS
from fedmom.engine.stacked.means import RowsEnded
from fedmom.engine.stacked.steps import Stack
from fedmom.errors import DivergedError, InputError
from fedmom.method.algorithms import Method
from fedmom.method.schedules import Horizon, LearningRate
from fedmom.method.state import ClientState
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, bytes_per_exchange, cohort, round_job
from laws import table
from runs import image_problem, run_plan, simple_plan, tiny_images

MODELS = ["logistic", "mlp", "cnn", "resnet20"]


def assert_same(a, b, tolerance=1e-12):
    """Two states with equal tensors."""
    for part_a, part_b in zip(a.state, b.state, strict=True):
        assert part_a.keys() == part_b.keys()
        for name, value in part_a.items():
            torch.testing.assert_close(value, part_b[name], rtol=tolerance, atol=tolerance, msg=name)


def small_problem(model, **options):
    side = 8 if model != "resnet20" else 4
    return image_problem(model, 3, data=tiny_images(side=side), **options)


@table("model, nesterov", [("mlp", False), ("cnn", True), ("resnet20", False)])
def test_vmap_equals_loop(model, nesterov):
    """Dropout (cnn) and BatchNorm (resnet20) included, in float64, over two rounds."""
    plan = simple_plan(3, num_rounds=2, nesterov=nesterov, weight_decay=1e-3)
    stacked, rows = run_plan(small_problem(model), plan, path="vmap")
    single, rows_single = run_plan(small_problem(model), plan, path="loop")
    # Convolutions of the two paths sum in different orders; two rounds of resnet20 amplify that to 1e-11.
    assert_same(stacked, single, 1e-9)
    for a, b in zip(rows, rows_single, strict=True):
        for key in ("train_loss", "test_loss", "consensus_distance", "momentum_spread"):
            assert a[key] == pytest.approx(b[key], rel=1e-9)


@table("chunk_size, policy", [(1, "average"), (2, "local"), (2, "reset"), (3, "average"), (100, "local")])
def test_any_chunk_size_gives_the_same_numbers(chunk_size, policy):
    plan = simple_plan(5, momentum_policy=policy)
    whole, rows_whole = run_plan(image_problem(num_clients=5), plan, path="vmap", chunk_size=5)
    parts, rows_parts = run_plan(image_problem(num_clients=5), plan, path="vmap", chunk_size=chunk_size)
    assert_same(whole, parts, 1e-12)
    for a, b in zip(rows_whole, rows_parts, strict=True):
        assert a["consensus_distance"] == pytest.approx(b["consensus_distance"], rel=1e-10)
        assert a["momentum_spread"] == pytest.approx(b["momentum_spread"], rel=1e-10)


def test_same_plan_same_bytes():
    plan = simple_plan(4)
    first, _ = run_plan(image_problem("cnn"), plan)
    again, _ = run_plan(image_problem("cnn"), plan)
    for a, b in zip(first.state, again.state, strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())


@table("path, policy", itertools.product(PATHS, ["average", "local"]))
def test_one_chunks_rows_are_gone_before_the_next_are_made(path, policy, monkeypatch):
    """No x of an earlier chunk is left when the local steps of another begin."""
    rows, left = [], []
    owner, name = (Stack, "run") if PATHS[path].folds else (PlainRunner, "_run_chunk")
    run = getattr(owner, name)

    def watched(*args, **kwargs):
        left.append(sum(ref() is not None for ref in rows))
        found = run(*args, **kwargs)
        params = found.params if isinstance(found, RowsEnded) else found.ended.params
        rows.extend(weakref.ref(x) for x in params.values())
        return found

    monkeypatch.setattr(owner, name, watched)
    run_plan(image_problem("mlp", 5), simple_plan(5, momentum_policy=policy), path=path, chunk_size=2)
    assert rows
    assert left == [0] * (15 if path == "loop" else 9)


def test_clones_have_no_spread():
    """Clients that agree are at distance exactly 0, in float32 and over several chunks."""
    from fedmom.tasks.quadratic import Quadratic

    problem = Quadratic([[0.7, 1.3]] * 6, [[0.3, -1.1]] * 6, [1.0, 2.0], dtype=torch.float32)
    _, records = run_plan(problem, simple_plan(6, batch_size=1), path="vmap", chunk_size=4)
    assert [r["consensus_distance"] for r in records] == [0.0] * 3
    assert [r["momentum_spread"] for r in records] == [0.0] * 3


def test_cohorts_are_addressed_sorted_and_fair():
    plan = simple_plan(10, cohort_size=4, seed=5)
    seen = np.zeros(10)
    for index in range(500):
        ids = cohort(10, plan.cohort_size, plan.seed, index)
        assert list(ids) == sorted(set(ids.tolist()))
        assert len(ids) == 4
        assert (ids == cohort(10, plan.cohort_size, plan.seed, index)).all()
        seen[ids] += 1
    # 200 expected each, deviation √(500 · 0.4 · 0.6) = 11.
    assert abs(seen - 200).max() < 55
    assert (cohort(10, 10, 0, 3) == np.arange(10)).all()
    assert any((cohort(10, 4, 5, index) != cohort(10, 4, 6, index)).any() for index in range(5))


def test_bytes_sent_counts_what_travels():
    problem = image_problem("mlp", 3)
    d = 8 * sum(x.numel() for x in problem.start().params.values())
    for policy, beta, each in (("average", 0.9, 2 * d), ("local", 0.9, d), ("reset", 0.9, d), ("average", 0.0, d)):
        _, rows = run_plan(problem, simple_plan(3, num_rounds=2, beta=beta, momentum_policy=policy))
        assert [r["bytes_sent"] for r in rows] == [3 * each, 6 * each]


def test_bytes_of_an_exchange_by_hand():
    """Three numbers of x and of u, two statistics and a count, of 8 bytes each; u where it travels and β > 0."""
    x, count = torch.zeros(3, dtype=torch.float64), torch.tensor(1)
    state = ClientState({"x": x}, {"x": x}, {"running_mean": x[:2], "num_batches_tracked": count})
    for method, right in ((Method(0.9), 9), (Method(0.0), 6), (Method(0.9, momentum_policy="local"), 6)):
        assert bytes_per_exchange(state, method, 1) == 8 * right


def test_a_round_goes_on_where_the_one_before_ended():
    """Rounds of 4 steps of 2 of 4 clients: γ changes in the middle of the second, whose minibatches are new ones."""
    problem = image_problem(num_clients=4)
    plan = simple_plan(4, num_rounds=3, num_local_steps=4, cohort_size=2)
    plan = plan._replace(rate=LearningRate(1.0, "step", (0.5,), 0.5, "fraction"))
    # 12 steps; 60 examples are seen in 6 steps of 2 clients with 5 each.
    assert plan.horizon(problem.sizes) == Horizon(12, 2, 6.0)
    jobs = [round_job(problem, plan, beginning(problem, plan)._replace(round=done)) for done in range(3)]
    assert [job.lrs for job in jobs] == [[1.0] * 4, [1.0, 1.0, 0.5, 0.5], [0.5] * 4]
    assert [job.first_steps.tolist() for job in jobs] == [[0, 0], [4, 4], [8, 8]]
    _, rows = run_plan(problem, plan._replace(rate=plan.rate._replace(lr=0.1)))
    assert [r["lr"] for r in rows] == [0.1, 0.1, 0.05]


@table("part", ["params", "momentum", "buffers", "spread"])
def test_a_number_that_is_not_finite_ends_the_run_wherever_it_is(part):
    class Broken(Engine):
        def begin_round(self, start, job, progress=None):
            outcome = super().begin_round(start, job, progress)
            if part == "spread":
                return outcome._replace(momentum_spread=math.inf)
            tree = {"w": torch.tensor([1.0, math.nan])}
            return outcome._replace(mean=outcome.mean._replace(**{part: tree}), measured={})

    problem, plan = image_problem(), simple_plan(4)
    rounds = run_rounds(
        problem, plan, Broken(problem, plan.method, path="loop", chunk_size=1), beginning(problem, plan)
    )
    with pytest.raises(DivergedError, match=rf"{part}.* became .*round 1 at lr = 0.05"):
        next(rounds)


def test_a_round_that_is_begun_before_its_turn_is_seen_in_its_turn():
    """What the next round tells and raises comes after this one's record, and no second is counted twice."""
    log = []

    class Ahead(Engine):
        def begin_round(self, start, job, progress=None):
            number = job.round_index + 1
            log.append(f"begin {number}")
            if number == 5:
                raise InputError("the fifth")
            outcome = super().begin_round(start, job, progress)
            settle = lambda: (log.append(f"settle {number}"), outcome)[1]  # noqa: E731
            return outcome._replace(train_loss=math.nan, losses=None, settle=settle)

    problem, plan = image_problem(), simple_plan(4, num_rounds=6, eval_every=2)
    engine = Ahead(problem, plan.method, path="loop", chunk_size=1)
    begin, records = time.perf_counter(), []
    rounds = run_rounds(problem, plan, engine, beginning(problem, plan), lambda _: log.append("told"))
    for _, record in itertools.islice(rounds, 4):
        log.append(f"record {record['round']}")
        records.append(record)
        time.sleep(0.01)
    with pytest.raises(InputError, match="fifth"):
        next(rounds)
    assert records[-1]["wall_seconds"] < time.perf_counter() - begin
    told = ["told"] * 12
    assert log == [
        *("begin 1", *told, "begin 2", "settle 1", "record 1"),
        *(*told, "settle 2", "record 2"),
        *("begin 3", *told, "begin 4", "settle 3", "record 3"),
        *(*told, "settle 4", "record 4", "begin 5"),
    ]
    _, wanted = run_plan(image_problem(), plan, path="loop")
    assert [r["train_loss"] for r in records] == [r["train_loss"] for r in wanted[:4]]


def test_a_round_that_runs_whole_where_it_was_to_be_begun_keeps_its_seconds(monkeypatch):
    """Those of the round before it end where it began."""
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    for room in ("loop", "round"):
        monkeypatch.setattr(f"fedmom.rounds.{room}.time", clock)

    class Slow(Engine):
        """Odd rounds are begun in 1 s and settled in another, even ones take 5 s at once."""

        def begin_round(self, start, job, progress=None):
            nonlocal now
            even = job.round_index % 2 == 1
            outcome = super().begin_round(start, job, progress)
            now += 5.0 if even else 1.0

            def settle():
                nonlocal now
                now += 1.0
                return outcome

            return outcome if even else outcome._replace(settle=settle)

    problem, plan = image_problem(), simple_plan(4, num_rounds=4, eval_every=9)
    records = [
        r
        for _, r in run_rounds(
            problem, plan, Slow(problem, plan.method, path="loop", chunk_size=1), beginning(problem, plan)
        )
    ]
    assert [r["wall_seconds"] for r in records] == [2.0, 7.0, 9.0, 14.0]
    steps = 4 * plan.num_local_steps
    assert [steps / r["client_steps_per_second"] for r in records] == [2.0, 5.0, 2.0, 5.0]


def test_records_say_what_they_should():
    done, rows = run_plan(image_problem(), simple_plan(4, num_rounds=3, eval_every=2))
    assert rows[-1]["test_loss"] == image_problem().evaluate(done.state)["test_loss"]  # after the round
    assert [r["round"] for r in rows] == [1, 2, 3]
    assert [r["steps"] for r in rows] == [3, 6, 9]
    assert [r["joint_epochs"] for r in rows] == [4 * 3 * 5 * k / 60 for k in (1, 2, 3)]
    assert ["test_accuracy" in r for r in rows] == [False, True, True]
    assert all(math.isfinite(r["train_loss"]) and r["client_steps_per_second"] > 0 for r in rows)


@pytest.mark.slow
def test_training_learns_on_every_path():
    for path in PATHS:
        _, rows = run_plan(image_problem("mlp"), simple_plan(4, num_rounds=15, lr=0.1), path=path)
        assert rows[-1]["train_loss"] < 0.2 * rows[0]["train_loss"]
        assert rows[-1]["test_accuracy"] > 0.9


def test_choose_measures_both_paths_and_respects_what_is_given():
    problem, plan = image_problem(), simple_plan(4)
    begin = beginning(problem, plan)
    job = round_job(problem, plan, begin)
    auto = choose(problem, plan.method, begin.state, job, path="auto", chunk_size=0)
    assert {"stack", "loop"} <= {name.split()[0] for name in auto.measured} <= {"factors", "vmap", "stack", "loop"}
    assert auto.measured[f"{auto.path} × {auto.chunk_size}"] == max(auto.measured.values())
    for path in ("factors", "stack", "vmap"):
        assert choose(problem, plan.method, begin.state, job, path=path, chunk_size=2) == Choice(path, 2, {})
    assert choose(problem, plan.method, begin.state, job, path="loop", chunk_size=0) == Choice("loop", 1, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch finds none here")
@table("path, model", itertools.product(["factors", "stack", "vmap"], MODELS))
def test_cuda_equals_cpu(model, path):
    plan = simple_plan(3, num_rounds=2)
    there, _ = run_plan(small_problem(model, device="cuda"), plan, path=path)
    here, _ = run_plan(small_problem(model), plan, path="loop")
    moved = there._replace(state=type(there.state)(*({n: v.cpu() for n, v in t.items()} for t in there.state)))
    assert_same(moved, here, 1e-9)
