"""A chunk that is replayed gives what its steps give: whatever changes between rounds reaches the recording's memory.

On the CPU a recording is a stand-in that takes the steps again, from the memory that was recorded into the same
results; on a GPU it is a CUDA graph.
"""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fedmom.engine import Engine
from fedmom.replays import Replays, cuda_graph
from fedmom.train import beginning, run_rounds
from runs import F64, image_task, run_plan, simple_plan, tiny_images


def again(run):
    """A recording without a GPU."""
    found = run()

    def replay():
        for memory, value in zip(tree_leaves(found), tree_leaves(run()), strict=True):
            memory.copy_(value)

    return found, replay


def replayed(task, plan, *, path, chunk_size, record=again):
    """All rounds through an engine that replays -> (state, records, its replays)."""
    engine = Engine(task, plan.method, path=path, chunk_size=chunk_size)
    engine.replays = Replays(engine.stack, record)
    steps = list(run_rounds(task, plan, engine, beginning(task, plan)))
    return steps[-1][0], [record for _, record in steps], engine.replays


def assert_same(one, other, tolerance=1e-13):
    (done, records), (want, wanted) = one, other
    for tree, right in zip(done.state, want.state, strict=True):
        for name in right:
            torch.testing.assert_close(tree[name], right[name], rtol=tolerance, atol=tolerance, msg=name)
    for mine, theirs in zip(records, wanted, strict=True):
        for key in ("train_loss", "consensus_distance", "momentum_spread"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12), key


MODELS = {"mlp": {}, "cnn": {}, "resnet20": {}, "resnet20-group": {"norm": "group"}}


def task_of(name, num_clients=5, **options):
    return image_task(name.removesuffix("-group"), num_clients, **MODELS[name], **options)


@pytest.mark.parametrize(
    ("name", "path", "policy"),
    [
        ("mlp", "stack", "average"),
        ("mlp", "factors", "reset"),
        ("cnn", "factors", "average"),
        ("resnet20", "stack", "reset"),  # its one dense layer is no other than cnn's
    ],
)
def test_replayed_rounds_are_the_stacks(name, path, policy):
    """Other cohorts, weights, starts and minibatches in every round; a last chunk that is smaller."""
    options = {"cohort_size": 5, "client_weights": "samples", "momentum_policy": policy, "weight_decay": 0.01}
    plan = simple_plan(7, num_rounds=4, num_local_steps=2, **options)
    *found, replays = replayed(task_of(name, 7), plan, path=path, chunk_size=2)
    assert replays.trouble == ""
    # Four rounds of two chunks of 2 and one of 1: the second of each kind is recorded, the rest is replayed.
    assert replays.num_replayed == (4 * 2 - 2) + (4 - 2)
    assert_same(found, run_plan(task_of(name, 7), plan, path=path, chunk_size=2))


def test_each_lr_has_a_recording_of_its_own():
    plan = simple_plan(4, num_rounds=8)
    plan = plan._replace(rate=plan.rate._replace(schedule="step", milestones=(0.5,), unit="fraction"))
    *found, replays = replayed(task_of("mlp", 4), plan, path="factors", chunk_size=4)
    assert replays.num_replayed == 4
    assert_same(found, run_plan(task_of("mlp", 4), plan, path="factors", chunk_size=4))


def test_an_lr_that_never_comes_again_is_never_recorded():
    plan = simple_plan(4, num_rounds=30)
    plan = plan._replace(rate=plan.rate._replace(schedule="cosine"))
    *_, replays = replayed(task_of("mlp", 4), plan, path="stack", chunk_size=4)
    assert (replays.num_replayed, replays._kept) == (0, {})
    assert len(replays._last) <= 8


@pytest.mark.parametrize("options", [{"momentum_policy": "local"}, {"local_epochs": 1}], ids=str)
def test_what_cannot_be_recorded_goes_step_by_step(options):
    plan = simple_plan(4, num_rounds=4, batch_size=1, **options)
    tasks = [task_of("mlp", 4, data=tiny_images(47), batch_size=1) for _ in range(2)]
    *found, replays = replayed(tasks[0], plan, path="stack", chunk_size=2)
    assert replays.num_replayed == 0
    assert_same(found, run_plan(tasks[1], plan, path="stack", chunk_size=2))


def broken(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(run):
    """A recording that forgets the last step's work."""
    found = run()

    def replay():
        for memory in tree_leaves(found):
            memory.zero_()

    return found, replay


@pytest.mark.parametrize("record", [broken, stale])
def test_a_recording_that_fails_or_is_wrong_is_not_used(record):
    plan = simple_plan(4, num_rounds=5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        *found, replays = replayed(task_of("mlp", 4), plan, path="stack", chunk_size=4, record=record)
    assert replays.num_replayed == 0
    assert len(said) == 1
    assert "CUDA graph" in str(said[0].message)
    assert_same(found, run_plan(task_of("mlp", 4), plan, path="stack", chunk_size=4))


def test_progress_counts_every_step():
    plan, task, counted = simple_plan(5, num_rounds=4), task_of("mlp"), []
    engine = Engine(task, plan.method, path="stack", chunk_size=2)
    engine.replays = Replays(engine.stack, again)
    for _ in run_rounds(task, plan, engine, beginning(task, plan), counted.append):
        pass
    assert sum(counted) == 4 * 5 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph cannot be recorded")
@pytest.mark.parametrize("path", ["stack", "factors"])
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs_give_the_cpus_result(name, path):
    plan = simple_plan(5, num_rounds=4, cohort_size=4)
    *found, replays = replayed(
        task_of(name, dtype=F64, device="cuda"), plan, path=path, chunk_size=2, record=cuda_graph
    )
    assert (replays.trouble, replays.num_replayed > 0) == ("", True)
    done, records = found
    done = done._replace(state=type(done.state)(*({n: v.cpu() for n, v in t.items()} for t in done.state)))
    assert_same((done, records), run_plan(task_of(name), plan, path=path, chunk_size=2), 1e-9)
