"""`engine.workers = n`: the engine's own blocks of clients on supervised Ray actors, for several GPUs or a cluster.

Each actor holds the data set and a warm engine; a round's start goes through Ray's object store once; the blocks' means
are added up in client order, so the result is the engine's to rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmom.actors.actor import Failure
from fedmom.actors.pool import Pool
from fedmom.backends.trainer import Node, TrainedBlock
from fedmom.config.build import actors_device, pool_options, resolve_device
from fedmom.config.keys import Config
from fedmom.config.load import replace
from fedmom.config.numbers import counted
from fedmom.errors import ClientsFailedError, InputError, RayEndedError
from fedmom.machine.allocator import keep_freed_memory
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import Arrays, ClientState, flatten, from_arrays, num_bytes, to_arrays, to_device, unflatten
from fedmom.rounds.loop import Plan
from fedmom.rounds.round import Backend, Job, Outcome, Progress
from fedmom.tasks.task import Task

_BLOCKS_PER_WORKER = 4  # so that a slower one does not hold up the round for long, unless
_LARGE = 1 << 20  # the model is so large, in bytes, that sending a block's mean costs more than that
_REFUSED = "InputError: "  # how the reason of such a failure begins


class BlockJob(NamedTuple):
    """What one message asks of an actor: some clients in one round, or (clients alone) how it would run them."""

    clients: np.ndarray  # [k]
    round_index: int = -1
    path: str = ""
    chunk_size: int = 0
    momentum: Arrays | None = None  # [k, ...] their own u, for policy "local"


class BlockAnswer(NamedTuple):
    """What an actor makes of a block."""

    mean: Arrays
    trained: TrainedBlock  # its outcome without tensors of the model's size
    momentum: Arrays | None


def make_worker(config: Config) -> Callable[..., Any]:
    """In an actor: a warm Node, and the function that answers blocks."""
    keep_freed_memory()
    node = Node(config)

    def answer(block: BlockJob, start: Arrays | None = None) -> Any:
        if start is None:
            return *node.choose(block.clients), node.said[len(block.clients)]
        momentum = None if block.momentum is None else from_arrays(block.momentum)
        trained = node.train(
            block.clients.tolist(),
            block.round_index,
            unflatten(from_arrays(start)),
            momentum,
            path=block.path,
            chunk_size=block.chunk_size,
        )
        outcome = trained.outcome
        slim = outcome._replace(mean=ClientState({}, {}, {}), momentum=None)
        rows = None if outcome.momentum is None else to_arrays(outcome.momentum)
        return BlockAnswer(to_arrays(flatten(outcome.mean)), trained._replace(outcome=slim), rows)

    return answer


class Workers(Backend):
    """Rounds whose blocks are answered by the actors of a Pool."""

    def __init__(self, pool: Pool, task: Task, running_var: str, path: str, chunk_size: int) -> None:
        self.pool, self.task, self.running_var = pool, task, running_var
        self.path, self.chunk_size = path, chunk_size

    def close(self) -> None:
        self.pool.close()

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of the cohort on the actors. ClientsFailedError where a block cannot be had."""
        try:
            return self._run_round(start, job, progress)
        except RayEndedError as error:
            raise ClientsFailedError(f"round {job.round_index + 1}: {error}") from None

    def _run_round(self, start: ClientState, job: Job, progress: Progress | None) -> Outcome:
        ids = job.clients.numpy()
        places = _blocks(len(ids), self.pool.num_workers, self.chunk_size, num_bytes(start.params))
        shared, waiting = self.pool.share(to_arrays(flatten(start))), dict[Any, BlockAnswer]()
        for number, rows in enumerate(places):
            momentum = None
            if job.momentum is not None:
                momentum = to_arrays({name: u[torch.from_numpy(rows)] for name, u in job.momentum.items()})
            block = BlockJob(ids[rows], job.round_index, self.path, self.chunk_size, momentum)
            self.pool.submit((job.round_index, number), block, (shared,))
        mean, parts = WeightedMean(self.running_var), list[BlockAnswer]()
        while len(parts) < len(places):
            key, answer = self.pool.take() or (None, None)
            if isinstance(answer, Failure):
                first, last = ids[places[key[1]]][[0, -1]]  # type: ignore[index]
                where = f"round {job.round_index + 1}: clients {first} … {last}"
                if answer.reason.startswith(_REFUSED):  # the input is at fault: no other actor would do better
                    raise InputError(f"{where}: {answer.reason.removeprefix(_REFUSED)}")
                raise ClientsFailedError(f"{where}: {answer.reason}")
            waiting[key] = answer  # type: ignore[assignment]
            while (at := (job.round_index, len(parts))) in waiting:
                part = waiting.pop(at)
                mean.add_one(unflatten(from_arrays(part.mean)), part.trained.weight)
                parts.append(part._replace(mean={}))
                if progress:
                    progress(part.trained.client_steps)
        return self._outcome(job, mean, parts)

    def _outcome(self, job: Job, mean: WeightedMean, parts: list[BlockAnswer]) -> Outcome:
        def average(values: list[Any]) -> Any:
            return sum(part.trained.weight / mean.weight * value for part, value in zip(parts, values, strict=True))

        outcomes = [part.trained.outcome for part in parts]
        momentum = None
        if job.momentum is not None:
            rows = [from_arrays(part.momentum or {}) for part in parts]
            momentum = {name: torch.cat([u[name] for u in rows]) for name in job.momentum}
        return Outcome(
            mean=to_device(mean.mean(), self.task.device),
            train_loss=average([outcome.train_loss for outcome in outcomes]),
            consensus_distance=average([o.consensus_distance for o in outcomes]) + mean.spread("params"),
            momentum_spread=average([o.momentum_spread for o in outcomes]) + mean.spread("momentum"),
            trajectory=[average(list(points)) for points in zip(*(o.trajectory for o in outcomes), strict=True)],
            momentum=momentum,
            losses=torch.cat([outcome.losses for outcome in outcomes]),
        )


def make_workers(config: Config, task: Task, plan: Plan) -> Workers:
    """The actors of `engine.workers`, with what one of them chose.

    Raises InputError where the actors cannot be had.
    """
    options = pool_options(config)
    inside = replace(config, "engine", device=actors_device(options), threads=0, workers=0)
    pool = Pool(partial(make_worker, inside), options)
    try:
        model = num_bytes(task.start().params)
        size = max(map(len, _blocks(plan.cohort_size, pool.num_workers, config.engine.chunk_size, model)))
        pool.submit("choose", BlockJob(np.arange(size)))
        _, answer = pool.take() or (None, None)
        if isinstance(answer, Failure):
            raise InputError(answer.reason.removeprefix(_REFUSED))
        path, chunk_size, said = answer  # type: ignore[misc]
    except BaseException:
        pool.close()
        raise
    backend = Workers(pool, task, plan.method.running_var, path, chunk_size)
    backend.settled = {
        "engine.device": resolve_device(config).engine.device,
        "engine.path": path,
        "engine.chunk-size": chunk_size,
        "engine.threads": torch.get_num_threads(),
        "simulation.num-gpus": options.num_gpus,
    }
    backend.notes = [f"{counted(pool.num_workers, 'Ray actor')} on {inside.engine.device}, each {path} × {chunk_size}"]
    backend.notes += [f"the first actor: {said.short}"] if said.short else []
    backend.details = [f"the first actor: {said.details}"] if said.details else []
    return backend


def _blocks(cohort: int, num_workers: int, chunk_size: int, model_bytes: int) -> list[np.ndarray]:
    """Places 0 … C − 1 in blocks: a few per worker, of whole chunks where there are enough of them."""
    each = 1 if model_bytes > _LARGE else _BLOCKS_PER_WORKER
    size = math.ceil(cohort / (each * num_workers))
    if 1 < chunk_size < cohort:
        size = max(1, round(size / chunk_size)) * chunk_size
    return np.split(np.arange(cohort), range(size, cohort, size))
