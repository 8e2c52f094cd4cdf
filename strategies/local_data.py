"""Clients whose data nobody else has: the server learns their sizes, and has them evaluate where it has no test set."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmom.config.build import check_own, supervised
from fedmom.config.goals import task_of
from fedmom.config.keys import Config
from fedmom.data.given.own_files import read_server
from fedmom.data.local import Common, Facts, agreed, as_record, none_of
from fedmom.errors import ClientsFailedError
from fedmom.flower.wire import pack
from fedmom.method.state import ClientState, Tree, flatten, row_of
from fedmom.rounds.results import OWN, PERSONAL, client_names
from fedmom.rounds.round import Job
from fedmom.tasks.supervised import Supervised

from .fleet import Fleet
from .replies import ARRAYS, CONFIG, STATES, accept_metrics, accept_sums, mean_metrics, shares_memory, span_of
from .replies import OWN as OWN_ROWS


class Told(NamedTuple):
    """What one client says of a model, from its own test examples."""

    client: int
    weight: float  # how many they are
    metrics: dict[str, float]
    sums: dict[str, list[float]]  # which add up over clients, where means of the metrics do not


class LocalSupervised(Supervised):
    """The clients' objectives as the server sees them: sizes, and a test set of its own or the clients'."""

    facts: dict[str, Any] = {}  # what every message to a client must say  # noqa: RUF012
    nodes: "tuple[Grid, Fleet, Common, float] | None" = None  # whom to ask for an evaluation, and for how long
    looks: bool = False  # whether they also tell what x̂ is to each of them
    asks: bool = False  # whether the test examples are the clients' own, and all of them together
    _told: "tuple[ClientState, list[Told]] | None" = None  # the last model of which clients told what they got

    def evaluate(self, state: ClientState) -> dict[str, float]:
        """{"test_loss", "test_accuracy"}: on the server's test examples, else on all clients' together."""
        if not self.asks:
            return super().evaluate(state)
        told = self._ask(state)
        self._told = state, told
        if self.task.means:
            found = mean_metrics((one.weight, one.metrics) for one in told)
        else:
            found = self._together((one.weight, one.sums) for one in told)
        if found is None:
            raise ClientsFailedError("the evaluation: no client with test examples answered")
        return {name: found[name] for name in self.measures}

    def own_results(self, state: ClientState, job: Job | None, rows: ClientState | None) -> dict[str, np.ndarray]:
        """{"own_loss": [N], …} of x̂ on every client's own test examples, as the clients tell them; NaN of the others.

        job: the steps after which they tell "personal_loss", … of their own models as well; rows: [N, ...] these models
        themselves, of Algorithm 2.
        """
        told, self._told = self._told, None
        answers = told[1] if told is not None and told[0] is state and job is None else self._ask(state, job)
        found = self._of_all(answers, OWN)
        return found if rows is None else found | self._of_all(self._ask(rows, each=True), PERSONAL)

    def _of_all(self, answers: "list[Told]", whose: str) -> dict[str, np.ndarray]:
        """{"own_loss": [N], …} of what clients told of the model that they were sent, and of those that they made."""
        found, wanted = dict[str, np.ndarray](), client_names([OWN, PERSONAL], self.task.metrics)
        for one in answers:
            for name, value in one.metrics.items():
                whole = name if name.startswith(f"{PERSONAL}_") else f"{whose}_{name.removeprefix(f'{OWN}_')}"
                if whole in wanted:
                    found.setdefault(whole, np.full(len(self.sizes), np.nan))[one.client] = value
        return found

    def _ask(self, state: ClientState, job: Job | None = None, *, each: bool = False) -> "list[Told]":
        """What every client with test examples says of a model; `each`: of its row of state [N, ...]."""
        assert self.nodes is not None
        grid, fleet, common, timeout = self.nodes
        bundled = not shares_memory(grid)
        arrays = pack(flatten(row_of(state, 0) if each else state), bundled=bundled)
        asked = {**self.facts, "own": self.looks or each}
        messages = list[Message]()
        if job is not None:
            asked |= {"server-round": job.round_index + 1, "own-models": True, "lr": float(next(iter(job.lrs), 0.0))}
            asked |= span_of(job)
        for holder in fleet.holders:
            client = holder.clients[0]
            if not common.test_sizes[client]:
                continue
            own = pack(flatten(row_of(state, client)), bundled=bundled) if each else arrays
            content: dict[str, Any] = {ARRAYS: own, CONFIG: ConfigRecord(asked)}
            for name, tree in _own(job).items():
                content[name] = pack({n: v[client : client + 1] for n, v in tree.items()}, bundled=bundled)
            messages.append(Message(RecordDict(content), message_type=MessageType.EVALUATE, dst_node_id=holder.node_id))
        try:
            accept = partial(self._accept, adds_up=not each)
            told = [*fleet.exchange(grid, 0, messages, arrays, timeout=timeout, accept=accept)]
        except ClientsFailedError as error:
            raise ClientsFailedError(str(error).replace("round 0: ", "the evaluation: ", 1)) from None
        if not told:
            raise ClientsFailedError("the evaluation: no client with test examples answered")
        return told

    def _accept(self, clients: Sequence[int], reply: Message, *, adds_up: bool) -> "Told":
        weight, metrics = accept_metrics(clients, reply)
        sums = (
            {} if self.task.means or not adds_up else accept_sums(clients, reply, names=("loss", *self.task.metrics))[1]
        )
        return Told(clients[0], weight, metrics, sums)

    def _together(self, answers: Iterable[tuple[float, dict[str, list[float]]]]) -> dict[str, float] | None:
        """The measures of all clients' examples together, by their sums; None where nobody has any."""
        totals = dict[str, Tensor]()
        for weight, sums in answers:
            for name, values in sums.items() if weight else ():
                own = torch.tensor(values, dtype=torch.float64)
                if name in totals and len(own) != len(totals[name]):
                    raise ClientsFailedError(
                        f"the evaluation: clients send {len(totals[name])} and {len(own)} sums of {name}"
                    )
                totals[name] = totals[name] + own if name in totals else own
        return {f"test_{name}": value for name, value in self.task.values(totals).items()} if totals else None


def _own(job: Job | None) -> dict[str, Tree]:
    """{record: [N, ...]} of what clients have of their own, as messages carry it."""
    if job is None:
        return {}
    found = {OWN_ROWS: None if job.own is None else flatten(job.own), STATES: job.correction}
    return {name: tree for name, tree in found.items() if tree}


def local_problem(grid: Grid, fleet: Fleet, config: Config) -> LocalSupervised:
    """Ask every node for its facts (`fleet` then knows its holders), and make the server's side of the problem.

    Raises InputError where clients' examples do not fit together.
    """
    fleet.learn(grid, {"facts": True})
    facts = []
    for holder in fleet.holders:
        said: Iterator[Any] = (holder.about[name.replace("_", "-")] for name in Facts._fields)
        facts.append(Facts._make(tuple(value) if isinstance(value, list) else value for value in said))
    targets = task_of(config).targets
    server = read_server(config.data.data_dir, config.data.classes, targets)
    common = agreed(facts, server, targets)
    problem = supervised(config, config.engine.device, *none_of(common, server, targets), LocalSupervised)
    assert isinstance(problem, LocalSupervised)
    problem.facts = as_record(common)
    problem.looks = bool(config.run.client_eval_every)
    problem.nodes, problem.asks = (grid, fleet, common, config.server.timeout_seconds), server is None
    problem.own_sizes = np.array(common.test_sizes) if any(common.test_sizes) else None
    check_own(config, problem.own_sizes)
    return problem
