"""Chunks of clients through the folded model: from a common start, from rows of their own, or from a part of each."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fedmom.engine.stacked.cuda_graphs import Replays
from fedmom.engine.stacked.means import RoundSums, RowsEnded, distances
from fedmom.engine.stacked.steps import Stack
from fedmom.method.named.fednova import scaled
from fedmom.method.state import ClientState, Tree, row_of, stacked
from fedmom.rounds.own import own_of, trained, with_own, without_own
from fedmom.rounds.round import Job, Progress, part_of


class ChunkOutcome(NamedTuple):
    """What the K clients of one chunk came to."""

    ended: Any  # their rows, or how far they went: what the runner's sums take
    weights: Tensor  # [K] in main memory
    losses: Tensor  # [K] float64, mean over each client's own steps
    points: Sequence[Tensor] = ()  # Σ w x after every local step, for small problems; else empty
    own: ClientState | None = None  # [K, ...] what the clients go on with by themselves, in main memory
    correction: Tree | None = None  # [K, ...] likewise their own states of a correction


class StackRunner:
    """Chunks through the folded model, replayed as CUDA graphs where they can be."""

    def __init__(self, stack: Stack, replays: Replays | None, order: ClientState | None) -> None:
        """order: of the model's names, where some tensors are personal."""
        self.stack, self.replays, self.order = stack, replays, order

    def sums(self, start: ClientState) -> RoundSums:
        return RoundSums(start, self.stack.method.running_var)

    def from_start(
        self, start: ClientState, job: Job, chunks: Sequence[Tensor], progress: Progress | None
    ) -> Iterator[ChunkOutcome]:
        even = bool((job.num_steps == len(job.lrs)).all()) and job.scales is None
        if even and self.replays is not None and not self._has_own(start, job):
            parts = [part_of(job, places) for places in chunks]
            replayed = zip(self.replays.run(start, parts, progress), parts, strict=True)
            return (ChunkOutcome(moved, part.weights, moved.losses.clone()) for moved, part in replayed)

        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.stack.problem.device)
            ended = self._run(start, part, even, progress)
            problem, method = self.stack.problem, self.stack.method
            shared, own = without_own(problem, method, start, ClientState(*ended[:3]), part)
            params = shared.params if part.scales is None else scaled(start.params, shared.params, part.scales)
            ended = ended._replace(params=params, momentum=shared.momentum, buffers=shared.buffers)
            return ChunkOutcome(distances(start, ended), part.weights, ended.losses, own=own)

        return map(run, chunks)

    def _has_own(self, start: ClientState, job: Job) -> bool:
        """Whether clients begin with something of their own, or go on with it, or encode what they send."""
        problem, method = self.stack.problem, self.stack.method
        if job.own is not None or method.codecs:
            return True
        return job.keeps and any(own_of(problem, method, start, job.round_index + 1))

    def _run(self, start: ClientState, part: Job, even: bool, progress: Progress | None) -> RowsEnded:
        """All local steps from `start` and what the clients have of their own."""
        own = None if part.own is None else trained(part.own)
        if own is None or not (own.params or own.buffers):  # the first step is one for all: they share x
            momentum = None if own is None else own.momentum or None
            even = even and not self._has_own(start, part)  # dense layers in factors have no rows to give back
            return self.stack.run(start, part, momentum=momentum, even=even, progress=progress)
        rows = with_own(stacked(start, len(part.clients)), part, self.order)
        return self.stack.run(row_of(rows, 0), part._replace(own=None), rows=rows, progress=progress)

    def from_rows(self, job: Job, chunks: Sequence[Tensor], progress: Progress | None) -> Iterator[ChunkOutcome]:
        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.stack.problem.device)
            assert part.rows is not None
            ended = self.stack.run(row_of(part.rows, 0), part, rows=part.rows, progress=progress)
            return ChunkOutcome(ClientState(*ended[:3]), part.weights, ended.losses)

        return map(run, chunks)
