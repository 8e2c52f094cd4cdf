"""DSGDM: Algorithm 2 under Flower, with the server as a relay.

Flower has no links between nodes, so the server holds all N rows (x, u and buffers of every client), sends row i to
client i, takes its row back after I local steps, and mixes with W_t: what neighbours would do among themselves passes
through the server, and its memory grows with N·d. The result is Algorithm 2's (Yu, Jin, Yang, ICML 2019); the traffic
is a star's, 2·(x, u) per client and round, whatever the topology. `bytes_sent` counts the topology's links.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from logging import INFO
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedmom.engine.gossip import exchange, mean_of, outcome_of
from fedmom.errors import InputError
from fedmom.flower.private import log
from fedmom.flower.wire import pack, unpack
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.mixing import Blocks
from fedmom.method.decentralized.topology import Mixing, Topology
from fedmom.method.state import ClientState, flatten, rows_of, stacked, unflatten
from fedmom.rounds.round import Backend, Job, Outcome, Progress
from fedmom.tasks.problem import Problem

from .fleet import Fleet
from .replies import ARRAYS, CONFIG, WEIGHT, ShouldStop, Update, accept, shares_memory, wanted_by


class Mixed(NamedTuple):
    """One round: rows before the exchange, after it, and what the clients said."""

    after: ClientState  # [N, ...] after the local steps; of clients that did not answer, their rows before
    rows: ClientState  # [N, ...] everybody's next start
    updates: dict[int, dict[str, Any]]  # {client: its part of the reply's ConfigRecord}
    answered: Tensor  # [N] bool


class DSGDM(Strategy):
    """Decentralized momentum SGD, relayed: every client has its own x and u, mixed with W after I local steps.

    topology: W_t, from `fedmom.make_topology`; method: β and the momentum policy (`Method`).
    lr: γ, needed by policy "quasi-global" alone, where the replies' metric `lr` does not tell it.
    on_failure, min_clients, retries: see `strategies.fleet.Fleet`. Under "proceed" a client that does not answer
    keeps its row, and the weights of its links go to both diagonals; that needs a symmetric W.

    Raises InputError for "proceed" with a directed W.
    """

    def __init__(
        self,
        topology: Topology,
        method: Method,
        *,
        on_failure: str = "stop",
        min_clients: int = 1,
        retries: int = 2,
        window: int = 0,
        wait_seconds: float = 600.0,
        lr: float = 1.0,
    ) -> None:
        if on_failure == "proceed" and not topology.is_symmetric:
            raise InputError(
                f"server.on-failure = 'proceed': topology {topology.name!r} is directed, and doing without a client "
                "would change W's sums; use stop or retry"
            )
        self.topology, self.method, self.lr = topology, method, lr
        self.fleet = Fleet(topology.num_clients, on_failure, min_clients, retries, window, wait_seconds)
        self.blocks = Blocks()
        self.rows: ClientState | None = None  # [N, ...]
        self.bundled = False  # whether rows travel as one array per dtype, which fedmom's clients understand
        self.path: int | None = None  # how many numbers a reply's path must have; None: whatever it has
        self._updates: dict[int, dict[str, Any]] = {}

    def summary(self) -> None:
        log(INFO, "\t├──> %d clients on %s, relayed by this server", self.topology.num_clients, self.topology.name)
        log(INFO, "\t└──> on failure: %s", self.fleet.on_failure)

    # What Flower asks of a strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message to every node, with its clients' rows [k, ...]; the first round's are all `arrays`."""
        if self.rows is None:
            start = stacked(unflatten(unpack(arrays)), self.topology.num_clients)
            self.rows = ClientState(*({name: value.clone() for name, value in tree.items()} for tree in start))
        self._updates = {}
        return list(self._messages(server_round, self.rows, config, grid))

    def _messages(self, server_round: int, rows: ClientState, config: ConfigRecord, grid: Grid) -> Iterator[Message]:
        if not self.fleet.holders:
            self.fleet.learn(grid)
        for holder in self.fleet.holders:
            own = rows_of(rows, torch.tensor(holder.clients))
            asked = {**config, "server-round": server_round, "clients": list(holder.clients), "rows": True}
            arrays = pack(flatten(own), bundled=self.bundled)
            content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(asked)})
            yield Message(content, message_type=MessageType.TRAIN, dst_node_id=holder.node_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mixes the replies into `self.rows`, and gives their mean; failures as `on_failure` says."""
        assert self.rows is not None
        rows, asked = self.rows, {holder.node_id: holder.clients for holder in self.fleet.holders}
        updates = self.fleet.answered(server_round, asked, replies, partial(self._accept, rows))
        mixed = self._mix(server_round, rows, updates, None)
        self.rows = mixed.rows
        losses = [about["loss"] for about in mixed.updates.values()]
        return pack(flatten(mean_of(mixed.rows, self.method.running_var))), MetricRecord(
            {"train_loss": sum(losses) / len(losses)}
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nobody: the mean model is evaluated at the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        should_stop: ShouldStop | None = None,
        *,
        first_round: int = 1,
    ) -> Result:
        """Rounds first_round … num_rounds; to go on with a run, set `self.rows` to the clients' rows.

        The result's arrays are the mean of all clients. Where `should_stop(round, result so far)` is true after a
        round, that round was the last. Raises ClientsFailedError by `on_failure`.
        """
        result = Result()
        result.arrays = initial_arrays
        if self.rows is None or first_round == 1:
            self.rows = stacked(unflatten(unpack(initial_arrays)), self.topology.num_clients)
        for number in range(first_round, num_rounds + 1):
            mixed = self.train_round(grid, number, self.rows, train_config or ConfigRecord(), timeout=timeout)
            self.rows = mixed.rows
            losses = [about["loss"] for about in mixed.updates.values()]
            result.arrays = pack(flatten(mean_of(mixed.rows, self.method.running_var)))
            result.train_metrics_clientapp[number] = MetricRecord({"train_loss": sum(losses) / len(losses)})
            log(INFO, "[ROUND %s/%s] train loss %s", number, num_rounds, sum(losses) / len(losses))
            if evaluate_fn and (measured := evaluate_fn(number, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = measured
            if should_stop and should_stop(number, result):
                break
        return result

    # One round

    def train_round(
        self,
        grid: Grid,
        server_round: int,
        rows: ClientState,
        config: ConfigRecord,
        *,
        timeout: float = 0.0,
        progress: Progress | None = None,
    ) -> Mixed:
        """Send every client its row, take it back after the local steps, and mix."""
        self._updates = {}
        messages = self._messages(server_round, rows, config, grid)
        block = max(1, -(-self.topology.num_clients // max(1, len(self.fleet.holders))))
        updates = self.fleet.exchange(
            grid,
            server_round,
            messages,
            pack(flatten(rows_of(rows, slice(0, block)))),  # how large a message is
            timeout=timeout,
            accept=partial(self._accept, rows),
        )
        return self._mix(server_round, rows, updates, progress)

    def _accept(self, rows: ClientState, clients: Sequence[int], reply: Message) -> Update:
        """The reply, checked against the rows of the clients asked for. ValueError with the reason to refuse it."""
        if self._updates.keys() & set(clients):
            raise ValueError(f"its clients {list(clients)[:5]} have answered already in this round")
        expected = flatten(rows_of(rows, torch.tensor(list(clients))))
        return accept(reply, expected, WEIGHT, clients=clients, losses=True, path=self.path)

    def _mix(self, server_round: int, rows: ClientState, updates: Iterable[Update], progress: Progress | None) -> Mixed:
        after = ClientState(*({name: value.clone() for name, value in tree.items()} for tree in rows))
        lr, told = self.lr, self._updates
        for update in updates:
            ids = torch.tensor(update.about["clients"])
            for part, tree in update.state._asdict().items():
                for name, value in tree.items():
                    getattr(after, part)[name][ids] = value
            for client, loss in zip(ids.tolist(), update.about["train-loss"], strict=True):
                told[client] = {"loss": loss}
            told[int(ids[0])] |= {"path": update.about["path"]} if "path" in update.about else {}
            lr = update.metrics.get("lr", lr)
            if progress:
                progress(int(update.about.get("client-steps", 0)))
        self.fleet.enough(server_round, len(told))
        answered = torch.zeros(self.topology.num_clients, dtype=torch.bool)
        answered[list(told)] = True
        mixing = self.topology.at(server_round - 1)
        absent = (~answered).nonzero()[:, 0]
        if len(absent):
            mixing = mixing.without(_links_of(mixing, set(absent.tolist())))
        mixed = exchange(after, rows, mixing, self.method, lr, server_round, self.blocks if not len(absent) else None)
        for tree, before in zip(mixed, rows, strict=True):  # also what a policy would make of a row that stood still
            for name, value in tree.items():
                if len(absent):
                    value[absent] = before[name][absent]
        return Mixed(after, mixed, told, answered)


def _links_of(mixing: Mixing, clients: set[int]) -> list[tuple[int, int]]:
    pairs = zip(mixing.sources.tolist(), mixing.targets.tolist(), strict=True)
    return [(j, i) for j, i in pairs if j != i and (j in clients or i in clients)]


class RelayRounds(Backend):
    """Rounds of DSGDM for fedmom's round loop."""

    def __init__(self, strategy: DSGDM, grid: Grid, problem: Problem, asked: dict[str, Any], timeout: float) -> None:
        """`asked`: what every train message says besides the round and the clients. `timeout` in seconds, 0: none."""
        self.strategy, self.grid, self.problem, self.asked, self.timeout = strategy, grid, problem, asked, timeout
        strategy.bundled = not shares_memory(grid)

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of all clients on the nodes, then the exchange here. ClientsFailedError by the policy."""
        assert job.rows is not None
        rows = ClientState(*({name: value.cpu() for name, value in tree.items()} for tree in job.rows))
        self.strategy.path = wanted_by(self.problem, job)["path"]
        mixed = self.strategy.train_round(
            self.grid,
            job.round_index + 1,
            rows,
            ConfigRecord(self.asked),
            timeout=self.timeout,
            progress=progress,
        )
        losses = torch.tensor([mixed.updates[c]["loss"] for c in sorted(mixed.updates)], dtype=torch.float64)
        part = job._replace(weights=job.weights[mixed.answered.to(job.weights.device)].cpu())
        method, path = self.strategy.method, list[Tensor]()
        if self.problem.small:
            points = [about["path"] for about in mixed.updates.values() if "path" in about]
            path = list(torch.tensor(points, dtype=torch.float64).sum(0).reshape(len(job.lrs), -1))
        outcome = outcome_of(self.problem.device, part, method, mixed.after, mixed.rows, losses, path)
        return outcome._replace(answered=None if bool(mixed.answered.all()) else mixed.answered)
