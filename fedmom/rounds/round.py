"""What a round asks and what comes of it: the words between the round loop and whoever runs a round."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedmom.method.schedules import Span
from fedmom.method.state import ClientState, Tree, rows_of, to_device

T = TypeVar("T")
Progress = Callable[[int], None]  # client-steps done since the last call


class Job(NamedTuple):
    """What one round asks of the engine. Its numbers are in main memory, wherever the clients are trained."""

    clients: Tensor  # [C] int64, the cohort, in ascending order
    weights: Tensor  # [C] float64, of the means; they need not sum to 1
    first_steps: Tensor  # [C] int64, each client's global step at the start of the round
    num_steps: Tensor  # [C] int64, local steps of each client (all I, but for local-epochs)
    lrs: Sequence[float]  # γ of each local step, as many as the most steps
    own: ClientState | None = None  # [C, ...] what the clients have of their own, in main memory (rounds/own.py)
    keeps: bool = False  # whether what they go on with by themselves is wanted back
    scales: Tensor | None = None  # [C] float64, by which clients' ways are multiplied before the averages (FedNova)
    round_index: int = 0  # rounds before this one
    seed: int = 0  # of the addresses of what the clients send
    # Where given, an engine in this process fills it: {coded array: [C, ...]} of what the clients send encoded, as it
    # travels (fedmom.travel.messages), in main memory.
    messages: Tree | None = None
    down: Tree | None = None  # what the server sends encoded at the round's start; None: the clients get all whole
    rows: ClientState | None = None  # [N, ...] the clients' own x, u and buffers, of Algorithm 2
    correction: Tree | None = None  # [C, ...] the clients' own states of a correction, in main memory
    evaluates: bool = False  # whether the round's result will be measured
    looks_at_clients: bool = False  # whether it will be, on every client's own test examples
    span: Span | None = None  # the steps, where I changes in the run: whoever makes this job anew must be told them
    following: Callable[[], "Job"] | None = None  # the next round's, without anything that depends on this one's result


class Fetched(NamedTuple):
    """What others hold of the state after a round, brought here."""

    mean: ClientState
    rows: ClientState | None = None  # [N, ...] of Algorithm 2
    own: ClientState | None = None  # [N, ...] what the clients go on with by themselves, in main memory
    correction: Tree | None = None  # [N, ...] their own states of a correction, in main memory


class Outcome(NamedTuple):
    """What the clients of one round came to."""

    mean: ClientState  # x̂, û and the buffers, everybody's next start; a correction's mean message; nothing personal
    train_loss: float  # mean over clients (by weight) and their steps, each before the step
    consensus_distance: float  # Σ p_i ‖x_i − x̂‖² just before the exchange
    momentum_spread: float  # Σ p_i ‖u_i − û‖², likewise
    trajectory: list[Tensor]  # x̄ after every local step, for small problems; else empty
    losses: Tensor  # [C] float64, mean over each client's own steps; in main memory when settled
    answered: Tensor | None = None  # [C] bool: whose update is in the means; None: everybody's
    rows: ClientState | None = None  # [N, ...] the clients' next start, of Algorithm 2
    correction: Tree | None = None  # [C, ...] the clients' own states of a correction at the end, in main memory
    own: ClientState | None = None  # [C, ...] what the clients go on with by themselves, in main memory
    more: Mapping[str, Any] | None = None  # what else goes into the round's record
    measured: dict[str, Any] | None = None  # the evaluation, where whoever ran the round made it
    fetch: Callable[[], Fetched] | None = None  # brings what others hold
    # Flat names of what did not travel: in `mean` stands what clients agreed on last, and `fetch` brings the mean.
    absent: frozenset[str] = frozenset()
    broken: str | None = None  # the part of the mean that is NaN or infinite, or ""; None: nobody has looked
    settle: Callable[[], "Outcome"] | None = None  # waits for the numbers, where only what the next round needs is here

    def settled(self) -> "Outcome":
        """The same with its numbers."""
        return self if self.settle is None else self.settle()


@runtime_checkable
class Stepper(Protocol):
    """Whoever takes local steps on this device, without an exchange."""

    chunk_size: int  # K, clients that are stacked at once

    def run_rows(
        self, rows: ClientState, job: Job, progress: Progress | None = None
    ) -> tuple[ClientState, Tensor, list[Tensor]]:
        """The job's steps of its clients, each from its own row [C, ...] -> rows like them, losses [C], a path."""
        ...


class Backend(Protocol):
    """Whoever can run one round: the engine on this device, Ray actors, or Flower's clients.

    Ours derive from it, so that one which chooses nothing, says nothing and holds nothing has run_round alone.
    """

    # {"engine.path": …}: what it chose of the configuration, so that a resume takes the same.
    settled: Mapping[str, Any] = MappingProxyType({})
    notes: Sequence[str] = ()  # what of that should be known
    details: Sequence[str] = ()  # what of that may be asked for
    # (x̂, û and the buffers; the steps to own models; own models that are there already, [N, ...]) ->
    # {"own_loss": [N], …}, where the clients alone can tell.
    own_results: Callable[[ClientState, Job | None, ClientState | None], dict[str, np.ndarray]] | None = None
    make_stepper: Callable[[], Stepper] | None = None  # of a backend that takes no steps on this device itself

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of every client of the cohort from `start`, and the averages. Changes nothing in place."""
        ...

    def begin_at(self, done: Any) -> None:
        """Told once, before the first round: the state between two rounds (RunState) that the run goes on from."""
        return

    def begin_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """The same, but the outcome may be still to settle: then the device works, and the host need not wait."""
        return self.run_round(start, job, progress)

    def close(self) -> None:
        """End what it holds: actors, and Ray if it was started for them."""
        return


def part_of(job: Job, rows: Tensor, device: torch.device | None = None) -> Job:
    """The job of some clients of the cohort, given as places in it.

    `device`: where their own u, states, tensors and rows are brought; left out, they stay where they are.
    """

    def some(tree: Tree | None) -> Tree | None:
        if tree is None:
            return None
        return {name: value[rows.to(value.device)].to(device or value.device) for name, value in tree.items()}

    def place(state: ClientState | None) -> ClientState | None:
        chosen = None if state is None else rows_of(state, rows)
        return to_device(chosen, device) if chosen is not None and device is not None else chosen

    return job._replace(
        clients=job.clients[rows],
        weights=job.weights[rows],
        first_steps=job.first_steps[rows],
        num_steps=job.num_steps[rows],
        scales=None if job.scales is None else job.scales[rows],
        correction=some(job.correction),
        rows=place(job.rows),
        own=place(job.own),
    )


class Early(Generic[T]):
    """A round that was begun before its turn: what it tells, and what it raises, comes when it is taken."""

    def __init__(self, begin: Callable[[Progress], T], progress: Progress | None) -> None:
        self.progress, self.told = progress, list[int]()
        self.begun: T | None = None
        self.raised: Exception | None = None
        started = time.perf_counter()
        try:
            self.begun = begin(self.told.append)
        except Exception as error:
            self.raised = error
        self.seconds = time.perf_counter() - started

    def take(self) -> T:
        if self.progress is not None:
            for steps in self.told:
                self.progress(steps)
        if self.raised is not None:
            error, self.raised = self.raised, None  # it refers to this frame: neither may keep the other
            raise error
        assert self.begun is not None
        return self.begun
