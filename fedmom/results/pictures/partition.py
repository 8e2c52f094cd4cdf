"""Who holds which data, as PNG: clients and classes as bubbles, as shades, or as shares of many clients."""

import textwrap
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from fedmom.errors import InputError
from fedmom.results.pictures.style import (
    DARK,
    add_circles,
    new_figure,
    plain_axes,
    save_picture,
    short_name,
    whole_ticks,
)

MAX_BUBBLES = 40  # clients, and classes; shades for more
MAX_SINGLE_CLIENTS = 100
MAX_HEAT_COLUMNS = 1000  # about one per pixel
HEAT: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "cmap": "Blues", "vmin": 0.0}


def draw_partition(counts: np.ndarray, path: Path, *, title: str, class_names: Sequence[str] | None = None) -> None:
    """PNG of counts [N, classes]: every client for up to 100 of them, shares of sorted clients for more."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or 0 in counts.shape:
        raise InputError(f"counts of shape {list(counts.shape)}: must be [clients, classes], both at least 1")
    names = [str(label) for label in range(counts.shape[1])] if class_names is None else class_names
    if len(names) != counts.shape[1]:
        raise InputError(f"{len(names)} class names for {counts.shape[1]} classes: give one name each")
    draw = _draw_clients if len(counts) <= MAX_SINGLE_CLIENTS else _draw_shares
    save_picture(draw(counts, title, names), path)


def _draw_clients(counts: np.ndarray, title: str, class_names: Sequence[str]) -> Any:
    """Clients on x, classes on y, below bars of the clients' sizes: bubbles, or shades if many."""
    num_clients, num_classes = counts.shape
    bubbles = max(num_clients, num_classes) <= MAX_BUBBLES
    width = min(max(0.36 * num_clients, 3.6), 9.0)
    height = min(max((0.36 if bubbles else 0.25) * num_classes, 1.0), 7.0)
    figure = new_figure(width + 0.9, height + 1.9)
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, height])

    bars.bar(np.arange(num_clients), counts.sum(axis=1), width=0.8, color=DARK)
    bars.set_ylabel("Examples")
    bars.yaxis.set_major_locator(whole_ticks(3))
    bars.yaxis.set_major_formatter("{x:,.0f}")
    plain_axes(bars, grid="y")
    bars.tick_params(axis="x", length=0)

    largest = max(int(counts.max()), 1)
    if bubbles:
        _draw_bubbles(cells, counts / largest, "x" if width / num_clients <= height / num_classes else "y")
        cells.set_xlabel(f"Client   (area ∝ examples, largest bubble: {largest:,})")
    else:
        image = cells.imshow(counts.T, **HEAT, vmax=largest)
        cells.set_xlabel("Client")
        _colour_bar(figure, cells, image, "Examples", format="{x:,.0f}", ticks=whole_ticks(6))
    cells.xaxis.set_major_locator(whole_ticks(26))
    _class_axis(cells, height, class_names)
    plain_axes(cells, grid="both" if bubbles else None)
    _title(figure, bars, title)
    return figure


def _draw_bubbles(axes: Any, areas: np.ndarray, unit: Any) -> None:
    """Areas [N, classes] in [0, 1]; an area of 1 nearly fills one step of the axis `unit`, "x" or "y"."""
    client, label = np.nonzero(areas)
    add_circles(axes, np.column_stack([client, label]), 0.95 * np.sqrt(areas[client, label]), unit)
    axes.set_xlim(-0.7, areas.shape[0] - 0.3)
    axes.set_ylim(-0.7, areas.shape[1] - 0.3)


def class_shares(counts: np.ndarray, most: int) -> np.ndarray:
    """[P, classes] shares of a client's examples, clients by dominant class; P = N, or `most` means of neighbours."""
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    dominant = np.where(sizes > 0, shares.argmax(axis=1), counts.shape[1])  # clients without examples come last
    shares = shares[np.lexsort((-shares.max(axis=1), dominant))]
    if len(shares) <= most:
        return shares
    starts = np.arange(most) * len(shares) // most
    return np.add.reduceat(shares, starts, axis=0) / np.diff(np.append(starts, len(shares)))[:, None]


def _draw_shares(counts: np.ndarray, title: str, class_names: Sequence[str]) -> Any:
    """Heat map of the clients' class shares, clients sorted by dominant class, below a histogram of sizes."""
    num_clients, num_classes = counts.shape
    shares = class_shares(counts, MAX_HEAT_COLUMNS)
    if num_clients > len(shares):
        title += f" ({num_clients:,} clients, each column the mean of about {num_clients / MAX_HEAT_COLUMNS:,.3g})"

    height = min(max(0.28 * num_classes, 1.2), 6.0)
    figure = new_figure(8.5, height + 2.9)
    histogram, heat = figure.subplots(2, 1, height_ratios=[1.2, height])
    _draw_sizes(histogram, counts.sum(axis=1))
    image = heat.imshow(shares.T, **HEAT, vmax=1.0, extent=(0, num_clients, -0.5, num_classes - 0.5))
    heat.xaxis.set_major_formatter("{x:,.0f}")
    heat.set_xlabel("Clients, sorted by dominant class")
    _class_axis(heat, height, class_names)
    plain_axes(heat, grid=None)
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
        axes.xaxis.set_major_locator(whole_ticks(8))
        step = ceil((high - low + 1) / 40)
        bins = np.arange(low, high + 1 + step, step) - 0.5
        axes.set_xlim(max(low - 5, 0), max(high + 5, bins[-1]))  # equal sizes are one bar, not a wall
    axes.hist(sizes, bins=bins, color=DARK, edgecolor="white", linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(whole_ticks(3))
    facts = f"min {low:,}, median {typical:,.0f}, max {high:,}"
    axes.set_xlabel(f"Examples of a client ({facts}; none: {(sizes == 0).sum():,} of {len(sizes):,} clients)")
    axes.set_ylabel("Clients")
    plain_axes(axes, grid="y")


def _class_axis(axes: Any, height: float, class_names: Sequence[str]) -> None:
    """Name as many classes as fit into `height` inches."""
    step = ceil(len(class_names) / max(1, int(height / 0.16)))
    names = [short_name(name) for name in class_names[::step]]
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
