"""What the rounds of a run say, and tables of text: what all tables, pictures and the page share."""

from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import NamedTuple

import numpy as np

from fedmom.rounds.loop import Record

MISSING = "–"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Measure(NamedTuple):
    """One thing that an evaluation measures: a row of the picture, a column of the tables."""

    key: str
    title: str  # in tables
    label: str  # on the picture
    digits: str  # format of factor * value
    factor: float = 1.0
    log: bool = False

    @property
    def rises(self) -> bool:
        """Whether larger is better."""
        return "accuracy" in self.key


MEASURES = (
    Measure("test_loss", "test loss", "Test loss at x̂", "#.4g"),
    Measure("test_accuracy", "test accuracy (%)", "Test accuracy at x̂ (%)", ".2f", factor=100.0),
    Measure("mean_client_accuracy", "mean client (%)", "Clients' own models:\nmean accuracy (%)", ".2f", factor=100.0),
    Measure(
        "worst_client_accuracy", "worst client (%)", "Clients' own models:\nworst accuracy (%)", ".2f", factor=100.0
    ),
    Measure("loss", "loss", "Loss at x̄", ".4g", log=True),
    Measure("distance", "distance", "Distance to the optimum", ".4g", log=True),
)

# Drawn where a run has them, but no results by which runs are compared.
TRAIN = Measure("train_loss", "train loss", "Train loss", "#.4g")
CONSENSUS = Measure(
    "consensus_distance_after",
    "consensus distance after the exchange",
    "Consensus distance,\nafter the exchange",
    ".4g",
    log=True,
)
SPREADS = (
    Measure("consensus_distance", "consensus distance", "Consensus distance\nΣ pᵢ‖xᵢ − x̂‖²", ".4g", log=True),
    Measure("momentum_spread", "momentum spread", "Momentum spread\nΣ pᵢ‖uᵢ − û‖²", ".4g", log=True),
    CONSENSUS,
)


def number(entry: Record, key: str) -> float | None:
    """The number under `key`, NaN and infinity included; None where there is none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)


def finite(rounds: Sequence[Record], key: str) -> list[float]:
    """The finite numbers under `key`, in order."""
    values = (number(entry, key) for entry in rounds)
    return [value for value in values if value is not None and isfinite(value)]


def byte_unit(largest: float) -> tuple[float, str]:
    """What to divide by, and the unit's name, for numbers up to `largest`."""
    power = 0 if largest < 1 else min(floor(log10(largest) / 3 + 1e-9), len(BYTE_UNITS) - 1)
    return 1000.0**power, BYTE_UNITS[power]


def last_evaluated(rounds: Sequence[Record]) -> Record:
    evaluated = (r for r in reversed(rounds) if any(number(r, m.key) is not None for m in MEASURES))
    return next(evaluated, {})


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one to the left, the others, which are numbers, to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join([line(header), line(rule), *map(line, rows)])
