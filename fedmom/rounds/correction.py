"""A correction with state between two rounds: what all begin with, and what the server makes of the messages."""

import torch

from fedmom.errors import DivergedError
from fedmom.method.algorithms import Method
from fedmom.method.corrections import Correction
from fedmom.method.optimizers.optimizer import zeros
from fedmom.method.state import ClientState, Tree, expand, is_finite
from fedmom.rounds.round import Outcome
from fedmom.tasks.problem import Problem


def start_of(problem: Problem, method: Method) -> tuple[ClientState, Tree]:
    """(the common start, with the server's state of a correction; one client's own state, {} where it has none)."""
    start, correction = problem.start(), method.correction
    if method.by.states != ("u",):  # which a problem begins with
        start = start._replace(momentum=zeros(method.by, start.params))
    if not isinstance(correction, Correction):
        return start, {}
    client, server = correction.start(start.params)
    return start._replace(correction=server), client


def client_rows(client: Tree, num_clients: int) -> Tree | None:
    """[N, ...] of one client's state, in main memory, for clients that all have it; None where it is empty."""
    if not client:
        return None
    return {name: value.cpu().clone() for name, value in expand(client, num_clients).items()}


def message_form(problem: Problem, method: Method) -> Tree:
    """A message as every client sends it: names, shapes and dtypes; {} where none is sent."""
    (start, client), correction = start_of(problem, method), method.correction
    if not isinstance(correction, Correction):
        return {}
    x = start.params
    device, dtype = problem.device, next((value.dtype for value in x.values()), torch.float32)
    count, total_lr = torch.ones((), dtype=torch.int64, device=device), torch.ones((), dtype=dtype, device=device)
    return correction.finish(x, x, client, start.correction, count, total_lr)[1]


def check_states(method: Method, outcome: Outcome, server: Tree, where: str) -> None:
    """DivergedError where a correction's state, of the server or of a client that took part, is no number."""
    if isinstance(method.correction, Correction):
        for whose, tree in (("the server's", server), ("a client's", outcome.correction or {})):
            if not is_finite(tree):
                what = f"algorithm.correction: {whose} state became NaN or infinite in {where}"
                raise DivergedError(f"{what}: try a smaller lr")


def gathered(method: Method, before: ClientState, mean: ClientState, share: float) -> ClientState:
    """The mean of a round with the server's next state in place of the mean message.

    before: the start of the round, with the server's state; share: the cohort's part of all clients' weights.
    """
    correction = method.correction
    if not isinstance(correction, Correction):
        return mean
    return mean._replace(correction=correction.gather(before.correction, mean.correction, share))
