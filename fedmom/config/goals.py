"""What a run may aim at: "test_accuracy=0.9", and the measure that is watched where nobody named one."""

from math import isfinite

from fedmom.config.numbers import as_number
from fedmom.method.algorithms import ALGORITHMS
from fedmom.rounds.evaluation import CLIENT_MEASURES
from fedmom.tasks.problem import data_kind

ALIASES = {"accuracy": "test_accuracy"}
# The numbers that every record has, and those of Algorithm 2 (docs/method.md).
_ALWAYS = (
    *("round", "steps", "joint_epochs", "lr", "train_loss", "consensus_distance", "momentum_spread"),
    *("bytes_sent", "wall_seconds", "client_steps_per_second", "num_clients", "num_failed"),
)
_MIXED = ("consensus_distance_after", "momentum_spread_after")


def measured_by(dataset: str, algorithm: str) -> set[str]:
    """The names of all numbers that a run of such data and such an algorithm may record."""
    kind, mixes = data_kind(dataset), ALGORITHMS[algorithm].decentralized
    return {*_ALWAYS, *kind.measures, *((*_MIXED, *CLIENT_MEASURES) if mixes else ())} - {"optimum"}


def rises(measure: str) -> bool:
    """Whether larger is better: accuracies and speeds rise, everything else falls."""
    return "accuracy" in measure or "per_second" in measure


def parse_goal(text: str) -> tuple[str, float] | None:
    """ "test_accuracy=0.9", "accuracy=90%", "test_loss=0.5" -> (measure, value); None for anything else."""
    name, _, number = (part.strip() for part in text.partition("="))
    value = as_number(number.removesuffix("%").strip())
    if not name.isidentifier() or value is None or not isfinite(value):
        return None
    value = value / 100 if number.endswith("%") else float(value)
    name = ALIASES.get(name, name)
    return None if "accuracy" in name and not 0 < value <= 1 else (name, value)


def monitored(dataset: str, named: str = "auto") -> str:
    """The measure by which a run is judged: the one named, else the test accuracy, else the loss."""
    if named != "auto":
        return ALIASES.get(named, named)
    measures = data_kind(dataset).measures
    return next((name for name in ("test_accuracy", "test_loss", "loss") if name in measures), "train_loss")
