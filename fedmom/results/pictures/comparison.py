"""Figures of groups of runs, for papers: means over seeds with bands, spreads, and the speedup over N.

Colours, dashes and markers change together, so that curves can be told apart in grey too.
"""

from collections.abc import Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmom.results.comparison import AXES, Speedup, Target
from fedmom.results.groups import Group
from fedmom.results.pictures.style import (
    COLOURS,
    DARK,
    DASHES,
    LIGHT,
    MARKERS,
    new_figure,
    plain_axes,
    save_picture,
    whole_ticks,
)
from fedmom.results.tables import MEASURES, Measure, byte_unit, finite, number

KINDS = (".png", ".pdf")
SPREADS = (
    Measure("consensus_distance", "consensus distance", "Consensus distance\nΣ pᵢ‖xᵢ − x̂‖²", ".4g", log=True),
    Measure("momentum_spread", "momentum spread", "Momentum spread\nΣ pᵢ‖uᵢ − û‖²", ".4g", log=True),
    Measure(
        "consensus_distance_after",
        "consensus distance after the exchange",
        "Consensus distance,\nafter the exchange",
        ".4g",
        log=True,
    ),
)
_LABELS = {"test_loss": "Test loss at x̂", "test_accuracy": "Test accuracy at x̂ (%)"}


class Curve(NamedTuple):
    """The mean of a group's seeds at every round that all of them have."""

    x: np.ndarray  # [P] mean over seeds
    y: np.ndarray  # [P]
    sd: np.ndarray  # [P] sample deviation of y; 0 for one seed


def curve(group: Group, x: str, y: str) -> Curve:
    """Rounds where every seed has a finite x and y; seeds that ended earlier cut the curve there."""
    tables = []
    for run in group.runs:
        pairs = {record["round"]: (number(record, x), number(record, y)) for record in run.rounds}
        tables.append({r: p for r, p in pairs.items() if all(v is not None and isfinite(v) for v in p)})
    common = sorted(set.intersection(*(set(table) for table in tables)))
    points = np.array([[table[r] for r in common] for table in tables], dtype=np.float64).reshape(len(tables), -1, 2)
    sd = points[:, :, 1].std(axis=0, ddof=1) if len(tables) > 1 else np.zeros(len(common))
    return Curve(points[:, :, 0].mean(axis=0), points[:, :, 1].mean(axis=0), sd)


def styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A look for each group. Where two keys make the groups, one is the colour and marker, the other the dashes."""
    looks = [(index, index, index) for index in range(len(groups))]
    keys = list(groups[0].differs)
    if len(keys) == 2:
        values = [list(dict.fromkeys(group.differs[key] for group in groups)) for key in keys]
        if len(values[0]) <= len(COLOURS) and len(values[1]) <= len(DASHES) and min(map(len, values)) > 1:
            looks = [
                (a, b, a)
                for group in groups
                for a, b in [[values[i].index(group.differs[key]) for i, key in enumerate(keys)]]
            ]
    return [
        {
            "color": COLOURS[colour % len(COLOURS)],
            "linestyle": DASHES[dash % len(DASHES)],
            "marker": MARKERS[marker % len(MARKERS)],
            "linewidth": 1.4,
            "markersize": 3.6,
        }
        for colour, dash, marker in looks
    ]


def foot(groups: Sequence[Group]) -> str:
    """What a figure says below of runs that are not finished or not counted; the tables name them."""
    left = sum(len(group.left) for group in groups)
    counted = sum(not run.is_finished for group in groups for run in group.runs)
    of = sum(len(group.members) for group in groups)
    parts = [f"{left} of {of} runs left out"] * bool(left) + [f"{counted} of {of} runs unfinished"] * bool(counted)
    return ", ".join(parts)


def draw_comparison(groups: Sequence[Group], stem: Path) -> list[Path]:
    """A row per measure, against rounds, joint epochs, bytes and seconds, as PNG and PDF."""
    runs = [run for group in groups for run in group.runs]
    rows = [m for m in MEASURES if any(finite(run.rounds, m.key) for run in runs)]
    return _draw_grid(groups, rows, list(AXES), stem)


def draw_spreads(groups: Sequence[Group], stem: Path) -> list[Path]:
    """How far clients are apart, in x and in u, just before the exchange (and after it, under Algorithm 2)."""
    runs = [run for group in groups for run in group.runs]
    rows = [m for m in SPREADS if any(value > 0 for run in runs for value in finite(run.rounds, m.key))]
    return _draw_grid(groups, rows, ["round", "joint_epochs"], stem)


def _draw_grid(groups: Sequence[Group], rows: Sequence[Measure], axes: Sequence[str], stem: Path) -> list[Path]:
    looks = [look for group, look in zip(groups, styles(groups), strict=True) if group.runs]
    footing = foot(groups)
    groups = [group for group in groups if group.runs]
    runs = [run for group in groups for run in group.runs]
    ends = {axis: [end for run in runs if (end := max(finite(run.rounds, axis), default=0.0)) > 0] for axis in axes}
    columns = [axis for axis in axes if ends[axis]]
    if not rows or not columns:
        return []
    divisor, unit = byte_unit(max(ends.get("bytes_sent", []), default=0.0))
    labels = [f"{group.label} ({group.seeds} seeds)" if group.note else group.label for group in groups]
    width = 0.5 + 2.7 * max(len(columns), 1.6)
    per_line = max(1, min(len(labels), int(width / (0.65 + 0.075 * max(map(len, labels))))))
    lines = ceil(len(labels) / per_line)
    figure = new_figure(width, 0.5 + 2.1 * len(rows) + 0.19 * lines)
    panels = figure.subplots(len(rows), len(columns), sharex="col", sharey="row", squeeze=False)
    for row, measure in zip(panels, rows, strict=True):
        for panel, axis in zip(row, columns, strict=True):
            for group, look in zip(groups, looks, strict=True):
                _draw_curve(
                    panel, curve(group, axis, measure.key), look, measure, divisor if axis == "bytes_sent" else 1
                )
            plain_axes(panel)
        values = [value for run in runs for value in finite(run.rounds, measure.key)]
        row[0].set_ylabel(_LABELS.get(measure.key, measure.label), fontsize=9)
        _scale_rows(row[0], measure, values, runs)
    names = {"bytes_sent": f"Sent by all clients ({unit})", "wall_seconds": "Seconds"}
    for panel, axis in zip(panels[-1], columns, strict=True):
        panel.set_xlabel(names.get(axis, AXES[axis].capitalize()), fontsize=9)
        if max(ends[axis]) > 10 * min(ends[axis]):  # else the shortest run is a vertical line
            panel.set_xscale("log", nonpositive="mask")
            panel.xaxis.set_major_formatter("{x:g}")
        elif axis == "round":
            panel.xaxis.set_major_locator(whole_ticks(6))
    seeds = any(len(group.runs) > 1 for group in groups)
    title = ["mean ± standard deviation over seeds"] * seeds + [footing] * bool(footing)
    _legend(figure, panels[0, 0], labels, looks, per_line, "; ".join(title))
    figure.align_ylabels(panels[:, 0])
    return _save_all(figure, stem)


def _draw_curve(panel: Any, drawn: Curve, look: dict[str, Any], measure: Measure, divisor: float) -> None:
    x, y, sd = drawn.x / divisor, measure.factor * drawn.y, measure.factor * drawn.sd
    panel.plot(x, y, **look, markevery=0.08)  # a share of the panel: evenly spaced on a log axis too
    if sd.any():
        low = np.maximum(y - sd, 0.5 * y) if measure.log else y - sd  # a log axis has no room below 0
        panel.fill_between(x, low, y + sd, color=look["color"], alpha=0.16, linewidth=0)


def _scale_rows(panel: Any, measure: Measure, values: Sequence[float], runs: Sequence[Any]) -> None:
    """A log axis for what shrinks by powers; and one diverging run must not flatten the others."""
    if measure.log and min(values, default=0.0) >= 0 and max(values, default=0.0) > 0:
        panel.set_yscale("log")
    elif measure.key == "test_loss":
        firsts = sorted(found[0] for run in runs if (found := finite(run.rounds, measure.key)))
        top, bottom = 2 * firsts[len(firsts) // 2], min(values)
        if 0 < top < max(values):
            panel.set_ylim(bottom - 0.05 * (top - bottom), top)
            panel.set_ylabel(f"{panel.get_ylabel()}, cut at {top:.2g}")


def _legend(
    figure: Any, panel: Any, labels: Sequence[str], looks: Sequence[dict[str, Any]], per_line: int, title: str
) -> None:
    lines = [panel.plot([], [], **look)[0] for look in looks]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": per_line, "frameon": False}
    legend = figure.legend(lines, labels, **place, fontsize=8.5, handlelength=3.4, columnspacing=1.6, title=title)
    legend.get_title().set_fontsize(8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_speedup(found: Sequence[Speedup], target: Target, stem: Path, footing: str = "") -> list[Path]:
    """The paper's figure: how many times sooner N clients get there, beside the line of a linear speedup."""
    if not found:
        return []
    figure = new_figure(6.6, 3.3 + 0.19 * ceil(len(found) / 2))
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("In local steps of one client", "In seconds on this machine")
    for panel, title, kind in zip(panels, titles, ("by_steps", "by_seconds"), strict=True):
        sizes = sorted({n for family in found for n in family.num_clients})
        ideal = [n / sizes[0] for n in sizes]
        panel.plot(sizes, ideal, color=DARK, linestyle=(0, (1, 1.5)), linewidth=1.2, zorder=1)
        panel.annotate("linear", (sizes[-1], ideal[-1]), (-6, -2), textcoords="offset points", ha="right", fontsize=8)
        for index, family in enumerate(found):
            look = {"color": COLOURS[index % 7], "linestyle": DASHES[index % 4], "marker": MARKERS[index % 12]}
            kept = [(n, cell) for n, cell in zip(family.num_clients, getattr(family, kind), strict=True) if cell]
            deviations = [cell.sd or 0.0 for _, cell in kept]
            panel.errorbar(
                [n for n, _ in kept],
                [cell.mean for _, cell in kept],
                deviations if any(deviations) else None,
                **look,
                linewidth=1.4,
                markersize=4.5,
                capsize=2.5,
                label=family.label,
            )
        panel.set_title(title, fontsize=9.5, loc="left")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(sizes, [str(n) for n in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("Clients N")
        plain_axes(panel)
        panel.grid(color=LIGHT, linewidth=0.6)
    panels[0].set_ylabel(f"Speedup to {target.title}")
    handles, labels = panels[0].get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False, "title": footing or None}
    legend = figure.legend(handles, labels, **place, fontsize=8.5, title_fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save_all(figure, stem)


def _save_all(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_name(stem.name + kind) for kind in KINDS]
    for path in paths:
        save_picture(figure, path)
    return paths
