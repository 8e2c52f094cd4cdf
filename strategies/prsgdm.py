"""PRSGDM: the Flower strategy that averages the model x, the momentum u and the buffers of a round's clients.

Yu, Jin, Yang (ICML 2019), Algorithm 1, server side. Arrays are named `params/…`, `momentum/…` and `buffers/…`; the
sums are taken in client order in float64, reply by reply, so the result does not depend on who answered first and
memory does not grow with the number of clients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from logging import INFO
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmom.errors import InputError
from fedmom.flower.private import log
from fedmom.flower.wire import pack, unpack
from fedmom.method.averaging import WeightedMean
from fedmom.method.outer import OuterNumbers, OuterRule
from fedmom.method.state import ClientState, Tree, expand, flatten, unflatten, zeros_like
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.rounds.outer import stepped_of
from fedmom.rounds.plan import cohort

from .fleet import Fleet
from .replies import (
    ARRAYS,
    CONFIG,
    OWN,
    STATES,
    WEIGHT,
    Contribution,
    ShouldStop,
    Update,
    accept,
    accept_metrics,
    is_bundled,
    mean_metrics,
)

SPREADS = {"consensus_distance": "params", "momentum_spread": "momentum"}

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class TrainedRound(NamedTuple):
    """One round of training."""

    state: ClientState  # x̂, û and the buffers
    metrics: dict[str, float]  # train_loss, consensus_distance, momentum_spread
    answers: list[Contribution]  # in client order


class PRSGDM(Strategy):
    """Federated momentum SGD: every client restarts from the mean of all models and the mean of all momenta.

    num_clients: N. The clients are found by one query round (node ids are random).
    cohort_size: clients drawn per round, by (seed, round) alone; 0: all.
    running_var: "pooled" or "mean", how BatchNorm variances are averaged.
    on_failure, min_clients, retries: see `strategies.fleet.Fleet`.
    window: messages between the oldest unanswered one and the newest sent; 0: so many as fit into 48 MB per worker.
    momentum_policy: the clients' (algorithm.momentum-policy); under "local" the server keeps every client's u.
    slow_momentum, slow_lr: α and η of SlowMo, a server step on top; outer: another one (`OuterRule`). γ is the clients'
    metric `lr`, else `lr`. It is taken by `start`, and by `aggregate_train` where Flower or a wrapper calls that.
    evaluate_clients: whether `start` also asks all nodes to evaluate after each round.

    The clients' weights are the metric `weighted_by_key` of their replies, the same for x, u and buffers.

    By itself this averages every state in every round, or under "local" leaves all the optimizer's with the client.
    The rest is for fedmom's round loop, and fedmom's clients refuse it: in the first round policies of which one but
    not all are "local", algorithm.personal and an I that changes, after it periods and fragments.
    """

    def __init__(
        self,
        num_clients: int,
        *,
        cohort_size: int = 0,
        seed: int = 0,
        running_var: str = "pooled",
        on_failure: str = "stop",
        min_clients: int = 1,
        retries: int = 2,
        window: int = 0,
        wait_seconds: float = 600.0,
        slow_momentum: float = 0.0,
        slow_lr: float = 1.0,
        outer: OuterRule | None = None,
        lr: float = 1.0,
        momentum_policy: str = "average",
        evaluate_clients: bool = False,
        weighted_by_key: str = WEIGHT,
    ) -> None:
        size = cohort_size or num_clients
        if not 0 < min_clients <= size <= num_clients:
            raise InputError(
                f"num_clients = {num_clients}, cohort_size = {cohort_size}, min_clients = {min_clients}: "
                "min_clients must be at least 1 and at most the cohort's size, and that at most num_clients"
            )
        self.fleet = Fleet(num_clients, on_failure, min_clients, retries, window, wait_seconds)
        self.cohort = partial(cohort, num_clients, size, seed)
        self.running_var, self.weighted_by_key = running_var, weighted_by_key
        self.lr = lr
        self.outer = outer or (
            OuterRule("slowmo", OuterNumbers(slow_lr, slow_momentum)) if slow_momentum or slow_lr != 1 else None
        )
        self.memory: dict[str, Tree] = {}  # what the outer step remembers
        self.evaluate_clients = evaluate_clients
        self._stepped: dict[str, Tree] | None = None  # the memory, where it is this strategy's own work
        self.policy = MOMENTUM_POLICIES[momentum_policy]
        self.keeps_rows = self.policy.keeps_rows
        self.own: dict[int, Tree] = {}  # {client: what it has of its own, as `flatten` names it}, sent along
        self._given: dict[int, Tree] = {}  # the same before round 1: what a caller has set, or nothing
        self._kept: dict[int, Tree] | None = None  # the same, where it is this strategy's own work
        self.returns: Tree | None = None  # what of its own a client must give back; None: what it was sent
        self.states: dict[int, Tree] = {}  # {client: its own state of a correction}, sent along where there are any
        self.message: Tree = {}  # of a correction with state, which the replies have in the place of the server's state
        self.wanted: dict[str, Any] = {}  # what else `accept` must find in a reply
        self._expected: Tree = {}  # what the updates of this round must look like
        self._asked: dict[int, list[int]] = {}  # {node: clients} of this round's training
        self._judging: dict[int, list[int]] | None = None  # {node: clients} of this round's evaluation

    def summary(self) -> None:
        log(INFO, "\t├──> %d clients in all", self.fleet.num_clients)
        log(INFO, "\t└──> on failure: %s", self.fleet.on_failure)

    # What Flower asks of a strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message to every node that holds clients of the round's cohort, in client order."""
        self._begin(server_round, arrays)
        return list(self._train_messages(server_round, arrays, config, grid))

    def _begin(self, server_round: int, arrays: ArrayRecord) -> None:
        """A run that begins forgets what this strategy has kept of the one before; what a caller has set stays."""
        start = unflatten(unpack(arrays))
        if start.correction:
            raise InputError("initial_arrays: a correction with state is fedmom's round loop's; this strategy has none")
        if server_round == 1:
            self._given = self.own = self._given if self.own is self._kept else self.own
        self.keeps_rows = self.policy.keeps_rows or bool(self.own)
        if self.outer is not None and (not self.memory or (server_round == 1 and self.memory is self._stepped)):
            self._stepped = self.memory = self.outer.start(stepped_of(self.outer, start))

    def _train_messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """The same, each made as it goes out."""
        if not self.fleet.holders:
            self.fleet.learn(grid)
        self._expected, self._asked, bundled = unpack(arrays), {}, is_bundled(arrays)
        self._expected = flatten(unflatten(self._expected)._replace(correction=self.message))
        if self.keeps_rows and not self.own:
            zeros = flatten(ClientState({}, zeros_like(unflatten(self._expected).momentum), {}))
            self._kept = self.own = dict.fromkeys(range(self.fleet.num_clients), zeros)
        chosen = set(self.cohort(server_round - 1).tolist())
        for holder in self.fleet.holders:
            clients = [client for client in holder.clients if client in chosen]
            if not clients:
                continue
            self._asked[holder.node_id] = clients
            asked = ConfigRecord({**config, "server-round": server_round, "clients": clients})
            content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {ARRAYS: arrays, CONFIG: asked}
            for name, rows in ((OWN, self.own), (STATES, self.states)):
                if rows:
                    each = [rows[client] for client in clients]
                    content[name] = pack({n: torch.stack([u[n] for u in each]) for n in each[0]}, bundled=bundled)
            yield Message(RecordDict(content), message_type=MessageType.TRAIN, dst_node_id=holder.node_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Weighted means of the replies, in the order in which they come; failures as `on_failure` says."""
        updates = self.fleet.answered(server_round, self._asked, replies, self._accept)
        trained = self._average(server_round, updates)
        return pack(flatten(self._outer_step(trained))), MetricRecord(dict(trained.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message to every node, if clients are to evaluate at all."""
        if not self.evaluate_clients:
            return []
        if not self.fleet.holders:
            self.fleet.learn(grid)
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, "server-round": server_round})})
        self._judging = {holder.node_id: list(holder.clients) for holder in self.fleet.holders}
        return [Message(content, message_type=MessageType.EVALUATE, dst_node_id=node_id) for node_id in self._judging]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means of the replies' metrics by their weights; None where nobody was asked."""
        asked, self._judging = self._judging, None
        accept_one = partial(accept_metrics, weighted_by_key=self.weighted_by_key)
        means = mean_metrics(self.fleet.answered(server_round, asked, replies, accept_one))
        return None if means is None else MetricRecord(dict(means))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
        should_stop: ShouldStop | None = None,
        *,
        first_round: int = 1,
        memory: dict[str, Tree] | None = None,
        on_round: Callable[[int, ArrayRecord, MetricRecord], None] | None = None,
    ) -> Result:
        """Rounds first_round … num_rounds, the numbers that clients and cohorts see; a resumed run gives the later one.

        `memory`: what the outer step remembers, to go on with; `self.memory` is its last value.
        `on_round(round, arrays, metrics)` is called after each round, then `should_stop(round, result so far)`: where
        it is true, that round was the last. Raises ClientsFailedError by `on_failure`.
        """
        result, arrays = Result(), initial_arrays
        result.arrays = arrays
        self.memory, self._stepped = memory or {}, None
        self._begin(first_round, arrays)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if evaluate_fn and first_round == 1 and (measured := evaluate_fn(0, arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = measured
        for number in range(first_round, num_rounds + 1):
            trained = self.train_round(grid, number, arrays, train_config, timeout=timeout)
            metrics = MetricRecord(dict(trained.metrics))
            arrays = result.arrays = pack(flatten(self._outer_step(trained)))
            result.train_metrics_clientapp[number] = metrics
            log(INFO, "[ROUND %s/%s] %s", number, num_rounds, dict(metrics))
            messages = self.configure_evaluate(number, arrays, evaluate_config, grid)
            replies = self.fleet.exchange(grid, number, messages, arrays, timeout=timeout)
            self._judging = None  # the exchange above has met the failures
            if (judged := self.aggregate_evaluate(number, replies)) is not None:
                result.evaluate_metrics_clientapp[number] = judged
            if evaluate_fn and (measured := evaluate_fn(number, arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = measured
            if on_round:
                on_round(number, arrays, metrics)
            if should_stop and should_stop(number, result):
                break
        return result

    # One round

    def train_round(
        self,
        grid: Grid,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        *,
        timeout: float = 0.0,
        on_update: Callable[[Update], None] = lambda update: None,
    ) -> TrainedRound:
        """Send the cohort its start, and average what comes back; failures as `on_failure` says."""
        messages = self._train_messages(server_round, arrays, config, grid)
        updates = self.fleet.exchange(grid, server_round, messages, arrays, timeout=timeout, accept=self._accept)
        return self._average(server_round, updates, on_update)

    def _accept(self, clients: Sequence[int], reply: Message) -> Update:
        own, states = (
            expand(rows[clients[0]], len(clients)) if rows and clients else None for rows in (self.own, self.states)
        )
        if self.returns is not None:
            own = expand(self.returns, len(clients))  # {} refuses what nobody has asked for
        return accept(
            reply,
            self._expected,
            self.weighted_by_key,
            clients=clients,
            own=own,
            states=states,
            **self.wanted,
        )

    def _average(
        self,
        server_round: int,
        updates: Iterable[Update],
        on_update: Callable[[Update], None] = lambda update: None,
    ) -> TrainedRound:
        """Weighted means, one update at a time; each is let go before the next is taken."""
        mean, answers, num_clients = WeightedMean(self.running_var), list[Contribution](), 0
        told = list[tuple[float, dict[str, float]]]()
        if self.keeps_rows:
            self._kept = self.own = dict(self.own)  # a copy: a caller's stays as it was
        for update in updates:
            mean.add_one(update.state, update.weight)
            told.append((update.weight, update.metrics))
            answers.append(Contribution(update.weight, update.about, update.own, update.states))
            if self.keeps_rows and update.own:
                for place, client in enumerate(update.about["clients"]):
                    self.own[client] = {name: u[place].clone() for name, u in update.own.items()}
            num_clients += len(update.about.get("clients", [0]))
            on_update(update)
            del update
        self.fleet.enough(server_round, num_clients)
        metrics = mean_metrics(told) or {}
        for name, part in SPREADS.items():  # a block's clients about its mean, and the means about theirs
            metrics[name] = metrics.get(name, 0.0) + mean.spread(part)
        return TrainedRound(mean.mean(), metrics, answers)

    def _outer_step(self, trained: TrainedRound) -> ClientState:
        """The outer step from the round's start to its mean; the mean itself where there is none."""
        if self.outer is None:
            return trained.state
        before, mean = self._expected, flatten(trained.state)
        names, lr = next(iter(self.memory.values())), trained.metrics.get("lr", self.lr)
        here, there = ({n: tree[n] for n in names} for tree in (before, mean))
        moved, self.memory = self.outer.step(here, there, self.memory, lr)
        self._stepped = self.memory
        return unflatten(mean | moved)
