"""What a step must not depend on is found before the first round: each kind by the look alone."""

import random

import numpy as np
import pytest
import torch
from test_stack import made
from torch import nn

from fedmom.errors import InputError
from fedmom.look import look
from fedmom.train import beginning, round_job
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
        "a training step changes the tensor smallest .*starts infinite",
    ),
    "a buffer that grows": (
        net(grow, lambda self: self.register_buffer("seen", torch.zeros(1, 1))),
        "turns the buffer seen from",
    ),
}


class Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d * torch.rand(())


def looked(build):
    look_at(made(build)(2))


def look_at(task):
    plan = simple_plan(2)
    begin = beginning(task, plan)
    look(task, begin.state, round_job(task, plan, begin), None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_client_has_of_its_own_is_refused(name):
    build, why = REFUSED[name]
    task = made(build)(2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with pytest.raises(InputError, match=rf"^model\.name = 'Own': .*{why}") as error:
        look_at(task)
    assert "\n" not in str(error.value)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_what_is_made_once_and_what_is_kept_to_be_looked_at_is_no_state():
    looked(net(cache, lambda self: setattr(self, "cached", None)))
    mask = torch.triu(torch.full((64, 64), -torch.inf), 1)
    looked(net(lambda self, h: h + torch.softmax(self.mask, 1)[0], lambda self: self.register_buffer("mask", mask)))
