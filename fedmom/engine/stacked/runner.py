"""Chunks of clients through the folded model: from a common start, from rows of their own, or from a part of each."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fedmom.engine.stacked.cuda_graphs import Replays
from fedmom.engine.stacked.means import RoundSums, RowsEnded, distances
from fedmom.engine.stacked.steps import Stack
from fedmom.method.algorithms import MOMENTUM_POLICIES
from fedmom.method.state import ClientState, Tree, row_of, stacked
from fedmom.rounds.personal import with_own, without_own
from fedmom.rounds.round import Job, Progress, part_of


class ChunkOutcome(NamedTuple):
    """What the K clients of one chunk came to."""

    ended: Any  # their rows, or how far they went: what the runner's sums take
    weights: Tensor  # [K] in main memory
    losses: Tensor  # [K] float64, mean over each client's own steps
    points: Sequence[Tensor] = ()  # Σ w x after every local step, for small problems; else empty
    momentum: Tree | None = None  # [K, ...] the clients' own u at the end, in main memory, for policy "local"
    correction: Tree | None = None  # [K, ...] likewise their own states of a correction
    personal: ClientState | None = None  # [K, ...] likewise their own tensors


def own_momentum(job: Job, momentum: Tree, *, copy: bool = False) -> Tree | None:
    """A chunk's own u [K, ...] where the job keeps all of them; `copy`: also if it is there already."""
    if job.momentum is None:
        return None
    return {name: u.to(job.momentum[name].device, copy=copy) for name, u in momentum.items()}


class StackRunner:
    """Chunks through the folded model, replayed as CUDA graphs where they can be."""

    def __init__(self, stack: Stack, replays: Replays | None, order: ClientState | None) -> None:
        """order: of the model's names, where some tensors are personal."""
        self.stack, self.replays, self.order = stack, replays, order

    def sums(self, start: ClientState) -> RoundSums:
        return RoundSums(self._begun(start), self.stack.method.running_var)

    def _begun(self, start: ClientState) -> ClientState:
        """Where all clients start: by a policy that gives each a u of its own, x alone."""
        policy = MOMENTUM_POLICIES[self.stack.method.momentum_policy]
        return start if policy.keeps_rows else start._replace(momentum=policy.start(start.momentum, None))

    def from_start(
        self, start: ClientState, job: Job, chunks: Sequence[Tensor], progress: Progress | None
    ) -> Iterator[ChunkOutcome]:
        policy = MOMENTUM_POLICIES[self.stack.method.momentum_policy]
        even = bool((job.num_steps == len(job.lrs)).all())
        start = self._begun(start)
        if even and self.replays is not None and not policy.keeps_rows and job.personal is None:
            parts = [part_of(job, places) for places in chunks]
            replayed = zip(self.replays.run(start, parts, progress), parts, strict=True)
            return (ChunkOutcome(moved, part.weights, moved.losses.clone()) for moved, part in replayed)

        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.stack.problem.device)
            momentum = policy.start(start.momentum, part.momentum) if policy.keeps_rows else None
            personal: ClientState | None = None
            if part.personal is None:
                ended = self.stack.run(start, part, momentum=momentum, even=even, progress=progress)
            else:
                ended, personal = self._from_own(start, part, momentum, progress)
            # A copy, since `distances` writes over the rows.
            own = own_momentum(job, ended.momentum, copy=True) if policy.keeps_rows else None
            return ChunkOutcome(distances(start, ended), part.weights, ended.losses, momentum=own, personal=personal)

        return map(run, chunks)

    def _from_own(
        self, start: ClientState, part: Job, momentum: Tree | None, progress: Progress | None
    ) -> tuple[RowsEnded, ClientState | None]:
        """All local steps from `start` and the clients' own tensors -> (the rows that are averaged, their own)."""
        rows = stacked(start, len(part.clients))
        rows = with_own(rows if momentum is None else rows._replace(momentum=momentum), part, self.order)
        ended = self.stack.run(row_of(rows, 0), part._replace(personal=None), rows=rows, progress=progress)
        shared, own = without_own(ClientState(*ended[:3]), part)
        return ended._replace(params=shared.params, momentum=shared.momentum, buffers=shared.buffers), own

    def from_rows(self, job: Job, chunks: Sequence[Tensor], progress: Progress | None) -> Iterator[ChunkOutcome]:
        def run(places: Tensor) -> ChunkOutcome:
            part = part_of(job, places, self.stack.problem.device)
            assert part.rows is not None
            ended = self.stack.run(row_of(part.rows, 0), part, rows=part.rows, progress=progress)
            return ChunkOutcome(ClientState(*ended[:3]), part.weights, ended.losses)

        return map(run, chunks)
