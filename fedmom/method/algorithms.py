"""The method, written once and for one client; `vmap_step` and `loop_step` add the client axis.

Source: Yu, Jin, Yang, "On the Linear Speedup Analysis of Communication Efficient Momentum SGD for Distributed
Non-Convex Optimization", ICML 2019 (arXiv 1905.03817), Algorithms 1 and 2. docs/method.md maps the symbols to names.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmom.method.state import ClientState, Tree, zeros_like

# gradient(params, buffers, batch) -> (gradients, buffers after the forward pass, loss)
Gradient = Callable[[Tree, Tree, Any], tuple[Tree, Tree, Tensor]]
# correct(gradients, params, params at the start of the round) -> gradients, of one client; with a parameter `key` it
# is also given the int64 address [] of the client's step, for random numbers
Correct = Callable[..., Tree]


class Correction:
    """A change of the gradient that remembers: every client has a state of its own between rounds, the server another.

    A class of yours that `algorithm.correction = "module:Class"` names is made without arguments, and may derive from
    this one, whose methods remember nothing. A state is a dict of tensors, {} where there is none; x, g and the states
    are given without a client axis, and a method returns new tensors instead of writing into these. SCAFFOLD
    (Karimireddy et al., ICML 2020) and a FedProx with memory are examples/memory.py.
    """

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        """(one client's state, the server's) before the first round, at x⁰ = `params`.

        A client that was never drawn has this state. The tensors' names, shapes and dtypes stay those of the start.
        """
        return {}, {}

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> Tree | tuple[Tree, Tree]:
        """At every local step: the gradient by which u and x are moved, or (gradient, client's state after the step).

        g: with weight decay; x_start: x at the start of the round; server: its state at the start of the round. A sixth
        parameter `key` is given the int64 address [] of the client's step, for `fedmom.normal_like`.
        """
        return g

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        """After a client's last local step of a round: (its state, its message to the server).

        num_steps: int64 [], the steps it took. total_lr: [] in the dtype of x, Σγ over them, which is I·γ where γ is
        constant: with β = 0, (x_start − x) / total_lr is the mean of its gradients by γ. The message is a dict of real
        tensors, the same names and shapes from every client in every round; its bytes count in bytes_sent.
        """
        return client, {}

    def gather(self, server: Tree, mean_message: Tree, share: float) -> Tree:
        """At the server, once per round: its new state.

        mean_message: Σ p_i message_i over the clients that answered, with the weights p_i of the averages of x and u.
        share: the part of all clients' weights that those have: |S|/N for client-weights = "uniform", and
        Σ_S n_i / Σ n_i for "samples". So share · mean_message is the sum over those, divided as for all N clients.
        """
        return server


def takes_key(correction: Correct | Correction) -> bool:
    """Whether a correction wants the address of the step."""
    function = correction.gradient if isinstance(correction, Correction) else correction
    try:
        return "key" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # what has no signature takes what all take
        return False


def user_object(correction: Correct | Correction) -> Any:
    """What the user wrote, within the wrappers that watch it: the function or the class."""
    outer: Any = correction
    return inspect.unwrap(outer)


def corrected(
    correction: Correction, grads: Tree, state: ClientState, start: Tree, server: Tree, key: Tensor | None
) -> tuple[Tree, Tree]:
    """One client's gradient by a correction with state, and its state after the step."""
    more = {} if key is None else {"key": key}
    found = correction.gradient(grads, state.params, start, state.correction, server, **more)
    return found if isinstance(found, tuple) else (found, state.correction)


def momentum_step(state: ClientState, grads: Tree, *, lr: float, beta: float, nesterov: bool) -> ClientState:
    """u <- βu + g;  x <- x − γu (option I, Polyak)  or  x <- x − γ(βu + g) with the new u (option II, Nesterov).

    Algorithm 1 of Yu, Jin, Yang (ICML 2019). γ (`lr`) stays outside u, so that a schedule changes the step
    and not the memory. Equal to torch.optim.SGD(momentum=β, dampening=0) without and with nesterov=True.
    """
    momentum = {name: beta * u + grads[name] for name, u in state.momentum.items()}
    step = {name: beta * u + grads[name] for name, u in momentum.items()} if nesterov else momentum
    params = {name: x - lr * step[name] for name, x in state.params.items()}
    return state._replace(params=params, momentum=momentum)


def local_step(
    state: ClientState,
    batch: Any,
    *,
    gradient: Gradient,
    lr: float,
    beta: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    correction: Correct | Correction | None = None,
    start: Tree | None = None,
    key: Tensor | None = None,
    server: Tree | None = None,
) -> tuple[ClientState, Tensor]:
    """One client's step on one minibatch -> (state, loss before the step).

    L2 weight decay is part of f, so it enters g: g = ∇F(x; ξ) + λx. That is linear and keeps the mean. A `correction`
    of the user's own comes after it: g ← correction(g, x, x at the `start` of the round), and the `key` of the step;
    one with state also gets the client's, state.correction, and the `server`'s.
    """
    grads, buffers, loss = gradient(state.params, state.buffers, batch)
    if weight_decay:
        grads = {name: g + weight_decay * state.params[name] for name, g in grads.items()}
    if isinstance(correction, Correction):
        grads, own = corrected(correction, grads, state, start or {}, server or {}, key)
        state = state._replace(correction=own)
    elif correction is not None:
        assert start is not None
        more = {} if key is None else {"key": key}
        grads = correction(grads, state.params, start, **more)
    return momentum_step(state._replace(buffers=buffers), grads, lr=lr, beta=beta, nesterov=nesterov), loss


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


def finish_round(
    correction: Correction, state: ClientState, start: Tree, server: Tree, num_steps: Tensor, lrs: Tensor
) -> tuple[ClientState, Tree]:
    """K stacked clients at the end of a round -> (their states with the messages as `correction`, their own states).

    start: x, server: the server's state, [K, ...] both; num_steps [K]; lrs [I] float64, γ of every step.
    """
    x = next(iter(state.params.values()), lrs)
    total = lrs.cumsum(0)[num_steps - 1].to(x.dtype)
    given = (state.params, start, state.correction, server, num_steps, total)
    if len(num_steps) == 1:  # as `loop_step`: what cannot be mapped may be done for one
        one = correction.finish(*tree_map(lambda t: t[0], given))
        own, messages = tree_map(lambda t: t[None], one)
    else:
        own, messages = torch.vmap(correction.finish)(*given)
    return state._replace(correction=messages), own


def slow_step(before: Tree, mean: Tree, slow: Tree, *, lr: float, alpha: float, eta: float) -> tuple[Tree, Tree]:
    """u_s <- α u_s + (x − x̂)/γ;  x <- x − ηγ u_s  -> (x, u_s), with x before the round and γ of its first step.

    SlowMo (Wang, Tantia, Ballas, Rabbat, ICLR 2020), Algorithm 1: server momentum on the change that a round made.
    With α = 0 and η = 1 it gives x̂ back (to rounding); callers then leave it out.
    """
    slow = {name: alpha * slow[name] + (x - mean[name]) / lr for name, x in before.items()}
    return {name: x - eta * lr * slow[name] for name, x in before.items()}, slow


def start_average(mean: Tree, own: Tree | None) -> Tree:
    """The paper: every client restarts from û, the average."""
    return mean


def start_local(mean: Tree, own: Tree | None) -> Tree:
    """Ours, to compare with: every client keeps the momentum it had."""
    if own is None:
        raise ValueError("momentum policy 'local' needs every client's own momentum")
    return own


def start_reset(mean: Tree, own: Tree | None) -> Tree:
    """Ours, to compare with: u = 0 at the start of every round, as most federated frameworks do."""
    return zeros_like(mean)


class Rows(NamedTuple):
    """What Algorithm 2 knows of the receivers' momentum when W is applied; every tree is [n, ...]."""

    mix: Callable[[], Tree]  # u after the local steps of all senders, times W
    own: Tree  # u after the local steps
    u_before: Tree  # u before the local steps
    x_before: Tree
    x_mixed: Tree
    lr: float  # γ
    beta: float


def exchange_average(rows: Rows) -> Tree:
    """The paper: u is mixed with W as x is."""
    return rows.mix()


def exchange_local(rows: Rows) -> Tree:
    """DSGDm: every client keeps its own u."""
    return rows.own


def exchange_reset(rows: Rows) -> Tree:
    """Ours, to compare with: u = 0 after every exchange."""
    return zeros_like(rows.own)


def exchange_quasi_global(rows: Rows) -> Tree:
    """m̂ <- β m̂ + (1 − β) (x − x_mixed) / γ: Lin et al. (ICML 2021), Algorithm 1 (QG-DSGDm) with μ = β."""
    share = (1 - rows.beta) / rows.lr
    return {n: rows.beta * m + share * (rows.x_before[n] - rows.x_mixed[n]) for n, m in rows.u_before.items()}


class MomentumPolicy(NamedTuple):
    """What happens to u between rounds, under both algorithms."""

    start: Callable[[Tree, Tree | None], Tree]  # (û, own u or None) -> u that a client starts a round with
    exchange: Callable[[Rows], Tree]  # Algorithm 2: the receivers' u after the exchange
    sends_momentum: bool  # whether u travels, and counts in bytes_sent
    keeps_rows: bool  # whether every client's own u must be stored between rounds
    summary: str
    gossip_only: bool = False  # whether it means something under Algorithm 2 alone
    one_step: bool = False  # whether it is for one step between two exchanges


MOMENTUM_POLICIES = {
    "average": MomentumPolicy(
        start_average, exchange_average, True, False, "the paper: u is averaged, everyone restarts from û"
    ),
    "local": MomentumPolicy(
        start_local, exchange_local, False, True, "every client keeps its own u (x alone is averaged)"
    ),
    "reset": MomentumPolicy(start_reset, exchange_reset, False, False, "u = 0 at the start of every round"),
    "quasi-global": MomentumPolicy(
        start_local,
        exchange_quasi_global,
        False,
        True,
        "d-sgd-m alone: u follows how far x moved (Lin et al. 2021)",
        gossip_only=True,
        one_step=True,
    ),
}


class Method(NamedTuple):
    """What of Algorithm 1 stays the same over a run."""

    beta: float
    nesterov: bool = False
    weight_decay: float = 0.0
    momentum_policy: str = "average"
    running_var: str = "pooled"
    correction: Correct | Correction | None = None  # of the gradient, the user's own


class Algorithm(NamedTuple):
    """A named member of the family, as what it fixes."""

    summary: str
    default_interval: int = 8  # I, when the config says 0
    interval: int | None = None  # I that the name implies, whatever the config says
    beta: float | None = None  # β that the name implies
    decentralized: bool = False  # Algorithm 2: every client has its own x and u, mixed by W


ALGORITHMS = {
    "pr-sgd-m": Algorithm("Algorithm 1: I local momentum steps, then model and momentum are averaged"),
    "parallel-sgd-m": Algorithm("large-batch momentum SGD: Algorithm 1 with I = 1", 1, interval=1),
    "d-sgd-m": Algorithm(
        "Algorithm 2: each client's model and momentum are mixed with its neighbours'", 1, decentralized=True
    ),
    "local-sgd": Algorithm("local SGD without momentum: Algorithm 1 with β = 0", beta=0.0),
}


def theory_interval(kind: str, num_steps: int, num_clients: int) -> int:
    """The largest I (up to its constant) that keeps the rate O(1/√(NT)): Yu, Jin, Yang (2019).

    `theory-iid` (identical data): ⌊T^{1/2} / N^{3/2}⌋; `theory-non-iid`: ⌊T^{1/4} / N^{3/4}⌋; at least 1.
    """
    # ⌊√q⌋ of the integer quotient q = ⌊T / N³⌋ is ⌊√(T / N³)⌋ exactly; floats would miss perfect powers.
    quotient = num_steps // num_clients**3
    root = math.isqrt(quotient)
    return max(1, {"theory-iid": root, "theory-non-iid": math.isqrt(root)}[kind])


INTERVALS = {
    "fixed": "I = num-local-steps",
    "theory-iid": "I = max(1, ⌊T^(1/2) / N^(3/2)⌋), for identical data; needs run.num-steps = T",
    "theory-non-iid": "I = max(1, ⌊T^(1/4) / N^(3/4)⌋), for distinct data; needs run.num-steps = T",
}
