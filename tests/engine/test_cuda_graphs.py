"""A chunk that is replayed gives what its steps give: whatever changes between rounds reaches the recording's memory.

CUDA graphs are emulated (pretend_cuda.py): what a recording reads and nobody owns is NaN when it is replayed.
"""

import itertools
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fedmom.engine.engine import Engine
from fedmom.engine.stacked.cuda_graphs import Replays
from fedmom.engine.stacked.steps import Stack
from fedmom.errors import DivergedError
from fedmom.machine.graphs import cuda_graph
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from laws import table
from pretend_cuda import pretend
from runs import F64, image_problem, run_plan, simple_plan, tiny_images


def varied(plan):
    """Another list of γ in every round."""
    return plan._replace(rate=plan.rate._replace(schedule="cosine"))


def replayed(problem, plan, *, path, chunk_size, times=1, record=cuda_graph, progress=None, trouble=""):
    """All rounds through an engine that replays, so often -> (the last state, all records, its replays).

    trouble: why it never does, and all steps are taken as they are.
    """
    engine = Engine(problem, plan.method, path=path, chunk_size=chunk_size, convolution="loop")
    engine.replays = Replays(engine.stack, record)
    engine.replays.trouble = trouble
    records = []
    for _ in range(times):
        steps = list(run_rounds(problem, plan, engine, beginning(problem, plan), progress))
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
    [("mlp", "factors", "average"),
     pytest.param("cnn", "stack", "reset", marks=pytest.mark.slow),
     pytest.param("resnet20", "stack", "average", marks=pytest.mark.slow),
     pytest.param("resnet20", "factors", "average", marks=pytest.mark.slow)],
)  # fmt: skip
def test_replayed_rounds_are_the_stacks(name, path, policy):
    """Other γ, cohorts, weights, starts and minibatches in every round; a last chunk that is smaller.

    Bit for bit those of the same steps one by one, and those of the CPU to rounding.
    """
    options = {"cohort_size": 3, "client_weights": "samples", "momentum_policy": policy, "weight_decay": 0.01}
    plan = varied(simple_plan(4, num_rounds=6, num_local_steps=2, nesterov=True, eval_every=9, **options))
    runs = []
    for trouble in ("", "not wanted"):
        with pretend() as card:
            problem = image_problem(name, 4, device="cuda", augment="crop-flip")
            *found, replays = replayed(problem, plan, path=path, chunk_size=2, trouble=trouble)
        assert (replays.trouble, card.troubles()) == (trouble, {})
        # Of six rounds with two chunks the first is taken, the second recorded, the third compared.
        assert replays.num_replayed == (0 if trouble else 2 * 3)
        assert replays.num_ahead == 5  # rounds whose first minibatches were drawn while the card worked
        runs.append(found)
    (done, records), (want, wanted) = runs
    for tree, other in zip(done.state, want.state, strict=True):
        assert all(torch.equal(tree[at], other[at]) for at in other)
    measures = ("train_loss", "consensus_distance", "momentum_spread")
    assert [[r[m] for m in measures] for r in records] == [[r[m] for m in measures] for r in wanted]
    assert_same((done, records), run_plan(image_problem(name, 4, augment="crop-flip"), plan, path=path, chunk_size=2))


MOST = {  # of a round that is replayed: launches beside the replay, waits, copies to the card; so many were counted
    "cnn": (15, 1, 1),
    "resnet56": (72, 1, 2),
}


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet56", marks=pytest.mark.slow)])
def test_a_replayed_round_launches_little_and_waits_once(name):
    """What a round costs the host does not grow with the number of layers."""
    steps = {"cnn": 5, "resnet56": 4}[name]
    plan = varied(simple_plan(2, num_rounds=4, num_local_steps=steps, batch_size=1, eval_every=9))
    with pretend() as card:
        problem = image_problem(name, 2, device="cuda", dtype=torch.float32, batch_size=1)
        engine = Engine(problem, plan.method, path="stack", chunk_size=2, convolution="loop")
        rounds = run_rounds(problem, plan, engine, beginning(problem, plan))
        for _ in range(3):
            next(rounds)
        job = round_job(problem, plan, beginning(problem, plan)._replace(round=3))
        start = beginning(problem, plan).state
        card.forget()
        engine.run_round(start, job)
    assert (engine.replays.num_replayed, card.replays, card.troubles()) == (1, 1, {})
    counted = (card.launches.total(), card.waits.total(), card.sent.total())
    assert all(count <= most for count, most in zip(counted, MOST[name], strict=True)), (counted, card.launches)


def test_the_card_has_the_next_round_before_the_host_waits_for_this_one():
    """But for a round that is evaluated; and what is not finite is said of the round in which it is."""
    plan = simple_plan(2, num_rounds=9, num_local_steps=2, eval_every=6)
    rate = plan.rate._replace(schedule="step", milestones=(7 / 9,), decay=1e300, unit="fraction")
    found = {}
    for trouble in ("", "not wanted"):
        with pretend() as card:
            problem = image_problem("mlp", 2, device="cuda")
            engine = Engine(problem, plan.method, path="stack", chunk_size=2)
            engine.replays.trouble = trouble
            rounds = run_rounds(problem, plan._replace(rate=rate), engine, beginning(problem, plan))
            seen = ((engine.replays.num_replayed, card.waits.total()) for _ in rounds)
            replays, waits = zip(*(next(seen) for _ in range(7)), strict=True)
            with pytest.raises(DivergedError) as error:
                next(seen)
            assert card.troubles() == {}
        found[trouble] = str(error.value)
        if not trouble:
            assert replays == (0, 0, 0, 2, 3, 3, 5)  # after rounds 1, 2, …: all replayed from the fourth on
            assert waits[4] - waits[3] == 1
    assert found[""] == found["not wanted"]


def test_minibatches_are_drawn_ahead_for_the_round_that_follows_and_no_other():
    """As after an answer that is asked for again, or another run by the same engine."""
    plan = simple_plan(4, num_rounds=9, num_local_steps=2)
    with pretend():
        problem = image_problem("mlp", 4, device="cuda")
        begun, engines = (
            beginning(problem, plan),
            [Engine(problem, plan.method, path="stack", chunk_size=4) for _ in "ab"],
        )
        jobs = [round_job(problem, plan, begun._replace(round=number)) for number in (0, 1, 7)]
        for job in jobs[:2]:
            engines[0].run_round(begun.state, job)
        found, want = (engine.run_round(begun.state, jobs[2]) for engine in engines)
    assert engines[0].replays.num_ahead == 1
    assert torch.equal(found.losses, want.losses)


def test_a_card_says_which_part_is_not_finite():
    """By the sums: losses and spreads may be finite all the same."""
    plan = simple_plan(2, num_local_steps=1)
    with pretend():
        problem = image_problem("resnet20", 2, device="cuda")
        begun = beginning(problem, plan)
        runner = Engine(problem, plan.method, path="stack", chunk_size=2, convolution="loop").runner
        (chunk,) = runner.from_start(begun.state, round_job(problem, plan, begun), [torch.arange(2)], None)
        moved = chunk.ended
        half = sum(count for (part, _), count in moved.layout.items() if part == "params")
        kind = next(kind for kind, b in moved.buffers.items() if b.is_floating_point())
        for part, place in (("", None), ("params", 0), ("momentum", half), ("buffers", None)):
            total, own = moved.total.clone(), {kind: b.clone() for kind, b in moved.buffers.items()}
            if part == "buffers":
                own[kind][0, 0] = torch.inf
            elif part:
                total[place] = torch.nan
            sums = runner.sums(begun.state)
            sums.add(moved._replace(total=total, buffers=own), chunk.weights)
            _, end = sums.finish(chunk.losses)
            assert end().broken == part


MEGABYTES = {  # of a client's step: clients, batch, and so many at most
    "cnn": (50, 10, 75),
    "resnet56": (2, 16, 740),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEGABYTES)
def test_a_step_moves_few_bytes(name):
    """Operands and results of all operators, in float32; the exchange is not in it, the minibatches are."""
    clients, batch, most = MEGABYTES[name]
    steps = 2
    plan = simple_plan(clients, num_local_steps=steps, batch_size=batch)
    data = tiny_images(4 * clients * batch, channels=3, side=32, num_classes=10)
    with pretend() as card:
        problem = image_problem(name, clients, data=data, device="cuda", dtype=torch.float32, batch_size=batch)
        done = beginning(problem, plan)
        job, stack = round_job(problem, plan, done), Stack(problem, plan.method, convolution="implicit")
        orders = stack.orders(job)
        orders = orders.read(orders.words().to("cuda"))
        stack.run_straight(done.state, job, orders)
        card.forget()
        stack.run_straight(done.state, job, orders)
    assert 0.8 * most < card.bytes.total() / (clients * steps) / 1e6 <= most, card.bytes.most_common(9)


@table("options", [{"momentum_policy": "local"}, {"local_epochs": 1}])
def test_what_cannot_be_recorded_goes_step_by_step(options):
    plan = simple_plan(4, num_rounds=4, batch_size=1, **options)
    tasks = [image_problem("mlp", 4, data=tiny_images(47), batch_size=1) for _ in range(2)]
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


@pytest.mark.slow
@table("record", [broken, waiting, frozen])
def test_a_recording_that_fails_or_is_wrong_is_not_used(record):
    """Nor does a capture that fails leave work on its own stream, where minibatches may not be there yet."""
    plan = simple_plan(4, num_rounds=4)
    with pretend() as card, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream = torch.cuda.current_stream()
        *found, replays = replayed(
            image_problem("mlp", 4, device="cuda"), plan, path="stack", chunk_size=2, record=record
        )
        assert torch.cuda.current_stream() is stream
    assert (replays.num_replayed, card.troubles()) == (0, {})
    assert len(said) == 1
    assert "CUDA graph" in str(said[0].message)
    assert_same(found, run_plan(image_problem("mlp", 4), plan, path="stack", chunk_size=2))


@pytest.mark.slow
def test_recordings_make_room_for_the_steps_themselves(monkeypatch):
    """Memory that recordings hold is given back where another chunk's steps need it."""
    plan, calls = simple_plan(4, num_rounds=8), []

    def straight(self, *args, _as_it_is=Stack.run_straight):
        calls.append(args)
        if len(calls) == 9:  # round 3: both chunks' recordings are there, and compared
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _as_it_is(self, *args)

    monkeypatch.setattr(Stack, "run_straight", straight)
    with pretend(), pytest.warns(UserWarning, match="memory"):
        *found, replays = replayed(image_problem("mlp", 4, device="cuda"), plan, path="stack", chunk_size=3)
    assert (replays.num_replayed, replays._kept) == (0, {})
    monkeypatch.undo()
    assert_same(found, run_plan(image_problem("mlp", 4), plan, path="stack", chunk_size=3))


def test_progress_counts_every_step():
    counted = []
    plan = simple_plan(5, num_rounds=4)
    replayed(image_problem("mlp", 5), plan, path="stack", chunk_size=2, record=again, progress=counted.append)
    assert sum(counted) == 4 * 5 * 3


def again(run):
    """A recording without a GPU: the steps again, into the same memory."""
    found = run()

    def replay():
        for memory, value in zip(tree_leaves(found), tree_leaves(run()), strict=True):
            if isinstance(memory, torch.Tensor):
                memory.copy_(value)

    return found, replay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph cannot be recorded")
@table("path, name", itertools.product(["stack", "factors"], ["mlp", "cnn", "resnet20", "resnet20-group"]))
def test_cuda_graphs_give_the_cpus_result(name, path):
    plan = varied(simple_plan(5, num_rounds=8, cohort_size=4))
    name, _, norm = name.partition("-")
    options = {"norm": norm or "batch"}
    *found, replays = replayed(
        image_problem(name, 5, dtype=F64, device="cuda", **options), plan, path=path, chunk_size=2, times=2
    )
    assert (replays.trouble, replays.num_replayed > 0) == ("", True)
    done, records = run_plan(image_problem(name, 5, **options), plan, path=path, chunk_size=2)
    assert_same(found, (done, 2 * records), 1e-9)
