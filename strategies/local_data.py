"""Clients whose data nobody else has: the server learns their sizes, and has them evaluate where it has no test set."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmom.config.build import supervised
from fedmom.config.goals import task_of
from fedmom.config.keys import Config
from fedmom.data.local import Common, Facts, agreed, as_record, none_of, read_server
from fedmom.errors import ClientsFailedError
from fedmom.method.state import ClientState, flatten
from fedmom.tasks.supervised import Supervised

from .fleet import Fleet
from .replies import ARRAYS, CONFIG, accept_metrics, accept_sums, mean_metrics, pack, shares_memory


class LocalSupervised(Supervised):
    """The clients' objectives as the server sees them: sizes, and a test set of its own or the clients'."""

    facts: dict[str, Any] = {}  # what every message to a client must say  # noqa: RUF012
    asks: "tuple[Grid, Fleet, Common, float] | None" = None  # whom to ask for an evaluation, where it must

    def evaluate(self, state: ClientState) -> dict[str, float]:
        """{"test_loss", "test_accuracy"}: on the server's test examples, else on all clients' together."""
        if self.asks is None:
            return super().evaluate(state)
        grid, fleet, common, timeout = self.asks
        arrays = pack(flatten(state), bundled=not shares_memory(grid))
        nodes = [holder.node_id for holder in fleet.holders if common.test_sizes[holder.clients[0]]]
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(dict(self.facts))})
        messages = [Message(content, message_type=MessageType.EVALUATE, dst_node_id=node) for node in nodes]
        accept: Callable[..., Any] = accept_metrics
        if not self.task.means:
            accept = partial(accept_sums, names=("loss", *self.task.metrics))
        try:
            answers = [*fleet.exchange(grid, 0, messages, arrays, timeout=timeout, accept=accept)]
        except ClientsFailedError as error:
            raise ClientsFailedError(str(error).replace("round 0: ", "the evaluation: ", 1)) from None
        found = mean_metrics(answers) if self.task.means else self._together(answers)
        if found is None:
            raise ClientsFailedError("the evaluation: no client with test examples answered")
        return {name: found[name] for name in self.measures}

    def _together(self, answers: list[tuple[float, dict[str, list[float]]]]) -> dict[str, float] | None:
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
    if server is None:
        problem.asks = (grid, fleet, common, config.server.timeout_seconds)
    return problem
