"""`engine.workers = n`: the engine's own blocks of clients on supervised Ray actors, for several GPUs or a cluster.

Each actor holds the data set and a warm engine; a round's start goes through Ray's object store to every node once. The
blocks' means are added up by a tree over the blocks in client order, so the result is the engine's to rounding, and the
same to the bit on any number of nodes. On several nodes the means stay where they were made, and each node sends the
sums of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmom.actors.actor import Failure, Split
from fedmom.actors.pool import Pool
from fedmom.actors.work import Kept, Shared
from fedmom.backends.agreement import agreement
from fedmom.backends.stepper import stepper_here
from fedmom.backends.trainer import Node, TrainedBlock
from fedmom.config.build import actors_device, pool_options, resolve_device
from fedmom.config.keys import Config
from fedmom.config.load import replace
from fedmom.config.numbers import counted
from fedmom.errors import ClientsFailedError, InputError, RayEndedError
from fedmom.machine.allocator import keep_freed_memory
from fedmom.method.algorithms import Method
from fedmom.method.partial_sums import PairwiseSum, Partial, aligned
from fedmom.method.schedules import Span
from fedmom.method.state import (
    Arrays,
    ClientState,
    Tree,
    concatenated,
    flatten,
    from_arrays,
    num_bytes,
    to_arrays,
    to_device,
    unflatten,
)
from fedmom.rounds.correction import message_form
from fedmom.rounds.plan import Plan
from fedmom.rounds.round import Backend, Job, Outcome, Progress, part_of
from fedmom.tasks.problem import Problem

_BLOCKS_PER_WORKER = 4  # so that a slower one does not hold up the round for long, unless
_LARGE = 1 << 20  # the model is so large, in bytes, that sending a block's mean costs more than that
_REFUSED = "InputError: "  # how the reason of such a failure begins


class BlockJob(NamedTuple):
    """What one message asks of an actor: some clients in one round, or (clients alone) how it would run them."""

    clients: np.ndarray  # [k]
    round_index: int = -1
    path: str = ""
    chunk_size: int = 0
    own: Arrays | None = None  # [k, ...] what they have of their own, as `flatten` names it
    correction: Arrays | None = None  # [k, ...] their own states of a correction
    span: Span | None = None  # the round's steps, where I changes in the run
    keeps: bool = False  # whether the mean stays on the actor's node


class SumJob(NamedTuple):
    """What one message asks of an actor on a node that keeps means: the sum of these, in their order."""

    parts: list[tuple[int, int, float]]  # (which of the shared lists, place in it, weight)


class BlockAnswer(NamedTuple):
    """What an actor makes of a block."""

    mean: Arrays  # empty where it stays on the actor's node
    trained: TrainedBlock  # its outcome without tensors of the model's size
    own: Arrays | None
    correction: Arrays | None


def make_worker(config: Config) -> Callable[..., Any]:
    """In an actor: a warm Node, and the function that answers blocks."""
    keep_freed_memory()
    node = Node(config)

    def answer(job: BlockJob | SumJob, *shared: Any) -> Any:
        if isinstance(job, SumJob):
            total = PairwiseSum()
            for number, place, weight in job.parts:
                total.add(_partial(shared[number][place].value(), weight))
            return total.result().packed()
        if not shared:
            return *node.choose(job.clients), node.said[len(job.clients)]
        trained = node.train(
            job.clients.tolist(),
            job.round_index,
            unflatten(from_arrays(shared[0])),
            None if job.own is None else unflatten(from_arrays(job.own)),
            None if job.correction is None else from_arrays(job.correction),
            span=job.span,
            path=job.path,
            chunk_size=job.chunk_size,
        )
        outcome = trained.outcome
        slim = outcome._replace(mean=ClientState({}, {}, {}), own=None, correction=None)
        mean, trained = to_arrays(flatten(outcome.mean)), trained._replace(outcome=slim)
        said = BlockAnswer({}, trained, _flat(outcome.own), _arrays(outcome.correction))
        return Split(said, mean) if job.keeps else said._replace(mean=mean)

    return answer


def _arrays(tree: Tree | None) -> Arrays | None:
    return None if tree is None else to_arrays(tree)


def _flat(state: ClientState | None) -> Arrays | None:
    return None if state is None else to_arrays(flatten(state))


def _partial(mean: Arrays, weight: float) -> Partial:
    return Partial.of(unflatten(from_arrays(mean)), weight)


class Workers(Backend):
    """Rounds whose blocks are answered by the actors of a Pool."""

    def __init__(self, pool: Pool, problem: Problem, method: Method, path: str, chunk_size: int) -> None:
        self.pool, self.problem, self.running_var = pool, problem, method.running_var
        self.message = message_form(problem, method)
        self.path, self.chunk_size = path, chunk_size

    def close(self) -> None:
        self.pool.close()

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of the cohort on the actors. ClientsFailedError where a block cannot be had."""
        try:
            return self._run_round(start, job, progress or (lambda client_steps: None))
        except RayEndedError as error:
            raise ClientsFailedError(f"round {job.round_index + 1}: {error}") from None

    def _run_round(self, start: ClientState, job: Job, progress: Progress) -> Outcome:
        places = _blocks(len(job.clients), self.pool.num_workers, self.chunk_size, num_bytes(start.params))
        shared, homes = self.pool.share(to_arrays(flatten(start))), self.pool.homes(len(places))
        parts: dict[int, BlockAnswer] = {}
        if not homes:  # one node: whatever is in its store is here
            total, waiting = PairwiseSum(), dict[int, Arrays]()
            for number, part in self._answers(job, places, shared, range(len(places))):
                parts[number], waiting[number] = part._replace(mean={}), part.mean
                progress(part.trained.client_steps)
                while total.count in waiting:
                    at = total.count
                    total.add(_partial(waiting.pop(at), parts[at].trained.weight))
            return self._outcome(start, job, total.result(), parts)
        kept: dict[int, Kept] = {}
        missing: Iterable[int] = range(len(places))
        for tries in range(self.pool.options.retries + 1):
            for number, part in self._answers(job, places, shared, missing, homes if not tries else None, keeps=True):
                kept[number] = part
                if number not in parts:
                    progress(part.value.trained.client_steps)
                parts[number] = part.value
            sums, missing = self._sums(job, [kept[n] for n in range(len(places))])
            if sums is not None:
                return self._outcome(start, job, sums, parts)
        where = _named(job, places[next(iter(missing))])
        raise ClientsFailedError(
            f"{where}: what they computed was lost with its node {self.pool.options.retries + 1} times"
        )

    def _answers(
        self,
        job: Job,
        places: list[np.ndarray],
        shared: Shared,
        numbers: Iterable[int],
        homes: list[str] | None = None,
        keeps: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """(number of a block, its answer) as they come. Raises ClientsFailedError or InputError for one without."""
        ids, missing = job.clients.numpy(), set(numbers)
        for number in sorted(missing):
            rows, part = places[number], part_of(job, torch.from_numpy(places[number]))
            own = _flat(part.own), _arrays(part.correction)
            block = BlockJob(ids[rows], job.round_index, self.path, self.chunk_size, *own, job.span, keeps)
            near = homes[number] if homes else ""
            self.pool.submit((job.round_index, number), block, (shared,), near=near, keep=keeps)
        while missing:
            (_, number), answer = self._take()
            if isinstance(answer, Failure):
                where = _named(job, places[number])
                if answer.reason.startswith(_REFUSED):  # the input is at fault: no other actor would do better
                    raise InputError(f"{where}: {answer.reason.removeprefix(_REFUSED)}")
                raise ClientsFailedError(f"{where}: {answer.reason}")
            missing.remove(number)
            yield number, answer

    def _sums(self, job: Job, kept: list[Kept]) -> tuple[Partial | None, list[int]]:
        """What the blocks come to, or None and those that must be computed anew: their means are gone with a node.

        What lies on another node is summed there, so far as neighbouring blocks do, and the sums alone travel.
        """
        asked: dict[int, int] = {}  # {first block: how many}
        for node in {part.node for part in kept if not self.pool.is_here(part)}:
            for first, length in aligned(number for number, part in enumerate(kept) if part.node == node):
                if length > 1:
                    asked[first] = length
                    self._ask_for_sum(first, kept[first : first + length])
        sums: dict[int, Any] = {}
        while len(sums) < len(asked):
            (_, first), sums[first] = self._take()
            if isinstance(sums[first], Failure) and sums[first].kind == "raised":
                raise ClientsFailedError(f"round {job.round_index + 1}: {sums[first].reason}")
        total, lost, place = PairwiseSum(), list[int](), 0
        while place < len(kept):
            holds = asked.get(place, 1)
            part = self._part(kept[place], sums.get(place))
            if part is None:
                lost += range(place, place + holds)
            elif not lost:
                total.add(part, holds)
            place += holds
        return (None, lost) if lost else (total.result(), [])

    def _part(self, kept: Kept, answer: Any) -> Partial | None:
        """Of the sum that was asked for, or of a block alone; None for what is gone."""
        if isinstance(answer, Failure):
            return None
        if answer is not None:
            return Partial.unpacked(answer)
        try:
            return _partial(self.pool.fetch(kept), kept.value.trained.weight)
        except LookupError:
            return None

    def _take(self) -> tuple[Any, Any]:
        taken = self.pool.take()
        assert taken is not None  # it waits for as long as it takes
        return taken

    def _ask_for_sum(self, first: int, parts: list[Kept]) -> None:
        lists = {part.shared: None for part in parts}
        numbers = {shared: number for number, shared in enumerate(lists)}
        job = SumJob([(numbers[part.shared], part.place, part.value.trained.weight) for part in parts])
        self.pool.submit_near(("sum", first), job, parts)

    def _outcome(self, start: ClientState, job: Job, total: Partial, parts: Mapping[int, BlockAnswer]) -> Outcome:
        blocks = [parts[number] for number in range(len(parts))]

        def average(values: list[Any]) -> Any:
            return sum(part.trained.weight / total.weight * value for part, value in zip(blocks, values, strict=True))

        outcomes = [part.trained.outcome for part in blocks]
        own = [unflatten(from_arrays(part.own)) for part in blocks if part.own is not None]
        memories = [ClientState({}, {}, {}, from_arrays(part.correction)) for part in blocks if part.correction]
        return Outcome(
            mean=to_device(total.mean(start._replace(correction=self.message), self.running_var), self.problem.device),
            train_loss=average([outcome.train_loss for outcome in outcomes]),
            consensus_distance=average([o.consensus_distance for o in outcomes]) + total.spread("params"),
            momentum_spread=average([o.momentum_spread for o in outcomes]) + total.spread("momentum"),
            trajectory=[average(list(points)) for points in zip(*(o.trajectory for o in outcomes), strict=True)],
            own=concatenated(own) if own else None,
            correction=concatenated(memories).correction if memories else None,
            losses=torch.cat([outcome.losses for outcome in outcomes]),
        )


def _named(job: Job, rows: np.ndarray) -> str:
    first, last = job.clients.numpy()[rows[[0, -1]]]
    return f"round {job.round_index + 1}: clients {first} … {last}"


def make_workers(config: Config, problem: Problem, plan: Plan) -> Workers:
    """The actors of `engine.workers`, with what one of them chose.

    Raises InputError where the actors cannot be had.
    """
    options = dataclasses.replace(pool_options(config), agreement=agreement(config, problem))
    inside = replace(config, "engine", device=actors_device(options), threads=0, workers=0)
    pool = Pool(partial(make_worker, inside), options)
    try:
        model = num_bytes(problem.start().params)
        size = max(map(len, _blocks(plan.cohort_size, pool.num_workers, config.engine.chunk_size, model)))
        pool.submit("choose", BlockJob(np.arange(size)))
        _, answer = pool.take() or (None, None)
        if isinstance(answer, Failure):
            raise InputError(answer.reason.removeprefix(_REFUSED))
        path, chunk_size, said = answer  # type: ignore[misc]
    except BaseException:
        pool.close()
        raise
    backend = Workers(pool, problem, plan.method, path, chunk_size)
    backend.settled = {
        "engine.device": resolve_device(config).engine.device,
        "engine.path": path,
        "engine.chunk-size": chunk_size,
        "engine.threads": torch.get_num_threads(),
        "simulation.num-gpus": pool.options.num_gpus,
    }
    backend.make_stepper = stepper_here(config, problem, plan, backend.settled)
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
