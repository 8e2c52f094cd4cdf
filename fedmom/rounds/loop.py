"""The round loop: who takes part, from where, with which lr, and one record per round.

Plain arguments in, a record and a new state out; nothing here knows of files, terminals or configurations.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fedmom.errors import DivergedError
from fedmom.method.named.fednova import of_a_cohort
from fedmom.method.schedules import Came
from fedmom.method.state import ClientState, Tree, is_finite, is_momentum
from fedmom.rounds.clients import look
from fedmom.rounds.correction import check_states, gathered
from fedmom.rounds.evaluation import chosen_clients, evaluate_rows
from fedmom.rounds.outer import outer_step
from fedmom.rounds.own import brought, check_own, means_of_all, next_rows, shared_of, whole_state
from fedmom.rounds.plan import Known, Plan, RunState, round_job
from fedmom.rounds.round import Backend, Early, Job, Outcome, Progress, part_of
from fedmom.tasks.problem import Problem
from fedmom.travel.reference import after_mean, clients_start, next_reference

Record = dict[str, Any]


def after_round(problem: Problem, plan: Plan, done: RunState, job: Job, outcome: Outcome, seconds: float) -> RunState:
    """The state between this round and the next; `done` stays as it is. `job`: of the clients that answered."""
    everybody, ids = len(job.clients) == len(problem.sizes), job.clients

    def rows(before: Tree | None, after: Tree | None) -> Tree | None:
        if before is None or after is None:
            return before
        return after if everybody else {name: old.index_copy(0, ids, after[name]) for name, old in before.items()}

    begun, weights = shared_of(problem, done.state), plan.weights_of(problem.sizes)
    share = float(job.weights.sum()) / float(weights.sum())
    mean, outer, sent = outcome.mean, done.outer, begun._replace(correction=outcome.mean.correction)
    if job.scales is not None and not everybody:
        mean = mean._replace(params=of_a_cohort(begun.params, mean.params, job.weights, job.scales))
    sent_down = begun if done.reference is None else clients_start(begun, done.reference)
    state = gathered(plan.method, done.state, mean, share, job, sent_down.params)
    state = state if done.reference is None else after_mean(begun, state, done.reference)
    if plan.outer is not None and outer is not None:
        state, outer = outer_step(plan.method, plan.outer, begun, state, outer, done.round + 1, job.lrs[0])
    received, reference, message, fetch = done.bytes_received, done.reference, None, outcome.fetch
    if received is not None and reference is not None:
        received += plan.bytes_received(done.round, len(problem.sizes), begun)
        reference, message = next_reference(plan.codecs_down, reference, state, plan.seed, done.round + 1)
    own = next_rows(problem, plan.method, done.state, done.own, job, outcome)
    whole = None
    if own is not None and any(seen := means_of_all(problem, own, everybody)):
        whole = partial(whole_state, problem, plan.method, state, seen, torch.from_numpy(weights))
        if not (everybody or plan.method.rules.moves_x):  # sums are of distances from it: as after a resume
            state, whole = whole(), None
    if fetch is not None and plan.topology is None:
        fetch = partial(brought, problem, plan.method, state, outcome, everybody, torch.from_numpy(weights))
    return RunState(
        round=done.round + 1,
        state=state,
        own=own,
        outer=outer,
        steps=done.steps + len(job.lrs),
        examples=done.examples + int(job.num_steps.sum()) * plan.batch_size,
        bytes_sent=done.bytes_sent + plan.bytes_sent(done.round, len(job.clients), sent),
        bytes_received=received,
        reference=reference,
        message=message,
        wall_seconds=done.wall_seconds + seconds,
        rows=outcome.rows,
        fetch=fetch,
        partial=fetch is not None and _lacks_model(problem, outcome),
        whole=whole,
        client_correction=rows(done.client_correction, outcome.correction),
    )


def _is_whole(outcome: Outcome, *parts: str) -> bool:
    """Whether all of these parts of the state travelled in the round; of the momentum, what its spread is of."""
    names = [name.partition("/") for name in outcome.absent]
    return not any(part in parts and (part != "momentum" or is_momentum(name)) for part, _, name in names)


def _lacks_model(problem: Problem, outcome: Outcome) -> bool:
    """Whether a part of the model is with those alone who ran the round."""
    return bool(problem.personal) or not _is_whole(outcome, "params", "buffers")


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
    start = shared_of(problem, done.state)
    start = start if done.reference is None else clients_start(start, done.reference)
    outcome = engine.begin_round(start, job, progress)
    asked = len(job.clients)
    if outcome.answered is not None:
        job = part_of(job._replace(own=None, correction=None), outcome.answered.nonzero()[:, 0])
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
    engine.begin_at(done)
    if done.round < plan.num_rounds:
        problem.check_evaluation(done.state)
    ahead: Early[_Begun] | None = None  # the next round, where it is under way
    known: Known = None
    end = 0.0
    while done.round < plan.num_rounds:
        begin = end - _whole(ahead) if ahead else clock()
        asked, job, outcome, new = ahead.take() if ahead else _begun(problem, plan, engine, done, known, progress)
        known, ahead = job.following, None
        if outcome.settle is not None and not (job.evaluates or job.looks_at_clients or plan.changes_steps):
            ahead = Early(partial(_begun, problem, plan, engine, new, known), progress)
        outcome = outcome.settled()
        if plan.changes_steps:
            new = new._replace(interval=_next_interval(problem, plan, done, job, outcome))
        train_seconds = clock() - begin - _whole(ahead)
        new, measured = _judged(problem, plan, engine, job, outcome, new)
        _check_finite(new.round, job, outcome, measured)
        check_states(plan.method, outcome, new.state.correction, f"round {new.round} at lr = {job.lrs[0]:g}")
        end = clock()
        new = new._replace(wall_seconds=done.wall_seconds + end - begin - _whole(ahead))
        record = _record(problem, plan, new, job, outcome, measured, train_seconds)
        if len(job.clients) < asked:
            record["num_failed"] = asked - len(job.clients)
        if outcome.trajectory:
            new = new.gathered() if outcome.absent else new
            record |= _coordinates(new.state, outcome.trajectory)
        yield new, record
        done = new


def _record(
    problem: Problem, plan: Plan, new: RunState, job: Job, outcome: Outcome, measured: Record, train_seconds: float
) -> Record:
    """The line of rounds.jsonl."""
    return {
        "round": new.round,
        "steps": new.steps,
        "joint_epochs": new.examples / int(problem.sizes.sum()),
        **({"interval": len(job.lrs)} if plan.changes_steps else {}),
        "lr": job.lrs[0],
        "train_loss": outcome.train_loss,
        **measured,
        **_spreads(outcome),
        **(outcome.more or {}),
        **_travelled(new),
        "wall_seconds": new.wall_seconds,
        "client_steps_per_second": int(job.num_steps.sum()) / train_seconds,
        "num_clients": len(job.clients),
    }


def _spreads(outcome: Outcome) -> Record:
    """How far apart the clients are; of what did not travel nobody can say it."""
    parts = {"consensus_distance": "params", "momentum_spread": "momentum"}
    return {name: getattr(outcome, name) for name, part in parts.items() if _is_whole(outcome, part)}


def _next_interval(problem: Problem, plan: Plan, done: RunState, job: Job, outcome: Outcome) -> int:
    """I of the round after that of `job`, which began at `done`."""
    begun = shared_of(problem, done.state)
    start = (begun if done.reference is None else clients_start(begun, done.reference)).params
    mean = outcome.mean.params
    away = [torch.linalg.vector_norm((mean[n] - x).to(torch.float64)) ** 2 for n, x in start.items()]
    clients = float(job.weights.sum() ** 2 / (job.weights**2).sum())
    came = Came(done.round + 1, outcome.consensus_distance, float(sum(away)), clients)
    return plan.next_interval(done.interval, came)


def _travelled(new: RunState) -> Record:
    """The bytes so far, of both ways where what goes down is counted."""
    sent = {"bytes_sent": new.bytes_sent}
    return sent if new.bytes_received is None else sent | {"bytes_received": new.bytes_received}


def _judged(
    problem: Problem, plan: Plan, engine: Backend, job: Job, outcome: Outcome, new: RunState
) -> tuple[RunState, Record]:
    """What is measured of a round, and the state with every client's own results, where they are looked at."""
    if (new.whole is not None or new.partial) and (job.evaluates or job.looks_at_clients):
        new = new.gathered()
    measured = _measured(problem, plan, job, outcome, new)
    if not job.looks_at_clients:
        return new, measured
    results = look(problem, plan, engine, new, job.lrs[-1])
    return new._replace(results=results), {**measured, **results.record()}


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
    for name, value in {"train_loss": outcome.train_loss, **measured, **_spreads(outcome)}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(f"the {name.replace('_', ' ')} became {value} in {where}: try a smaller lr")
    broken = outcome.broken
    if broken is None:
        broken = next((part for part, tree in outcome.mean._asdict().items() if not is_finite(tree)), "")
    if broken:
        raise DivergedError(f"the {broken} became NaN or infinite in {where}: try a smaller lr")
    check_own(outcome, where)


def _coordinates(state: ClientState, path: list[torch.Tensor]) -> Record:
    """x, u and x̄ after every step, written out: for problems small enough to read."""
    flat = {
        part: torch.cat([v.flatten() for v in tree.values()]).tolist()
        for part, tree in (("x", state.params), ("u", state.momentum))
    }
    return {**flat, "x_path": [point.tolist() for point in path]}
