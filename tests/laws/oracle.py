"""Both algorithms in plain numpy, one client after another: what a round must come to, whoever runs it.

The task is logistic regression on the squares of a few features. Nothing here is fedmom's but what the caller gives:
who takes part, with what weight, and which examples each step sees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

FEATURES, CLASSES, EXAMPLES = 4, 3, 40
POISON = 4  # the example that `poisoned` spoils


class Settings(NamedTuple):
    beta: float
    nesterov: bool
    policy: str  # of the momentum


class Round(NamedTuple):
    """What a round asks of its clients."""

    clients: Sequence[int]  # [C]
    weights: Sequence[float]  # [C], of the means
    draws: Sequence[np.ndarray]  # [C] of [steps, B]: the examples of every step
    lr: float
    W: np.ndarray | None = None  # [N, N] of Algorithm 2; None: Algorithm 1


class State(NamedTuple):
    """Between two rounds, the parameters [K, FEATURES + 1] with the bias last; of Algorithm 2 x and u are means."""

    x: np.ndarray
    u: np.ndarray
    own_x: np.ndarray  # [N, …] where the clients start from, under Algorithm 2
    own_u: np.ndarray  # [N, …] their own momentum


class Came(NamedTuple):
    """What one round came to."""

    state: State
    losses: np.ndarray  # [C] mean of each client's steps, each before the step
    train_loss: float
    consensus_distance: float  # before the exchange
    momentum_spread: float


def examples() -> dict[str, np.ndarray]:
    """Learnable features of three classes, in float64."""
    rng = np.random.default_rng(7)
    y = np.arange(EXAMPLES + 10) % CLASSES
    x = rng.uniform(0.2, 1.0, (CLASSES, FEATURES))[y] + rng.normal(0, 0.3, (len(y), FEATURES))
    return {"x_train": x[:EXAMPLES], "y_train": y[:EXAMPLES], "x_test": x[EXAMPLES:], "y_test": y[EXAMPLES:]}


def poisoned() -> dict[str, np.ndarray]:
    """The same with one example whose squares are infinite, though it is not."""
    data = examples()
    data["x_train"][POISON] = 1e200
    return data


class Squares(nn.Module):
    """The model, in torch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * x)


def squares(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Squares(num_classes)


def start(x: np.ndarray, num_clients: int) -> State:
    """Everybody at x without momentum."""
    own = np.stack([x] * num_clients)
    return State(x, np.zeros_like(x), own, np.zeros_like(own))


def gradient(x: np.ndarray, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Of the mean cross-entropy, and the cross-entropy itself."""
    inputs = np.column_stack([features**2, np.ones(len(features))])
    logits = inputs @ x.T
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    right = np.eye(CLASSES)[labels]
    return (np.exp(log_p) - right).T @ inputs / len(labels), float(-(right * log_p).sum(1).mean())


def one_round(settings: Settings, state: State, asked: Round, data: dict[str, np.ndarray]) -> Came:
    """Local steps of every client of the round, then the exchange."""
    gossip, clients = asked.W is not None, list(asked.clients)
    xs, us, losses = [], [], []
    for client, draws in zip(clients, asked.draws, strict=True):
        x = state.own_x[client] if gossip else state.x
        u = {"average": state.u, "local": state.own_u[client], "reset": np.zeros_like(state.u)}.get(settings.policy)
        u = state.own_u[client] if gossip else u
        seen = []
        for rows in draws:
            g, loss = gradient(x, data["x_train"][rows], data["y_train"][rows])
            u = settings.beta * u + g
            x = x - asked.lr * (settings.beta * u + g if settings.nesterov else u)
            seen.append(loss)
        xs.append(x)
        us.append(u)
        losses.append(np.mean(seen))
    p = np.asarray(asked.weights, dtype=np.float64) / np.sum(asked.weights)
    new = _mixed(settings, state, asked, xs, us) if gossip else _averaged(state, clients, p, xs, us)
    return Came(new, np.array(losses), float(p @ losses), _spread(p, xs), _spread(p, us))


def _averaged(state: State, clients: list[int], p: np.ndarray, xs: list[np.ndarray], us: list[np.ndarray]) -> State:
    x, u = (sum(share * row for share, row in zip(p, rows, strict=True)) for rows in (xs, us))
    own_u = state.own_u.copy()
    for client, row in zip(clients, us, strict=True):
        own_u[client] = row
    return State(x, u, state.own_x, own_u)


def _mixed(settings: Settings, state: State, asked: Round, xs: list[np.ndarray], us: list[np.ndarray]) -> State:
    """x_i = Σ_j W_ji x_j; u as its policy says, which for "quasi-global" is Lin et al. (2021), Algorithm 1."""
    W, N = asked.W, len(xs)
    mixed_x, mixed_u = (np.array([sum(W[j, i] * rows[j] for j in range(N)) for i in range(N)]) for rows in (xs, us))
    moved = (state.own_x - mixed_x) / asked.lr
    own_u = {
        "average": mixed_u,
        "local": np.array(us),
        "reset": np.zeros_like(mixed_u),
        "quasi-global": settings.beta * state.own_u + (1 - settings.beta) * moved,
    }[settings.policy]
    return State(mixed_x.mean(0), own_u.mean(0), mixed_x, own_u)


def _spread(p: np.ndarray, rows: list[np.ndarray]) -> float:
    mean = sum(share * row for share, row in zip(p, rows, strict=True))
    return float(sum(share * ((row - mean) ** 2).sum() for share, row in zip(p, rows, strict=True)))
