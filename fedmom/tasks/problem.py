"""What the clients minimise. A problem draws minibatches, gives one client's gradient, and judges the mean model."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedmom.method.state import ClientState, Tree
from fedmom.tasks.quadratic import Quadratic


class Problem(Protocol):
    """N clients' objectives f_i, as the engine needs them."""

    sizes: np.ndarray  # [N] examples of each client
    device: torch.device
    measures: tuple[str, ...]  # the names that `evaluate` gives
    own_sizes: np.ndarray | None  # [N] test examples that each client has of its own; None where none has any
    small: bool  # whether a round's line also carries x, u and x after every step
    personal: frozenset[str] = frozenset()  # names of x and buffers that stay with each client

    def start(self) -> ClientState:
        """The common x⁰, u⁰ = 0 and the buffers."""

    def gradient(self, params: Tree, buffers: Tree, batch: Any, /) -> tuple[Tree, Tree, Tensor]:
        """Of ONE client on one minibatch: gradients, buffers after the forward pass, loss. vmap adds the axis."""

    def gradient_alone(self, params: Tree, buffers: Tree, batch: Any, /) -> tuple[Tree, Tree, Tensor]:
        """The same where no vmap is around it."""

    def round_batches(self, clients: Tensor, first_steps: Tensor, num_steps: int) -> Iterator[Any]:
        """The minibatches of clients [K] for steps first_steps [K] + 0, 1, …: tensors [K, ...] per step.

        Clients and steps are given in main memory; the minibatches are where the problem is.
        """

    def check_evaluation(self, state: ClientState) -> None:
        """Raise InputError where `evaluate` would fail."""

    def evaluate(self, state: ClientState) -> dict[str, Any]:
        """Measurements at the mean model."""

    def evaluate_clients(self, state: ClientState, clients: Tensor) -> dict[str, float]:
        """Measurements of `state` on the own data of clients [K], all examples together."""

    def evaluate_own(self, state: ClientState) -> dict[str, np.ndarray]:
        """{"loss": [N], …} of one model on every client's own test examples; NaN for a client without."""

    def evaluate_own_rows(self, rows: ClientState, clients: Tensor) -> dict[str, np.ndarray]:
        """The same [K] of the own models of clients [K], rows [K, ...]."""

    def state_dict(self, state: ClientState) -> Tree:
        """The mean model as its own load_state_dict takes it."""

    def activation_bytes(self, start: ClientState) -> int:
        """Memory of one client's step besides x, u and g; decides how many clients fit at once."""


class DataKind(NamedTuple):
    """What sets problems apart: everything that asks what `data.dataset` means asks here."""

    summary: str
    measures: tuple[str, ...] = ()  # what its evaluation records, where no task says it
    has_examples: bool = True  # examples and a model; else every f_i is a formula that the configuration holds
    own_data: bool = False  # every client's examples are its own, and are read where it runs
    objective: tuple[str, ...] = ()  # the keys besides data.dataset that say what is minimised


DATA_KINDS = {  # by values of data.dataset that are no data set
    "quadratic": DataKind(
        "the test bench: f_i is a quadratic with an exact gradient",
        Quadratic.measures,
        has_examples=False,
        objective=("data.curvatures", "data.centers"),
    ),
    "local": DataKind("every client's own examples, read where it runs", own_data=True),
}
_OF_A_DATA_SET = DataKind("a data set's examples")


def data_kind(dataset: object) -> DataKind:
    """The kind of problem that a value of data.dataset asks for."""
    return DATA_KINDS.get(str(dataset), _OF_A_DATA_SET)
