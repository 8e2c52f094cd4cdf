"""A change of the gradient by code of the user's own, or of a named method: plain, or with a state that remembers."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmom.method.state import ClientState, Tree

# correct(gradients, params, params at the start of the round) -> gradients, of one client; with a parameter `key` it
# is also given the int64 address [] of the client's step, for random numbers
Correct = Callable[..., Tree]


class Correction:
    """A change of the gradient that remembers: every client has a state of its own between rounds, the server another.

    A class of yours that `algorithm.correction = "module:Class"` names is made without arguments, and may derive from
    this one, whose methods remember nothing. A state is a dict of tensors, {} where there is none; x, g and the states
    are given without a client axis, and a method returns new tensors instead of writing into these. SCAFFOLD
    (Karimireddy et al., ICML 2020) and a FedProx with memory are examples/memory.py; fedmom's own are in
    fedmom/method/named.
    """

    # Of fedmom's own, whose states are of what travels alone: `start` is not shown what algorithm.personal keeps at
    # home, where no server corrects anything. A class of yours is shown all of x.
    shared_alone = False

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
        Further parameters of these names are given too, of what travels, so that no message need carry them:
        `x_start`, x before the round; `x_mean`, x̂, the mean of the clients' x before any outer step; `total_lr`, a
        float, Σ p_i Σγ over each client's own steps.
        """
        return server

    def forgets(self, name: str) -> bool:
        """Whether the client's tensor of this name lives within a round alone.

        It begins every round as `start` makes it at the round's x, and nobody keeps it for N clients between rounds.
        """
        return False


def takes_key(correction: Correct | Correction) -> bool:
    """Whether a correction wants the address of the step."""
    function = correction.gradient if isinstance(correction, Correction) else correction
    try:
        return "key" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # what has no signature takes what all take
        return False


_OF_THE_ROUND = ("x_start", "x_mean", "total_lr")  # what `gather` may be given beside its three


def takes_of_the_round(correction: Correction) -> frozenset[str]:
    """The further parameters that `gather` wants."""
    function = getattr(correction, "of", correction).gather  # the user's own, within what watches it
    try:
        names = list(inspect.signature(function).parameters)[3:]
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(names) & frozenset(_OF_THE_ROUND)


def has_short_states(correction: Correct | Correction | None) -> bool:
    """Whether a client may have states that live within a round."""
    return isinstance(correction, Correction) and _forgets(correction) is not Correction.forgets


def _forgets(correction: Correction) -> Any:
    return getattr(type(getattr(correction, "of", correction)), "forgets", Correction.forgets)


def started(correction: Correction, params: Tree, personal: Collection[str] = ()) -> tuple[Tree, Tree]:
    """(one client's whole state, the server's) at x = `params`; personal: names of what stays with each client."""
    if correction.shared_alone:
        params = {name: x for name, x in params.items() if name not in personal}
    return correction.start(params)


def lasting(correction: Correction, client: Tree) -> Tree:
    """Of a client's state, stacked or not, what is kept between rounds."""
    if not has_short_states(correction):
        return client
    return {name: value for name, value in client.items() if not correction.forgets(name)}


def begun_round(correction: Correction, kept: Tree, x_start: Tree, personal: Collection[str] = ()) -> Tree:
    """K stacked clients' whole states at the start of a round: what was kept, and what lives within it anew."""
    if not has_short_states(correction):
        return kept

    def short(params: Tree) -> Tree:
        client = started(correction, params, personal)[0]
        return {name: value for name, value in client.items() if correction.forgets(name)}

    if next((len(x) for x in x_start.values()), 1) == 1:  # as `loop_step`: what cannot be mapped may be done for one
        return kept | tree_map(lambda t: t[None], short(tree_map(lambda t: t[0], x_start)))
    return kept | torch.vmap(short)(x_start)


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
