"""Algorithm 1 once more, in plain numpy with one dial per known mistake: what the laws must tell from the right one."""

from collections.abc import Callable

import numpy as np

from laws import Problem, Runner, Trajectory

# Each mistake by name; "none" is the method itself.
VARIANTS = (
    "none",
    "momentum reset",
    "momentum kept local",
    "momentum averaged before the update",
    "momentum broadcast from one client",
    "model broadcast from one client",
    "model not averaged",
    "model summed, not averaged",
    "momentum summed, not averaged",
    "averaged one step late",
    "averaged one step early",
    "coefficient zeroed",
    "moving average of gradients (EMA)",
    "lr inside the momentum",
    "displacement as momentum",
    "stale average of the momentum",
    "dampened first step",
)
NESTEROV_VARIANTS = ("v from the old momentum", "gradient at the look-ahead point", "v without the gradient")


def simulate(variant: str) -> Runner:
    def run(p: Problem) -> Trajectory:
        kind = np.float32 if str(p.dtype) == "torch.float32" else np.float64
        h, c = np.array(p.h, kind), np.array(p.c, kind)
        x = np.broadcast_to(np.array(p.start, kind), h.shape).copy()
        u = np.zeros_like(x)
        beta = 0.0 if variant == "coefficient zeroed" else p.beta
        stale, last = np.zeros_like(x), x.copy()
        xs, us = [x.copy()], [u.copy()]
        for t, lr in enumerate(p.lrs, 1):
            due = _due(variant, t, p.interval)
            if due and variant == "momentum averaged before the update":
                u = _mean(u)
            x, u = _step(variant, p.nesterov, x, u, h, c, lr, beta, first=t == 1)
            if due:
                x, u, stale = _exchange(variant, x, u, stale, last, p.interval, lr)
                last = x.copy()
            xs.append(x.copy())
            us.append(u.copy())
        return Trajectory(np.array(xs), np.array(us))

    return run


def _mean(rows: np.ndarray) -> np.ndarray:
    return np.broadcast_to(rows.mean(0, dtype=np.float64).astype(rows.dtype), rows.shape).copy()


def _due(variant: str, t: int, interval: int) -> bool:
    shift = {"averaged one step late": -1, "averaged one step early": 1}.get(variant, 0)
    return t + shift > 0 and (t + shift) % interval == 0


def _step(variant, nesterov, x, u, h, c, lr, beta, *, first):
    at = x - lr * beta * u if nesterov and variant == "gradient at the look-ahead point" else x
    g = h * (at - c)
    old = u
    if variant == "moving average of gradients (EMA)":
        u = beta * u + (1 - beta) * g
    elif variant == "dampened first step" and first:
        u = (1 - beta) * g
    elif variant == "lr inside the momentum":
        u = beta * u + lr * g
        v = beta * u + lr * g if nesterov else u
        return x - v, u
    else:
        u = beta * u + g
    v = u
    if nesterov and variant != "gradient at the look-ahead point":
        v = beta * u + g
        if variant == "v from the old momentum":
            v = beta * old + g
        elif variant == "v without the gradient":
            v = beta * u
    return x - lr * v, u


def _exchange(variant, x, u, stale, last, interval, lr):
    mean_u = _mean(u)
    n = len(x)
    choices: dict[str, Callable] = {
        "momentum reset": lambda: (_mean(x), np.zeros_like(u)),
        "momentum kept local": lambda: (_mean(x), u),
        "momentum averaged before the update": lambda: (_mean(x), u),
        "momentum broadcast from one client": lambda: (_mean(x), np.broadcast_to(u[0], u.shape).copy()),
        "model broadcast from one client": lambda: (np.broadcast_to(x[0], x.shape).copy(), mean_u),
        "model not averaged": lambda: (x, mean_u),
        "model summed, not averaged": lambda: (_mean(x) * n, mean_u),
        "momentum summed, not averaged": lambda: (_mean(x), mean_u * n),
        "displacement as momentum": lambda: (_mean(x), (last - _mean(x)) / (lr * interval)),
        "stale average of the momentum": lambda: (_mean(x), stale),
    }
    new_x, new_u = choices.get(variant, lambda: (_mean(x), mean_u))()
    return new_x, new_u, mean_u
