"""The optimizers' steps once more, in place and from the papers: of those that are written for one client no word.

As torch.optim has them, whose own first step would take seconds to import torch._dynamo.
"""

from collections.abc import Callable

from torch import Tensor

from fedmom.method.algorithms import Method

# Writes into the parameter and into its states, by their names; the gradient has no decay in it.
PlainStep = Callable[[Tensor, dict[str, Tensor], Tensor, float, Method], None]


def _sgd(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    g = g + m.weight_decay * p
    states["u"] = m.beta * states["u"] + g
    p.sub_(lr * (g + m.beta * states["u"] if m.nesterov else states["u"]))


def _adam(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    for name, beta, value in (("m", m.beta, g), ("v", m.beta2, g.square())):
        states[name] = states[name].lerp(value, 1 - beta)
        states[f"{name}.clock"] = 1 - beta * (1 - states[f"{name}.clock"])
    root = states["v"].div(states["v.clock"]).sqrt().add(m.eps)
    p.sub_(states["m"].div(states["m.clock"]).div(root).mul(lr))


def _decayed(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    p.mul_(1 - lr * m.weight_decay)
    _adam(p, states, g, lr, m)


def _l2(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    _adam(p, states, g.add(p, alpha=m.weight_decay), lr, m)


def _lion(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    sign = states["m"].lerp(g, 1 - m.beta).sign()
    states["m"] = states["m"].lerp(g, 1 - m.beta2)
    p.sub_(sign.add(p, alpha=m.weight_decay).mul(lr))


def _adagrad(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    g = g.add(p, alpha=m.weight_decay)
    states["v"] = states["v"].addcmul(g, g)
    p.sub_(g.div(states["v"].sqrt().add(m.eps)).mul(lr))


def _tracking(p: Tensor, states: dict[str, Tensor], g: Tensor, lr: float, m: Method) -> None:
    g = g.add(p, alpha=m.weight_decay)
    states["y"] = states["y"].sub(states["g"]).add(g)
    states["g"] = g.clone()
    p.sub_(states["y"].mul(lr))


PLAIN_STEPS: dict[str, PlainStep] = {
    "sgd": _sgd,
    "adamw": _decayed,
    "adam": _l2,
    "lion": _lion,
    "adagrad": _adagrad,
    "gradient-tracking": _tracking,
}
