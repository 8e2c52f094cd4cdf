"""The policies: what becomes of a state of the optimizer between rounds, under both algorithms."""

from collections.abc import Callable
from typing import NamedTuple

from fedmom.method.state import Tree, zeros_like


def start_average(mean: Tree) -> Tree:
    """The paper: every client restarts from û, the average."""
    return mean


def start_local(mean: Tree) -> Tree:
    """Ours, to compare with: every client keeps the momentum it had, which is put in the place of this."""
    return mean


def start_reset(mean: Tree) -> Tree:
    """Ours, to compare with: u = 0 at the start of every round, as most federated frameworks do."""
    return zeros_like(mean)


class Rows(NamedTuple):
    """What Algorithm 2 knows of the receivers' momentum when W is applied; every tree is [n, ...]."""

    mix: Callable[[], Tree]  # u after the local steps of all senders, times W
    own: Tree  # u after the local steps
    u_before: Tree  # u before the local steps
    x_before: Tree
    x_mixed: Tree
    lr: float  # γ
    beta: float


def exchange_average(rows: Rows) -> Tree:
    """The paper: u is mixed with W as x is."""
    return rows.mix()


def exchange_local(rows: Rows) -> Tree:
    """DSGDm: every client keeps its own u."""
    return rows.own


def exchange_reset(rows: Rows) -> Tree:
    """Ours, to compare with: u = 0 after every exchange."""
    return zeros_like(rows.own)


def exchange_quasi_global(rows: Rows) -> Tree:
    """m̂ <- β m̂ + (1 − β) (x − x_mixed) / γ: Lin et al. (ICML 2021), Algorithm 1 (QG-DSGDm) with μ = β."""
    share = (1 - rows.beta) / rows.lr
    return {n: rows.beta * m + share * (rows.x_before[n] - rows.x_mixed[n]) for n, m in rows.u_before.items()}


class MomentumPolicy(NamedTuple):
    """What happens to a state between rounds, under both algorithms."""

    start: Callable[[Tree], Tree]  # û -> u that all clients start with, but for those that have one of their own
    exchange: Callable[[Rows], Tree]  # Algorithm 2: the receivers' u after the exchange
    sends_momentum: bool  # whether u travels, and counts in bytes_sent
    keeps_rows: bool  # whether every client's own u must be stored between rounds
    summary: str
    gossip_only: bool = False  # whether it means something under Algorithm 2 alone
    one_step: bool = False  # whether it is for one step between two exchanges


MOMENTUM_POLICIES = {
    "average": MomentumPolicy(
        start_average, exchange_average, True, False, "the paper: u is averaged, everyone restarts from û"
    ),
    "local": MomentumPolicy(
        start_local, exchange_local, False, True, "every client keeps its own u (x alone is averaged)"
    ),
    "reset": MomentumPolicy(start_reset, exchange_reset, False, False, "u = 0 at the start of every round"),
    "quasi-global": MomentumPolicy(
        start_local,
        exchange_quasi_global,
        False,
        True,
        "d-sgd-m alone: u follows how far x moved (Lin et al. 2021)",
        gossip_only=True,
        one_step=True,
    ),
}
