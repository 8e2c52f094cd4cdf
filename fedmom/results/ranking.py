"""Which of several groups is the best, and whether the seeds can tell: a sweep's ranks, and a sentence of result."""

import shlex
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from fedmom.config.keys import Scalar
from fedmom.config.numbers import counted
from fedmom.records.history import read_rounds
from fedmom.records.status import CellEnded
from fedmom.results.groups import Group, data_setting, rivals, said
from fedmom.results.sheets import stat, written
from fedmom.results.tables import MISSING, Measure, finite, fitted, measure_of, measures_in, number

# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom; beyond them `_t95` has an expansion.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SETTINGS = 4  # that are told of in sentences


def metric_of(folder: Path) -> str:
    """What to rank by where nothing was asked for, from a run that is done: accuracy, or loss."""
    numbers = {name for record in read_rounds(folder) for name in record if number(record, name) is not None}
    return next((name for name in ("test_accuracy", "test_loss", "loss") if name in numbers), "train_loss")


class Ranking(NamedTuple):
    """The combinations of a sweep that share a data setting, the best first."""

    setting: str  # "Dirichlet α = 0.1"; "" where all combinations share one
    header: list[str]
    rows: list[list[str]]


def rankings(ended: Sequence[CellEnded], out: Path, metric: str) -> list[Ranking]:
    """A ranking for each data setting, by the metric's last value: mean ± deviation over the seeds that are done.

    Combinations that differ in what the examples are, or who has them, answer different questions; where no two share
    a setting there is one table, without ranks. Accuracies and speeds are better when larger, everything else when
    smaller. Combinations with a run that is not done, or that has no such number, come last.
    """
    groups: dict[str, list[CellEnded]] = {}
    for one in ended:
        groups.setdefault(one.cell.group, []).append(one)
    settings = {name: data_setting(cells[0].cell.sets) for name, cells in groups.items()}
    differ = {
        key for own in settings.values() for key in own if len({other.get(key) for other in settings.values()}) > 1
    }
    parts: dict[str, list[str]] = {}
    for name, own in settings.items():
        parts.setdefault(_words({key: value for key, value in own.items() if key in differ}), []).append(name)
    if len(parts) == len(groups):  # nothing to be ranked
        return [Ranking("", *_table([(name, groups[name]) for name in groups], out, metric, set(), ranked=False))]
    return [
        Ranking(setting, *_table([(name, groups[name]) for name in names], out, metric, differ, ranked=len(names) > 1))
        for setting, names in parts.items()
    ]


def told(ended: Sequence[CellEnded], out: Path, metric: str, width: int | None) -> list[str]:
    """What a sweep ends with: its rankings in lines of at most `width` characters, its folder, and what comes next."""
    lines = list[str]()
    for setting, header, rows in rankings(ended, out, metric):
        lines += [*filter(None, [setting]), fitted(header, rows, width), ""]
    one_data_set = len({one.cell.sets.get("data.dataset") for one in ended}) == 1  # else `fedmom compare` refuses them
    return [*lines, str(out), f"next: fedmom {'compare' if one_data_set else 'report'} {shlex.quote(str(out))}"]


def _words(settings: dict[str, Scalar]) -> str:
    return ", ".join(said(key, value) for key, value in settings.items())


def _table(
    groups: Sequence[tuple[str, list[CellEnded]]], out: Path, metric: str, apart: set[str], *, ranked: bool
) -> tuple[list[str], list[list[str]]]:
    """(header, a row per group)."""
    measure = measure_of(metric) or Measure(metric, metric.replace("_", " "), "", "#.4g")
    sign = -1 if measure.rises else 1
    found = []
    for name, cells in groups:
        sets = {key: value for key, value in cells[0].cell.sets.items() if key not in apart and key != "run.seed"}
        label = _words(sets) or name
        values, trouble = list[float](), list[str]()
        for one in cells:
            last = finite(read_rounds(out / one.cell.name), metric)[-1:] if one.status == "done" else []
            values += last
            if not last:
                why = f"no {metric}" if one.status == "done" else one.status
                trouble.append(f"seed {one.cell.sets['run.seed']}: {why}")
        cell = stat([measure.factor * value for value in values])
        seeds = f"{len(values)} of {len(cells)}" if trouble else f"{len(values)}"
        order = (bool(trouble) or not values, sign * mean(values) if values else 0.0)
        text = written(cell, measure.digits if measure.unit else "#.4g", measure.unit) if cell else MISSING
        found.append((order, [label, text, seeds, "; ".join(trouble)]))
    if ranked:
        found.sort(key=lambda pair: pair[0])
    header = ["run", f"{measure.title} at the end", "seeds", "not done"]
    rows = [row for _, row in found]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    if ranked:
        header, rows = ["run", "rank", *header[1:]], [[row[0], str(r), *row[1:]] for r, row in enumerate(rows, 1)]
    return header, rows


def results(groups: Sequence[Group]) -> list[str]:
    """What came out, in a sentence or two per data setting: which group ended best, by how much, and whether the seeds
    can tell; and where a pooled model ended. [] where nothing was measured.
    """
    ours = [group for group in rivals(groups) if group.runs]
    measure = _judged_by(ours)
    if measure is None:
        return []
    parts: dict[str, list[Group]] = {}
    for group in ours:
        parts.setdefault(_words(data_setting(group.differs)), []).append(group)
    lines = [_result(own, measure, setting) for setting, own in list(parts.items())[:MOST_SETTINGS]]
    if len(parts) > MOST_SETTINGS:
        lines.append(f"{counted(len(parts) - MOST_SETTINGS, 'more data setting')} in the tables.")
    for group in groups:
        if group.pooled and (ends := _ends(group, measure)):
            lines.append(f"{group.label[0].upper()}{group.label[1:]} reaches {_shown(ends, measure)}.")
    return lines


def _judged_by(groups: Sequence[Group]) -> Measure | None:
    """Accuracy before the others, among what some group has measured."""
    found = measures_in(run.rounds for group in groups for run in group.runs)
    measures = sorted(found, key=lambda one: not one.rises)
    return next((one for one in measures if any(_ends(group, one) for group in groups)), None)


def _ends(group: Group, measure: Measure) -> list[float]:
    """The last value of every seed that has one, as it is shown (in percent)."""
    return [measure.factor * found[-1] for run in group.runs if (found := finite(run.rounds, measure.key))]


def _shown(ends: Sequence[float], measure: Measure) -> str:
    return f"{written(stat(ends), measure.digits, measure.unit)} ({counted(len(ends), 'seed')})"


def _result(groups: Sequence[Group], measure: Measure, setting: str) -> str:
    sign = -1 if measure.rises else 1
    order = sorted((g for g in groups if _ends(g, measure)), key=lambda g: sign * mean(_ends(g, measure)))
    if not order:
        return f"{setting}: nothing was measured."
    apart = {} if len(groups) == 1 else data_setting(order[0].differs)
    names = [_words({k: v for k, v in group.differs.items() if k not in apart}) or group.label for group in order]
    ends = [_ends(group, measure) for group in order]
    start = f"{setting}: " if setting and setting != names[0] else ""
    text = f"M{names[0][1:]}" if not start and names[0].startswith("momentum ") else names[0]  # no name's first letter
    text = f"{start}{text} ends {'at' if len(order) == 1 else 'best, at'} {measure.title} {_shown(ends[0], measure)}"
    if len(order) == 1:
        return f"{text}."
    above, below = ("above", "below") if measure.rises else ("below", "above")
    lead = f"{text}, {_gap(ends[0], ends[1], measure)} {above} {names[1]}"
    if len(ends[0]) < 2 or all(len(values) < 2 for values in ends[1:]):
        return f"{lead}; one seed does not say how much of that is noise."
    near = [name for name, values in zip(names[1:], ends[1:], strict=True) if not _apart(ends[0], values)]
    if not near:
        return f"{lead}."
    more = f" and {len(near) - 3} more" if len(near) > 3 else ""
    text = f"{text}; within the noise of it: {'; '.join(near[:3])}{more}."
    for name, values in zip(names[1:], ends[1:], strict=True):
        if name not in near:
            return (
                f"{text} The next that the seeds tell from it, {name}, ends {_gap(ends[0], values, measure)} {below}."
            )
    return text


def _gap(first: Sequence[float], second: Sequence[float], measure: Measure) -> str:
    gap = abs(mean(first) - mean(second))
    return f"{gap:{measure.digits}} points" if measure.unit else f"{gap:.3g}"


def _apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two means differ by more than the noise: Welch's t test at 95 %; never where one has a single seed."""
    if len(first) < 2 or len(second) < 2:
        return False
    parts = [stdev(values) ** 2 / len(values) for values in (first, second)]
    gap, error = abs(mean(first) - mean(second)), sum(parts)
    if error == 0:
        return gap > 0
    freedom = error**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return gap > _t95(max(1, int(freedom))) * sqrt(error)


def _t95(freedom: int) -> float:
    """Student's t, two-sided 95 %: the expansion around the normal quantile z (Abramowitz, Stegun, 26.7.5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
