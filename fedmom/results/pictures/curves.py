"""Curves of runs, and who holds which data, as PNG files.

The only file that imports matplotlib, and only when it draws; through the object API, never pyplot, so that
pictures need no display and may be drawn in any thread.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fedmom.errors import InputError
from fedmom.machine.files import whole_file
from fedmom.results.tables import AXES, CONSENSUS, MEASURES, Measure, RunHistory, byte_unit, check, finite, number

DPI = 150
# Okabe and Ito's colours without yellow, which is lost on white; together these repeat after 84 runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
PALE = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.35, "marker": "none", "zorder": 1.5}
LIGHT, DARK = "#D9D9D9", "#404040"
MAX_MARKERS = 16  # on one curve
MAX_NAME = 40
MAX_BUBBLES = 40  # clients, and classes; shades for more
MAX_SINGLE_CLIENTS = 100
MAX_HEAT_COLUMNS = 1000  # about one per pixel
HEAT: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "cmap": "Blues", "vmin": 0.0}


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(path: Path) -> Path:
    """InputError unless a picture can be written there by that name."""
    if path.suffix not in (".png", ".pdf"):
        raise InputError(f"--out {path}: pictures are PNG or PDF; end the name in .png or .pdf")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    return path


def _save(figure: Any, path: Path) -> None:
    """PNG or PDF, as the name says. The same figure gives the same bytes."""
    from matplotlib import rc_context

    kind = path.suffix.removeprefix(".")
    # TrueType: journals refuse matplotlib's own Type 3 fonts.
    with whole_file(path) as aside, rc_context({"pdf.fonttype": 42}):
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"CreationDate": None} if kind == "pdf" else {}
        figure.savefig(aside, format=kind, dpi=DPI, facecolor="white", metadata=about)


def _plain(axes: Any, *, grid: str | None = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(DARK)
    axes.tick_params(labelsize=8, color=DARK, length=3)
    axes.tick_params(which="minor", color=DARK, length=1.5)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=LIGHT, linewidth=0.6)


def _integers(most: int) -> Any:
    """Ticks at round whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _short_name(name: str) -> str:
    """One line of at most MAX_NAME characters."""
    name = " ".join(name.split())
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return f" {name}" if name.startswith("_") else name  # matplotlib hides labels in _


# --- curves ----------------------------------------------------------------------------------------------


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
    figure = _figure(width, 0.3 + 2.45 * len(measures) + 0.19 * lines_below)
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
            axes.xaxis.set_major_locator(_integers(7))

    place: dict[str, Any] = {"loc": "outside lower center", "ncols": names_per_line, "frameon": False}
    lines = [panels[0, 0].plot([], [], **_style(index))[0] for index in range(len(runs))]
    legend = figure.legend(
        lines, names, **place, fontsize=8.5, handlelength=3.2, columnspacing=1.6, title=foot or None, title_fontsize=7.5
    )
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
    figure.align_ylabels(panels[:, 0])
    _save(figure, path)


def _draw_panel(axes: Any, runs: Sequence[RunHistory], measure: Measure, axis: str, divisor: float) -> None:
    for index, run in enumerate(runs):
        for key in _keys(run, measure):
            x, y = _series(run, axis, key)
            look = _style(index) | (PALE if key == "train_loss" else {})
            axes.plot(x / divisor, measure.factor * y, **look, markevery=ceil(len(x) / MAX_MARKERS) or 1)
    _plain(axes)


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
    return [_short_name(name) for name in names]


# --- partitions ------------------------------------------------------------------------------------------


def draw_partition(counts: np.ndarray, path: Path, *, title: str, class_names: Sequence[str] | None = None) -> None:
    """PNG of counts [N, classes]: every client for up to 100 of them, shares of sorted clients for more."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise InputError(f"counts of shape {list(counts.shape)}: must be [clients, classes], both at least 1")
    names = [str(label) for label in range(counts.shape[1])] if class_names is None else class_names
    if len(names) != counts.shape[1]:
        raise InputError(f"{len(names)} class names for {counts.shape[1]} classes: give one name each")
    draw = _draw_clients if len(counts) <= MAX_SINGLE_CLIENTS else _draw_shares
    _save(draw(counts, title, names), path)


def _draw_clients(counts: np.ndarray, title: str, class_names: Sequence[str]) -> Any:
    """Clients on x, classes on y, below bars of the clients' sizes: bubbles, or shades if many."""
    num_clients, num_classes = counts.shape
    bubbles = max(num_clients, num_classes) <= MAX_BUBBLES
    width = min(max(0.36 * num_clients, 3.6), 9.0)
    height = min(max((0.36 if bubbles else 0.25) * num_classes, 1.0), 7.0)
    figure = _figure(width + 0.9, height + 1.9)
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, height])

    bars.bar(np.arange(num_clients), counts.sum(axis=1), width=0.8, color=DARK)
    bars.set_ylabel("Examples")
    bars.yaxis.set_major_locator(_integers(3))
    bars.yaxis.set_major_formatter("{x:,.0f}")
    _plain(bars, grid="y")
    bars.tick_params(axis="x", length=0)

    largest = max(int(counts.max()), 1)
    if bubbles:
        _draw_bubbles(cells, counts / largest, "x" if width / num_clients <= height / num_classes else "y")
        cells.set_xlabel(f"Client   (area ∝ examples, largest bubble: {largest:,})")
    else:
        image = cells.imshow(counts.T, **HEAT, vmax=largest)
        cells.set_xlabel("Client")
        _colour_bar(figure, cells, image, "Examples", format="{x:,.0f}", ticks=_integers(6))
    cells.xaxis.set_major_locator(_integers(26))
    _class_axis(cells, height, class_names)
    _plain(cells, grid="both" if bubbles else None)
    _title(figure, bars, title)
    return figure


def _draw_bubbles(axes: Any, areas: np.ndarray, unit: Any) -> None:
    """Areas [N, classes] in [0, 1]; an area of 1 nearly fills one step of the axis `unit`, "x" or "y"."""
    from matplotlib.collections import EllipseCollection

    client, label = np.nonzero(areas)
    diameter = 0.95 * np.sqrt(areas[client, label])
    places: dict[str, Any] = {"offsets": np.column_stack([client, label]), "offset_transform": axes.transData}
    shape: dict[str, Any] = {"widths": diameter, "heights": diameter, "angles": np.zeros_like(diameter)}
    axes.add_collection(EllipseCollection(**shape, **places, units=unit, facecolor=COLOURS[0]))
    axes.set_xlim(-0.7, areas.shape[0] - 0.3)
    axes.set_ylim(-0.7, areas.shape[1] - 0.3)


def _draw_shares(counts: np.ndarray, title: str, class_names: Sequence[str]) -> Any:
    """Heat map of the clients' class shares, clients sorted by dominant class, below a histogram of sizes."""
    num_clients, num_classes = counts.shape
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None].astype(np.float32)  # [N, classes]
    dominant = np.where(sizes > 0, shares.argmax(axis=1), num_classes)  # clients without examples come last
    shares = shares[np.lexsort((-shares.max(axis=1), dominant))]
    if num_clients > MAX_HEAT_COLUMNS:
        starts = np.arange(MAX_HEAT_COLUMNS) * num_clients // MAX_HEAT_COLUMNS
        widths = np.diff(np.append(starts, num_clients))
        shares = np.add.reduceat(shares, starts, axis=0) / widths[:, None]
        title += f" ({num_clients:,} clients, each column the mean of about {num_clients / MAX_HEAT_COLUMNS:,.3g})"

    height = min(max(0.28 * num_classes, 1.2), 6.0)
    figure = _figure(8.5, height + 2.9)
    histogram, heat = figure.subplots(2, 1, height_ratios=[1.2, height])
    _draw_sizes(histogram, sizes)
    image = heat.imshow(shares.T, **HEAT, vmax=1.0, extent=(0, num_clients, -0.5, num_classes - 0.5))
    heat.xaxis.set_major_formatter("{x:,.0f}")
    heat.set_xlabel("Clients, sorted by dominant class")
    _class_axis(heat, height, class_names)
    _plain(heat, grid=None)
    _colour_bar(figure, heat, image, "Share of the client's examples", format="{x:.0%}")
    _title(figure, histogram, title)
    return figure


def _draw_sizes(axes: Any, sizes: np.ndarray) -> None:
    """Histogram of whole numbers: every bin holds equally many of them, or is as wide on a log axis."""
    low, high, typical = int(sizes.min()), int(sizes.max()), float(np.median(sizes))
    if high > 20 * max(typical, 1.0):
        axes.set_xscale("log")
        bins: Any = np.unique(np.geomspace(max(low, 1), high + 1, 41).round()) - 0.5
    else:
        axes.xaxis.set_major_locator(_integers(8))
        step = ceil((high - low + 1) / 40)
        bins = np.arange(low, high + 1 + step, step) - 0.5
        axes.set_xlim(max(low - 5, 0), max(high + 5, bins[-1]))  # equal sizes are one bar, not a wall
    axes.hist(sizes, bins=bins, color=DARK, edgecolor="white", linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(_integers(3))
    facts = f"min {low:,}, median {typical:,.0f}, max {high:,}"
    axes.set_xlabel(f"Examples of a client ({facts}; none: {(sizes == 0).sum():,} of {len(sizes):,} clients)")
    axes.set_ylabel("Clients")
    _plain(axes, grid="y")


def _class_axis(axes: Any, height: float, class_names: Sequence[str]) -> None:
    """Name as many classes as fit into `height` inches."""
    step = ceil(len(class_names) / max(1, int(height / 0.16)))
    names = [_short_name(name) for name in class_names[::step]]
    axes.set_yticks(range(0, len(class_names), step), names, parse_math=False)
    axes.set_ylabel("Class")


def _title(figure: Any, axes: Any, title: str) -> None:
    """A title to the left, broken into lines that fit: about 0.085 inches a letter."""
    lines = textwrap.fill(title, width=max(20, int((figure.get_figwidth() - 0.8) / 0.085)))
    axes.set_title(lines, fontsize=10, loc="left", parse_math=False)


def _colour_bar(figure: Any, axes: Any, image: Any, label: str, **options: Any) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, fraction=0.05, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, color=DARK, length=3)
    bar.outline.set_visible(False)
