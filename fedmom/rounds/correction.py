"""A correction with state between two rounds: what all begin with, and what the server makes of the messages."""

import torch

from fedmom.errors import DivergedError
from fedmom.method.algorithms import Method
from fedmom.method.corrections import Correction, lasting, started, takes_of_the_round
from fedmom.method.optimizers.optimizer import zeros
from fedmom.method.state import ClientState, Tree, expand, is_finite
from fedmom.rounds.round import Job, Outcome
from fedmom.tasks.problem import Problem


def start_of(problem: Problem, method: Method) -> tuple[ClientState, Tree]:
    """(the common start, with the server's state of a correction; what one client keeps of its own, {} for nothing)."""
    start, correction = problem.start(), method.correction
    if method.by.states != ("u",):  # which a problem begins with
        start = start._replace(momentum=zeros(method.by, start.params))
    if not isinstance(correction, Correction):
        return start, {}
    client, server = started(correction, start.params, problem.personal)
    return start._replace(correction=server), lasting(correction, client)


def client_rows(client: Tree, num_clients: int) -> Tree | None:
    """[N, ...] of one client's state, in main memory, for clients that all have it; None where it is empty."""
    if not client:
        return None
    return {name: value.cpu().clone() for name, value in expand(client, num_clients).items()}


def message_form(problem: Problem, method: Method) -> Tree:
    """A message as every client sends it: names, shapes and dtypes; {} where none is sent."""
    correction, x = method.correction, problem.start().params
    if not isinstance(correction, Correction):
        return {}
    client, server = started(correction, x, problem.personal)
    device, dtype = problem.device, next((value.dtype for value in x.values()), torch.float32)
    count, total_lr = torch.ones((), dtype=torch.int64, device=device), torch.ones((), dtype=dtype, device=device)
    return correction.finish(x, x, client, server, count, total_lr)[1]


def check_states(method: Method, outcome: Outcome, server: Tree, where: str) -> None:
    """DivergedError where a correction's state, of the server or of a client that took part, is no number."""
    if isinstance(method.correction, Correction):
        for whose, tree in (("the server's", server), ("a client's", outcome.correction or {})):
            if not is_finite(tree):
                what = f"algorithm.correction: {whose} state became NaN or infinite in {where}"
                raise DivergedError(f"{what}: try a smaller lr")


def gathered(
    method: Method, before: ClientState, mean: ClientState, share: float, job: Job, shared: Tree
) -> ClientState:
    """The mean of a round with the server's next state in place of the mean message.

    before: the start of the round, with the server's state; share: the cohort's part of all clients' weights; job: of
    the clients that answered; shared: x before the round, of what travels.
    """
    correction = method.correction
    if not isinstance(correction, Correction):
        return mean
    told = {"x_start": shared, "x_mean": mean.params, "total_lr": _mean_lr(job)}
    more = {name: told[name] for name in takes_of_the_round(correction)}
    return mean._replace(correction=correction.gather(before.correction, mean.correction, share, **more))


def _mean_lr(job: Job) -> float:
    """Σ p_i Σγ over each client's own steps."""
    totals = torch.tensor(job.lrs, dtype=torch.float64).cumsum(0)[job.num_steps - 1]
    return float(job.weights @ totals / job.weights.sum())
