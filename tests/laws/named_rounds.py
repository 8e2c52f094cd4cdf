"""Rounds of the named methods in plain numpy, one client after another, each after its paper: what they must come to.

Nothing here is fedmom's but what the caller gives: who takes part, with what weight and how many steps, and gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Asked(NamedTuple):
    """What a round asks of its clients."""

    number: int  # 1, 2, …
    clients: Sequence[int]  # [C]
    steps: Sequence[int]  # [C]
    weights: np.ndarray  # [N], of all clients, with the sum 1
    gradient: Callable[[int, int, Any], Any]  # (place in the cohort, step, x) -> g
    lr: float
    all_steps: Sequence[int] = ()  # [N], of all clients


NUMBERS = {"mu": 0.01, "alpha": 0.1, "beta": 0.0, "b1": 0.9, "b2": 0.999, "eta": 1.0, "outer": 0.9, "nesterov": False}


def start(x, num_clients):
    """What the methods remember, before the first round."""
    zero = 0.0 * x
    return {"x": x, "u": zero, "c": zero, "D": zero, "m": zero, "b": zero, "adam": None} | {
        "c_i": [zero] * num_clients,
        "own": [None] * num_clients,
    }


def one_round(name: str, s: dict, asked: Asked, numbers: dict) -> dict:
    """The state after a round of SGD on the clients, changed as the method of this name has it."""
    by, x0, lr = NUMBERS | numbers, s["x"], asked.lr
    ys, us, sums, firsts = [], [], [], []
    for place, (client, steps) in enumerate(zip(asked.clients, asked.steps, strict=True)):
        y, u, total = x0, (0.0 * x0 if name == "fednova" else s["u"]), 0.0
        for k in range(steps):
            g = asked.gradient(place, k, y)
            total = total + g
            if k == 0:
                firsts.append(g)
            if name == "fedprox":
                g = g + by["mu"] * (y - x0)
            if name == "scaffold":
                g = g - s["c_i"][client] + s["c"]
            if name == "fedcm":
                g = by["alpha"] * g + (1 - by["alpha"]) * s["D"]
            if name == "mime-lite":
                g = g + by["mime"] * s["m"]
            u = by["beta"] * u + g
            y = y - lr * (by["beta"] * u + g if by["nesterov"] else u)
        ys.append(y)
        us.append(u)
        sums.append(total)
    shares = asked.weights[list(asked.clients)]
    p, steps = shares / shares.sum(), np.array(asked.steps)

    def mean(rows):
        return sum(w * row for w, row in zip(p, rows, strict=True))

    def spread(rows):
        return mean([np.square(row - mean(rows)).sum() for row in rows])

    new = s | {"x": mean(ys), "u": mean(us), "spread": spread(ys)}
    if name == "scaffold":
        c_i = list(s["c_i"])
        for place, client in enumerate(asked.clients):
            way = c_i[client] - s["c"] + (x0 - ys[place]) / (steps[place] * lr)
            c_i[client] = sums[place] / steps[place] if by["beta"] else way
        change = [c_i[client] - s["c_i"][client] for client in asked.clients]
        new |= {"c_i": c_i, "c": s["c"] + sum(w * d for w, d in zip(shares, change, strict=True))}
    if name == "fednova":

        def length(count):
            shift = 1 if by["nesterov"] else 0
            return sum((1 - by["beta"] ** (k + shift)) / (1 - by["beta"]) for k in range(1, count + 1))

        a = [length(count) for count in steps]
        each = [(x0 - y) / one for y, one in zip(ys, a, strict=True)]
        everybodys = asked.weights @ [length(count) for count in asked.all_steps or steps]
        new |= {"x": x0 - mean(a) * mean(each), "spread": spread([x0 - everybodys * way for way in each])}
    if name == "fedcm":
        new |= {"D": (x0 - new["x"]) / (lr * (p @ steps))}
    if name == "mime-lite":
        new |= {"m": by["mime"] * s["m"] + mean(firsts)}
    return outer(name, by, s, new, lr)


def outer(name, by, s, new, lr):
    """The server's own step."""
    x0, mean = s["x"], new["x"]
    if name == "slowmo":
        b = by["outer"] * s["b"] + (x0 - mean) / lr
        return new | {"b": b, "x": x0 - by["eta"] * lr * b}
    if name == "fedavgm":
        b = by["outer"] * s["b"] + (x0 - mean)
        return new | {"b": b, "x": x0 - by["eta"] * b}
    if name == "diloco":
        b = by["outer"] * s["b"] + (x0 - mean)
        return new | {"b": b, "x": x0 - by["eta"] * ((x0 - mean) + by["outer"] * b)}
    if name == "fedadam":
        m, v = s["adam"] or (0.0 * x0, 1e-6 + 0.0 * x0)
        m = 0.9 * m - 0.1 * (x0 - mean)
        v = 0.99 * v + 0.01 * (x0 - mean) ** 2
        return new | {"adam": (m, v), "x": x0 + 0.1 * m / (np.sqrt(v) + 1e-3)}
    return new


def adam_round(name: str, s: dict, asked: Asked, numbers: dict) -> dict:
    """AdamW on everybody, whose m and v are averaged every so many rounds (0: never), with their clocks."""
    by, periods = NUMBERS | numbers, {"local-adam": (1, 1), "des-loc": (3, 6), "diloco": (0, 0)}[name]
    b1, b2 = by["b1"], by["b2"]
    ys, states = [], []
    for client in asked.clients:
        m, v, z_m, z_v = s["own"][client] or (0.0, 0.0, 0.0, 0.0)
        y = s["x"]
        for k in range(asked.steps[client]):
            g = asked.gradient(client, k, y)
            m, z_m = b1 * m + (1 - b1) * g, b1 * z_m + (1 - b1)
            v, z_v = b2 * v + (1 - b2) * g**2, b2 * z_v + (1 - b2)
            y = y - asked.lr * (m / z_m) / (np.sqrt(v / z_v) + 1e-8)
        ys.append(y)
        states.append([m, v, z_m, z_v])
    for kinds, period in zip(((0, 2), (1, 3)), periods, strict=True):
        if period and asked.number % period == 0:
            for kind in kinds:
                mean = sum(w * row[kind] for w, row in zip(asked.weights, states, strict=True))
                for row in states:
                    row[kind] = mean
    new = s | {"x": sum(w * y for w, y in zip(asked.weights, ys, strict=True)), "own": [tuple(row) for row in states]}
    return outer(name, by, s, new, asked.lr)


def gossip_step(name: str, rows: dict, W, gradient: Callable[[Any], Any], lr: float, beta: float) -> dict:
    """Algorithm 2 with one step: x, u (of quasi-global momentum m̂), y and g [N, …], then W_ji."""
    x, g = rows["x"], gradient(rows["x"])
    if name == "gradient-tracking":
        y = rows["y"] + g - rows["g"]
        return {"x": np.einsum("j...,ji->i...", x - lr * y, W), "y": np.einsum("j...,ji->i...", y, W), "g": g}
    mixed = np.einsum("j...,ji->i...", x - lr * (beta * rows["u"] + g), W)
    return {"x": mixed, "u": beta * rows["u"] + (1 - beta) * (x - mixed) / lr}
