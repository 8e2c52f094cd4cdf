"""The laws of Algorithm 1 as checks on a trajectory, whoever made it: the engine, or a wrong variant.

A runner takes a `Problem` and gives every client's (x, u) after every step, averaging included. Each law runs
problems of its own and raises AssertionError where the trajectory breaks it. Sources: docs/method.md.
"""

import contextlib
import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch


class Problem(NamedTuple):
    """Quadratics f_i = Σ_k h_ik/2 (x_k − c_ik)², exact gradients."""

    h: list[list[float]]  # [N, d]
    c: list[list[float]]  # [N, d]
    start: list[float]  # [d]
    lrs: list[float]  # [T] γ of each step
    beta: float
    nesterov: bool
    interval: int  # I
    dtype: torch.dtype = torch.float64


class Trajectory(NamedTuple):
    x: np.ndarray  # [T + 1, N, d]
    u: np.ndarray  # [T + 1, N, d]


Runner = Callable[[Problem], Trajectory]


def torch_sgd(h, c, start, lrs, beta, nesterov) -> Trajectory:
    """torch.optim.SGD on the mean objective of h, c [N, d]: an implementation that is not ours. N = 1 row."""
    h, c = torch.tensor(h, dtype=torch.float64), torch.tensor(c, dtype=torch.float64)
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lrs[0], momentum=beta, nesterov=nesterov)
    xs, us = [x.detach().clone()], [torch.zeros_like(x)]
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (h * (x - c) ** 2).sum().div(2 * len(h)).backward()
        optimizer.step()
        xs.append(x.detach().clone())
        us.append(optimizer.state[x]["momentum_buffer"].clone())
    return Trajectory(torch.stack(xs)[:, None].numpy(), torch.stack(us)[:, None].numpy())


def sample_problem(num_clients: int, nesterov: bool, *, interval: int, lrs: list[float], beta=0.9) -> Problem:
    """Clients with different curvatures and centers in two coordinates."""
    rng = np.random.default_rng(num_clients)
    h = rng.uniform(0.2, 2.0, (num_clients, 2)).tolist()
    c = rng.normal(0, 3, (num_clients, 2)).tolist()
    return Problem(h, c, [1.0, -2.0], lrs, beta, nesterov, interval)


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=tolerance, atol=tolerance)


def law_large_batch(run: Runner, nesterov: bool, num_clients: int) -> None:
    """I = 1: every client's x_i and u_i are those of large-batch momentum SGD."""
    p = sample_problem(num_clients, nesterov, interval=1, lrs=[0.1] * 12)
    got, want = run(p), torch_sgd(p.h, p.c, p.start, p.lrs, p.beta, nesterov)
    close(got.x, want.x)
    close(got.u, want.u)


def law_single_client(run: Runner, nesterov: bool) -> None:
    """N = 1, I = 3, γ decayed half way: torch.optim.SGD."""
    p = sample_problem(1, nesterov, interval=3, lrs=[0.1] * 6 + [0.01] * 6)
    got, want = run(p), torch_sgd(p.h, p.c, p.start, p.lrs, p.beta, nesterov)
    close(got.x, want.x)
    close(got.u, want.u)


# x̄ after steps 1 … 6 and û after steps 2, 4, 6 of the golden run, options I and II.
GOLDEN_X = {
    False: ["0", "-1/4", "-3/16", "-5/16", "-43/256", "-67/256", "-515/4096"],
    True: ["0", "-3/8", "11/64", "-67/256", "975/4096", "-4071/16384", "63107/262144"],
}
GOLDEN_U = {False: ["-1/4", "-37/64", "-557/1024"], True: ["-9/8", "-549/512", "-32481/32768"]}


def numbers(fractions: list[str]) -> list[float]:
    return [float(Fraction(f)) for f in fractions]


def law_golden(run: Runner, nesterov: bool, dtype: torch.dtype = torch.float32) -> None:
    """The golden run, bit for bit: all its numbers are dyadic."""
    got = run(Problem([[1.0], [3.0]], [[4.0], [-2.0]], [0.0], [0.25] * 6, 0.5, nesterov, 2, dtype))
    assert got.x.mean(1)[:, 0].tolist() == numbers(GOLDEN_X[nesterov])
    for client in range(2):
        assert got.u[2::2, client, 0].tolist() == numbers(GOLDEN_U[nesterov])


def law_restart_together(run: Runner, nesterov: bool, num_clients: int) -> None:
    """All clients are equal exactly after steps kI, in x and in u, and at no other step."""
    p = sample_problem(num_clients, nesterov, interval=3, lrs=[0.05] * 9)
    got = run(p)
    for t in range(len(p.lrs) + 1):
        for rows in (got.x[t], got.u[t]):
            assert bool((rows == rows[0]).all()) == (t % 3 == 0 or num_clients == 1), f"step {t}"


FIXED_POINTS = {"average": -0.187520, "reset": -0.125851, "local": -0.485885}  # x* − x_opt, option I


def fixed_point(h, c, lr, beta, interval, nesterov, policy="average") -> float:
    """x* from P_i = A_i^I, A_i = [[β, h_i], [−γβ, 1 − γh_i]] on (u, x − c_i), by the momentum policy.

    average: (u, x)* = (I − mean P_i)⁻¹ mean[(I − P_i)(0, c_i)]. reset: x = mean[c_i + P_i^xx (x − c_i)], as u = 0 each
    round. local: as reset, with u_i = P_i^ux (x − c_i) / (1 − P_i^uu) put in.
    """
    matrices = []
    for hi in h:
        second = [-lr * beta**2, 1 - lr * (1 + beta) * hi] if nesterov else [-lr * beta, 1 - lr * hi]
        matrices.append(np.linalg.matrix_power(np.array([[beta, hi], second]), interval))
    if policy == "average":
        pull = [(np.eye(2) - P) @ np.array([0.0, ci]) for P, ci in zip(matrices, c, strict=True)]
        return float(np.linalg.solve(np.eye(2) - np.mean(matrices, 0), np.mean(pull, 0))[1])
    keep = [P[1, 1] + (policy == "local") * P[1, 0] * P[0, 1] / (1 - P[0, 0]) for P in matrices]
    return float(np.mean([(1 - k) * ci for k, ci in zip(keep, c, strict=True)]) / np.mean([1 - k for k in keep]))


FIXED_H, FIXED_C = [0.5, 2.0, 1.0], [-1.0, 3.0, 0.0]
FIXED_OPTIMUM = float(np.dot(FIXED_H, FIXED_C) / np.sum(FIXED_H))


def law_fixed_point(run: Runner, nesterov: bool) -> None:
    """Three clients with different curvatures end where averaged momentum ends, and not where others do."""
    h, c = [[v] for v in FIXED_H], [[v] for v in FIXED_C]
    got = run(Problem(h, c, [0.0], [0.05] * 800, 0.9, nesterov, 5))
    want = fixed_point(FIXED_H, FIXED_C, 0.05, 0.9, 5, nesterov)
    assert abs(got.x[-1, :, 0] - want).max() < 1e-9


def minimal_set(run: Runner, nesterov: bool) -> list[str]:
    """The names of the laws that a runner breaks, of the five that together catch every known mistake."""
    laws = {
        "large batch": lambda: law_large_batch(run, nesterov, 3),
        "single client": lambda: law_single_client(run, nesterov),
        "golden": lambda: law_golden(run, nesterov),
        "restart together": lambda: law_restart_together(run, nesterov, 3),
        "fixed point": lambda: law_fixed_point(run, nesterov),
    }
    broken = []
    for name, law in laws.items():
        try:
            law()
        except AssertionError:
            broken.append(name)
    return broken


def table(names, rows):
    """One test of one law over a table: every row runs, and all rows that break it are told together.

    The error is the first broken row's, with a note for every row that is broken. A row has a tmp_path, an in_tmp and
    a monkeypatch of its own and what it printed alone in capsys; all other fixtures are the same for all rows.

    names: of the test's parameters, as pytest.mark.parametrize takes them; its other parameters are fixtures.
    """
    wanted, rows = [name.strip() for name in names.split(",")], list(rows)
    assert rows, "a table without a row tests nothing"

    def decorate(test):
        def whole(**fixtures):
            broken = []
            for place, row in enumerate(rows):
                values = row if len(wanted) > 1 else (row,)
                try:
                    with of_a_row(fixtures, f"row-{place}") as own:
                        test(**own, **dict(zip(wanted, values, strict=True)))
                except (Exception, pytest.fail.Exception) as error:
                    broken.append((f"row {place}, {row!r}: {type(error).__name__}: {error}", error))
            if broken:
                first = broken[0][1]
                for note, _ in broken:
                    first.add_note(note)
                raise first

        kept = [p for name, p in inspect.signature(test).parameters.items() if name not in wanted]
        whole.__dict__.update(test.__dict__)  # pytest's marks
        whole.__signature__ = inspect.Signature(kept)
        whole.__name__, whole.__doc__, whole.__module__ = test.__name__, test.__doc__, test.__module__
        return whole

    return decorate


@contextlib.contextmanager
def of_a_row(fixtures, name):
    """The fixtures as a row of a table has them: `name` is its folder's."""
    own = dict(fixtures)
    with pytest.MonkeyPatch.context() as patch:
        if "monkeypatch" in own:
            own["monkeypatch"] = patch
        if "capsys" in own:
            own["capsys"].readouterr()
        for place in {"tmp_path", "in_tmp"} & own.keys():
            own[place] = own[place] / name
            own[place].mkdir(exist_ok=True)
        if "in_tmp" in own:
            patch.chdir(own["in_tmp"])
        yield own
