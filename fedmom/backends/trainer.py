"""One Flower node: the clients it holds, and one engine call for those of them that a round asks for.

No Flower here: clients/client_app.py unpacks a message, calls `Node`, and packs the answer.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.backends.at_nodes.turns import Turns
from fedmom.config.build import make_plan, make_problem, resolve_device, set_up_torch, supervised
from fedmom.config.examples import own_split
from fedmom.config.goals import task_of
from fedmom.config.keys import Config, Scalar
from fedmom.config.load import flat, load
from fedmom.config.resolve import Resolved, resolve
from fedmom.data.given.own_files import read_client
from fedmom.data.local import Common, one_of
from fedmom.engine.auto import Said, choose
from fedmom.engine.engine import Engine
from fedmom.errors import InputError
from fedmom.method.schedules import Span
from fedmom.method.state import ClientState, Tree, flatten, is_among, parted, row_of, to_device
from fedmom.rounds.clients import after_steps, own_models_of, steps_job
from fedmom.rounds.correction import client_rows, start_of
from fedmom.rounds.plan import Plan, clients_job, own_after
from fedmom.rounds.results import OWN, PERSONAL
from fedmom.rounds.round import Outcome
from fedmom.tasks.models.start import digest_of
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import blamed


def held_clients(node: int, num_nodes: int, num_clients: int) -> np.ndarray:
    """The ids c with ⌊c·P/N⌋ = p, in ascending order: one client each where P = N, blocks of nearly equal size else."""
    first = -(-node * num_clients // num_nodes)
    return np.arange(first, -(-(node + 1) * num_clients // num_nodes), dtype=np.int64)


def settled(run_config: Mapping[str, Scalar]) -> Resolved:
    """The resolved configuration of a Flower run config, in which every key is there, given or not.

    Raises InputError naming the key.
    """
    return _settled(tuple(run_config.items()))


@lru_cache(maxsize=1)
def _settled(items: tuple[tuple[str, Scalar], ...]) -> Resolved:
    # Of a Config, keys at their defaults count as not given.
    return resolve(load(load(dict(items)).config))


class TrainedBlock(NamedTuple):
    """What a block of clients answers."""

    outcome: Outcome  # weighted means over the block; tensors in main memory
    weight: float  # Σ of the clients' weights, by which the server weighs the block
    client_steps: int
    lr: float  # γ of the round's first step


class TrainedRows(NamedTuple):
    """What a block of clients answers under Algorithm 2."""

    rows: ClientState  # [k, ...] after the local steps; tensors in main memory
    losses: Tensor  # [k]
    client_steps: int
    lr: float
    path: list[Tensor]  # Σ x after every step, for small tasks


class Local(NamedTuple):
    """One client's own data, as a node that trains on it must know them."""

    source: str  # see fedmom.data.local
    client: int
    common: Common


class Node:
    """Data, model and engines of one configuration, warm for as long as the process lives."""

    def __init__(self, config: Config, local: "Local | None" = None) -> None:
        """`local`: where this node's own examples are, under data.dataset = "local"."""
        set_up_torch(config.engine)
        self.config, self.local = resolve_device(config), local
        self._keys = flat(self.config)
        device = self.config.engine.device
        with blamed(self._keys):
            if local is None:
                self.problem: Problem = make_problem(self.config, device)
            else:
                targets = task_of(config).targets
                keys = self.config.data.classes, targets, own_split(self.config)
                held = read_client(Path(local.source), local.client, *keys)
                mine = one_of(local.common, local.client, held, targets)
                self.problem = supervised(self.config, device, *mine[:2], own=mine[2])
            self.plan: Plan = make_plan(self.config, self.problem)
            self.begin = start_of(self.problem, self.plan.method)  # as a run begins, and one client's own state
        self.sent = parted(self.begin[0], self.problem.personal)[0]  # what of it travels
        self.turns = Turns(self.problem, self.plan)
        # What is frozen never travels: another file here would be another model.
        self.begun_from = digest_of(config.model.start)
        self._choices: dict[int, tuple[str, int]] = {}
        self.said: dict[int, Said] = {}  # {size of block: what was measured for it, or remembered}
        self._engines: dict[tuple[str, int], Engine] = {}

    def choose(self, clients: np.ndarray) -> tuple[str, int]:
        """(path, chunk size) for a block: as configured, else by timing, once for each size of block.

        Raises InputError where the path that is configured is not right for the model.
        """
        wanted, size = self.config.engine, len(clients)
        if size not in self._choices:
            start, client = self.begin
            job = clients_job(self.problem, self.plan, 0, clients, None, client_rows(client, size))
            path, chunk_size = wanted.path, wanted.chunk_size
            with blamed(self._keys):
                choice = choose(
                    self.problem,
                    self.plan.method,
                    start,
                    job,
                    path=path,
                    remember=wanted.remember,
                    chunk_size=chunk_size,
                    own_rows=self.plan.topology is not None,
                )
            self._choices[size] = (choice.path, wanted.chunk_size or choice.chunk_size)
            self.said[size] = choice.said
        return self._choices[size]

    def _engine(self, path: str, chunk_size: int) -> Engine:
        if (path, chunk_size) not in self._engines:
            self._engines[path, chunk_size] = Engine(self.problem, self.plan.method, path=path, chunk_size=chunk_size)
        return self._engines[path, chunk_size]

    def train(
        self,
        clients: Sequence[int],
        round_index: int,
        start: ClientState,
        own: ClientState | None = None,
        correction: Tree | None = None,
        *,
        span: Span | None = None,
        path: str = "",
        chunk_size: int = 0,
        messages: Tree | None = None,
    ) -> TrainedBlock:
        """I local steps of `clients` from `start` in round 0, 1, …, and their weighted mean.

        `own`: what they have of their own [k, ...]; `correction`: their own states of one [k, ...]; `span`: the round's
        steps, where I changes in the run; `messages`: filled with what one client sends, encoded.
        `path` and `chunk_size` as the server settled them; left out, they are chosen here. Raises InputError for a
        client that does not exist or a start of another model.
        """
        ids = self._ids(clients)
        self._check(start, self.sent)
        self._check_own(own, own_after(self.problem, self.plan, round_index), len(ids))
        if (states := self.begin[1]).keys() != (correction or {}).keys():
            right = ", ".join(states) or "none"
            raise InputError(f"arrays: the clients' own states must be {right}, by algorithm.correction")
        if not path:
            path, chunk_size = self.choose(ids)
        engine = self._engine(path, chunk_size or len(ids))
        job = clients_job(self.problem, self.plan, round_index, ids, own, correction, self._checked(span))
        job = job._replace(messages=messages)
        with blamed(self._keys):
            outcome = engine.run_round(to_device(start, self.problem.device), job)
        return TrainedBlock(
            outcome._replace(mean=to_device(outcome.mean, "cpu"), losses=outcome.losses),
            float(job.weights.sum()),
            int(job.num_steps.sum()),
            job.lrs[0],
        )

    def train_rows(
        self, clients: Sequence[int], round_index: int, rows: ClientState, *, path: str = "", chunk_size: int = 0
    ) -> TrainedRows:
        """I local steps of `clients`, each from its own row [k, ...] (in ascending order), without an exchange.

        Raises InputError for a client that does not exist or rows of another model.
        """
        ids = self._ids(clients)
        self._check(row_of(rows, 0), self.begin[0])
        if not path:
            path, chunk_size = self.choose(ids)
        engine = self._engine(path, chunk_size or len(ids))
        job = clients_job(self.problem, self.plan, round_index, ids)
        with blamed(self._keys):
            after, losses, points = engine.run_rows(to_device(rows, self.problem.device), job)
        return TrainedRows(to_device(after, "cpu"), losses.cpu(), int(job.num_steps.sum()), job.lrs[0], points)

    def _checked(self, span: Span | None) -> Span | None:
        """InputError unless whoever asks tells the steps where they change from round to round, and only there."""
        if (span is not None) != self.plan.changes_steps:
            said = f"algorithm.interval = {self._keys['algorithm.interval']!r}"
            told = "must be told" if span is None else "need not be told"
            right = "take this fedmom on both sides, and its round loop, which tells them"
            raise InputError(f"{said}: a round's first-step and num-steps {told}; {right}")
        return span

    def _ids(self, clients: Sequence[int]) -> np.ndarray:
        ids = np.asarray(sorted(clients), dtype=np.int64)
        known = len(self.problem.sizes)
        if self.local is not None and ids.tolist() != [self.local.client]:
            raise InputError(f"clients = {list(clients)}: this node holds client {self.local.client}'s data alone")
        if not len(ids) or ids[0] < 0 or ids[-1] >= known:
            raise InputError(f"clients = {list(clients)}: must be some of 0 … {known - 1}")
        return ids

    def evaluate(self, clients: Sequence[int], start: ClientState) -> tuple[dict[str, float], int]:
        """Loss (and accuracy) of a model on the clients' own training examples, and how many there are.

        With local data: on the client's own test examples.
        """
        self._check(start, self.begin[0])
        if self.local is not None:
            num_examples = self.local.common.test_sizes[self.local.client]
            with blamed(self._keys):
                return self.problem.evaluate(to_device(start, self.problem.device)), num_examples
        ids = torch.tensor(sorted(clients))
        with blamed(self._keys):
            measured = self.problem.evaluate_clients(to_device(start, self.problem.device), ids)
        return measured, int(self.problem.sizes[ids.numpy()].sum())

    def personal_results(
        self,
        start: ClientState,
        round_index: int,
        lr: float,
        own: ClientState | None = None,
        correction: Tree | None = None,
        span: Span | None = None,
    ) -> dict[str, float]:
        """{"personal_loss", …} on the client's own test examples, after `run.personal-steps` from `start` with γ = lr.

        round_index: of the round that these steps would begin; the client's own and the span as `train` takes them.
        """
        assert self.local is not None, "the server has the others' examples"
        ids, device = self._ids([self.local.client]), self.problem.device
        form = own_models_of(self.problem, self.plan, own_after(self.problem, self.plan, round_index))
        self._check_own(own, form, len(ids))
        job = steps_job(self.problem, self.plan, round_index, ids, own, correction, lr=lr, span=self._checked(span))
        make = partial(self._stepper, ids)
        with blamed(self._keys):
            rows = after_steps(self.problem, self.plan.method, make, to_device(start, device), job)
            found = self.problem.evaluate_own_rows(rows, job.clients)
        return {f"{PERSONAL}_{name}": float(values[0]) for name, values in found.items()}

    def _stepper(self, ids: np.ndarray) -> Engine:
        return self._engine(*self.choose(ids))

    def own_results(self, start: ClientState) -> dict[str, float]:
        """{"own_loss", …} on the client's own test examples: NaN of what they say nothing of, infinity of no number."""
        assert self.local is not None, "the server has the others' examples"
        with blamed(self._keys):
            found = self.problem.evaluate_own(to_device(start, self.problem.device))
        return {f"{OWN}_{name}": float(values[self.local.client]) for name, values in found.items()}

    def test_totals(self, start: ClientState) -> dict[str, list[float]]:
        """Of a client's own test examples: sums that add up over clients, where a mean of theirs is not everybody's."""
        if not isinstance(self.problem, Supervised) or self.problem.task.means:
            return {}
        with blamed(self._keys):
            totals = self.problem.test_totals(to_device(start, self.problem.device))
        return {name: sums.tolist() for name, sums in totals.items()}

    def _check_own(self, own: ClientState | None, form: ClientState | None, count: int) -> None:
        got, right = (flatten(state or ClientState({}, {}, {})) for state in (own, form))
        for name in {**right, **got}:
            if name not in got or name not in right or got[name].shape != (count, *right[name].shape[1:]):
                algorithm = self.config.algorithm
                key = "algorithm.states" if algorithm.states else "algorithm.momentum-policy"
                key = "algorithm.fragments" if algorithm.fragments > 1 else key
                if is_among(name.partition("/")[2], self.problem.personal):
                    key = "algorithm.personal"
                advice = "take fedmom's round loop (its server app), which sends what fits"
                if key == "algorithm.momentum-policy":
                    advice = "a strategy by itself needs the same momentum_policy"
                raise InputError(f"arrays: the clients' own {name} does not fit {key} = {self._keys[key]!r}; {advice}")

    def _check(self, start: ClientState, expected: ClientState) -> None:
        for part, own in expected._asdict().items():
            got = getattr(start, part)
            for name in {**own, **got}:
                if name not in got or name not in own or got[name].shape != own[name].shape:
                    key = "algorithm.correction" if part == "correction" else "model.name"
                    raise InputError(f"arrays: {part}/{name} does not fit {key} = {self._keys[key]!r}")


@lru_cache(maxsize=1)
def _node(items: tuple[tuple[str, Any], ...], local: Local | None) -> Node:
    return Node(load(dict(items)).config, local)


def warm_node(run_config: Mapping[str, Scalar], local: Local | None = None) -> Node:
    """The process's Node of this configuration: made at first use, kept until another one is asked for."""
    return _node(tuple(flat(settled(run_config).config).items()), local)
