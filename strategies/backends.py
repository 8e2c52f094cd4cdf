"""fedmom's round loop on Flower's clients: each round of `run_rounds` is one exchange over a Grid."""

from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmom.errors import ClientsFailedError
from fedmom.flower.wire import pack, unpack
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import ClientState, Tree, flatten, row_of, to_device, unflatten
from fedmom.rounds.plan import Plan, own_after
from fedmom.rounds.round import Backend, Job, Outcome, Progress
from fedmom.tasks.problem import Problem

from .fleet import Fleet
from .flower_strategies import CohortGrid
from .prsgdm import PRSGDM, SPREADS
from .replies import MEASURES, Contribution, Update, accept, shares_memory, span_of, wanted_by


class AveragingRounds(Backend):
    """Rounds of PRSGDM: what the engine does in this process, done by the nodes of a Grid."""

    def __init__(
        self,
        strategy: PRSGDM,
        grid: Grid,
        problem: Problem,
        plan: Plan,
        asked: dict[str, Any],
        timeout: float,
    ) -> None:
        """`asked`: what every train message says besides the round and the clients. `timeout` in seconds, 0: none."""
        self.strategy, self.grid, self.problem, self.plan = strategy, grid, problem, plan
        self.asked, self.timeout = asked, timeout

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of the cohort on the nodes. Raises ClientsFailedError as the strategy's policy says."""
        ids = job.clients.tolist()
        self.strategy.own = {} if job.own is None else _by_client(ids, flatten(job.own))
        returned = own_after(self.problem, self.plan, job.round_index + 1)
        self.strategy.returns = {} if returned is None else flatten(to_device(row_of(returned, 0), "cpu"))
        self.strategy.wanted = wanted_by(self.problem, job)
        if job.correction is not None:
            self.strategy.states = _by_client(ids, job.correction)
        trained = self.strategy.train_round(
            self.grid,
            job.round_index + 1,
            pack(flatten(start), bundled=not shares_memory(self.grid)),
            ConfigRecord({**self.asked, **span_of(job)}),
            timeout=self.timeout,
            on_update=lambda update: tell(progress, update),
        )
        metrics = trained.metrics
        return outcome_of(self.problem, job, trained.state, metrics, trained.answers)


class StockRounds(Backend):
    """Rounds of one of Flower's own strategies; the failures are met as for ours before it sees the replies."""

    def __init__(
        self,
        strategy: Strategy,
        fleet: Fleet,
        grid: Grid,
        problem: Problem,
        asked: dict[str, Any],
        timeout: float,
    ) -> None:
        self.strategy, self.fleet, self.grid, self.problem = strategy, fleet, grid, problem
        self.asked, self.timeout = asked, timeout

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """One round as Strategy.start would run it: configure, exchange, aggregate."""
        number, tensors = job.round_index + 1, flatten(start)
        arrays = pack(tensors, bundled=not shares_memory(self.grid))
        chosen, wanted = set(job.clients.tolist()), wanted_by(self.problem, job)
        nodes = [holder.node_id for holder in self.fleet.holders if chosen.intersection(holder.clients)]
        messages = list(
            self.strategy.configure_train(number, arrays, ConfigRecord(self.asked), CohortGrid(self.grid, nodes))
        )
        messages.sort(key=lambda message: nodes.index(message.metadata.dst_node_id))
        updates, mean = list[Update](), WeightedMean("mean")
        for update in self.fleet.exchange(
            self.grid,
            number,
            messages,
            arrays,
            timeout=self.timeout,
            accept=lambda clients, reply: accept(reply, tensors, clients=clients, **wanted),
        ):
            tell(progress, update)
            mean.add_one(update.state, update.weight)
            updates.append(update)
        self.fleet.enough(number, sum(len(update.about["clients"]) for update in updates))
        result, _ = self.strategy.aggregate_train(number, [update.reply for update in updates])
        if result is None:
            raise ClientsFailedError(f"round {number}: {type(self.strategy).__name__} gave no model")
        metrics = {}
        for name in MEASURES:
            metrics[name] = sum(u.weight * u.metrics[name] for u in updates) / mean.weight
        for name, part in SPREADS.items():
            metrics[name] += mean.spread(part)
        answers = [Contribution(update.weight, update.about, None) for update in updates]
        return outcome_of(self.problem, job, unflatten(_like(result, tensors)), metrics, answers)


def _like(arrays: ArrayRecord, tensors: Tree) -> Tree:
    """Arrays of a stock strategy in the dtypes that were sent: it makes whole numbers real."""
    found = unpack(arrays)
    return {
        name: (found[name] if right.is_floating_point() else found[name].round()).to(right.dtype, copy=True)
        for name, right in tensors.items()
    }


def _by_client(ids: Sequence[int], rows: Tree) -> dict[int, Tree]:
    """{client: its row} of rows [C, ...]."""
    each = {name: value.unbind() for name, value in rows.items()}
    return {client: {name: values[k] for name, values in each.items()} for k, client in enumerate(ids)}


def tell(progress: Progress | None, update: Update) -> None:
    if progress:
        progress(int(update.about.get("client-steps", 0)))


def outcome_of(
    problem: Problem, job: Job, state: ClientState, metrics: dict[str, float], answers: Sequence[Contribution]
) -> Outcome:
    """What the nodes' answers come to, in the order of the job's clients."""
    place = {client: k for k, client in enumerate(job.clients.tolist())}
    answered = torch.zeros(len(place), dtype=torch.bool)
    losses = torch.full((len(place),), torch.nan, dtype=torch.float64)
    path, total = list[torch.Tensor](), sum(answer.weight for answer in answers)
    for answer in answers:
        rows = torch.tensor([place[client] for client in answer.about["clients"]])
        answered[rows] = True
        losses[rows] = torch.tensor(answer.about["train-loss"], dtype=torch.float64)
        if problem.small:
            points = torch.tensor(answer.about["path"], dtype=torch.float64).reshape(len(job.lrs), -1)
            path = [
                a + answer.weight / total * b for a, b in zip(path or torch.zeros_like(points), points, strict=True)
            ]
    order = torch.tensor([place[client] for answer in answers for client in answer.about["clients"]]).argsort()

    def together(rows: Sequence[Tree | None]) -> Tree | None:
        found = [tree for tree in rows if tree]
        return {name: torch.cat([tree[name] for tree in found])[order] for name in found[0]} if found else None

    kept = together([answer.own for answer in answers])
    return Outcome(
        mean=to_device(state, problem.device),
        train_loss=metrics["train_loss"],
        consensus_distance=metrics["consensus_distance"],
        momentum_spread=metrics["momentum_spread"],
        trajectory=path,
        own=None if kept is None else unflatten(kept),
        correction=together([answer.states for answer in answers]) if job.correction is not None else None,
        losses=losses[answered],
        answered=None if bool(answered.all()) else answered,
    )
