"""Curves: a row per measure, a column per axis, a line per group (the mean over its seeds) with a band of deviations.

Colours, dashes and markers change together, so that curves can be told apart in grey too.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from fedmom.results.comparison import AXES, COSTS
from fedmom.results.groups import Group, alone, counted_of, rivals
from fedmom.results.pictures.style import (
    COLOURS,
    DARK,
    DASHES,
    MARKERS,
    MAX_NAME,
    POLICY_COLOURS,
    add_legend,
    new_figure,
    plain_axes,
    save_picture,
    short_name,
    whole_ticks,
)
from fedmom.results.reading import Run
from fedmom.results.tables import (
    CONSENSUS,
    MEASURES,
    TRAIN,
    Measure,
    byte_unit,
    finite,
    measure_of,
    measures_in,
    without_clients,
)

POLICY = "algorithm.momentum-policy"
POOLED_LINE = {"color": DARK, "linestyle": (0, (1.2, 1.3)), "marker": "none", "linewidth": 1.3}
PALE = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.35, "marker": "none", "zorder": 1.5}


class Curve(NamedTuple):
    """The mean of a group's seeds at every round that all of them have."""

    x: np.ndarray  # [P] mean over seeds
    y: np.ndarray  # [P]
    sd: np.ndarray  # [P] sample deviation of y; 0 for one seed


def curve(group: Group, x: str, y: str) -> Curve:
    """Rounds where every seed has a finite x and y; seeds that ended earlier cut the curve there."""
    rounds = set(group.rounds)
    xs, ys = group.numbers(x, rounds), group.numbers(y, rounds)
    kept = (np.isfinite(xs) & np.isfinite(ys)).all(axis=0)
    xs, ys = xs[:, kept], ys[:, kept]
    sd = ys.std(axis=0, ddof=1) if len(ys) > 1 else np.zeros(ys.shape[1])
    return Curve(xs.mean(axis=0), ys.mean(axis=0), sd)


def line_style(colour: int, dash: int, marker: int) -> dict[str, Any]:
    """How a line looks, the same in every panel and in the legend."""
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": DASHES[dash % len(DASHES)],
        "marker": MARKERS[marker % len(MARKERS)],
        "linewidth": 1.4,
        "markersize": 3.6,
    }


def styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A look for each group; a pooled model's is a dotted line.

    Where policies differ, a policy is a colour and marker, the same in every picture, and all else the dashes. Else,
    where two keys make the groups, one is the colour and marker, the other the dashes.
    """
    looks = iter(_looks([group for group in groups if not group.pooled]))
    return [dict(POOLED_LINE) if group.pooled else next(looks) for group in groups]


def _looks(groups: Sequence[Group]) -> list[dict[str, Any]]:
    policies = [str(group.settings.get(POLICY, "")) for group in groups]
    if len(set(policies)) > 1 and all(policy in POLICY_COLOURS for policy in policies):
        rest = [str({key: value for key, value in group.differs.items() if key != POLICY}) for group in groups]
        # Runs that nothing else is known of are told apart by their number.
        if len(set(zip(policies, rest, strict=True))) < len(groups):
            rest = [str(policies[:place].count(policy)) for place, policy in enumerate(policies)]
        others = list(dict.fromkeys(rest))
        colours = [POLICY_COLOURS[policy] for policy in policies]
        if len(others) == 1:
            return [line_style(colour, colour, colour) for colour in colours]
        if len(others) <= len(DASHES):
            return [line_style(c, others.index(own), c) for c, own in zip(colours, rest, strict=True)]
        return [line_style(c, c, others.index(own)) for c, own in zip(colours, rest, strict=True)]
    keys = list(groups[0].differs)
    if len(keys) == 2:
        values = [list(dict.fromkeys(group.differs[key] for group in groups)) for key in keys]
        if len(values[0]) <= len(COLOURS) and len(values[1]) <= len(DASHES) and min(map(len, values)) > 1:
            first, second = (
                [found.index(group.differs[key]) for group in groups] for found, key in zip(values, keys, strict=True)
            )
            return [line_style(colour, dash, colour) for colour, dash in zip(first, second, strict=True)]
    return [line_style(index, index, index) for index in range(len(groups))]


def draw_curves(runs: Sequence[Run], path: Path, notes: Sequence[str] = ()) -> None:
    """PNG of runs: every measure against rounds, joint epochs and bytes sent. Pale lines are the train loss.

    notes: small lines below the names of the runs. A single run's clients have a picture of their own.
    """
    groups = alone(runs)
    found = without_clients(_found(groups)) if len(runs) == 1 else _found(groups)
    measures = [m for m in (*found, CONSENSUS) if any(_keys(group, m, train=True) for group in groups)]
    labels = _legend_names([run.name for run in runs])
    save_picture(draw_grid(groups, measures or MEASURES[:1], COSTS, labels, "\n".join(notes), train=True), path)


def _found(groups: Sequence[Group]) -> Sequence[Measure]:
    """What the runs measured; a loss where they measured nothing."""
    return measures_in(run.rounds for group in groups for run in group.runs) or MEASURES[:1]


def draw_groups(groups: Sequence[Group], path: Path, notes: Sequence[str] = ()) -> None:
    """PNG of groups: `draw_curves` of means over seeds, with bands of their deviations."""
    runs = counted_of(rivals(groups))
    measures = [m for m in (*_found(groups), CONSENSUS) if any(finite(run.rounds, m.key) for run in runs)]
    labels = _legend_names([group.title for group in groups if group.runs])
    note = "\n".join(["mean ± standard deviation over seeds", *notes])
    save_picture(draw_grid(groups, measures or MEASURES[:1], COSTS, labels, note), path)


def draw_grid(
    groups: Sequence[Group],
    measures: Sequence[Measure],
    axes: Sequence[str],
    labels: Sequence[str],
    note: str,
    *,
    train: bool = False,
) -> Any:
    """The figure; its lines are called by `labels`, with `note` below. train: with pale lines of the train loss."""
    pooled = [group for group in groups if group.pooled and group.runs]
    runs = counted_of(rivals(groups))
    ends = {axis: [end for run in runs if (end := max(finite(run.rounds, axis), default=0.0)) > 0] for axis in axes}
    columns = [axis for axis in axes if ends[axis]] or axes[:1]
    divisor, unit = byte_unit(max(ends.get("bytes_sent", []), default=0.0))
    groups = [group for group in rivals(groups) if group.runs] + pooled
    looks = styles(groups)
    width = 0.5 + 2.7 * max(len(columns), 1.6)
    # 0.075 inches a letter at 8.5 points, 0.65 for the line before it.
    per_line = max(1, min(len(labels), int(width / (0.65 + 0.075 * max(map(len, labels))))))
    note = "\n".join(line for text in note.split("\n") for line in textwrap.wrap(text, int(width / 0.072)))
    figure = new_figure(width, 0.5 + 2.1 * len(measures) + 0.19 * (ceil(len(labels) / per_line) + note.count("\n")))
    panels = figure.subplots(len(measures), len(columns), sharex="col", sharey="row", squeeze=False)
    for row, measure in zip(panels, measures, strict=True):
        for panel, axis in zip(row, columns, strict=True):
            for group, each in zip(groups, looks, strict=True):
                for key in () if group.pooled else _keys(group, measure, train):
                    pale = PALE if key == TRAIN.key else {}
                    by = divisor if axis == "bytes_sent" else 1.0
                    _draw_curve(panel, curve(group, axis, key), each | pale, measure, by)
            for value in [level for group in pooled if (level := end_of(group, measure)) is not None]:
                panel.axhline(measure.factor * value, **POOLED_LINE, zorder=1.8)
            plain_axes(panel)
        row[0].set_ylabel(_scale(row[0], rivals(groups), measure, train), fontsize=9)
    for panel, axis in zip(panels[-1], columns, strict=True):
        title = f"Sent by all clients ({unit})" if axis == "bytes_sent" else AXES[axis].capitalize()
        panel.set_xlabel(title, fontsize=9)
        if ends[axis] and max(ends[axis]) > 10 * min(ends[axis]):  # else the shortest run is a vertical line
            panel.set_xscale("log", nonpositive="mask")
            panel.xaxis.set_major_formatter("{x:g}")
        elif axis == "round":
            panel.xaxis.set_major_locator(whole_ticks(6))
    lines = [panels[0, 0].plot([], [], **each)[0] for each in looks]
    add_legend(figure, lines, labels, per_line, note, handlelength=3.4, columnspacing=1.6)
    figure.align_ylabels(panels[:, 0])
    return figure


def end_of(group: Group, measure: Measure) -> float | None:
    """Where a group ended: the mean over its seeds of a measure's last value; None where it has none."""
    found = [ends[-1] for run in group.runs if (ends := finite(run.rounds, measure.key))]
    return sum(found) / len(found) if found and measure_of(measure.key) else None


def _draw_curve(panel: Any, drawn: Curve, line: dict[str, Any], measure: Measure, divisor: float) -> None:
    x, y, sd = drawn.x / divisor, measure.factor * drawn.y, measure.factor * drawn.sd
    panel.plot(x, y, **line, markevery=0.08)  # a share of the panel: evenly spaced on a log axis too
    if sd.any():
        low = np.maximum(y - sd, 0.5 * y) if measure.log else y - sd  # a log axis has no room below 0
        panel.fill_between(x, low, y + sd, color=line["color"], alpha=0.16, linewidth=0)


def _keys(group: Group, measure: Measure, train: bool) -> list[str]:
    """What a group has to draw in the row of a measure; train losses go with a quadratic's loss, else the test loss."""
    quadratic = any(finite(run.rounds, key) for run in group.runs for key in ("loss", "distance"))
    with_train = train and measure.key == ("loss" if quadratic else "test_loss")
    keys = [TRAIN.key] * with_train + [measure.key]
    return [key for key in keys if any(finite(run.rounds, key) for run in group.runs)]


def _scale(panel: Any, groups: Sequence[Group], measure: Measure, train: bool) -> str:
    """Choose the y scale of a row, and say it in the row's label.

    One diverging run must not flatten the others: a test loss ends at twice the runs' median start.
    """
    drawn = [(run, _keys(group, measure, train)) for group in groups for run in group.runs]
    curves = [[found for key in keys if (found := finite(run.rounds, key))] for run, keys in drawn]
    values = [value for run in curves for found in run for value in found]
    label = measure.label + ("\n(pale: train)" if any(TRAIN.key in keys for _, keys in drawn) else "")
    if measure.log and min(values, default=0.0) >= 0 and max(values, default=0.0) > 0:
        panel.set_yscale("log")  # an optimum that was reached exactly is a line through the floor
        panel.tick_params(axis="y", which="minor", labelsize=8)  # no larger than those of the powers
    if measure.key == "test_loss" and values:
        top, bottom = 2 * median(max(found[0] for found in run) for run in curves if run), min(values)
        if 0 < top < max(values):
            panel.set_ylim(bottom - 0.05 * (top - bottom), top)
            label += f", cut at {top:.2g}"
    return label


def _legend_names(names: Sequence[str]) -> list[str]:
    """Short names; where they are long, without the words that all of them begin with."""
    if len(set(names)) > 1 and max(map(len, names)) > MAX_NAME:
        prefix = re.sub(r"[^-_ /,]*$", "", os.path.commonprefix(list(names)))  # noqa: RUF071 - cut to whole words
        names = [f"…{name.removeprefix(prefix)}" if prefix else name for name in names]
    return [short_name(name) for name in names]
