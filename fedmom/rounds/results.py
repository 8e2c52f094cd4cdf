"""What every single client gets: one number of each measure per client, and how they are spread over all of them.

"own": x̂ on each client's own test examples. "personal": each client's own model on them, which has the tensors that
stay with it (algorithm.personal), or has taken some steps from x̂ (run.personal-steps).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmom.tasks.metrics import is_share, rises

OWN, PERSONAL = "own", "personal"
BINS = 20
# What is said of a measure over all clients, each client counting once.
STATISTICS = {
    "mean": "mean over the clients",
    # q-FFL (Li, Sanjabi, Beirami, Smith, ICLR 2020) judges fairness by it.
    "worst10": "mean over the worst tenth of the clients",
    "q25": "first quartile",
    "median": "median",
    "q75": "third quartile",
}
JAIN, HISTOGRAM, DIVERGED = "jain", "histogram", "num_diverged"
COUNT = f"{OWN}_num_clients"  # in the record of every round that looked: how many clients have a number


class ClientResults(NamedTuple):
    """What every client got in one round."""

    round: int
    values: Mapping[str, np.ndarray]  # {"own_loss": [N] float64, …}, NaN for a client without test examples

    def record(self) -> dict[str, Any]:
        """The statistics, as they stand in the record of the round.

        A client whose own model has diverged is counted apart: x̂ has not, and the run goes on.
        """
        found: dict[str, Any] = {COUNT: int((~np.isnan(self.values.get(f"{OWN}_loss", np.zeros(0)))).sum())}
        if diverged := int(np.isinf(self.values.get(f"{PERSONAL}_loss", np.zeros(0))).sum()):
            found[f"{PERSONAL}_{DIVERGED}"] = diverged
        for name, values in self.values.items():
            there = ~np.isnan(values)
            if name.startswith(PERSONAL):
                there &= np.isfinite(values)
            found |= summary(name, values[there])
        return found


def client_results(round_number: int, values: Mapping[str, np.ndarray]) -> ClientResults:
    """What every client got: a model of its own that has diverged gets nothing of any measure, but infinity."""
    loss = values.get(f"{PERSONAL}_loss")
    if loss is None or not np.isinf(loss).any():
        return ClientResults(round_number, values)
    apart = {n: np.where(np.isinf(loss), np.inf, of) if n.startswith(PERSONAL) else of for n, of in values.items()}
    return ClientResults(round_number, apart)


def client_names(whose: Sequence[str], metrics: Sequence[str]) -> tuple[str, ...]:
    """The names of a client's own numbers: "own_loss", "own_accuracy", …."""
    return tuple(f"{one}_{name}" for one in whose for name in ("loss", *metrics))


def statistics(name: str) -> tuple[str, ...]:
    """The names of the numbers that `summary` gives of "own_accuracy"."""
    whose, _, measure = name.partition("_")
    numbers = [f"{whose}_{statistic}_{measure}" for statistic in STATISTICS]
    return (*numbers, *([f"{name}_{JAIN}"] if is_share(name) else []))


def summary_names(name: str) -> tuple[str, ...]:
    """The names of all that `summary` gives."""
    return (*statistics(name), f"{name}_{HISTOGRAM}")


def summary(name: str, values: np.ndarray) -> dict[str, Any]:
    """How one measure, such as "own_accuracy", is spread over the clients that have it: values [n] float64.

    The worst tenth are ⌈n / 10⌉ clients. Jain's index is (Σ a)² / (n Σ a²), of shares alone: 1 where all clients have
    the same (Jain, Chiu, Hawe, 1984). The histogram has BINS bins: of shares on [0, 1], of others from the least to the
    largest value. Nothing is said of no client.
    """
    if not len(values):
        return {}
    whose, _, measure = name.partition("_")
    ordered = np.sort(values) if rises(measure) else np.sort(values)[::-1]  # the worst first
    with np.errstate(invalid="ignore"):  # infinity is told as it is
        quartiles = np.quantile(values, (0.25, 0.5, 0.75))
    numbers = [values.mean(), ordered[: -(-len(values) // 10)].mean(), *quartiles]
    found: dict[str, Any] = {
        f"{whose}_{statistic}_{measure}": float(number) for statistic, number in zip(STATISTICS, numbers, strict=True)
    }
    share = is_share(name)
    if share:
        squares = float((values**2).sum())
        found[f"{name}_{JAIN}"] = float(values.sum()) ** 2 / (len(values) * squares) if squares else 1.0
    low, high = (0.0, 1.0) if share else (float(values.min()), float(values.max()))
    if np.isfinite(high - low):
        counts, edges = np.histogram(values, BINS, (low, high))
        found[f"{name}_{HISTOGRAM}"] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    return found
