"""What all pictures share: a figure, its axes and ticks, colours, and how it is saved.

The only file that imports matplotlib, and only when something is drawn; through its object API, never pyplot, so that
pictures need no display and may be drawn in any thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmom.errors import InputError
from fedmom.machine.files import whole_file

DPI = 150
# Okabe and Ito's colours without yellow, which is lost on white; together these repeat after 84 runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
# One policy, one colour, in every picture and on the page, by its place in COLOURS.
POLICY_COLOURS = {"average": 0, "local": 1, "reset": 2, "quasi-global": 4}
LIGHT, DARK = "#D9D9D9", "#404040"
MAX_NAME = 40  # characters of a run's or a class's name


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches."""
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


def save_picture(figure: Any, path: Path) -> None:
    """PNG or PDF, as the name says. The same figure gives the same bytes."""
    from matplotlib import rc_context

    kind = path.suffix.removeprefix(".")
    # TrueType: journals refuse matplotlib's own Type 3 fonts.
    with whole_file(path) as aside, rc_context({"pdf.fonttype": 42}):
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"CreationDate": None} if kind == "pdf" else {}
        figure.savefig(aside, format=kind, dpi=DPI, facecolor="white", metadata=about)


def plain_axes(axes: Any, *, grid: str | None = "both") -> None:
    """Axes without a frame, with small labels and a pale grid along `grid` ("x", "y", "both" or None)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(DARK)
    axes.tick_params(labelsize=8, color=DARK, length=3)
    axes.tick_params(which="minor", color=DARK, length=1.5)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=LIGHT, linewidth=0.6)


def add_legend(
    figure: Any, handles: Sequence[Any], labels: Sequence[str], per_line: int, note: str, **spacing: float
) -> None:
    """The names of the lines below the panels, so many on a line, and `note` with them; no text is mathematics."""
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": per_line, "frameon": False}
    legend = figure.legend(handles, labels, **place, fontsize=8.5, title=note, title_fontsize=8, **spacing)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)


def add_circles(axes: Any, centres: np.ndarray, diameters: np.ndarray, unit: Any) -> None:
    """Filled circles at centres [P, 2], in data coordinates; diameters [P] are in steps of axis `unit`, "x" or "y"."""
    from matplotlib.collections import EllipseCollection

    places: dict[str, Any] = {"offsets": centres, "offset_transform": axes.transData}
    shape: dict[str, Any] = {"widths": diameters, "heights": diameters, "angles": np.zeros_like(diameters)}
    axes.add_collection(EllipseCollection(**shape, **places, units=unit, facecolor=COLOURS[0]))


def whole_ticks(most: int) -> Any:
    """Ticks at round whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def short_name(name: str) -> str:
    """One line of at most MAX_NAME characters."""
    name = " ".join(name.split())
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return f" {name}" if name.startswith("_") else name  # matplotlib hides labels in _
