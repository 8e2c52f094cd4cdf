"""A look at every client: x̂ and the clients' own models, each judged on its client's own test examples."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedmom.method.algorithms import Method
from fedmom.method.schedules import Span
from fedmom.method.state import ClientState, Tree, is_among, rows_of, stacked, to_device
from fedmom.rounds.own import shared_of, trained, with_own
from fedmom.rounds.plan import Plan, RunState, clients_job
from fedmom.rounds.results import OWN, PERSONAL, ClientResults, client_results
from fedmom.rounds.round import Backend, Job, Stepper, part_of
from fedmom.tasks.problem import Problem

_CHUNK = 16  # clients whose rows, which are there already, are measured at a time


def look(problem: Problem, plan: Plan, backend: Backend, done: RunState, lr: float) -> ClientResults:
    """What every client gets from the round that `done` ends: from x̂ and, where it has one, from its own model.

    lr: γ of the steps that make clients' own models, of the round's last step.
    """
    done, everybody = done.gathered(), torch.arange(len(problem.sizes))
    job = None
    if plan.personal_steps or problem.personal:
        own = own_models_of(problem, plan, done.own)
        job = steps_job(
            problem, plan, done.round, everybody.numpy(), own, done.client_correction, lr=lr, span=plan.span(done)
        )
    if backend.own_results is not None:
        return client_results(done.round, backend.own_results(done.state, job, done.rows))
    values = _named(OWN, problem.evaluate_own(done.state))
    if done.rows is not None or job is not None:
        found = dict[str, np.ndarray]()
        for ids, rows in _own_models(problem, plan, backend, done, job):
            for name, own_values in problem.evaluate_own_rows(rows, ids).items():
                found.setdefault(name, np.full(len(everybody), np.nan))[ids.numpy()] = own_values
        values |= _named(PERSONAL, found)
    return client_results(done.round, values)


def steps_job(
    problem: Problem,
    plan: Plan,
    round_index: int,
    ids: np.ndarray,
    own: ClientState | None,
    correction: Tree | None,
    *,
    lr: float,
    span: Span | None = None,
) -> Job:
    """`plan.personal_steps` local steps with γ = `lr`, as they would begin round `round_index` of clients `ids` [C].

    So they go from û by the momentum policy, on the minibatches that the clients draw next.
    """
    job = clients_job(problem, plan, round_index, ids, own, correction, span)
    return job._replace(num_steps=torch.full((len(ids),), plan.personal_steps), lrs=[lr] * plan.personal_steps)


def after_steps(
    problem: Problem, method: Method, make_stepper: Callable[[], Stepper], state: ClientState, job: Job
) -> ClientState:
    """Rows [C, ...] of the job's clients after its steps, if any, from `state` and their own tensors."""
    start = shared_of(problem, state)
    start = start._replace(momentum=method.rules.begun(start.momentum, job.round_index))
    job = part_of(job, torch.arange(len(job.clients)), problem.device)
    rows = with_own(stacked(start, len(job.clients)), job, state)
    return make_stepper().run_rows(rows, job._replace(own=None))[0] if len(job.lrs) else rows


def own_models_of(problem: Problem, plan: Plan, own: ClientState | None) -> ClientState | None:
    """Of the clients' own what a model of their own begins with: everything but an x that waits for an exchange.

    A model of a client's own goes from x̂, also where clients are on their way between two exchanges of x.
    """
    if own is None or plan.method.rules.moves_x:
        return own and trained(own)
    kept = [{n: v for n, v in tree.items() if is_among(n, problem.personal)} for tree in (own.params, own.buffers)]
    return ClientState(kept[0], trained(own).momentum, kept[1])


def _own_models(
    problem: Problem, plan: Plan, backend: Backend, done: RunState, job: Job | None
) -> Iterator[tuple[Tensor, ClientState]]:
    """Every client's own model, chunk by chunk: (ids [k], rows [k, ...]); one chunk is held at a time.

    Under Algorithm 2 the client's row; else x̂ with the tensors that stay with the client, after the steps of `job`.
    """
    if done.rows is not None:
        for ids in torch.arange(len(problem.sizes)).split(_CHUNK):
            yield ids, to_device(rows_of(done.rows, ids), problem.device)
        return
    assert job is not None
    make_stepper = (lambda: backend) if isinstance(backend, Stepper) else backend.make_stepper
    assert make_stepper is not None, "a backend takes steps on this device, or says who does"
    for ids in job.clients.split(make_stepper().chunk_size if len(job.lrs) else _CHUNK):
        yield ids, after_steps(problem, plan.method, make_stepper, done.state, part_of(job, ids))


def _named(whose: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{whose}_{name}": of_all for name, of_all in values.items()}
