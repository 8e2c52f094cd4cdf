"""Random numbers, and state within buffers and outside of them."""

import random
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from zoo.parts import CLASSES, SIZE, Fn, conv, flat, head, model, seq


@model("Dropout and Dropout2d")
def dropout(shape, classes):
    return seq(conv(2, 4), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, classes))


@model("Dropout in place, Dropout1d and Dropout3d")
def dropout_kinds(shape, classes):
    layers = (conv(2, 4), nn.Flatten(2), nn.Dropout1d(0.2), nn.Unflatten(2, (4, 4, 4)), nn.Dropout3d(0.2), nn.Flatten())
    return seq(*layers, nn.Dropout(0.3, inplace=True), nn.Linear(256, classes))


@model("RReLU", everywhere="draws random numbers")
def rrelu(shape, classes):
    return seq(flat(8), nn.RReLU(), nn.Linear(8, classes))


@model("FractionalMaxPool2d", everywhere="draws random numbers")
def fractional_pool(shape, classes):
    return seq(conv(2, 4), nn.FractionalMaxPool2d(2, output_size=4), head(4))


@model("AlphaDropout", everywhere="draws random numbers")
def alpha_dropout(shape, classes):
    return seq(flat(8), nn.SELU(), nn.AlphaDropout(0.3), nn.Linear(8, classes))


@model("FeatureAlphaDropout", everywhere="draws random numbers")
def feature_alpha_dropout(shape, classes):
    return seq(conv(2, 4), nn.SELU(), nn.FeatureAlphaDropout(0.3), head(4))


@model("dropout by a function, F.dropout", everywhere="draws random numbers")
def functional_dropout(shape, classes):
    return Fn(
        lambda m, x: m.out(F.dropout(torch.relu(m.body(x)), 0.3, m.training)), body=flat(8), out=nn.Linear(8, classes)
    )


@model("Gumbel softmax", everywhere="draws random numbers")
def gumbel(shape, classes):
    return seq(flat(8), lambda h: F.gumbel_softmax(h, hard=True), nn.Linear(8, classes))


def _stochastic_depth(draw: Callable[[], float]) -> nn.Module:
    def forward(m, x):
        h = m.body(x)
        if not m.training or draw() < 0.5:
            h = h + torch.relu(m.block(h))
        return m.out(h)

    return Fn(forward, body=flat(8), block=nn.Linear(8, 8), out=nn.Linear(8, CLASSES))


@model("stochastic depth by torch's numbers", everywhere="draws random numbers")
def depth_torch(shape, classes):
    return _stochastic_depth(lambda: torch.rand(()).item())


@model("stochastic depth by NumPy's numbers", everywhere="draws random numbers")
def depth_numpy(shape, classes):
    return _stochastic_depth(np.random.rand)


@model("stochastic depth by Python's random", everywhere="draws random numbers")
def depth_random(shape, classes):
    return _stochastic_depth(random.random)


@model("a generator of the model's own", everywhere="changes the attribute 'source'")
def own_generator(shape, classes):
    def forward(m, x):
        noise = torch.randn(x.shape, generator=m.source, dtype=x.dtype)
        return m.out(x + 0.1 * noise if m.training else x)

    return Fn(forward, source=torch.Generator(), out=flat(classes))


@model("a Python counter on the module (an annealed temperature)", everywhere="changes the attribute 'steps'")
def counter(shape, classes):
    def forward(m, x):
        if m.training:
            m.steps += 1
        return m.out(x) / (1 + m.steps)

    return Fn(forward, out=flat(classes), steps=0)


@model("a counter as a buffer", stack="differs from plain torch's")
def counter_buffer(shape, classes):
    def forward(m, x):
        if m.training:
            m.steps += 1
        return m.out(x) / (1 + 0.1 * m.steps)

    return Fn(forward, out=flat(classes), steps=torch.zeros((), dtype=torch.int64))


@model("a running mean of one's own, written in place into a buffer", stack="differs from plain torch's")
def own_average(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if m.training:
            with torch.no_grad():
                m.centre.mul_(0.9).add_(0.1 * h.mean(0))
        return m.out(h - m.centre)

    return Fn(forward, body=flat(8), centre=torch.zeros(8), out=nn.Linear(8, classes))


@model("a running mean of one's own, assigned to a buffer", stack="differs from plain torch's")
def assigned_average(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if m.training:
            m.centre = 0.9 * m.centre + 0.1 * h.mean(0).detach()
        return m.out(h - m.centre)

    return Fn(forward, body=flat(8), centre=torch.zeros(8), out=nn.Linear(8, classes))


@model("activations kept on the module for a later look")
def kept_activations(shape, classes):
    def forward(m, x):
        m.seen = m.body(x)
        return m.out(torch.relu(m.seen))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("a target network that follows by moving averages", stack="no attribute 'weight'")
def momentum_encoder(shape, classes):
    def forward(m, x):
        if m.training:
            with torch.no_grad():
                m.shadow.lerp_(m.body[1].weight, 0.1)
        return m.out(torch.tanh(m.body(x)) + F.linear(x.flatten(1), m.shadow))

    return Fn(forward, body=flat(8), shadow=torch.zeros(8, SIZE), out=nn.Linear(8, classes))


@model("a counter on the class", everywhere="changes 'steps' of the class Annealed")
def class_counter(shape, classes):
    class Annealed(nn.Module):
        steps = 0

        def __init__(self) -> None:
            super().__init__()
            self.out = flat(classes)

        def forward(self, x):
            type(self).steps += self.training
            return self.out(x) / (1 + type(self).steps)

    return Annealed()


@model("noise from a generator that every pass seeds anew", vmap="random operation", stack="differs from plain torch's")
def seeded_each_pass(shape, classes):
    def forward(m, x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        return m.out(x + 0.1 * noise)

    return Fn(forward, out=flat(classes))


@model("a counter as a buffer, that evaluation counts up too", stack="differs from plain torch's")
def counts_always(shape, classes):
    def forward(m, x):
        m.steps += 1
        return m.out(x) / (1 + 0.1 * m.steps)

    return Fn(forward, out=flat(classes), steps=torch.zeros((), dtype=torch.int64))


@model(
    "a target network of frozen parameters that follows within forward (BYOL)",
    everywhere="changes the tensor target.1.weight",
)
def byol_target(shape, classes):
    def forward(m, x):
        if m.training:
            with torch.no_grad():
                for slow, fast in zip(m.target.parameters(), m.online.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
        return m.out(torch.tanh(m.online(x)) * m.target(x).detach())

    return Fn(forward, online=flat(8), target=flat(8).requires_grad_(False), out=nn.Linear(8, classes))


@model("a queue of features in a buffer (MoCo)", vmap=".item()", stack="asks for values")
def queue(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.body(x))
        y = m.out(torch.cat([h, torch.softmax(h @ m.queue.clone().T, 1)], 1))
        if m.training:
            place = int(m.place)
            m.queue[place : place + len(h)] = h.detach()
            m.place.fill_((place + len(h)) % len(m.queue))
        return y

    parts = {"queue": torch.randn(8, 8), "place": torch.zeros((), dtype=torch.int64)}
    return Fn(forward, body=flat(8), out=nn.Linear(16, classes), **parts)


@model("an attribute that cannot be copied (a lock)", everywhere="cannot pickle")
def cannot_copy(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made.lock = threading.Lock()
    return made
