"""Which of a sweep's runs is the best: the metric's last value, over seeds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from fedmom.records.history import read_rounds
from fedmom.records.status import CellEnded
from fedmom.results.tables import MISSING, finite, number


def metric_of(folder: Path) -> str:
    """What to rank by where nothing was asked for, from a run that is done: accuracy, or loss."""
    numbers = {name for record in read_rounds(folder) for name in record if number(record, name) is not None}
    return next((name for name in ("test_accuracy", "test_loss", "loss") if name in numbers), "train_loss")


def best_table(ended: Sequence[CellEnded], out: Path, metric: str) -> tuple[list[str], list[list[str]]]:
    """(header, a row per group, the best first): the metric's last value, mean ± deviation over seeds that are done.

    Accuracies and speeds are better when larger, everything else when smaller. Groups with a run that is not done, or
    that has no such number, come last.
    """
    groups: dict[str, list[float]] = {}
    trouble: dict[str, list[str]] = {}
    for one in ended:
        values, seed = groups.setdefault(one.cell.group, []), one.cell.sets["run.seed"]
        found = finite(read_rounds(out / one.cell.name), metric)[-1:] if one.status == "done" else []
        values += found
        if not found:
            why = f"no {metric}" if one.status == "done" else one.status
            trouble.setdefault(one.cell.group, []).append(f"seed {seed}: {why}")
    sign = -1 if "accuracy" in metric or "per_second" in metric else 1

    def key(group: str) -> tuple[bool, float]:
        values = groups[group]
        return (group in trouble or not values, sign * mean(values) if values else 0.0)

    rows = []
    for group in sorted(groups, key=key):
        values, missing = groups[group], trouble.get(group, [])
        cell = f"{mean(values):.4g}" if values else MISSING
        cell += f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        of = f"{len(values)} of {len(values) + len(missing)}" if missing else f"{len(values)}"
        rows.append([group, cell, of, "; ".join(missing)])
    return ["run", f"{metric}, mean ± deviation", "seeds", "not done"], rows
