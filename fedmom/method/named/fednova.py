"""FedNova of Wang, Liu, Liang, Joshi, Poor (NeurIPS 2020), (5) and (7): the mean of what clients did per step.

x̂ = x − τ_eff Σ p_i (x − y_i)/a_i,  a_i = Σ_{k≤τ_i} (1−β^k)/(1−β),  τ_eff = Σ p_i a_i: with unequal numbers of steps
τ_i the plain mean minimises Σ p_i τ_i f_i, and this minimises Σ p_i f_i. y_i is client i's x after its steps, whose u
began at 0. Each client's way is brought to the length τ_eff/a_i before it is averaged, so that all means and spreads
are by the weights p_i as ever.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmom.method.state import Tree


def lengths(num_steps: Tensor, lrs: Sequence[float], beta: float, nesterov: bool = False) -> Tensor:
    """a_i [N] float64 of clients that take so many steps [N].

    Ours: where γ changes within a round, step k counts as (1−β^k)/(1−β) or, with option II, (1−β^{k+1})/(1−β) times
    its γ, in units of the first.
    """
    k = torch.arange(1, len(lrs) + 1, dtype=torch.float64) + nesterov
    gamma = torch.tensor(lrs, dtype=torch.float64)
    gamma = gamma / gamma[0] if gamma[0] > 0 else torch.ones_like(gamma)
    return (gamma * (1 - beta**k) / (1 - beta)).cumsum(0)[num_steps - 1]


def scales(num_steps: Tensor, weights: Tensor, lrs: Sequence[float], beta: float, nesterov: bool = False) -> Tensor:
    """τ_eff/a_i [N] of all N clients, with their weights [N]."""
    a = lengths(num_steps, lrs, beta, nesterov)
    return (weights @ a / weights.sum()) / a


def scaled(x_start: Tree, rows: Tree, by: Tensor) -> Tree:
    """Rows [K, ...] that lie `by` [K] times as far from `x_start`."""

    def one(x: Tensor, row: Tensor) -> Tensor:
        return x + by.to(row).reshape(-1, *[1] * x.ndim) * (row - x)

    return {name: one(x_start[name], row) for name, row in rows.items()}


def of_a_cohort(x_start: Tree, mean: Tree, weights: Tensor, by: Tensor) -> Tree:
    """The mean of some clients' scaled ways, with the τ_eff of these in the place of all clients'."""
    factor = float(weights @ (1 / by) / weights.sum())
    return {name: x_start[name] + factor * (x - x_start[name]) for name, x in mean.items()}
