"""What a client has of its own between rounds: the tensors of algorithm.personal, and states between two exchanges.

What is personal is never averaged: a backend is given a start without it and gives back a mean without it. A state of a
longer period, and one that its policy leaves with the client, is averaged to be looked at, and goes on with the client.
The clients' own rows are kept beside the common state; a client without one begins at that. So is what a client keeps
of the messages that it encoded (fedmom.travel.feedback).
"""

import torch
from torch import Tensor

from fedmom.errors import DivergedError
from fedmom.method.algorithms import Method
from fedmom.method.averaging import WeightedMean
from fedmom.method.state import (
    ClientState,
    Tree,
    expand,
    flatten,
    is_among,
    is_finite,
    joined,
    like,
    parted,
    rows_of,
    stacked,
    to_device,
    unflatten,
)
from fedmom.rounds.correction import start_of
from fedmom.rounds.round import Fetched, Job, Outcome
from fedmom.tasks.problem import Problem
from fedmom.travel.feedback import Senders, is_kept, kept_before, sent

_HELD = 64  # clients whose rows are averaged at once: sums are in float64
PARTS = ("params", "momentum", "buffers")


def shared_of(problem: Problem, state: ClientState) -> ClientState:
    """Of a state, stacked or not, what travels."""
    return parted(state, problem.personal)[0] if problem.personal else state


def is_own(problem: Problem, method: Method, part: str, name: str, number: int) -> bool:
    """Whether every client goes on with its own tensor after round 1, 2, …; 0: before the first."""
    if part == "correction":
        return False
    return is_among(name, problem.personal) or method.rules.keeps(part, name, number)


def own_of(problem: Problem, method: Method, state: ClientState, number: int) -> ClientState:
    """Of a state, stacked or not, what every client goes on with by itself after round 1, 2, …"""
    parts = {
        part: {n: v for n, v in getattr(state, part).items() if is_own(problem, method, part, n, number)}
        for part in PARTS
    }
    return ClientState(**parts)


def rows_after(problem: Problem, method: Method, start: ClientState, number: int) -> ClientState | None:
    """[N, ...] the form of what clients have of their own after round 1, 2, …, all at `start`; None for nothing.

    All rows are one copy in memory. After round 0 that is what they begin with.
    """
    count = len(problem.sizes)
    own = stacked(own_of(problem, method, start, number), count)
    if method.codecs:
        own = own._replace(momentum=own.momentum | kept_before(method.codecs, shared_of(problem, start), count))
    return own if any(own) else None


def first_rows(problem: Problem, method: Method, start: ClientState) -> ClientState | None:
    """[N, ...] every client's own tensors before the first round, in main memory; None where there are none."""
    rows = rows_after(problem, method, start, 0)
    if rows is None:
        return None
    return ClientState(*({name: value.cpu().clone() for name, value in tree.items()} for tree in rows))


def next_rows(
    problem: Problem, method: Method, done: ClientState, old: ClientState | None, job: Job, outcome: Outcome
) -> ClientState | None:
    """[N, ...] what clients go on with after the round of `job`; None where all go on from the common state.

    done: the whole common state before the round; old: their own rows before it. A client that did not take part keeps
    its own row or, where there is none, has what was common.
    """
    if outcome.own is None:
        return None
    num_clients = len(problem.sizes)
    if len(job.clients) == num_clients:
        return outcome.own
    before = old or ClientState({}, {}, {})
    done = done._replace(momentum=method.rules.begun(done.momentum, job.round_index))

    def whole(known: Tree, common: Tree, after: Tree) -> Tree:
        found = {}
        for name, value in after.items():
            rows = known[name] if name in known else expand({name: common[name].cpu()}, num_clients)[name]
            found[name] = rows.index_copy(0, job.clients, value)
        return found

    parts = zip(before[:3], done[:3], outcome.own[:3], strict=True)
    return ClientState(*(whole(known, common, after) for known, common, after in parts))


def trained(own: ClientState) -> ClientState:
    """Of what clients have of their own the tensors that local steps take: not what is kept for a message."""
    return own._replace(momentum={n: v for n, v in own.momentum.items() if not is_kept(n)})


def order_of(problem: Problem, method: Method) -> ClientState | None:
    """The model's order of names, for `with_own`; None where nothing is personal."""
    return to_device(start_of(problem, method)[0], "meta") if problem.personal else None


def with_own(rows: ClientState, job: Job, order: ClientState | None) -> ClientState:
    """Rows [K, ...] of the job's clients with what they have of their own put in.

    order: of the model's names, where some are missing in `rows`.
    """
    return rows if job.own is None else joined(rows, job.own, rows if order is None else order)


def without_own(
    problem: Problem, method: Method, start: ClientState, ended: ClientState, job: Job
) -> tuple[ClientState, ClientState | None]:
    """Rows [K, ...] after the local steps -> (what is averaged, what the clients go on with in main memory).

    start: the common one; what is averaged is what arrives of the change since then, where it is encoded.
    """
    shared = parted(ended, problem.personal)[0] if problem.personal and job.keeps else ended
    kept: Tree = {}
    if method.codecs:
        before = job.own.momentum if job.own is not None else {}
        senders = Senders(job.seed, job.clients, job.round_index)
        shared, kept = sent(method.codecs, shared, start, before, senders, job.messages)
    if not job.keeps:
        return shared, None
    own = own_of(problem, method, ended, job.round_index + 1)
    own = own._replace(momentum=own.momentum | kept)
    if not any(own):
        return shared, None
    # A copy, also of what is there already: the rows may be written over once they are averaged.
    return shared, ClientState(*({n: v.to("cpu", copy=True) for n, v in tree.items()} for tree in own))


def whole_state(problem: Problem, method: Method, mean: ClientState, rows: ClientState, weights: Tensor) -> ClientState:
    """The mean of a round, in which what every client has of its own is the mean of all N clients'.

    rows: [N, ...]; weights: [N], of all clients.
    """
    order, own, weights = start_of(problem, method)[0], WeightedMean(method.running_var), weights.to(torch.float64)
    for first in range(0, len(weights), _HELD):
        some = slice(first, first + _HELD)
        own.add(rows_of(rows, some), weights[some])
    return joined(mean, like(own.mean(), order), order)


def brought(
    problem: Problem, method: Method, state: ClientState, outcome: Outcome, everybody: bool, weights: Tensor
) -> Fetched:
    """What others hold after a round, `state` made whole with it: of what did not travel, the mean that there was.

    state: after the round, as far as it is here; everybody: whether all N clients took part; weights: [N], of all.
    """
    assert outcome.fetch is not None
    found = outcome.fetch()
    seen = flatten(found.mean)
    state = unflatten({n: seen[n] if n in outcome.absent else v for n, v in flatten(state).items()})
    if found.own is not None and any(own := means_of_all(problem, found.own, everybody)):
        state = whole_state(problem, method, state, own, weights)
    return found._replace(mean=state)


def means_of_all(problem: Problem, rows: ClientState, everybody: bool) -> ClientState:
    """Of the clients' own rows those whose mean is not the cohort's: what is personal, and x where some were absent."""

    def some(part: str, tree: Tree) -> Tree:
        return {
            n: v for n, v in tree.items() if is_among(n, problem.personal) or (part != "momentum" and not everybody)
        }

    return ClientState(*(some(part, tree) for part, tree in zip(PARTS, rows[:3], strict=True)))


def check_own(outcome: Outcome, where: str) -> None:
    """DivergedError where a tensor of a client's own is no number."""
    for part, tree in (outcome.own or ClientState({}, {}, {}))._asdict().items():
        if not is_finite(tree):
            raise DivergedError(f"a client's own {part} became NaN or infinite in {where}: try a smaller lr")
