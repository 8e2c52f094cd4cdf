"""A recording is told right or wrong though its steps are not the same when they are taken twice.

As on a card, which sums in no fixed order, and in deep networks, whose first steps make much of that.
"""

import itertools
import warnings
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

from fedmom.engine.stacked import cuda_graphs, steps
from fedmom.engine.stacked.steps import Stack
from laws import table
from pretend_cuda import pretend
from runs import image_problem, simple_plan, tiny_images
from test_cuda_graphs import again, replayed, varied

NOISE = {  # of the steps' own: parts of how far x and u go, by γ [I]
    "none": None,
    "few per cent": lambda lrs: 0.05,
    "chaos": lambda lrs: (10 * lrs.sum()).clamp(max=2.0),  # steps that are short amplify nothing
    "all": lambda lrs: 0.8,
}


def make_noisy(monkeypatch, noise):
    """x and u other ones each time that the same steps are taken, as on a card that sums in no fixed order."""
    if NOISE[noise] is None:
        return
    torch.manual_seed(0)

    def straight(self, start, job, orders, _as_it_is=Stack.run_straight):
        ended = _as_it_is(self, start, job, orders)
        for rows, begun in zip(ended[:2], start[:2], strict=True):
            for name, own in rows.items():
                own += NOISE[noise](orders.lrs) * (own - begun[name]) * torch.randn_like(own)
        return ended._replace(losses=ended.losses * (1 + 2e-4 * torch.randn_like(ended.losses)))

    monkeypatch.setattr(Stack, "run_straight", straight)


@table("noise", ["few per cent", "chaos"])
def test_steps_that_differ_from_themselves_are_replayed(monkeypatch, noise):
    """As those of deep networks do in float32, whose first steps amplify the order of a sum to the steps' own size."""
    make_noisy(monkeypatch, noise)
    plan = varied(simple_plan(4))
    with pretend() as card:
        *_, replays = replayed(image_problem("mlp", 4, device="cuda"), plan, path="stack", chunk_size=2)
    assert (replays.trouble, replays.num_replayed, card.troubles()) == ("", 3, {})


def misreading(part):
    """Records steps that read, when they are replayed, the `part` that was there when they were recorded."""
    kept = {}

    def straight(self, start, job, orders, _as_it_is=Stack.run_straight):
        own = next(tree for tree in (start, orders) if hasattr(tree, part))
        stale = kept.setdefault(part, tree_map(torch.clone, getattr(own, part)))
        own = own._replace(**{part: stale})
        return _as_it_is(self, *((own, job, orders) if hasattr(start, part) else (start, job, own)))

    def record(run):
        def misread():
            with mock.patch.object(Stack, "run_straight", straight):
                return run()

        return again(misread)

    return record


PARTS = ["draws", "lrs", "params", "momentum"]


@table("part, noise", itertools.product(PARTS, ["none", "chaos"]))
def test_a_recording_that_reads_other_memory_is_refused(monkeypatch, part, noise):
    """However noisy the steps are."""
    misread_is_refused(monkeypatch, part, noise)


@pytest.mark.slow
@table("part", PARTS)
def test_it_is_refused_where_the_steps_differ_by_a_few_per_cent(monkeypatch, part):
    misread_is_refused(monkeypatch, part, "few per cent")


def misread_is_refused(monkeypatch, part, noise):
    make_noisy(monkeypatch, noise)
    plan = varied(simple_plan(4))
    with pytest.warns(UserWarning, match="another result"):
        *_, replays = replayed(image_problem("mlp", 4), plan, path="stack", chunk_size=2, record=misreading(part))
    assert replays.num_replayed == 0


def test_of_steps_that_are_noise_alone_nothing_is_replayed(monkeypatch):
    """A replay that is as far from them as they are from themselves may read anything."""
    make_noisy(monkeypatch, "all")
    with pytest.warns(UserWarning, match=r"the steps differ from themselves by \d+ %"):
        *_, replays = replayed(image_problem("mlp", 4), simple_plan(4), path="stack", chunk_size=2, record=again)
    assert replays.num_replayed == 0


@pytest.mark.slow
def test_chaos_itself_is_told_from_other_memory(monkeypatch):
    """ResNet-20 in float32, a millionth of each gradient another one each time: steps that are long say nothing."""

    def noisy(g):
        return g * (1 + 1e-6 * torch.randn_like(g))

    first, later, compared = steps.first_update, steps.update, []
    monkeypatch.setattr(steps, "first_update", lambda m, x, u, g, lr: first(m, x, u, noisy(g), lr))
    monkeypatch.setattr(steps, "update", lambda m, xs, us, gs, lr: later(m, xs, us, [noisy(g) for g in gs], lr))
    as_it_is = cuda_graphs.trouble_between
    monkeypatch.setattr(cuda_graphs, "trouble_between", lambda *args: compared.append(1) or as_it_is(*args))
    torch.manual_seed(0)
    plan = varied(simple_plan(4, num_rounds=3, num_local_steps=6, lr=0.1, batch_size=8))
    data = tiny_images(256, channels=3, side=32, num_classes=10)
    for record, trouble in ((again, ""), (misreading("draws"), "a replay gave another result")):
        problem = image_problem("resnet20", 4, data=data, dtype=torch.float32, batch_size=8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            *_, replays = replayed(problem, plan, path="stack", chunk_size=2, record=record)
        assert (replays.trouble, replays.num_replayed, len(compared) > 0) == (trouble, 0 if trouble else 3, True)
        compared.clear()


def test_steps_that_are_compared_once_more_need_not_have_the_memory(monkeypatch):
    make_noisy(monkeypatch, "chaos")

    def straight(self, start, job, orders, _as_it_is=Stack.run_straight):
        if orders.lrs.max() < 1e-3 and not recording:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _as_it_is(self, start, job, orders)

    recording = []

    def record(run):
        found, replay = again(run)

        def alone():
            recording.append(1)
            replay()
            recording.pop()

        return found, alone

    monkeypatch.setattr(Stack, "run_straight", straight)
    with pytest.warns(UserWarning, match="memory"):
        done, *_ = replayed(image_problem("mlp", 4), simple_plan(4), path="stack", chunk_size=2, record=record)
    assert done.round == 3
