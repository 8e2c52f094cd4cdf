"""What stays with each client (algorithm.personal): its own part of x, u and the buffers, kept between its rounds.

A backend is given a start without these tensors, the cohort's own rows beside it, and gives back a mean without them.
"""

import torch
from torch import Tensor

from fedmom.errors import DivergedError
from fedmom.method.algorithms import Method
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import ClientState, is_finite, joined, like, parted, rows_of, stacked, to_device
from fedmom.rounds.round import Job, Outcome
from fedmom.tasks.problem import Problem

_HELD = 64  # clients whose rows are averaged at once: sums are in float64


def shared_of(problem: Problem, state: ClientState) -> ClientState:
    """Of a state, stacked or not, what travels."""
    return parted(state, problem.personal)[0] if problem.personal else state


def own_rows(problem: Problem, start: ClientState) -> ClientState | None:
    """[N, ...] every client's own tensors before the first round, in main memory; None where nothing is personal."""
    if not problem.personal:
        return None
    rows = stacked(parted(start, problem.personal)[1], len(problem.sizes))
    return ClientState(*({name: value.cpu().clone() for name, value in tree.items()} for tree in rows))


def order_of(problem: Problem) -> ClientState | None:
    """The model's order of names, for `with_own`; None where nothing is personal."""
    return to_device(problem.start(), "meta") if problem.personal else None


def with_own(rows: ClientState, job: Job, order: ClientState | None) -> ClientState:
    """Rows [K, ...] of the job's clients with their own tensors put in, where the job has them."""
    return rows if job.personal is None or order is None else joined(rows, job.personal, order)


def without_own(ended: ClientState, job: Job) -> tuple[ClientState, ClientState | None]:
    """Rows [K, ...] after the local steps -> (what is averaged, the clients' own in main memory)."""
    if job.personal is None:
        return ended, None
    shared, own = parted(ended, {*job.personal.params, *job.personal.buffers})
    return shared, to_device(own, "cpu")


def whole_state(problem: Problem, method: Method, mean: ClientState, rows: ClientState, weights: Tensor) -> ClientState:
    """The mean of a round, which has no personal tensors, with the mean of all N clients' own.

    rows: [N, ...]; weights: [N], of all clients.
    """
    order, own, weights = problem.start(), WeightedMean(method.running_var), weights.to(torch.float64)
    for first in range(0, len(weights), _HELD):
        some = slice(first, first + _HELD)
        own.add(rows_of(rows, some), weights[some])
    return joined(mean, like(own.mean(), order), order)


def check_own(outcome: Outcome, where: str) -> None:
    """DivergedError where a tensor of a client's own is no number."""
    for part, tree in (outcome.personal or ClientState({}, {}, {}))._asdict().items():
        if not is_finite(tree):
            raise DivergedError(f"a client's own {part} became NaN or infinite in {where}: try a smaller lr")
