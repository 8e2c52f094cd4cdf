"""Flower's own strategies on our clients, by name: `[server] strategy = "fedavgm"`.

They see every array of a reply, so what they do to the model x they do to the momentum u as well: docs/flower.md
says what each then averages.
"""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from fedmom.config.keys import Config, ServerConfig
from fedmom.config.strategies import STRATEGIES
from fedmom.errors import InputError
from fedmom.method.state import ClientState

from .fleet import Holder


def _dp(keys: ServerConfig, cohort: int, options: dict[str, Any]) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**options), keys.noise_multiplier, keys.clipping_norm, num_sampled_clients=cohort
    )


def _fedavgm(keys: ServerConfig, cohort: int, options: dict[str, Any]) -> Strategy:
    return FedAvgM(**options, server_learning_rate=keys.lr or 1.0, server_momentum=keys.momentum)


Make = Callable[[ServerConfig, int, dict[str, Any]], Strategy]  # (keys, clients per round, options of FedAvg)
STOCK: dict[str, Make] = {  # of fedmom.config.strategies.STRATEGIES all but ours
    "fedavg": lambda keys, cohort, options: FedAvg(**options),
    "fedavgm": _fedavgm,
    "fedadam": lambda keys, cohort, options: FedAdam(**options, eta=keys.lr or 0.1),
    "fedtrimmedavg": lambda keys, cohort, options: FedTrimmedAvg(**options, beta=keys.trim),
    "krum": lambda keys, cohort, options: Krum(**options, num_malicious_nodes=keys.num_malicious),
    "dp-fedavg": _dp,
}


def make_stock(config: Config, start: ClientState, holders: Iterable[Holder]) -> Strategy:
    """The strategy that `server.strategy` names; InputError where it would be wrong on this model or these nodes."""
    algorithm, name = config.algorithm, config.server.strategy
    rule, named = STRATEGIES[name], f"server.strategy = {name!r}"
    blocks = [holder for holder in holders if len(holder.clients) > 1]
    if blocks and not rule.means_of_means:
        raise InputError(
            f"{named}: node {blocks[0].node_id} holds {len(blocks[0].clients)} clients and answers with their mean; "
            "give every client its own node (simulation.clients-per-node = 1, or as many nodes as clients)"
        )
    if blocks and algorithm.cohort_size < config.data.num_clients:
        raise InputError(
            f"{named}: takes whole nodes, so algorithm.cohort-size = {algorithm.cohort_size} needs one client per node"
        )
    if rule.moves_buffers and start.buffers:
        raise InputError(
            f"{named}: its step could make a running variance negative, and model.name = {config.model.name!r} has "
            "buffers; take a model without (cnn, mlp, logistic, or model.norm = 'group')"
        )
    # It sees the nodes of the round's cohort alone, so it takes all it sees.
    options = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    return STOCK[name](config.server, algorithm.cohort_size, options)


class CohortGrid(Grid):
    """A Grid of which a strategy sees some nodes only; it sends nothing itself."""

    def __init__(self, grid: Grid, node_ids: Iterable[int]) -> None:
        self.grid, self.node_ids = grid, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node_ids)

    @property
    def run(self) -> Any:
        return self.grid.run

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout)
