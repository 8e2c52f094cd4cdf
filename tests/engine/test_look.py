"""What a step must not depend on is found before the first round: each kind by the look alone."""

import itertools
import random
from collections import deque

import numpy as np
import pytest
import torch
from test_stacked import made
from torch import nn

from fedmom.engine.look import look
from fedmom.errors import InputError
from fedmom.rounds.plan import beginning, round_job
from laws import table
from runs import simple_plan


class Net(nn.Module):
    """A layer, and what subclasses do besides."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 3)
        self.prepare()

    def prepare(self):
        """Nothing."""

    def besides(self, h):
        return h

    def forward(self, x):
        return self.out(self.besides(x.flatten(1)))


def net(besides, prepare=lambda self: None):
    return type("Own", (Net,), {"besides": besides, "prepare": prepare})


def count(self, h):
    self.calls += 1
    return h / self.calls


def cache(self, h):
    if self.cached is None:
        self.cached = torch.ones(64, dtype=h.dtype)
    self.last = (h * self.cached).tanh()  # for a later look; not read by the next step
    return h * self.cached


def observe(self, h):
    self.smallest.copy_(torch.minimum(self.smallest, h.detach().min()))
    return h


class Steps:
    def __init__(self):
        self.number = 0


STEPS, SEEN, STATE, NUMBERS = 0, {"train": {"steps": 0}}, Steps(), itertools.count()
KEPT = {}


def count_globally(self, h):
    global STEPS
    STEPS += 1
    return h if STEPS < 1000 else -h


def count_in_a_table(self, h):
    SEEN["train"]["steps"] += 1
    return h if SEEN["train"]["steps"] < 1000 else -h


def count_in_an_object(self, h):
    STATE.number += 1
    return h if STATE.number < 1000 else -h


def count_on_a_function(self, h):
    count_on_a_function.calls += 1
    return h if count_on_a_function.calls < 1000 else -h


count_on_a_function.calls = 0


def follow(self, h):
    """An average of x that training moves and evaluation uses; it stands still as long as x does."""
    if self.training:
        with torch.no_grad():
            self.slow.mul_(0.9).add_(self.out.weight, alpha=0.1)
        return h
    return h + self.slow.sum()


def slow(self):
    self.slow = nn.Parameter(self.out.weight.detach().clone(), requires_grad=False)


def keep(self, h):
    """What is kept to be looked at is another in training and in evaluation."""
    self.kept = KEPT["last"] = self.norm(h)
    self.list, self.mode = [h, self.kept], self.training
    return self.kept


def mask_of(self, h):
    if self.mask is None:
        self.register_buffer("mask", (torch.arange(64) % 3 > 0).to(h), persistent=False)
    return h * self.mask


def count_on_the_class(self, h):
    type(self).steps += 1
    return h if self.steps < 1000 else -h


def grow(self, h):
    self.seen = torch.cat([self.seen, h.detach()[:1, :1]])
    return h


REFUSED = {
    "torch": (net(lambda self, h: h * torch.rand(())), "draws random numbers of torch"),
    "numpy": (net(lambda self, h: h * np.random.rand()), "draws random numbers of numpy"),  # noqa: NPY002
    "random": (net(lambda self, h: h * (random.random() < 0.5)), "draws random numbers of Python's random"),
    "in the backward pass": (
        net(lambda self, h: h * Drawn.apply(self.out.weight).sum()),
        "draws random numbers of torch",
    ),
    "its own generator": (
        net(
            lambda self, h: h * torch.rand((), generator=self.generator),
            lambda self: setattr(self, "generator", torch.Generator()),
        ),
        "changes the attribute 'generator'",
    ),
    "a new generator": (
        net(lambda self, h: h * np.random.default_rng().random()),
        "differs between two training steps",
    ),
    "a counter": (net(count, lambda self: setattr(self, "calls", 0)), "changes the attribute 'calls' of Own"),
    "a minimum": (
        net(observe, lambda self: self.register_buffer("smallest", torch.tensor(torch.inf))),
        "a training step changes the buffer smallest, which starts with numbers that are not finite",
    ),
    "a count that torch cannot add up": (
        net(
            lambda self, h: (setattr(self, "seen", (self.seen.long() + 1).to(torch.uint16)), h)[1],
            lambda self: self.register_buffer("seen", torch.zeros(1, dtype=torch.uint16)),
        ),
        "changes the buffer seen, which is uint16: the clients' have no mean",
    ),
    "a global count, which acts later": (net(count_globally), "changes 'STEPS' of test_look, a global variable"),
    "a global table, which acts later": (net(count_in_a_table), "changes 'SEEN' of test_look, a global variable"),
    "a global object, which acts later": (net(count_in_an_object), "changes 'STATE' of test_look, a global variable"),
    "a global iterator, which acts later": (
        net(lambda self, h: h if next(NUMBERS) < 1000 else -h),
        "changes 'NUMBERS' of test_look, a global variable",
    ),
    "a function's count, which acts later": (
        net(count_on_a_function),
        "changes 'calls' of the function count_on_a_function",
    ),
    "an average that follows x": (net(follow, slow), "a training step changes the tensor slow of the model"),
    "a count on the class, which acts later": (
        type("Own", (Net,), {"besides": count_on_the_class, "prepare": lambda self: None, "steps": 0}),
        "changes 'steps' of the class Own",
    ),
    "a large count": (
        net(
            lambda self, h: (setattr(self, "seen", self.seen + 1), h)[1],
            lambda self: setattr(self, "seen", torch.tensor(30_000_000)),
        ),
        "a training step changes the attribute 'seen'",
    ),
    "a buffer that grows": (
        net(grow, lambda self: self.register_buffer("seen", torch.zeros(1, 1))),
        "turns the buffer seen from",
    ),
}


class Counts:
    """An object of the user's own that is called in forward."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, h):
        self.calls += 1
        return h


def merge(self, mode=True):
    """As loralib's layers do: evaluation has the product in the frozen weight."""
    if mode == self.merged:
        self.frozen.data.add_(-1.0 if mode else 1.0)
        self.merged = not mode
    return nn.Module.train(self, mode)


def freeze(self):
    self.frozen, self.merged = nn.Parameter(torch.zeros(3), requires_grad=False), False


def close_over(self):
    self.closure = lambda h, layer=self.out: layer(h).sum()


def in_evaluation(change):
    def besides(self, h):
        if not self.training:
            change(self)
        return h

    return besides


REFUSED |= {
    "an object that counts": (
        net(lambda self, h: self.augment(h), lambda self: setattr(self, "augment", Counts())),
        "changes the attribute 'augment'",
    ),
    "what evaluation counts": (
        net(in_evaluation(lambda self: self.seen.append(0)), lambda self: setattr(self, "seen", deque(maxlen=99))),
        "an evaluation changes the attribute 'seen'",
    ),
    "what evaluation draws": (net(in_evaluation(lambda self: torch.rand(()))), "of torch in an evaluation"),
    "a frozen weight that is merged": (
        type("Own", (Net,), {
            "prepare": freeze,
            "train": merge,
        }),
        "an evaluation changes the tensor frozen",
    ),
    "a closure over the layers that it was made with": (
        net(lambda self, h: h + self.closure(h), close_over),
        "is another by a copy of the model",
    ),
    "x, by its data": (
        net(lambda self, h: (self.out.weight.data.mul_(0.9), h)[1]),
        "writes into the parameter out.weight",
    ),
}  # fmt: skip


class Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d * torch.rand(())


def looked(build):
    look_at(made(build)(2))


def look_at(problem):
    plan = simple_plan(2)
    begin = beginning(problem, plan)
    look(problem, begin.state, round_job(problem, plan, begin), None)


@table("name", REFUSED)
def test_what_no_client_has_of_its_own_is_refused(name):
    build, why = REFUSED[name]
    problem = made(build)(2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with pytest.raises(InputError, match=rf"^model\.name = 'Own': .*{why}") as error:
        look_at(problem)
    assert "\n" not in str(error.value)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor", "ignore:TypedStorage")
def test_what_is_made_once_and_what_is_kept_to_be_looked_at_is_no_state():
    looked(net(cache, lambda self: setattr(self, "cached", None)))
    looked(net(keep, lambda self: setattr(self, "norm", nn.BatchNorm1d(64))))
    looked(net(mask_of, lambda self: self.register_buffer("mask", None, persistent=False)))
    extra = {"get_extra_state": lambda self: {"version": 2}, "besides": lambda self, h: h}
    looked(type("Own", (Net,), {**extra, "prepare": lambda self: None}))
    mask = torch.triu(torch.full((64, 64), -torch.inf), 1)
    looked(net(lambda self, h: h + torch.softmax(self.mask, 1)[0], lambda self: self.register_buffer("mask", mask)))
    codes = torch.arange(64).to(torch.uint16)
    packed = torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8)
    looked(net(lambda self, h: h * self.codes.to(h.dtype), lambda self: self.register_buffer("codes", codes)))
    looked(net(lambda self, h: h * self.codes.dequantize(), lambda self: self.register_buffer("codes", packed)))


def test_gradients_that_are_no_numbers_are_left_to_the_run():
    """It diverges, with the status that says so."""
    looked(net(lambda self, h: h + (self.zero / torch.linalg.vector_norm(self.zero)).sum(),
               lambda self: setattr(self, "zero", nn.Parameter(torch.zeros(3)))))  # fmt: skip
