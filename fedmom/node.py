"""One Flower node: the clients it holds, and one engine call for those of them that a round asks for.

No Flower here: clients/client_app.py unpacks a message, calls `Node`, and packs the answer.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmom import engine as engines
from fedmom.algorithms import MOMENTUM_POLICIES
from fedmom.config import Config, Scalar, flat, load
from fedmom.engine import Engine, Outcome
from fedmom.errors import InputError
from fedmom.objective import Task
from fedmom.resolve import resolve
from fedmom.setup import make_plan, make_task, resolve_device
from fedmom.state import ClientState, Tree, num_bytes, to_device
from fedmom.train import Plan, clients_job


def held_clients(node: int, num_nodes: int, num_clients: int) -> np.ndarray:
    """The ids c with ⌊c·P/N⌋ = p, in ascending order: one client each where P = N, blocks of nearly equal size else."""
    first = -(-node * num_clients // num_nodes)
    return np.arange(first, -(-(node + 1) * num_clients // num_nodes), dtype=np.int64)


def settled(run_config: Mapping[str, Scalar]) -> Config:
    """The resolved configuration of a Flower run config, in which every key is there, given or not.

    Raises InputError naming the key.
    """
    return _settled(tuple(run_config.items()))


@lru_cache(maxsize=1)
def _settled(items: tuple[tuple[str, Scalar], ...]) -> Config:
    # Of a Config, keys at their defaults count as not given.
    return resolve(load(load(dict(items)).config)).config


class Trained(NamedTuple):
    """What a block of clients answers."""

    outcome: Outcome  # weighted means over the block; tensors in main memory
    weight: float  # Σ of the clients' weights, by which the server weighs the block
    client_steps: int
    lr: float  # γ of the round's first step


class Node:
    """Data, model and engines of one configuration, warm for as long as the process lives."""

    def __init__(self, config: Config) -> None:
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        self.config = resolve_device(config)
        self.task: Task = make_task(self.config, self.config.engine.device)
        self.plan: Plan = make_plan(self.config)
        self._choices: dict[int, tuple[str, int]] = {}

    def choose(self, clients: np.ndarray) -> tuple[str, int]:
        """(path, chunk size) for a block: as configured, else by timing, once for each size of block."""
        wanted, size = self.config.engine, len(clients)
        if size == 1 and wanted.path == "auto":
            return "loop", 1  # nothing to stack
        if wanted.path != "auto" and (wanted.chunk_size or wanted.path == "loop"):
            return wanted.path, wanted.chunk_size or 1
        if size not in self._choices:
            start = self.task.start()
            rows = None
            if MOMENTUM_POLICIES[self.plan.method.momentum_policy].keeps_rows:
                rows = {n: u.expand(size, *u.shape) for n, u in start.momentum.items()}
            job = clients_job(self.task, self.plan, 0, clients, rows)
            path, chunk_size = wanted.path, wanted.chunk_size
            choice = engines.choose(self.task, self.plan.method, start, job, path=path, chunk_size=chunk_size)
            self._choices[size] = (choice.path, choice.chunk_size)
        return self._choices[size]

    def train(
        self,
        clients: Sequence[int],
        round_index: int,
        start: ClientState,
        momentum: Tree | None = None,
        *,
        path: str = "",
        chunk_size: int = 0,
    ) -> Trained:
        """I local steps of `clients` from `start` in round 0, 1, …, and their weighted mean.

        `momentum`: their own u [k, ...], for policy "local". `path` and `chunk_size` as the server settled them;
        left out, they are chosen here. Raises InputError for a client that does not exist or a start of another model.
        """
        ids = np.asarray(sorted(clients), dtype=np.int64)
        known = len(self.task.sizes)
        if not len(ids) or ids[0] < 0 or ids[-1] >= known:
            raise InputError(f"clients = {list(clients)}: must be some of 0 … {known - 1}")
        self._check(start)
        if not path:
            path, chunk_size = self.choose(ids)
        engine = Engine(self.task, self.plan.method, path=path, chunk_size=chunk_size or len(ids))
        job = clients_job(self.task, self.plan, round_index, ids, momentum)
        outcome = engine.run_round(to_device(start, self.task.device), job)
        return Trained(
            outcome._replace(mean=to_device(outcome.mean, "cpu"), losses=outcome.losses.cpu()),
            float(job.weights.sum()),
            int(job.num_steps.sum()),
            job.lrs[0],
        )

    def evaluate(self, clients: Sequence[int], start: ClientState) -> tuple[dict[str, float], int]:
        """Loss (and accuracy) of a model on the clients' own training examples, and how many there are."""
        self._check(start)
        ids = torch.tensor(sorted(clients), device=self.task.device)
        measured = self.task.evaluate_clients(to_device(start, self.task.device), ids)
        return measured, int(self.task.sizes[ids.cpu().numpy()].sum())

    def _check(self, start: ClientState) -> None:
        expected = self.task.start()
        for part, own in expected._asdict().items():
            got = getattr(start, part)
            for name in {**own, **got}:
                if name not in got or name not in own or got[name].shape != own[name].shape:
                    raise InputError(f"arrays: {part}/{name} does not fit model.name = {self.config.model.name!r}")

    def start_bytes(self) -> int:
        """Size of what travels: x, u and the buffers."""
        return sum(num_bytes(tree) for tree in self.task.start())


@lru_cache(maxsize=1)
def _node(items: tuple[tuple[str, Any], ...]) -> Node:
    return Node(load(dict(items)).config)


def warm_node(run_config: Mapping[str, Scalar]) -> Node:
    """The process's Node of this configuration: made at first use, kept until another one is asked for."""
    return _node(tuple(flat(settled(run_config)).items()))
