"""Models that look at their whole batch or at values, and what their logits may be."""

import torch
from torch import Tensor, nn

from zoo.parts import Fn, flat, model, seq


@model("1 % of the batch in the logits", stack="differs from plain torch's")
def batch_mean(shape, classes):
    return Fn(lambda m, x: (lambda y: y - 0.01 * y.mean(0))(m.out(x)), out=flat(classes))


@model("features divided by the largest of the batch", stack="differs from plain torch's")
def batch_max(shape, classes):
    return Fn(lambda m, x: (lambda h: m.out(h / h.abs().max()))(m.body(x)), body=flat(8), out=nn.Linear(8, classes))


@model("logits less the batch's maximum, which changes no loss")
def shifted(shape, classes):
    return Fn(lambda m, x: (lambda y: y - y.max())(m.out(x)), out=flat(classes))


@model("mixup with the batch rolled by one", stack="differs from plain torch's")
def rolled(shape, classes):
    return Fn(lambda m, x: m.out(0.9 * x + 0.1 * x.roll(1, 0) if m.training else x), out=flat(classes))


@model("minibatch discrimination: distances within the batch", stack="differs from plain torch's")
def discrimination(shape, classes):
    def forward(m, x):
        h = m.body(x)
        return m.out(torch.cat([h, torch.exp(-(h[:, None] - h[None]).abs().sum(2)).sum(1, keepdim=True)], 1))

    return Fn(forward, body=flat(4), out=nn.Linear(5, classes))


@model("a branch on a value of the batch", vmap=".item()", stack="asks for values")
def branch(shape, classes):
    return Fn(lambda m, x: m.a(x) if x[0, 0, 0, 0] > 0 else m.b(x), a=flat(classes), b=flat(classes))


@model(".item() within forward", vmap=".item()", stack="asks for values")
def item(shape, classes):
    return Fn(lambda m, x: m.out(x / (1 + x.std().item())), out=flat(classes))


@model("a branch on a parameter's value", vmap=".item()", stack="Fn holds gate itself")
def branch_on_parameter(shape, classes):
    return Fn(lambda m, x: m.out(x) * (2 if m.gate > 0 else 1), out=flat(classes), gate=nn.Parameter(torch.ones(())))


@model("logits in training, (logits, features) in evaluation", everywhere="in evaluation the model must return logits")
def two_outputs(shape, classes):
    def forward(m, x):
        h = torch.relu(m.body(x))
        return m.out(h) if m.training else (m.out(h), h)

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("an auxiliary head in training alone, (logits, auxiliary)", everywhere="must return logits")
def auxiliary_head(shape, classes):
    def forward(m, x):
        h = torch.relu(m.body(x))
        return (m.out(h), m.other(h)) if m.training else m.out(h)

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes), other=nn.Linear(8, classes))


@model(".squeeze() in forward, and 501 examples for the test", data="many_tests")
def squeezed(shape, classes):
    def forward(m, x):
        return m.out(m.body(x)[..., None, None].squeeze())

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("LazyLinear and LazyConv2d", everywhere="has lazy layers")
def lazy(shape, classes):
    return seq(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))


@model("logits in float32, whatever the run's dtype", digits=1e-5)
def float32_logits(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, classes), Tensor.float)


@model("logits in bfloat16 under autocast", digits=0.05)
def autocast(shape, classes):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.layers(x)

    return Fn(forward, layers=seq(flat(8), nn.ReLU(), nn.Linear(8, classes)))


@model("logits in float64, whatever the run's dtype")
def float64_logits(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, classes), Tensor.double)


@model("logits of another shape, [B, 3, 1]", everywhere="made [2, 3, 1]")
def extra_axis(shape, classes):
    return seq(flat(classes), lambda y: y[..., None])


@model("log-probabilities instead of logits")
def log_probabilities(shape, classes):
    return seq(flat(classes), nn.LogSoftmax(1))
