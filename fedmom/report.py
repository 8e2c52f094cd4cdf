"""Run histories and client-by-class counts -> tables and pictures.

The only file that imports matplotlib, and only when it draws; through the object API, never pyplot, so that
pictures need no display and may be drawn in any thread.
"""

import os
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import floor, isfinite, log10
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from fedmom.errors import InputError, unknown

Table = tuple[list[str], list[list[str]]]  # header, rows

MISSING = "–"
AXES = {"round": "round", "joint_epochs": "joint epochs", "bytes_sent": "bytes sent"}
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

DPI = 150
# Okabe and Ito's colours without yellow, which is lost on white; with 4 dashes they repeat after 28 runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
MAX_STYLED_RUNS = 12  # beyond it the colour is the run's place in the list
MAX_LEGEND_RUNS = 60
MAX_MARKED_POINTS = 20
MAX_NAME = 40
MAX_BUBBLES = 40  # clients, and classes; shades for more
MAX_SINGLE_CLIENTS = 100
MAX_HEAT_COLUMNS = 1000  # about one per pixel
HEAT: dict[str, Any] = {
    "origin": "lower",
    "aspect": "auto",
    "interpolation": "nearest",
    "cmap": "Blues",
    "vmin": 0.0,
}
LIGHT, DARK = "#D9D9D9", "#404040"


class RunHistory(NamedTuple):
    """What a run left behind in rounds.jsonl."""

    name: str  # shown in legends and tables
    rounds: list[dict[str, Any]]  # one per round, in order


class Measure(NamedTuple):
    """One thing that an evaluation measures: a row of the picture, a column of the tables."""

    key: str
    title: str  # in tables
    label: str  # on the picture
    factor: float = 1.0
    decimals: int = 4
    log: bool = False


MEASURES = (
    Measure("test_loss", "test loss", "Test loss"),
    Measure("test_accuracy", "test accuracy (%)", "Test accuracy (%)", factor=100.0, decimals=2),
    Measure("loss", "loss", "Loss at the mean model", log=True),
    Measure("distance", "distance", "Distance to the optimum", log=True),
)


# --- reading histories -----------------------------------------------------------------------------------


def _value(entry: dict[str, Any], key: str) -> float | None:
    """The number under `key`, NaN and infinity included; None where there is none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value)


def _finite(rounds: Sequence[dict[str, Any]], key: str) -> list[float]:
    values = (_value(entry, key) for entry in rounds)
    return [value for value in values if value is not None and isfinite(value)]


def _series(run: RunHistory, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The rounds of a run in which both x and y are finite: [P], [P]."""
    pairs = [(_value(entry, x), _value(entry, y)) for entry in run.rounds]
    kept = [(a, b) for a, b in pairs if a is not None and b is not None and isfinite(a) and isfinite(b)]
    points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _evaluated(entry: dict[str, Any]) -> bool:
    return any(_value(entry, measure.key) is not None for measure in MEASURES)


def _last_evaluated(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next((entry for entry in reversed(rounds) if _evaluated(entry)), {})


def _measures(runs: Sequence[RunHistory]) -> list[Measure]:
    """The measures that at least one of the runs has; the classifier's where none was ever evaluated."""
    entries = [entry for run in runs for entry in run.rounds]
    has = [m for m in MEASURES if any(_value(entry, m.key) is not None for entry in entries)]
    return has or list(MEASURES[:2])


def _check(runs: Sequence[RunHistory]) -> None:
    if not runs:
        raise InputError("no runs to report: name at least one run folder")
    for run in runs:
        if not run.rounds:
            raise InputError(f"run {run.name!r} has no rounds: its rounds.jsonl must hold at least one")


# --- numbers as text -------------------------------------------------------------------------------------


def _fixed(value: float | None, decimals: int) -> str:
    """Fixed decimals, in powers of ten where those would show too few digits or too many."""
    if value is None:
        return MISSING
    if isfinite(value) and value != 0 and not 10.0 ** (1 - decimals) <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:.{decimals}f}"


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _byte_unit(largest: float) -> tuple[float, str]:
    """What to divide by, and the unit's name, for numbers up to `largest`."""
    power = 0 if largest < 1 else min(floor(log10(largest) / 3 + 1e-9), len(BYTE_UNITS) - 1)
    return 1000.0**power, BYTE_UNITS[power]


def _axis_text(axis: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if axis == "bytes_sent":
        divisor, unit = _byte_unit(value)
        return f"{value / divisor:.4g} {unit}"
    return _count(value) if axis == "round" else _fixed(value, 2)


def _measured(entry: dict[str, Any], measure: Measure) -> str:
    value = _value(entry, measure.key)
    if value is None:
        return MISSING
    if measure.factor != 1.0:  # percent: no powers of ten
        return f"{measure.factor * value:.{measure.decimals}f}"
    return f"{value:.4g}" if measure.log else _fixed(value, measure.decimals)


# --- tables ----------------------------------------------------------------------------------------------


def summary_table(runs: Sequence[RunHistory]) -> Table:
    """Where each run ended: counts of its last round, values of its last evaluation.

    client-steps/s is the median over the rounds: a slow first one (compilation, caches) does not count.
    """
    _check(runs)
    measures = _measures(runs)
    header = ["run", "rounds", "steps", "joint epochs"]
    for measure in measures:
        header += [measure.title]
        if measure.key == "test_accuracy":
            header += ["best (%)"]
    header += ["MB sent", "seconds", "client-steps/s"]

    rows = []
    for run in runs:
        last, evaluation = run.rounds[-1], _last_evaluated(run.rounds)
        row = [run.name, _count(_value(last, "round")), _count(_value(last, "steps"))]
        row += [_fixed(_value(last, "joint_epochs"), 2)]
        for measure in measures:
            row += [_measured(evaluation, measure)]
            if measure.key == "test_accuracy":
                best = max(_finite(run.rounds, measure.key), default=None)
                row += [_measured({measure.key: best}, measure)]
        sent, seconds = _value(last, "bytes_sent"), _value(last, "wall_seconds")
        speeds = _finite(run.rounds, "client_steps_per_second")
        row += [MISSING if sent is None else f"{sent / 1e6:,.0f}" if sent >= 1e10 else f"{sent / 1e6:.4g}"]
        row += [MISSING if seconds is None else f"{seconds:.1f}", _count(median(speeds) if speeds else None)]
        rows.append(row)
    return header, rows


def equal_table(runs: Sequence[RunHistory], axis: str) -> Table:
    """Every run at the largest value of `axis` that all of them reached, and before it at half of that value.

    Results come from the last evaluated round at or before it; the second column says the value, the third
    where that evaluation was. A run that never moves along the axis (one client sends nothing) does not hold
    the others back; no rows where no run moves.
    """
    _check(runs)
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    measures = _measures(runs)
    header = ["run", f"at {AXES[axis]}", "evaluated at", *(measure.title for measure in measures)]
    reached = [end for run in runs if (end := max(_finite(run.rounds, axis), default=0.0)) > 0]
    if not reached:
        return header, []
    end = min(reached)
    half = float(floor(end / 2)) if axis == "round" else end / 2
    rows = []
    for limit in (half, end) if half > 0 else (end,):
        for run in runs:
            ceiling = limit * (1 + 1e-9)  # joint epochs are sums of fractions
            before = [r for r in run.rounds if (at := _value(r, axis)) is not None and at <= ceiling]
            evaluation = _last_evaluated(before)
            values = [_measured(evaluation, measure) for measure in measures]
            places = [_axis_text(axis, at) for at in (limit, _value(evaluation, axis))]
            rows.append([run.name, *places, *values])
    return header, rows


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


# --- files and figures -----------------------------------------------------------------------------------


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` if the body succeeds, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save(figure: Any, path: Path) -> None:
    with _atomic(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    return f" {name}" if name.startswith("_") or not name else name  # matplotlib hides labels in _


def _legend_names(runs: Sequence[RunHistory]) -> list[str]:
    """Short names; where they are long, without the words that all of them begin with."""
    names = [run.name for run in runs]
    if len(runs) > 1 and max(map(len, names)) > MAX_NAME:
        pairs = zip(min(names), max(names), strict=False)
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        prefix = names[0][:length]
        prefix = prefix[: 1 + max(prefix.rfind(mark) for mark in "-_ /,")]
        if len(prefix) > 3:
            names = [f"…{name[len(prefix) :]}" for name in names]
    return [_short_name(name) for name in names]


# --- curves ----------------------------------------------------------------------------------------------


def _styles(num_runs: int) -> list[dict[str, Any]]:
    """Colour, dashes and marker of every run."""
    if num_runs <= MAX_STYLED_RUNS:
        colours: list[Any] = [COLOURS[i % len(COLOURS)] for i in range(num_runs)]
    else:
        from matplotlib import colormaps

        colours = [colormaps["viridis"](x) for x in np.linspace(0, 0.9, num_runs)]
    return [
        {"color": colours[i], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
        for i in range(num_runs)
    ]


def _train_measure(run: RunHistory) -> str:
    """The row where the train loss of this run belongs: a quadratic's `loss`, a classifier's `test_loss`."""
    quadratic = any(_value(entry, key) is not None for entry in run.rounds for key in ("loss", "distance"))
    return "loss" if quadratic else "test_loss"


def _scale(axes: Any, runs: Sequence[RunHistory], measure: Measure) -> str:
    """Choose the y scale of a row; returns what to add to its label.

    One diverging run must not flatten the others: a test loss ends at twice the runs' median start.
    """
    values = [measure.factor * value for run in runs for value in _finite(run.rounds, measure.key)]
    if measure.key == "test_accuracy":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -1.0), min(high, 101.0))
        return ""
    note = ""
    if measure.key == "test_loss":
        mine = [run.rounds for run in runs if _train_measure(run) == measure.key]
        curves = [[_finite(rounds, key) for key in (measure.key, "train_loss")] for rounds in mine]
        starts = [max((curve[0] for curve in pair if curve), default=0.0) for pair in curves]
        drawn = [value for pair in curves for curve in pair for value in curve]
        top = 2 * median(starts) if starts else 0.0
        if 0 < top < max(drawn, default=0.0):
            bottom = min(drawn)
            axes.set_ylim(bottom - 0.05 * (top - bottom), top)
            values = [value for value in values if value <= top]
            note = f", cut at {top:.2g}"
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and (measure.log or max(positive) > 1000 * min(positive)):
        if min(values) == 0:  # a run that reached its optimum exactly
            axes.set_yscale("symlog", linthresh=min(positive), linscale=0.3)
        else:
            axes.set_yscale("log")
            if note:
                axes.set_ylim(bottom=0.7 * min(positive))
    return note


def draw_curves(runs: Sequence[RunHistory], path: Path) -> None:
    """PNG: a row per measure, against rounds, joint epochs and bytes sent. Pale lines are the train loss."""
    from matplotlib.lines import Line2D

    _check(runs)
    measures = [m for m in _measures(runs) if any(len(_series(run, "round", m.key)[0]) for run in runs)]
    train_rows = {_train_measure(run) for run in runs if _finite(run.rounds, "train_loss")}
    keep = {m.key for m in measures} | train_rows
    measures = [m for m in MEASURES if m.key in keep] or list(MEASURES[:1])
    ends = {axis: [max(_finite(run.rounds, axis), default=0.0) for run in runs] for axis in AXES}
    columns = [axis for axis in AXES if axis == "round" or max(ends[axis]) > 0]

    styles = _styles(len(runs))
    names = _legend_names(runs)
    if len(names) > MAX_LEGEND_RUNS:
        names = [*names[: MAX_LEGEND_RUNS - 1], f"… and {len(runs) - MAX_LEGEND_RUNS + 1} more"]
    width = 0.5 + 3.1 * max(len(columns), 1.5)
    # 0.078 inches a letter at 8.5 points, 0.6 for the line before it
    legend_columns = max(1, min(len(names), int(width / (0.6 + 0.078 * max(map(len, names))))))
    legend_rows = -(-len(names) // legend_columns)
    figure = _figure(width, 0.3 + 2.45 * len(measures) + 0.19 * legend_rows)
    panels = figure.subplots(len(measures), len(columns), sharex="col", sharey="row", squeeze=False)

    for row, measure in enumerate(measures):
        shows_train = measure.key in train_rows
        for column, axis in enumerate(columns):
            axes = panels[row, column]
            divisor = _byte_unit(max(ends[axis]))[0] if axis == "bytes_sent" else 1.0
            for run, style in zip(runs, styles, strict=True):
                if shows_train and _train_measure(run) == measure.key:
                    x, y = _series(run, axis, "train_loss")
                    pale = {"color": style["color"], "linewidth": 0.7, "alpha": 0.35, "zorder": 1.5}
                    dot = {"marker": ".", "markersize": 4} if len(x) == 1 else {}
                    axes.plot(x / divisor, y, **pale, **dot)
                x, y = _series(run, axis, measure.key)
                marked = {**style, "marker": style["marker"] if len(x) <= MAX_MARKED_POINTS else "none"}
                axes.plot(x / divisor, measure.factor * y, **marked, linewidth=1.5, markersize=3.5)
            _plain(axes)
        note = _scale(panels[row, 0], runs, measure)
        panels[row, 0].set_ylabel(measure.label + (" (pale: train)" if shows_train else "") + note)

    for column, axis in enumerate(columns):
        bottom = panels[-1, column]
        label = AXES[axis].capitalize()
        if axis == "bytes_sent":
            label = f"Sent by all clients ({_byte_unit(max(ends[axis]))[1]})"
        bottom.set_xlabel(label)
        moving = [end for end in ends[axis] if end > 0]
        if moving and max(moving) > 10 * min(moving):  # else the shortest run is a vertical line
            bottom.set_xscale("log", nonpositive="mask")
            bottom.xaxis.set_major_formatter("{x:g}")
        elif axis == "round":
            bottom.xaxis.set_major_locator(_integers(7))
    handles = []
    for run, style in list(zip(runs, styles, strict=True))[: len(names)]:
        few = any(0 < len(_series(run, "round", m.key)[0]) <= MAX_MARKED_POINTS for m in measures)
        marked = {**style, "marker": style["marker"] if few else "none"}
        handles.append(Line2D([], [], **marked, linewidth=1.5, markersize=3.5))
    if len(names) < len(runs):
        handles[-1] = Line2D([], [], linestyle="none")
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=8.5,
        handlelength=3.2,
        columnspacing=1.6,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.align_ylabels(panels[:, 0])
    _save(figure, path)


# --- partitions ------------------------------------------------------------------------------------------


def _class_axis(axes: Any, height: float, num_classes: int, class_names: Sequence[str] | None) -> None:
    """Name as many classes as fit into `height` inches."""
    step = -(-num_classes // max(1, int(height / 0.16)))
    names = [_short_name(name) for name in class_names or map(str, range(num_classes))]
    axes.set_yticks(range(0, num_classes, step), names[::step], parse_math=False)
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


def _draw_clients(counts: np.ndarray, title: str, class_names: Sequence[str] | None) -> Any:
    """Clients on x, classes on y, below bars of the clients' sizes: bubbles, or shades if many."""
    from matplotlib.collections import EllipseCollection

    num_clients, num_classes = counts.shape
    bubbles = max(num_clients, num_classes) <= MAX_BUBBLES
    largest = max(int(counts.max()), 1)
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

    if bubbles:
        client, label = np.nonzero(counts)
        diameter = 0.95 * np.sqrt(counts[client, label] / largest)
        unit: Any = "x" if width / num_clients <= height / num_classes else "y"
        places: dict[str, Any] = {"offsets": np.column_stack([client, label])}
        places |= {"units": unit, "offset_transform": cells.transData}
        angles = np.zeros_like(diameter)
        cells.add_collection(EllipseCollection(diameter, diameter, angles, **places, facecolor=COLOURS[0]))
        cells.set_xlim(-0.7, num_clients - 0.3)
        cells.set_ylim(-0.7, num_classes - 0.3)
        cells.set_xlabel(f"Client   (area ∝ examples, largest bubble: {largest:,})")
    else:
        image = cells.imshow(counts.T, **HEAT, vmax=largest)
        cells.set_xlabel("Client")
        _colour_bar(figure, cells, image, "Examples", format="{x:,.0f}", ticks=_integers(6))
    if num_clients <= 25:
        cells.set_xticks(range(num_clients))
    else:
        cells.xaxis.set_major_locator(_integers(10))
    _class_axis(cells, height, num_classes, class_names)
    _plain(cells, grid="both" if bubbles else None)
    _title(figure, bars, title)
    return figure


def _draw_sizes(axes: Any, sizes: np.ndarray) -> None:
    """Histogram of whole numbers: every bin holds equally many of them, or is as wide on a log axis."""
    low, high = int(sizes.min()), int(sizes.max())
    typical = float(np.median(sizes))
    if high > 20 * max(typical, 1.0):
        axes.set_xscale("log")
        bins: Any = np.unique(np.geomspace(max(low, 1), high + 1, 41).round()) - 0.5
    else:
        axes.xaxis.set_major_locator(_integers(8))
        step = -(-(high - low + 1) // 40)
        bins = np.arange(low, high + 1 + step, step) - 0.5
        if high - low < 10:
            axes.set_xlim(max(low - 5, -1), high + 5)
    axes.hist(sizes, bins=bins, color=DARK, edgecolor="white", linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(_integers(3))
    axes.set_xlabel("Examples of a client")
    axes.set_ylabel("Clients")
    facts = f"{len(sizes):,} clients\nmin {low:,}, median {typical:,.0f}, max {high:,}"
    if empty := int((sizes == 0).sum()):
        facts += f"\n{empty:,} without examples"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    corner: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top"}
    axes.annotate(facts, (0.995, 0.97), **corner, fontsize=8, color=DARK, bbox=box)
    _plain(axes, grid="y")


def _draw_shares(counts: np.ndarray, title: str, class_names: Sequence[str] | None) -> Any:
    """Heat map of the clients' class shares, clients sorted by dominant class, below a histogram of sizes."""
    num_clients, num_classes = counts.shape
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None].astype(np.float32)  # [N, classes]
    dominant = np.where(sizes > 0, shares.argmax(axis=1), num_classes)  # clients without examples come last
    shares = shares[np.lexsort((-shares.max(axis=1), dominant))]
    num_columns = min(num_clients, MAX_HEAT_COLUMNS)
    if num_columns < num_clients:
        starts = np.arange(num_columns) * num_clients // num_columns
        widths = np.diff(np.append(starts, num_clients))
        shares = np.add.reduceat(shares, starts, axis=0) / widths[:, None]
        title += f" ({num_clients:,} clients, each column the mean of about {num_clients / num_columns:,.3g})"

    height = min(max(0.28 * num_classes, 1.2), 6.0)
    figure = _figure(8.5, height + 2.9)
    histogram, heat = figure.subplots(2, 1, height_ratios=[1.2, height])
    _draw_sizes(histogram, sizes)
    image = heat.imshow(shares.T, **HEAT, vmax=1.0, extent=(0, num_clients, -0.5, num_classes - 0.5))
    heat.xaxis.set_major_formatter("{x:,.0f}")
    heat.set_xlabel("Clients, sorted by dominant class")
    _class_axis(heat, height, num_classes, class_names)
    _plain(heat, grid=None)
    _colour_bar(figure, heat, image, "Share of the client's examples", format="{x:.0%}")
    _title(figure, histogram, title)
    return figure


def draw_partition(counts: np.ndarray, path: Path, *, title: str, class_names: Sequence[str] | None = None) -> None:
    """PNG of counts [N, classes]: every client for up to 100 of them, shares of sorted clients for more."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise InputError(f"counts of shape {list(counts.shape)}: must be [clients, classes], both at least 1")
    if class_names is not None and len(class_names) != counts.shape[1]:
        raise InputError(f"{len(class_names)} class names for {counts.shape[1]} classes: give one name each")
    draw = _draw_clients if len(counts) <= MAX_SINGLE_CLIENTS else _draw_shares
    _save(draw(counts, title, class_names), path)


# --- the report ------------------------------------------------------------------------------------------


def draw_report(runs: Sequence[RunHistory], out_dir: Path) -> dict[str, Path]:
    """Write curves.png and report.md (the tables, and the picture linked) into `out_dir`."""
    _check(runs)
    paths = {"curves": Path(out_dir) / "curves.png", "report": Path(out_dir) / "report.md"}
    draw_curves(runs, paths["curves"])
    parts = ["# Runs", "![Curves of the runs](curves.png)"]
    parts += ["## At the end", as_markdown(*summary_table(runs))]
    parts += ["Values of the last evaluation; client-steps/s is the median over the rounds."]
    for axis, name in AXES.items():
        header, rows = equal_table(runs, axis)
        if rows:
            parts += [f"## At equal {'rounds' if axis == 'round' else name}", as_markdown(header, rows)]
    parts += [
        "Equal tables: each run's last evaluation at or before the largest value that all runs reached, "
        f"and at or before half of it; {MISSING} where a run was not evaluated by then."
    ]
    with _atomic(paths["report"]) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return paths
