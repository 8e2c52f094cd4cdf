"""Curves of runs as PNG: measures against rounds, joint epochs and bytes sent."""

import os
import re
import textwrap
from collections.abc import Sequence
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fedmom.results.pictures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    MAX_NAME,
    new_figure,
    plain_axes,
    save_picture,
    short_name,
    whole_ticks,
)
from fedmom.results.tables import AXES, CONSENSUS, MEASURES, Measure, RunHistory, byte_unit, check, finite, number

PALE = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.35, "marker": "none", "zorder": 1.5}
MAX_MARKERS = 16  # on one curve


def draw_curves(runs: Sequence[RunHistory], path: Path, notes: Sequence[str] = ()) -> None:
    """PNG: a row per measure, against rounds, joint epochs and bytes sent. Pale lines are the train loss.

    notes: small lines below the names of the runs.
    """
    check(runs)
    measures = [m for m in (*MEASURES, CONSENSUS) if any(_keys(run, m) for run in runs)] or MEASURES[:1]
    ends = {axis: [end for run in runs if (end := max(finite(run.rounds, axis), default=0.0)) > 0] for axis in AXES}
    columns = [axis for axis in AXES if ends[axis]] or ["round"]
    divisor, unit = byte_unit(max(ends["bytes_sent"], default=0.0))

    names = _legend_names([run.name for run in runs])
    width = 0.5 + 3.1 * max(len(columns), 1.5)
    # 0.078 inches a letter at 8.5 points, 0.6 for the line before it
    names_per_line = max(1, min(len(names), int(width / (0.6 + 0.078 * max(map(len, names))))))
    foot = "\n".join(line for note in notes for line in textwrap.wrap(note, int(width / 0.072)))
    lines_below = ceil(len(names) / names_per_line) + foot.count("\n") + bool(foot)
    figure = new_figure(width, 0.3 + 2.45 * len(measures) + 0.19 * lines_below)
    panels = figure.subplots(len(measures), len(columns), sharex="col", sharey="row", squeeze=False)

    for row, measure in zip(panels, measures, strict=True):
        for axes, axis in zip(row, columns, strict=True):
            _draw_panel(axes, runs, measure, axis, divisor if axis == "bytes_sent" else 1.0)
        row[0].set_ylabel(_scale(row[0], runs, measure))
    for axes, axis in zip(panels[-1], columns, strict=True):
        axes.set_xlabel(f"Sent by all clients ({unit})" if axis == "bytes_sent" else AXES[axis].capitalize())
        if ends[axis] and max(ends[axis]) > 10 * min(ends[axis]):  # else the shortest run is a vertical line
            axes.set_xscale("log", nonpositive="mask")
            axes.xaxis.set_major_formatter("{x:g}")
        elif axis == "round":
            axes.xaxis.set_major_locator(whole_ticks(7))

    place: dict[str, Any] = {"loc": "outside lower center", "ncols": names_per_line, "frameon": False}
    lines = [panels[0, 0].plot([], [], **_style(index))[0] for index in range(len(runs))]
    legend = figure.legend(
        lines, names, **place, fontsize=8.5, handlelength=3.2, columnspacing=1.6, title=foot or None, title_fontsize=7.5
    )
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
    figure.align_ylabels(panels[:, 0])
    save_picture(figure, path)


def _draw_panel(axes: Any, runs: Sequence[RunHistory], measure: Measure, axis: str, divisor: float) -> None:
    for index, run in enumerate(runs):
        for key in _keys(run, measure):
            x, y = _series(run, axis, key)
            look = _style(index) | (PALE if key == "train_loss" else {})
            axes.plot(x / divisor, measure.factor * y, **look, markevery=ceil(len(x) / MAX_MARKERS) or 1)
    plain_axes(axes)


def _style(index: int) -> dict[str, Any]:
    """How the curve of a run looks, the same in every panel and in the legend."""
    choices = {"color": COLOURS, "linestyle": DASHES, "marker": MARKERS}
    return {name: looks[index % len(looks)] for name, looks in choices.items()} | {"linewidth": 1.5, "markersize": 3.5}


def _series(run: RunHistory, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The rounds of a run in which both x and y are finite: [P], [P]."""
    pairs = [(number(entry, x), number(entry, y)) for entry in run.rounds]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None and isfinite(a) and isfinite(b)]
    points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _keys(run: RunHistory, measure: Measure) -> list[str]:
    """What a run has to draw in the row of a measure; train losses go with a quadratic's loss, else the test loss."""
    quadratic = any(finite(run.rounds, key) for key in ("loss", "distance"))
    train = ["train_loss"] if measure.key == ("loss" if quadratic else "test_loss") else []
    return [key for key in [*train, measure.key] if finite(run.rounds, key)]


def _scale(axes: Any, runs: Sequence[RunHistory], measure: Measure) -> str:
    """Choose the y scale of a row, and say it in the row's label.

    One diverging run must not flatten the others: a test loss ends at twice the runs' median start.
    """
    curves = [[finite(run.rounds, key) for key in _keys(run, measure)] for run in runs]
    values = [value for run in curves for curve in run for value in curve]
    label = measure.label + (" (pale: train)" if any("train_loss" in _keys(run, measure) for run in runs) else "")
    if measure.log and min(values, default=0.0) >= 0 and max(values, default=0.0) > 0:
        axes.set_yscale("log")  # an optimum that was reached exactly is a line through the floor
        axes.tick_params(axis="y", which="both", labelsize=9)  # labels between the powers are no larger than theirs
    if measure.key == "test_loss" and values:
        top, bottom = 2 * median(max(curve[0] for curve in run) for run in curves if run), min(values)
        if 0 < top < max(values):
            axes.set_ylim(bottom - 0.05 * (top - bottom), top)
            label += f", cut at {top:.2g}"
    return label


def _legend_names(names: Sequence[str]) -> list[str]:
    """Short names; where they are long, without the words that all of them begin with."""
    if len(set(names)) > 1 and max(map(len, names)) > MAX_NAME:
        prefix = re.sub(r"[^-_ /,]*$", "", os.path.commonprefix(list(names)))  # noqa: RUF071 - cut to whole words
        names = [f"…{name.removeprefix(prefix)}" if prefix else name for name in names]
    return [short_name(name) for name in names]
