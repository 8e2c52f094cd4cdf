"""Many clients on one device: chunks of stacked clients, or a loop over one client at a time.

`loop` and `vmap` call the same `local_step`, written for one client; `stack` and `factors` take the folded model of
stacked/. All see the same addressed minibatches, and tests hold them equal. auto.py says which is taken.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmom.engine.paths import PATHS
from fedmom.engine.stacked.cuda_graphs import Replays
from fedmom.engine.stacked.means import RoundEnd
from fedmom.engine.stacked.runner import ChunkOutcome, StackRunner
from fedmom.engine.stacked.steps import Stack
from fedmom.method.algorithms import Method
from fedmom.method.averaging import WeightedMean
from fedmom.method.corrections import Correction, begun_round, finish_round, lasting, takes_key
from fedmom.method.named.fednova import scaled
from fedmom.method.randomness import random_bits
from fedmom.method.state import ClientState, Tree, concatenated, like, stacked, where
from fedmom.method.step import loop_step, vmap_step
from fedmom.rounds.own import order_of, with_own, without_own
from fedmom.rounds.round import Backend, Job, Outcome, Progress, part_of
from fedmom.tasks.problem import Problem


class Sums(Protocol):
    """What the chunks of a round are added to."""

    def add(self, ended: Any, weights: Tensor, /) -> None:
        """Add K clients, their weights [K] in main memory; `ended` may be written over afterwards."""

    def finish(self, losses: Tensor, /) -> tuple[ClientState, Callable[[], RoundEnd]]:
        """The means, and a function that waits for what else the round came to; losses [C] float64 of all clients."""
        ...


class PlainSums(WeightedMean):
    """Of rows of clients."""

    def finish(self, losses: Tensor) -> tuple[ClientState, Callable[[], RoundEnd]]:
        end = RoundEnd(losses.cpu(), self.spread("params"), self.spread("momentum"), None)
        return self.mean(), lambda: end


class Runner(Protocol):
    """A way to run the clients of a job chunk by chunk, each chunk given by its places in the cohort.

    Each outcome is to be used up and let go before the next is asked for: replays share their memory, and the rows of
    two chunks may not fit on the device together.
    """

    def sums(self, start: ClientState) -> Sums:
        """What the outcomes of a round from `start` are added to."""
        ...

    def from_start(
        self, start: ClientState, job: Job, chunks: Sequence[Tensor], progress: Progress | None
    ) -> Iterator[ChunkOutcome]:
        """All local steps from the common `start`."""
        ...

    def from_rows(self, job: Job, chunks: Sequence[Tensor], progress: Progress | None) -> Iterator[ChunkOutcome]:
        """All local steps of every client from its own row of job.rows; `ended` are rows [K, ...]."""
        ...


class PlainRunner:
    """Chunks by `local_step`, which is written for one client: mapped over K of them, or a loop over chunks of one."""

    def __init__(self, problem: Problem, method: Method, *, stacks: bool) -> None:
        self.problem, self.method = problem, method
        self.step, self.gradient = (vmap_step, problem.gradient) if stacks else (loop_step, problem.gradient_alone)
        self.keyed = method.correction is not None and takes_key(method.correction)
        self.order = order_of(problem, method)

    def sums(self, start: ClientState) -> PlainSums:
        return PlainSums(self.method.running_var)

    def from_start(
        self, start: ClientState, job: Job, chunks: Sequence[Tensor], progress: Progress | None
    ) -> Iterator[ChunkOutcome]:
        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.problem.device)
            found = self._run_chunk(with_own(stacked(start, len(places)), part, self.order), part, progress)
            ended, own = without_own(self.problem, self.method, start, found.ended, part)
            if part.scales is not None:
                ended = ended._replace(params=scaled(start.params, ended.params, part.scales))
            return found._replace(ended=ended, own=own)

        return map(run, chunks)

    def from_rows(self, job: Job, chunks: Sequence[Tensor], progress: Progress | None) -> Iterator[ChunkOutcome]:
        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.problem.device)
            assert part.rows is not None
            return self._run_chunk(part.rows, part, progress)

        return map(run, chunks)

    def _run_chunk(self, state: ClientState, job: Job, progress: Progress | None) -> ChunkOutcome:
        """All local steps of K stacked clients."""
        most, least = int(job.num_steps.max()), int(job.num_steps.min())
        device = self.problem.device
        losses = torch.zeros(len(job.clients), dtype=torch.float64, device=device)
        points: list[Tensor] = []
        start, num_steps, weights = state.params, job.num_steps.to(device), job.weights.to(device)
        told: dict[str, Any] = {"start": start}
        correction = self.method.correction
        if isinstance(correction, Correction):
            told["server"], personal = state.correction, self.problem.personal
            state = state._replace(correction=begun_round(correction, job.correction or {}, start, personal))
        for s, batch in enumerate(self.problem.round_batches(job.clients, job.first_steps, most)):
            if self.keyed:
                told["key"] = random_bits(job.clients, job.first_steps + s).to(device)
            after, loss = self._one_step(state, batch, told, job.lrs[s])
            moved = len(job.clients)
            if s < least:
                state = after
                losses += loss
            else:
                active = s < num_steps
                state = where(active, after, state)
                losses += torch.where(active, loss, 0)
                moved = int((s < job.num_steps).sum())
            if self.problem.small:
                flat = torch.cat([x.flatten(1).to(torch.float64) for x in state.params.values()], dim=1)
                points.append(weights @ flat)
            if progress:
                progress(moved)
        points += [points[-1]] * (len(job.lrs) - most) if points else []
        own: Tree | None = None
        if isinstance(correction, Correction):
            lrs = torch.tensor(job.lrs, dtype=torch.float64, device=device)
            state, own = finish_round(correction, state, start, told["server"], num_steps, lrs)
            kept = lasting(correction, own)
            own = {name: value.to("cpu") for name, value in kept.items()} if job.correction is not None else None
        return ChunkOutcome(state, job.weights, losses / num_steps, points, correction=own)

    def _one_step(self, state: ClientState, batch: Any, told: dict[str, Any], lr: float) -> tuple[ClientState, Tensor]:
        method = self.method
        try:
            return self.step(
                state,
                batch,
                told,
                gradient=self.gradient,
                lr=lr,
                **method.options,
            )
        except RuntimeError as error:
            # Ctrl-C between two of torch.func's levels makes torch fail an assertion of its own on the way out.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise


class Engine(Backend):
    """Runs rounds of one problem by one method; `path` (of PATHS) and `chunk_size` change the result by rounding alone.

    `convolution`: one of convolutions.CONVOLUTIONS for the folded paths; left out, by layer.
    Raises FoldError for "stack" and "factors" with a model or problem that cannot take them.
    """

    def __init__(self, problem: Problem, method: Method, *, path: str, chunk_size: int, convolution: str = "") -> None:
        self.problem, self.method = problem, method
        self.stack: Stack | None = None
        way = PATHS[path]
        if way.folds:
            self.stack = Stack(problem, method, factors=way.factors, convolution=convolution)
        self.replays = Replays(self.stack) if self.stack is not None and problem.device.type == "cuda" else None
        self.plain = PlainRunner(problem, method, stacks=way.stacks)
        # The loop keeps one client resident: a larger chunk would only hold finished rows for longer.
        self.chunk_size = chunk_size if way.stacks else 1

    @property
    def runner(self) -> Runner:
        """Who runs the chunks, with the stack and the replays that the engine has by now."""
        return self.plain if self.stack is None else StackRunner(self.stack, self.replays, self.plain.order)

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of every client of the cohort from `start`, and the averages. Changes nothing in place."""
        return self.begin_round(start, job, progress).settled()

    def begin_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """The same; a round whose chunks are all replayed is still to settle."""
        start = start._replace(momentum=self.method.rules.begun(start.momentum, job.round_index))
        runner, chunks, replayed = self.runner, self._chunks(job), self._num_replayed()
        sums = runner.sums(start)
        losses, path, own, memories = self._add_up(runner.from_start(start, job, chunks, progress), job, sums.add)
        (mean, end), total = sums.finish(losses), float(job.weights.sum())

        def settle() -> Outcome:
            found = end()
            return Outcome(
                mean=mean,
                train_loss=float(job.weights @ found.losses) / total,
                consensus_distance=found.consensus_distance,
                momentum_spread=found.momentum_spread,
                trajectory=[point / total for point in path],
                own=own,
                correction=memories,
                losses=found.losses,
                broken=found.broken,
            )

        if self._num_replayed() < replayed + len(chunks):
            return settle()
        return Outcome(mean, math.nan, math.nan, math.nan, [], losses, settle=settle)

    def run_rows(
        self, rows: ClientState, job: Job, progress: Progress | None = None
    ) -> tuple[ClientState, Tensor, list[Tensor]]:
        """I local steps of every client from its own row, without an exchange.

        rows: [C, ...] of the job's clients. Returns rows like them, mean losses [C] in main memory, and Σ w x after
        every step.
        """
        job, parts = job._replace(rows=rows), list[ClientState]()
        chunks = self.runner.from_rows(job, self._chunks(job), progress)
        losses, path, _, _ = self._add_up(chunks, job, lambda ended, weights: parts.append(ended))
        return like(concatenated(parts), rows), losses.cpu(), path

    def _num_replayed(self) -> int:
        return 0 if self.replays is None else self.replays.num_replayed

    def _chunks(self, job: Job) -> Sequence[Tensor]:
        """The places of each chunk's clients in the cohort."""
        return torch.arange(len(job.clients)).split(self.chunk_size)

    def _add_up(
        self, chunks: Iterator[ChunkOutcome], job: Job, add: Callable[[Any, Tensor], None]
    ) -> tuple[Tensor, list[Tensor], ClientState | None, Tree | None]:
        """Every chunk, given to `add` -> losses [C], Σ w x after every step; of the clients' own [C, ...] what they go
        on with, and their states of a correction.
        """
        losses, own, memories = list[Tensor](), list[ClientState](), list[ClientState]()
        path = [torch.zeros((), dtype=torch.float64)] * (len(job.lrs) if self.problem.small else 0)
        for chunk in chunks:
            add(chunk.ended, chunk.weights)
            losses.append(chunk.losses)
            path = [a + b for a, b in zip(path, chunk.points, strict=True)]
            own += [chunk.own] if chunk.own is not None else []
            memories += [ClientState({}, {}, {}, chunk.correction)] if chunk.correction else []
            del chunk  # its rows, before the next chunk's are made
        kept = concatenated(memories).correction if memories else None
        return torch.cat(losses), path, concatenated(own) if own else None, kept
