"""The round loop's rounds over Flower's nodes that keep their clients' rows, and the rows' way to a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmom.backends.at_nodes.node import STATES
from fedmom.backends.at_nodes.turns import Turns
from fedmom.errors import DivergedError
from fedmom.flower.private import log
from fedmom.flower.wire import pack, unpack
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import ClientState, Tree, flatten, to_device, unflatten
from fedmom.rounds.plan import Plan, RunState
from fedmom.rounds.round import Backend, Fetched, Job, Outcome, Progress
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import Senders
from fedmom.travel.messages import read

from ..backends import outcome_of, tell
from ..prsgdm import PRSGDM, TrainedRound
from ..replies import ABOUT, ARRAYS, CONFIG, Update, accept, check, shares_memory, span_of, wanted_by
from .ledger import Ledger

_GIVEN, _MEAN = "given", "mean"  # names of records
_PATIENCE = 60.0  # seconds for what nodes keep, after a round that failed


class Sends(PRSGDM):
    """PRSGDM, whose messages differ from node to node."""

    content: Callable[[Sequence[int], Sequence[int]], RecordDict]  # (clients of the cohort, all) of one node
    read: Callable[[Sequence[int], Tree], Tree]  # what clients' arrays stand for

    def _train_messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        # What clients send, in the place of what all begin with.
        self._expected = unpack(arrays) | {f"correction/{name}": value for name, value in self.message.items()}
        chosen = set(self.cohort(server_round - 1).tolist())
        for holder in self.fleet.holders:
            if clients := [client for client in holder.clients if client in chosen]:
                content = self.content(clients, holder.clients)
                yield Message(content, message_type=MessageType.TRAIN, dst_node_id=holder.node_id)

    def _accept(self, clients: Sequence[int], reply: Message) -> Update:
        read = partial(self.read, clients)
        update = accept(reply, self._expected, clients=clients, own={}, states={}, read=read, **self.wanted)
        for name, kind in (("given", list), ("broken", str)):
            if not isinstance(update.about.get(name, kind()), kind):
                raise ValueError(f"its record {ABOUT!r} has a {name} that is no {'text' if kind is str else 'list'}")
        return update


class RoundsAtNodes(Backend):
    """Rounds of Algorithm 1 over nodes that keep what is their clients' own."""

    def __init__(
        self, strategy: Sends, grid: Grid, problem: Problem, plan: Plan, asked: dict[str, Any], timeout: float
    ) -> None:
        """`asked`: what every train message says besides the round and the clients. `timeout` in seconds, 0: none."""
        self.strategy, self.grid, self.problem, self.plan = strategy, grid, problem, plan
        self.asked, self.timeout, self.failed = asked, timeout, False
        self.turns = Turns(problem, plan)
        self.ledger = Ledger(self.turns, len(problem.sizes))
        self.bundled = not shares_memory(grid)

    def begin_at(self, done: RunState) -> None:
        self.ledger.begin_at(done)

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of the cohort on the nodes. Raises ClientsFailedError as the strategy's policy says."""
        number, self.failed = job.round_index + 1, True
        self.ledger.begin(start, job.round_index)
        common = flatten(to_device(start, "cpu"))
        form = {flat: common[flat] for flat in self.turns.up(number)}
        packed = dict[tuple[str, ...], ArrayRecord]()  # by names: one for all nodes that are told the same

        def content(clients: Sequence[int], held: Sequence[int]) -> RecordDict:
            since = [int(self.ledger.since[client]) for client in clients]
            asked = {**self.asked, **span_of(job), "server-round": number, "clients": list(clients), "since": since}
            down = self.ledger.down(clients, job.round_index)
            down |= {name: value for name, value in common.items() if name.startswith("correction/")}
            if job.down is not None and self.ledger.trained_in(held, job.round_index):
                asked["reference"] = job.round_index
                rules = self.plan.codecs_down
                down = {name: v for name, v in down.items() if not self.turns.is_encoded(rules, name)} | job.down
            if (*down,) not in packed:
                packed[(*down,)] = pack(down, bundled=self.bundled)
            given = self.ledger.given(clients, job.round_index)
            records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {ARRAYS: packed[(*down,)]}
            if given:
                asked["given"] = [*given]
                names = next(iter(given.values()))
                rows = {name: torch.stack([row[name] for row in given.values()]) for name in names}
                records[_GIVEN] = pack(rows, bundled=self.bundled)
            return RecordDict({**records, CONFIG: ConfigRecord(asked)})

        self.strategy.content, self.strategy.wanted = content, wanted_by(self.problem, job)
        self.strategy.read = partial(self._read, common, job)
        trained = self.strategy.train_round(
            self.grid,
            number,
            pack(form),
            ConfigRecord(),
            timeout=self.timeout,
            on_update=lambda update: tell(progress, update),
        )
        self.failed = False
        self._check_finite(trained, job)
        self._note(trained, job)
        return self._outcome(common, job, trained)

    def _read(self, common: Tree, job: Job, clients: Sequence[int], arrays: Tree) -> Tree:
        """What the arrays of one client's reply stand for, or a block's. ValueError where they are no such message."""
        rules = self.plan.method.codecs
        if not rules or len(clients) > 1:
            return arrays
        message = {name: value for name, value in arrays.items() if name.startswith("correction/")}
        arrays = {name: value for name, value in arrays.items() if name not in message}
        begun = {flat: common[flat] for flat in self.turns.up(job.round_index + 1)}
        return read(rules, arrays, begun, Senders(job.seed, torch.tensor(clients), job.round_index)) | message

    def _note(self, trained: TrainedRound, job: Job) -> None:
        """Whose rows are newer now; a warning where a node had lost some."""
        answered = {client for answer in trained.answers for client in answer.about["clients"]}
        told = {client for answer in trained.answers for client in answer.about.get("given", ())}
        for client in self.ledger.restored(told & answered):
            before = int(self.ledger.since[client])
            log(
                WARNING,
                "client %d: its node had lost what the client had of its own after round %d; it went on from what the "
                "server had of round %d",
                client,
                before,
                self.ledger.known_round,
            )
        self.ledger.silent(set(job.clients.tolist()) - answered)
        self.ledger.answered(answered, job.round_index + 1)

    def _check_finite(self, trained: TrainedRound, job: Job) -> None:
        for answer in trained.answers:
            if broken := str(answer.about.get("broken", "")):
                where = f"round {job.round_index + 1} at lr = {job.lrs[0]:g}"
                raise DivergedError(f"a client's own {broken[:20]} became NaN or infinite in {where}: try a smaller lr")

    def _outcome(self, common: Tree, job: Job, trained: TrainedRound) -> Outcome:
        """What came of a round; what did not travel stands where clients agreed on it last, and can be fetched."""
        sent = flatten(trained.state)
        absent = frozenset(flat for flat in self.turns.shared if flat not in sent)
        names = [*self.turns.shared, *(name for name in sent if name.startswith("correction/"))]
        mean = {name: self.ledger.agreed[name] if name in absent else sent[name] for name in names}
        trained = trained._replace(state=unflatten(mean))
        outcome = outcome_of(self.problem, job, trained.state, trained.metrics, trained.answers)
        own = bool(self.turns.own(job.round_index + 1) or self.turns.states)
        if not absent and not own:
            return outcome

        there = self.ledger.there()

        def fetch() -> Fetched:
            return self._fetch(outcome.mean, absent, job.round_index + 1, trained, there)

        return outcome._replace(absent=absent, fetch=fetch)

    # What nodes keep

    def _fetch(
        self, mean: ClientState, absent: frozenset[str], number: int, trained: TrainedRound, there: np.ndarray
    ) -> Fetched:
        """The whole mean, and every client's rows, from the nodes. Raises ClientsFailedError by the policy."""
        blocks = {answer.about["clients"][0]: len(answer.about["clients"]) for answer in trained.answers}
        form = {flat: self.turns.begin[flat] for flat in absent}
        alone = {flat: value for flat, value in form.items() if flat not in self.turns.own(number)}
        forms = {first: form if size > 1 else alone for first, size in blocks.items()} if absent else {}
        means, rows = self._ask(number, forms, there)
        own, states = self.ledger.rows(number, there, rows.get)
        whole = flatten(mean)
        if absent:
            looked_at = WeightedMean(self.plan.method.running_var)
            for answer in trained.answers:
                first, *others = answer.about["clients"]
                if first not in means:  # under `proceed`
                    continue
                found = means[first] if others else {**rows[first], **means[first]}
                looked_at.add_one(unflatten({flat: found[flat] for flat in absent}), answer.weight)
            if means:
                whole |= flatten(to_device(looked_at.mean(), self.problem.device))
        return Fetched(
            unflatten({name: whole[name] for name in flatten(mean)}),
            own=unflatten(own) if own else None,
            correction=states or None,
        )

    def _ask(
        self, number: int, forms: Mapping[int, Tree], there: np.ndarray
    ) -> tuple[dict[int, Tree], dict[int, Tree]]:
        """({the first client of a block: the mean of what it did not send}, {client: its row}) after a round.

        forms: by the first client of each block whose mean is asked for, what it must have; there: the ledger's.
        """
        messages, wants = list[Message](), dict[tuple[int, ...], int]()
        for holder in self.strategy.fleet.holders:
            first = next((client for client in holder.clients if client in forms), -1)
            clients = [c for c in holder.clients if c == first or self.ledger.counts(int(there[c]), number)]
            if not clients:
                continue
            wants[(*clients,)] = first
            since = [int(there[client]) for client in clients]
            asked = ConfigRecord({"clients": clients, "since": since, "mean": number if first >= 0 else 0})
            content = RecordDict({CONFIG: asked})
            messages.append(Message(content, message_type=MessageType.QUERY, dst_node_id=holder.node_id))
        means, rows = dict[int, Tree](), dict[int, Tree]()

        def accept(clients: Sequence[int], reply: Message) -> bool:
            records, first = reply.content.array_records, wants[(*clients,)]
            for client in clients:
                found = unpack(records.get(f"own/{client}", ArrayRecord()))
                check("own row", found, self._form(int(there[client])))
                rows[client] = found
            if first >= 0:
                found = unpack(records.get(_MEAN, ArrayRecord()))
                check("mean", found, forms[first])
                means[first] = found
            return True

        size = pack(self.turns.begin)
        timeout = min(self.timeout or _PATIENCE, _PATIENCE) if self.failed else self.timeout
        for _ in self.strategy.fleet.exchange(self.grid, number, messages, size, timeout=timeout, accept=accept):
            pass
        return means, rows

    def _form(self, since: int) -> Tree:
        """What a client's row of a round must have."""
        own = {flat: rows[0] for flat, rows in self.turns.own(since).items()}
        return own | {STATES + name: value for name, value in self.turns.states.items()}
