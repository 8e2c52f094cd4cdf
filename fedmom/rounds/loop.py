"""The round loop: who takes part, from where, with which lr, and one record per round.

Plain arguments in, a record and a new state out; nothing here knows of files, terminals or configurations.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmom.errors import DivergedError
from fedmom.method.algorithms import MOMENTUM_POLICIES, Method, slow_step
from fedmom.method.randomness import COHORT, random_bits
from fedmom.method.schedules import Horizon, LearningRate
from fedmom.method.state import ClientState, Tree, is_finite, num_bytes, stacked, zeros_like
from fedmom.method.topology import Topology
from fedmom.rounds.correction import check_states, client_rows, gathered, start_of
from fedmom.rounds.evaluation import chosen_clients, evaluate_rows
from fedmom.rounds.round import Backend, Early, Job, Outcome, Progress, part_of
from fedmom.tasks.problem import Problem

Record = dict[str, Any]
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
    client_weights: str = "uniform"
    eval_every: int = 1
    num_steps: int = 0  # T, if it was given; else R × I
    slow_momentum: float = 0.0  # α of SlowMo
    slow_lr: float = 1.0  # η of SlowMo
    topology: Topology | None = None  # W_t of Algorithm 2
    eval_clients: int = 0  # of Algorithm 2: how many clients' own models are measured; 0: all
    compared: bool = False  # whether the run goes on whose ways were compared with plain torch when it began

    @property
    def slow(self) -> bool:
        """Whether the server takes a step of its own."""
        return self.slow_momentum > 0 or self.slow_lr != 1

    def evaluates(self, round_number: int) -> bool:
        """Whether round 1, 2, … ends with an evaluation."""
        return round_number % self.eval_every == 0 or round_number == self.num_rounds

    def bytes_sent(self, round_index: int, num_clients: int, state: ClientState) -> int:
        """By all clients in round 0, 1, …; `state`: as one client sends it, with the message of a correction."""
        if self.topology is None:
            return num_clients * bytes_per_exchange(state, self.method)
        return self.topology.at(round_index).num_links() * bytes_per_exchange(state, self.method)

    def weights_of(self, sizes: np.ndarray) -> np.ndarray:
        """[C] weights of clients with so many examples in the averages, not normalised."""
        return sizes if self.client_weights == "samples" else np.ones(len(sizes))

    def steps_of(self, sizes: np.ndarray) -> np.ndarray:
        """[N] local steps of each client in a round: I, or local_epochs × ⌈n_i / B⌉."""
        if self.local_epochs:
            return self.local_epochs * -(-sizes // self.batch_size)
        return np.full(len(sizes), self.num_local_steps, dtype=np.int64)

    def horizon(self, sizes: np.ndarray) -> Horizon:
        per_round = float(self.steps_of(sizes).mean())
        total = self.num_steps or math.ceil(self.num_rounds * per_round)
        return Horizon(total, self.cohort_size, float(sizes.sum()) / (self.cohort_size * self.batch_size))


class RunState(NamedTuple):
    """A run between two rounds: all that a checkpoint must hold."""

    round: int  # rounds done
    state: ClientState  # x̂, û, the buffers, and the server's state of a correction
    client_momentum: Tree | None  # [N, ...] every client's own u, for policy "local"
    slow_momentum: Tree | None = None  # the server's own, of SlowMo
    rows: ClientState | None = None  # [N, ...] every client's own x, u and buffers, of Algorithm 2
    steps: int = 0  # local steps t so far (with local-epochs: of each round's longest client)
    examples: int = 0  # seen by all clients so far, repeats counted
    bytes_sent: int = 0  # by all clients so far
    wall_seconds: float = 0.0
    fetch: Callable[[], tuple[ClientState, ClientState]] | None = None  # brings state and rows from where they are
    client_correction: Tree | None = None  # [N, ...] every client's own state of a correction, in main memory

    def gathered(self) -> "RunState":
        """The same with its state and rows here, where others hold them."""
        if self.fetch is None:
            return self
        state, rows = self.fetch()
        return self._replace(state=state, rows=rows, fetch=None)


def beginning(problem: Problem, plan: Plan) -> RunState:
    """The state before the first round."""
    start, client = start_of(problem, plan.method)
    rows = None
    if plan.topology is not None:
        own = ClientState(*({n: v.clone() for n, v in tree.items()} for tree in stacked(start, len(problem.sizes))))
        return RunState(0, start, None, rows=own)
    if MOMENTUM_POLICIES[plan.method.momentum_policy].keeps_rows:
        rows = {n: torch.zeros(len(problem.sizes), *u.shape, dtype=u.dtype) for n, u in start.momentum.items()}
    slow = zeros_like(start.params) if plan.slow else None
    return RunState(0, start, rows, slow, client_correction=client_rows(client, len(problem.sizes)))


def cohort(num_clients: int, cohort_size: int, seed: int, round_index: int) -> np.ndarray:
    """[C] ascending ids of the clients of round 0, 1, …: uniform without replacement, by (seed, round) alone."""
    if cohort_size == num_clients:
        return np.arange(num_clients)
    keys = random_bits(COHORT, seed, round_index, torch.arange(num_clients)).numpy()
    return np.sort(np.argpartition(keys, cohort_size)[:cohort_size])


def bytes_per_exchange(state: ClientState, method: Method) -> int:
    """What one client sends per round: x, the buffers, u where the method needs it, and a correction's message."""
    sends = MOMENTUM_POLICIES[method.momentum_policy].sends_momentum and method.beta > 0
    return sum(map(num_bytes, (state.params, state.buffers, state.correction, state.momentum if sends else {})))


def round_job(problem: Problem, plan: Plan, done: RunState, known: Known = None) -> Job:
    """What the whole cohort must do in the round after `done`."""
    num_clients = len(problem.sizes)
    job = cohort_job(problem, plan, done.round) if known is None else known()
    momentum, correction = done.client_momentum, done.client_correction
    if len(job.clients) < num_clients:
        momentum, correction = (
            tree and {n: v[job.clients] for n, v in tree.items()} for tree in (momentum, correction)
        )
    following = cache(partial(cohort_job, problem, plan, done.round + 1)) if done.round + 1 < plan.num_rounds else None
    job = job._replace(momentum=momentum, correction=correction, rows=done.rows, following=following)
    return job._replace(evaluates=plan.evaluates(done.round + 1))


def cohort_job(problem: Problem, plan: Plan, round_index: int) -> Job:
    """What of round 0, 1, … can be known before the rounds before it are done."""
    return clients_job(problem, plan, round_index, cohort(len(problem.sizes), plan.cohort_size, plan.seed, round_index))


def clients_job(
    problem: Problem,
    plan: Plan,
    round_index: int,
    ids: np.ndarray,
    momentum: Tree | None = None,
    correction: Tree | None = None,
) -> Job:
    """What clients `ids` [C] must do in round 0, 1, …, with their own u (policy "local") and states, [C, ...]."""
    sizes = problem.sizes[ids]
    all_steps = plan.steps_of(problem.sizes)
    steps, per_round, horizon = all_steps[ids], float(all_steps.mean()), plan.horizon(problem.sizes)
    first = round_index * per_round  # the schedule's clock; with local-epochs the mean client's
    lrs = [plan.rate.at(math.floor(first + s), horizon) for s in range(int(steps.max()))]
    weights = torch.from_numpy(plan.weights_of(sizes))
    return Job(
        clients=torch.from_numpy(ids),
        weights=weights.to(torch.float64),
        first_steps=torch.from_numpy(round_index * steps),
        num_steps=torch.from_numpy(steps),
        lrs=lrs,
        momentum=momentum,
        round_index=round_index,
        correction=correction,
    )


def after_round(problem: Problem, plan: Plan, done: RunState, job: Job, outcome: Outcome, seconds: float) -> RunState:
    """The state between this round and the next; `done` stays as it is. `job`: of the clients that answered."""
    everybody, ids = len(job.clients) == len(problem.sizes), job.clients

    def rows(before: Tree | None, after: Tree | None) -> Tree | None:
        if before is None or after is None:
            return before
        return after if everybody else {name: old.index_copy(0, ids, after[name]) for name, old in before.items()}

    examples = int(job.num_steps.sum()) * plan.batch_size
    share = float(job.weights.sum()) / float(plan.weights_of(problem.sizes).sum())
    state, slow = gathered(plan.method, done.state, outcome.mean, share), done.slow_momentum
    if slow is not None:
        alpha, eta = plan.slow_momentum, plan.slow_lr
        params, slow = slow_step(done.state.params, state.params, slow, lr=job.lrs[0], alpha=alpha, eta=eta)
        state = state._replace(params=params)
    sent = done.state._replace(correction=outcome.mean.correction)
    return RunState(
        round=done.round + 1,
        state=state,
        client_momentum=rows(done.client_momentum, outcome.momentum),
        slow_momentum=slow,
        steps=done.steps + len(job.lrs),
        examples=done.examples + examples,
        bytes_sent=done.bytes_sent + plan.bytes_sent(done.round, len(job.clients), sent),
        wall_seconds=done.wall_seconds + seconds,
        rows=outcome.rows,
        fetch=outcome.fetch,
        client_correction=rows(done.client_correction, outcome.correction),
    )


class _Begun(NamedTuple):
    """A round that the next one can start from."""

    asked: int  # clients
    job: Job  # of those that answered
    outcome: Outcome  # perhaps still to settle
    new: RunState  # without its seconds


def _begun(
    problem: Problem, plan: Plan, engine: Backend, done: RunState, known: Known, progress: Progress | None
) -> _Begun:
    job = round_job(problem, plan, done, known)
    outcome = engine.begin_round(done.state, job, progress)
    asked = len(job.clients)
    if outcome.answered is not None:
        job = part_of(job._replace(momentum=None, correction=None), outcome.answered.nonzero()[:, 0])
    return _Begun(asked, job, outcome, after_round(problem, plan, done, job, outcome, 0.0))


def _whole(ahead: Early[_Begun] | None) -> float:
    """Seconds of a round that ran whole where it was to be begun: they are its own, and not those of the one before."""
    begun = ahead.begun if ahead else None
    return ahead.seconds if ahead and begun and begun.outcome.settle is None else 0.0


def run_rounds(
    problem: Problem, plan: Plan, engine: Backend, done: RunState, progress: Progress | None = None
) -> Iterator[tuple[RunState, Record]]:
    """Rounds done.round + 1 … R, each as the state after it and its record (see docs/method.md).

    Raises InputError before the first one where the model cannot be evaluated, and
    DivergedError, with the round and the lr, when the loss, x or u is NaN or infinite. Where a device works for itself,
    the next round begins before this one's numbers are there: it never waits for what the host does between the two.
    """
    clock = time.perf_counter
    if done.round < plan.num_rounds:
        problem.check_evaluation(done.state)
    ahead: Early[_Begun] | None = None  # the next round, where it is under way
    known: Known = None
    end = 0.0
    while done.round < plan.num_rounds:
        begin = end - _whole(ahead) if ahead else clock()
        asked, job, outcome, new = ahead.take() if ahead else _begun(problem, plan, engine, done, known, progress)
        known, ahead = job.following, None
        if outcome.settle is not None and not job.evaluates:
            ahead = Early(partial(_begun, problem, plan, engine, new, known), progress)
        outcome = outcome.settled()
        steps = int(job.num_steps.sum())
        train_seconds = clock() - begin - _whole(ahead)
        measured = _measured(problem, plan, job, outcome, new)
        _check_finite(new.round, job, outcome, measured)
        check_states(plan.method, outcome, new.state.correction, f"round {new.round} at lr = {job.lrs[0]:g}")
        end = clock()
        new = new._replace(wall_seconds=done.wall_seconds + end - begin - _whole(ahead))
        record = {
            "round": new.round,
            "steps": new.steps,
            "joint_epochs": new.examples / int(problem.sizes.sum()),
            "lr": job.lrs[0],
            "train_loss": outcome.train_loss,
            **measured,
            "consensus_distance": outcome.consensus_distance,
            "momentum_spread": outcome.momentum_spread,
            **(outcome.more or {}),
            "bytes_sent": new.bytes_sent,
            "wall_seconds": new.wall_seconds,
            "client_steps_per_second": steps / train_seconds,
            "num_clients": len(job.clients),
        }
        if len(job.clients) < asked:
            record["num_failed"] = asked - len(job.clients)
        if outcome.trajectory:
            record |= _coordinates(new.state, outcome.trajectory)
        yield new, record
        done = new


def _measured(problem: Problem, plan: Plan, job: Job, outcome: Outcome, new: RunState) -> Record:
    """The evaluation of a round, by whoever ran it or here; empty where none is due."""
    if outcome.measured is not None:
        return outcome.measured
    if not job.evaluates:
        return {}
    measured = problem.evaluate(new.state)
    if new.rows is not None:
        measured |= evaluate_rows(problem, new.rows, chosen_clients(len(problem.sizes), plan.eval_clients))
    return measured


def _check_finite(round_number: int, job: Job, outcome: Outcome, measured: Record) -> None:
    where = f"round {round_number} at lr = {job.lrs[0]:g}"
    spreads = {"consensus_distance": outcome.consensus_distance, "momentum_spread": outcome.momentum_spread}
    for name, value in {"train_loss": outcome.train_loss, **measured, **spreads}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(f"the {name.replace('_', ' ')} became {value} in {where}: try a smaller lr")
    broken = outcome.broken
    if broken is None:
        broken = next((part for part, tree in outcome.mean._asdict().items() if not is_finite(tree)), "")
    if broken:
        raise DivergedError(f"the {broken} became NaN or infinite in {where}: try a smaller lr")


def _coordinates(state: ClientState, path: list[torch.Tensor]) -> Record:
    """x, u and x̄ after every step, written out: for problems small enough to read."""
    flat = {
        part: torch.cat([v.flatten() for v in tree.values()]).tolist()
        for part, tree in (("x", state.params), ("u", state.momentum))
    }
    return {**flat, "x_path": [point.tolist() for point in path]}
