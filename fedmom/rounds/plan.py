"""What a run does, in plain numbers; its state between two rounds, and what a round asks of the clients.

Plain arguments in, plain values out; nothing here knows of files, terminals or configurations.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.method.algorithms import INTERVALS, Method
from fedmom.method.decentralized.topology import Topology
from fedmom.method.named.fednova import scales
from fedmom.method.outer import OuterRule
from fedmom.method.randomness import COHORT, random_bits
from fedmom.method.schedules import Came, Horizon, LearningRate, Pacing, Span
from fedmom.method.state import ClientState, Tree, num_bytes, rows_of, stacked
from fedmom.rounds.correction import client_rows, start_of
from fedmom.rounds.outer import outer_start
from fedmom.rounds.own import first_rows, rows_after, shared_of
from fedmom.rounds.results import ClientResults
from fedmom.rounds.round import Fetched, Job
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import CodecRules, bytes_of
from fedmom.travel.reference import first_reference

Known = Callable[[], Job] | None  # what the job before said that follows it


class Plan(NamedTuple):
    """What a whole run does, in plain numbers."""

    method: Method
    rate: LearningRate
    num_rounds: int  # R
    cohort_size: int  # C clients drawn per round
    batch_size: int  # B
    seed: int = 0
    num_local_steps: int = 8  # I
    local_epochs: int = 0  # instead of I, if positive
    interval: str = "fixed"  # how I, which is I₀ above, changes in the run: of INTERVALS
    milestones: tuple[float, ...] = ()  # fractions of R at which `decaying` halves I
    client_weights: str = "uniform"
    eval_every: int = 1
    num_steps: int = 0  # T, if it was given; else R × I
    outer: OuterRule | None = None  # the server's own step after a round's averages
    topology: Topology | None = None  # W_t of Algorithm 2
    codecs_down: CodecRules = MappingProxyType({})  # of what the server sends of each state, where it is encoded
    client_eval_every: int = 0  # rounds between two evaluations on every client's own test examples; 0: none
    personal_steps: int = 0  # local steps from x̂ after which a client's own evaluation measures once more
    eval_clients: int = 0  # of Algorithm 2: how many clients' own models are measured; 0: all
    normalised: bool = False  # whether clients' ways are averaged per step: FedNova
    compared: bool = False  # whether the run goes on whose ways were compared with plain torch when it began

    def evaluates(self, round_number: int) -> bool:
        """Whether round 1, 2, … ends with an evaluation."""
        return round_number % self.eval_every == 0 or round_number == self.num_rounds

    def looks_at_clients(self, round_number: int) -> bool:
        """Whether round 1, 2, … ends with an evaluation on every client's own test examples."""
        every = self.client_eval_every
        return bool(every) and (round_number % every == 0 or round_number == self.num_rounds)

    def bytes_sent(self, round_index: int, num_clients: int, state: ClientState) -> int:
        """By all clients in round 0, 1, …; `state`: as one client sends it, with the message of a correction."""
        each = bytes_per_exchange(state, self.method, round_index + 1)
        return each * (num_clients if self.topology is None else self.topology.at(round_index).num_links())

    def bytes_received(self, round_index: int, num_clients: int, state: ClientState) -> int:
        """By all clients at the start of round 0, 1, …; `state`: what the server sends to one of them.

        Who was in the round before has the reference and gets a message, everybody else the reference whole.
        """
        ids = cohort(num_clients, self.cohort_size, self.seed, round_index)
        knows = cohort(num_clients, self.cohort_size, self.seed, round_index - 1) if round_index else ids[:0]
        in_few = len(np.intersect1d(ids, knows))
        few, whole = (bytes_down(state, self.method, rules) for rules in (self.codecs_down, {}))
        return in_few * few + (len(ids) - in_few) * whole

    def weights_of(self, sizes: np.ndarray) -> np.ndarray:
        """[C] weights of clients with so many examples in the averages, not normalised."""
        return sizes if self.client_weights == "samples" else np.ones(len(sizes))

    def steps_of(self, sizes: np.ndarray) -> np.ndarray:
        """[N] local steps of each client in a round: I, or local_epochs × ⌈n_i / B⌉."""
        if self.local_epochs:
            return self.local_epochs * -(-sizes // self.batch_size)
        return np.full(len(sizes), self.num_local_steps, dtype=np.int64)

    @property
    def pacing(self) -> Pacing:
        return Pacing(self.num_local_steps, self.num_rounds, self.milestones)

    @property
    def changes_steps(self) -> bool:
        """Whether I is not that of every round."""
        return INTERVALS[self.interval].follow is not None

    def next_interval(self, interval: int, came: Came) -> int:
        """I of the round after one that took `interval` steps and came to this."""
        follow = INTERVALS[self.interval].follow
        return interval if follow is None else follow(interval, came, self.pacing)

    def span(self, done: "RunState") -> Span | None:
        """The steps of the round after `done`, where I changes in the run."""
        return Span(done.steps, done.interval) if self.changes_steps else None

    def horizon(self, sizes: np.ndarray) -> Horizon:
        per_round = float(self.steps_of(sizes).mean())
        total = self.num_steps or math.ceil(self.num_rounds * per_round)
        if self.changes_steps:
            total = self.pacing.num_steps()  # `adaptive`, which has no milestones, asks for no such number
        return Horizon(total, self.cohort_size, float(sizes.sum()) / (self.cohort_size * self.batch_size))


class RunState(NamedTuple):
    """A run between two rounds: all that a checkpoint must hold."""

    round: int  # rounds done
    state: ClientState  # x̂, û, the buffers, and the server's state of a correction; of what is personal the mean
    own: ClientState | None = None  # [N, ...] what every client has of its own now, in main memory (rounds/own.py)
    outer: dict[str, Tree] | None = None  # what the outer step remembers, {slot: {part/name: tensor}}
    rows: ClientState | None = None  # [N, ...] every client's own x, u and buffers, of Algorithm 2
    steps: int = 0  # local steps t so far (with local-epochs: of each round's longest client)
    interval: int = 0  # I of the next round, where it changes in the run; else 0
    examples: int = 0  # seen by all clients so far, repeats counted
    bytes_sent: int = 0  # by all clients so far
    bytes_received: int | None = None  # by all clients so far; None where as many come back as they send
    reference: Tree | None = None  # {part/name: tensor}: what clients begin at, where what goes down is encoded
    message: Tree | None = None  # {coded array: [*]} from the reference before to this one; in no checkpoint
    wall_seconds: float = 0.0
    fetch: Callable[[], Fetched] | None = None  # brings state and rows from where they are
    partial: bool = False  # whether the model itself is not whole before that
    client_correction: Tree | None = None  # [N, ...] every client's own state of a correction, in main memory
    whole: Callable[[], ClientState] | None = None  # makes the whole state, where the tensors that stay are not in it
    results: ClientResults | None = None  # what every client got in this round; in no checkpoint

    def gathered(self) -> "RunState":
        """The same with its whole state and its rows here."""
        if self.whole is not None:
            return self._replace(state=self.whole(), whole=None)
        if self.fetch is None:
            return self
        found = self.fetch()
        return self._replace(
            state=found.mean,
            rows=found.rows,
            own=self.own if found.own is None else found.own,
            client_correction=self.client_correction if found.correction is None else found.correction,
            fetch=None,
            partial=False,
        )


def beginning(problem: Problem, plan: Plan) -> RunState:
    """The state before the first round."""
    start, client = start_of(problem, plan.method)
    if plan.topology is not None:
        own = ClientState(*({n: v.clone() for n, v in tree.items()} for tree in stacked(start, len(problem.sizes))))
        return RunState(0, start, rows=own)
    rows = first_rows(problem, plan.method, start)
    outer = None if plan.outer is None else outer_start(problem, plan.method, plan.outer, start)
    interval = plan.num_local_steps if plan.changes_steps else 0
    begun = RunState(0, start, rows, outer, interval=interval)
    begun = begun._replace(client_correction=client_rows(client, len(problem.sizes)))
    if not plan.codecs_down:
        return begun
    return begun._replace(bytes_received=0, reference=first_reference(plan.codecs_down, shared_of(problem, start)))


def own_after(problem: Problem, plan: Plan, number: int) -> ClientState | None:
    """[N, ...] the form of what clients have of their own after round 1, 2, …, 0: before them; None for nothing."""
    if plan.topology is not None:
        return None
    return rows_after(problem, plan.method, start_of(problem, plan.method)[0], number)


def cohort(num_clients: int, cohort_size: int, seed: int, round_index: int) -> np.ndarray:
    """[C] ascending ids of the clients of round 0, 1, …: uniform without replacement, by (seed, round) alone."""
    if cohort_size == num_clients:
        return np.arange(num_clients)
    keys = random_bits(COHORT, seed, round_index, torch.arange(num_clients)).numpy()
    return np.sort(np.argpartition(keys, cohort_size)[:cohort_size])


def bytes_per_exchange(state: ClientState, method: Method, number: int) -> int:
    """What one client sends in round 1, 2, …: x and the buffers, states, those that are due, a correction's message."""
    return _bytes(state, method, method.codecs, number)


def bytes_down(state: ClientState, method: Method, rules: CodecRules) -> int:
    """What the server sends to one client, where every state is exchanged in every round; with its correction's."""
    return _bytes(state, method, rules, 1)


def _bytes(state: ClientState, method: Method, rules: CodecRules, number: int) -> int:
    sent = [num_bytes(state.correction)]
    for part in ("params", "momentum", "buffers"):
        tensors = getattr(state, part).items()
        sent += [bytes_of(rules, part, n, t) for n, t in tensors if method.rules.sends(part, n, number)]
    return sum(sent)


def round_job(problem: Problem, plan: Plan, done: RunState, known: Known = None) -> Job:
    """What the whole cohort must do in the round after `done`."""
    num_clients = len(problem.sizes)
    span = plan.span(done)
    job = cohort_job(problem, plan, done.round, span) if known is None else known()
    own, correction = done.own, done.client_correction
    if len(job.clients) < num_clients:
        correction = correction and {n: v[job.clients] for n, v in correction.items()}
        own = own and rows_of(own, job.clients)
    following = None
    if done.round + 1 < plan.num_rounds and span is None:
        following = cache(partial(cohort_job, problem, plan, done.round + 1))
    job = job._replace(own=own, correction=correction, rows=done.rows, following=following, down=done.message)
    number = done.round + 1
    return job._replace(evaluates=plan.evaluates(number), looks_at_clients=plan.looks_at_clients(number))


def cohort_job(problem: Problem, plan: Plan, round_index: int, span: Span | None = None) -> Job:
    """What of round 0, 1, … can be known before the rounds before it are done; its steps, where they change."""
    ids = cohort(len(problem.sizes), plan.cohort_size, plan.seed, round_index)
    return clients_job(problem, plan, round_index, ids, span=span)


def clients_job(
    problem: Problem,
    plan: Plan,
    round_index: int,
    ids: np.ndarray,
    own: ClientState | None = None,
    correction: Tree | None = None,
    span: Span | None = None,
) -> Job:
    """What clients `ids` [C] must do in round 0, 1, …; what they have of their own and their states, [C, ...].

    span: the round's steps, which a plan by which I changes does not tell.
    """
    sizes = problem.sizes[ids]
    all_steps = plan.steps_of(problem.sizes)
    steps, per_round, horizon = all_steps[ids], float(all_steps.mean()), plan.horizon(problem.sizes)
    first = round_index * per_round  # the schedule's clock; with local-epochs the mean client's
    first_steps = round_index * steps
    if span is not None:
        all_steps = np.full_like(all_steps, span.steps)
        first, first_steps, steps = span.first, np.full_like(steps, span.first), all_steps[ids]
    lrs = [plan.rate.at(math.floor(first + s), horizon) for s in range(int(all_steps.max()))]
    weights = torch.from_numpy(plan.weights_of(sizes))
    return Job(
        clients=torch.from_numpy(ids),
        weights=weights.to(torch.float64),
        first_steps=torch.from_numpy(first_steps),
        num_steps=torch.from_numpy(steps),
        lrs=lrs[: int(steps.max())],
        own=own,
        keeps=True,
        scales=_scales(plan, problem.sizes, all_steps, lrs, ids),
        round_index=round_index,
        seed=plan.seed,
        correction=correction,
        span=span,
    )


def _scales(plan: Plan, sizes: np.ndarray, steps: np.ndarray, lrs: list[float], ids: np.ndarray) -> Tensor | None:
    """[C] what FedNova multiplies the ways of clients `ids` by, with sizes and steps [N] of all; None for nothing."""
    if not plan.normalised or len(set(steps.tolist())) == 1:
        return None
    weights = torch.from_numpy(plan.weights_of(sizes)).to(torch.float64)
    return scales(torch.from_numpy(steps), weights, lrs, plan.method.beta, plan.method.nesterov)[torch.from_numpy(ids)]
