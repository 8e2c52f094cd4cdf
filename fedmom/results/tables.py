"""Run histories -> tables of text, at the end of each run and where all of them can be compared."""

from collections.abc import Sequence
from math import floor, isfinite, log10
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from fedmom.errors import InputError, unknown

Table = tuple[list[str], list[list[str]]]  # header, rows

MISSING = "–"
AXES = {"round": "round", "joint_epochs": "joint epochs", "bytes_sent": "bytes sent"}
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class RunHistory(NamedTuple):
    """What a run left behind in rounds.jsonl."""

    name: str  # shown in legends and tables
    rounds: list[dict[str, Any]]  # one per round, in order


class Measure(NamedTuple):
    """One thing that an evaluation measures: a row of the picture, a column of the tables."""

    key: str
    title: str  # in tables
    label: str  # on the picture
    digits: str  # format of factor * value
    factor: float = 1.0
    log: bool = False


MEASURES = (
    Measure("test_loss", "test loss", "Test loss", "#.4g"),
    Measure("test_accuracy", "test accuracy (%)", "Test accuracy (%)", ".2f", factor=100.0),
    Measure("mean_client_accuracy", "mean client (%)", "Clients' own models:\nmean accuracy (%)", ".2f", factor=100.0),
    Measure(
        "worst_client_accuracy", "worst client (%)", "Clients' own models:\nworst accuracy (%)", ".2f", factor=100.0
    ),
    Measure("loss", "loss", "Loss at x̄", ".4g", log=True),
    Measure("distance", "distance", "Distance to the optimum", ".4g", log=True),
)

# Drawn where a run has it, but no result by which runs are compared.
CONSENSUS = Measure("consensus_distance_after", "consensus", "Consensus distance", ".4g", log=True)


def number(entry: dict[str, Any], key: str) -> float | None:
    """The number under `key`, NaN and infinity included; None where there is none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)


def finite(rounds: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The finite numbers under `key`, in order."""
    values = (number(entry, key) for entry in rounds)
    return [value for value in values if value is not None and isfinite(value)]


def check(runs: Sequence[RunHistory]) -> None:
    """InputError where there is nothing to show."""
    if not runs:
        raise InputError("no runs to report: name at least one run folder")
    for run in runs:
        if not run.rounds:
            raise InputError(f"run {run.name!r} has no rounds: its rounds.jsonl must hold at least one")


def byte_unit(largest: float) -> tuple[float, str]:
    """What to divide by, and the unit's name, for numbers up to `largest`."""
    power = 0 if largest < 1 else min(floor(log10(largest) / 3 + 1e-9), len(BYTE_UNITS) - 1)
    return 1000.0**power, BYTE_UNITS[power]


def summary_table(runs: Sequence[RunHistory]) -> Table:
    """Where each run ended: counts of its last round, values of its last evaluation.

    client-steps/s is the median over the rounds: a slow first one (compilation, caches) does not count.
    """
    check(runs)
    measures = measures_of(runs)
    rows = [_summary(run, measures) for run in runs]
    return list(rows[0]), [list(row.values()) for row in rows]


def _summary(run: RunHistory, measures: Sequence[Measure]) -> dict[str, str]:
    last, evaluation = run.rounds[-1], last_evaluated(run.rounds)
    cells = {"run": run.name}
    for key, title in {"round": "rounds", "steps": "steps", "joint_epochs": "joint epochs"}.items():
        cells[title] = _count(number(last, key))
    for measure in measures:
        cells[measure.title] = _measured(number(evaluation, measure.key), measure)
        if measure.key == "test_accuracy":
            cells["best (%)"] = _measured(max(finite(run.rounds, measure.key), default=None), measure)
    sent, speeds = number(last, "bytes_sent"), finite(run.rounds, "client_steps_per_second")
    cells["MB sent"] = _count(None if sent is None else sent / 1e6)
    cells["seconds"] = _count(number(last, "wall_seconds"))
    cells["client-steps/s"] = _count(median(speeds) if speeds else None)
    return cells


def equal_table(runs: Sequence[RunHistory], axis: str) -> Table:
    """Every run at the largest value of `axis` that all of them reached, and before it at half of that value.

    Results come from the last evaluated round at or before it; the second column says the value, the third
    where that evaluation was. A run that never moves along the axis (one client sends nothing) does not hold
    the others back; no rows where no run moves.
    """
    check(runs)
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    measures = measures_of(runs)
    header = ["run", f"at {AXES[axis]}", "evaluated at", *(measure.title for measure in measures)]
    ends = [max(finite(run.rounds, axis), default=0.0) for run in runs]
    end = min((end for end in ends if end > 0), default=0.0)
    half = float(floor(end / 2)) if axis == "round" else end / 2
    rows = []
    for limit in (half, end):
        for run in runs if limit > 0 else ():
            ceiling = limit * (1 + 1e-9)  # joint epochs are sums of fractions
            before = [r for r in run.rounds if (at := number(r, axis)) is not None and at <= ceiling]
            evaluation = last_evaluated(before)
            places = [_place(axis, at) for at in (limit, number(evaluation, axis))]
            rows.append([run.name, *places, *(_measured(number(evaluation, m.key), m) for m in measures)])
    return header, rows


def measures_of(runs: Sequence[RunHistory]) -> Sequence[Measure]:
    """The measures that at least one of the runs has; the classifier's where none was ever evaluated."""
    entries = [entry for run in runs for entry in run.rounds]
    return [m for m in MEASURES if any(number(entry, m.key) is not None for entry in entries)] or MEASURES[:2]


def last_evaluated(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    evaluated = (r for r in reversed(rounds) if any(number(r, m.key) is not None for m in MEASURES))
    return next(evaluated, {})


def _count(value: float | None) -> str:
    """Four digits, or all of them before the point."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _place(axis: str, value: float | None) -> str:
    if value is None or axis != "bytes_sent":
        return _count(value)
    divisor, unit = byte_unit(value)
    return f"{_count(value / divisor)} {unit}"


def _measured(value: float | None, measure: Measure) -> str:
    return MISSING if value is None else format(measure.factor * value, measure.digits)


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
