"""The local step, written once and for one client; `vmap_step` and `loop_step` add the client axis.

Source: Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient Momentum SGD for Distributed
Non-Convex Optimization", ICML 2019 (arXiv 1905.03817), Algorithms 1 and 2. docs/method.md maps the symbols to names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmom.method.corrections import Correct, Correction, corrected
from fedmom.method.optimizers.optimizer import Numbers, optimizer_step
from fedmom.method.optimizers.table import OPTIMIZERS
from fedmom.method.state import ClientState, Tree

# gradient(params, buffers, batch) -> (gradients, buffers after the forward pass, loss)
Gradient = Callable[[Tree, Tree, Any], tuple[Tree, Tree, Tensor]]


def local_step(
    state: ClientState,
    batch: Any,
    *,
    gradient: Gradient,
    lr: float,
    beta: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    optimizer: str = "sgd",
    beta2: float = 0.0,
    eps: float = 1e-8,
    correction: Correct | Correction | None = None,
    start: Tree | None = None,
    key: Tensor | None = None,
    server: Tree | None = None,
) -> tuple[ClientState, Tensor]:
    """One client's step on one minibatch -> (state, loss before the step).

    optimizer: one of OPTIMIZERS, whose β (β₁), β₂ and ε these are; state.momentum holds what it remembers
    (`optimizers.optimizer.zeros` makes it). L2 weight decay is part of f, so it enters g: g = ∇F(x; ξ) + λx. That is
    linear and keeps the mean; AdamW and Lion decay x itself instead. A `correction` of the user's own comes after it:
    g ← correction(g, x, x at the `start` of the round), and the `key` of the step; one with state also gets the
    client's, state.correction, and the `server`'s.
    """
    by, numbers = OPTIMIZERS[optimizer], Numbers(beta, beta2, eps, weight_decay, nesterov)
    grads, buffers, loss = gradient(state.params, state.buffers, batch)
    if weight_decay and not by.decoupled:
        grads = {name: g + weight_decay * state.params[name] for name, g in grads.items()}
    if isinstance(correction, Correction):
        grads, own = corrected(correction, grads, state, start or {}, server or {}, key)
        state = state._replace(correction=own)
    elif correction is not None:
        assert start is not None
        more = {} if key is None else {"key": key}
        grads = correction(grads, state.params, start, **more)
    return optimizer_step(by, state._replace(buffers=buffers), grads, lr, numbers), loss


def vmap_step(state: ClientState, batch: Any, told: dict[str, Any], **method: Any) -> tuple[ClientState, Tensor]:
    """One local step of K stacked clients at once; `told`: what their correction knows, [K, ...] each."""
    if method.get("correction") is None:
        return torch.vmap(partial(local_step, **method))(state, batch)

    def step(state: ClientState, batch: Any, told: dict[str, Any]) -> tuple[ClientState, Tensor]:
        return local_step(state, batch, **told, **method)

    return torch.vmap(step)(state, batch, told)


def loop_step(state: ClientState, batch: Any, told: dict[str, Any], **method: Any) -> tuple[ClientState, Tensor]:
    """One local step of a stack of one client, in the plain way."""
    state, batch, told = tree_map(lambda t: t[0], (state, batch, told))
    return tree_map(lambda t: t[None], local_step(state, batch, **told, **method))
