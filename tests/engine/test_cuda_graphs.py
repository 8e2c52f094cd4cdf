"""A chunk that is replayed gives what its steps give: whatever changes between rounds reaches the recording's memory.

CUDA graphs are emulated (pretend_cuda.py): what a recording reads and nobody owns is NaN when it is replayed.
"""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fedmom.engine.engine import Engine
from fedmom.engine.stacked.cuda_graphs import Replays, cuda_graph
from fedmom.engine.stacked.steps import Stack
from fedmom.rounds.loop import beginning, run_rounds
from pretend_cuda import pretend
from runs import F64, image_task, run_plan, simple_plan, tiny_images


def stepped(plan):
    """Two lr lists, half of the rounds each."""
    return plan._replace(rate=plan.rate._replace(schedule="step", milestones=(0.5,), unit="fraction"))


def replayed(task, plan, *, path, chunk_size, times=1, record=cuda_graph, progress=None):
    """All rounds through an engine that replays, so often -> (the last state, all records, its replays)."""
    engine = Engine(task, plan.method, path=path, chunk_size=chunk_size, convolution="loop")
    engine.replays = Replays(engine.stack, record)
    records = []
    for _ in range(times):
        steps = list(run_rounds(task, plan, engine, beginning(task, plan), progress))
        records += [record for _, record in steps]
    return on_cpu(steps[-1][0]), records, engine.replays


def on_cpu(done):
    return done._replace(state=type(done.state)(*({n: v.cpu() for n, v in t.items()} for t in done.state)))


def assert_same(one, other, tolerance=1e-13):
    (done, records), (want, wanted) = one, other
    for tree, right in zip(done.state, want.state, strict=True):
        for name in right:
            torch.testing.assert_close(tree[name], right[name], rtol=tolerance, atol=tolerance, msg=name)
    for mine, theirs in zip(records, wanted, strict=True):
        for key in ("train_loss", "consensus_distance", "momentum_spread"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(
    ("name", "path", "policy"),
    [("mlp", "factors", "average"), ("cnn", "stack", "reset"),
     pytest.param("resnet20", "factors", "average", marks=pytest.mark.slow)],
)  # fmt: skip
def test_replayed_rounds_are_the_stacks(name, path, policy):
    """Other cohorts, weights, starts and minibatches in every round; a last chunk that is smaller; two lr lists.

    The run is taken twice, so that the first list comes again after the second.
    """
    options = {"cohort_size": 3, "client_weights": "samples", "momentum_policy": policy, "weight_decay": 0.01}
    plan = stepped(simple_plan(4, num_rounds=6, num_local_steps=2, nesterov=True, **options))
    with pretend() as card:
        *found, replays = replayed(image_task(name, 4, device="cuda"), plan, path=path, chunk_size=2, times=2)
    assert (replays.trouble, card.troubles()) == ("", {})
    # Of each list's three rounds with two chunks the first is taken, the second recorded, the third compared.
    assert replays.num_replayed == 2 * 2 * 3
    done, records = run_plan(image_task(name, 4), plan, path=path, chunk_size=2)
    assert_same(found, (done, 2 * records))


def test_an_lr_that_never_comes_again_is_never_recorded():
    plan = simple_plan(4, num_rounds=10)
    plan = plan._replace(rate=plan.rate._replace(schedule="cosine"))
    *_, replays = replayed(image_task("mlp", 4), plan, path="stack", chunk_size=4, record=broken)
    assert (replays.trouble, replays._kept) == ("", {})
    assert len(replays._last) <= 8


@pytest.mark.parametrize("options", [{"momentum_policy": "local"}, {"local_epochs": 1}], ids=str)
def test_what_cannot_be_recorded_goes_step_by_step(options):
    plan = simple_plan(4, num_rounds=4, batch_size=1, **options)
    tasks = [image_task("mlp", 4, data=tiny_images(47), batch_size=1) for _ in range(2)]
    *found, replays = replayed(tasks[0], plan, path="stack", chunk_size=2, record=broken)
    assert (replays.trouble, replays.num_replayed) == ("", 0)
    assert_same(found, run_plan(tasks[1], plan, path="stack", chunk_size=2))


def broken(run):
    raise RuntimeError("operation not permitted when stream is capturing")


def waiting(run):
    """A capture in which the host waits, which CUDA refuses."""
    return cuda_graph(lambda: (run(), torch.zeros((), device="cuda").item())[0])


def frozen(run):
    """A recording that gives the same, whatever its memory holds later."""
    return run(), lambda: None


@pytest.mark.parametrize("record", [broken, waiting, frozen])
def test_a_recording_that_fails_or_is_wrong_is_not_used(record):
    """Nor does a capture that fails leave work on its own stream, where minibatches may not be there yet."""
    plan = simple_plan(4, num_rounds=4)
    with pretend() as card, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream = torch.cuda.current_stream()
        *found, replays = replayed(image_task("mlp", 4, device="cuda"), plan, path="stack", chunk_size=2, record=record)
        assert torch.cuda.current_stream() is stream
    assert (replays.num_replayed, card.troubles()) == (0, {})
    assert len(said) == 1
    assert "CUDA graph" in str(said[0].message)
    assert_same(found, run_plan(image_task("mlp", 4), plan, path="stack", chunk_size=2))


def test_recordings_make_room_for_the_steps_themselves(monkeypatch):
    """Memory that recordings hold is given back where another chunk's steps need it."""
    plan, calls = stepped(simple_plan(4, num_rounds=8)), []

    def straight(self, *args, _as_it_is=Stack.run_straight):
        calls.append(args)
        if len(calls) == 8:  # the second list's first round: the first list's recording is there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _as_it_is(self, *args)

    monkeypatch.setattr(Stack, "run_straight", straight)
    with pretend(), pytest.warns(UserWarning, match="memory"):
        *found, replays = replayed(image_task("mlp", 4, device="cuda"), plan, path="stack", chunk_size=4)
    assert (replays.num_replayed, replays._kept) == (1, {})
    monkeypatch.undo()
    assert_same(found, run_plan(image_task("mlp", 4), plan, path="stack", chunk_size=4))


def test_progress_counts_every_step():
    counted = []
    plan = simple_plan(5, num_rounds=4)
    replayed(image_task("mlp", 5), plan, path="stack", chunk_size=2, record=again, progress=counted.append)
    assert sum(counted) == 4 * 5 * 3


def again(run):
    """A recording without a GPU: the steps again, into the same memory."""
    found = run()

    def replay():
        for memory, value in zip(tree_leaves(found), tree_leaves(run()), strict=True):
            memory.copy_(value)

    return found, replay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph cannot be recorded")
@pytest.mark.parametrize("path", ["stack", "factors"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "resnet20-group"])
def test_cuda_graphs_give_the_cpus_result(name, path):
    plan = stepped(simple_plan(5, num_rounds=8, cohort_size=4))
    name, _, norm = name.partition("-")
    options = {"norm": norm or "batch"}
    *found, replays = replayed(
        image_task(name, 5, dtype=F64, device="cuda", **options), plan, path=path, chunk_size=2, times=2
    )
    assert (replays.trouble, replays.num_replayed > 0) == ("", True)
    done, records = run_plan(image_task(name, 5, **options), plan, path=path, chunk_size=2)
    assert_same(found, (done, 2 * records), 1e-9)
