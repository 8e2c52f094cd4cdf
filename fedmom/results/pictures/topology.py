"""A topology as PNG: the graph, and the eigenvalues of W in the unit circle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmom.method.decentralized.graphs import Layout, torus_shape
from fedmom.method.decentralized.topology import Topology
from fedmom.results.pictures.style import COLOURS, DARK, LIGHT, new_figure, plain_axes, save_picture

MAX_ARROWS = 80  # links; more are drawn as plain lines
MAX_LABELS = 40  # clients
_AROUND = np.linspace(0, 2 * np.pi, 361)


def draw_topology(topology: Topology, path: Path) -> None:
    """PNG: who sends to whom over a period (line width ∝ weight), and the spectrum with |λ₂| as a dashed circle."""
    figure = new_figure(9.6, 5.3)
    graph, circle = figure.subplots(1, 2)
    _draw_graph(graph, topology)
    _draw_spectrum(circle, topology)
    save_picture(figure, path)


def _circle(n: int) -> np.ndarray:
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / max(1, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _hub(n: int) -> np.ndarray:
    return np.concatenate([[[0.0, 0.0]], _circle(n - 1)])


def _grid(n: int) -> np.ndarray:
    shape = torus_shape(n)
    if shape is None:  # one client
        return _circle(n)
    row, column = np.divmod(np.arange(n), shape[1])
    return (np.stack([column, -row], 1) - [(shape[1] - 1) / 2, -(shape[0] - 1) / 2]) / max(1, max(shape) - 1) * 2


class Placing(NamedTuple):
    """How a layout is drawn."""

    places: Callable[[int], np.ndarray]  # N -> [N, 2]
    bends: bool = False  # long links, which go around; straight ones would hide behind the row


PLACINGS: dict[Layout, Placing] = {"circle": Placing(_circle), "hub": Placing(_hub), "grid": Placing(_grid, bends=True)}


def _draw_graph(axes: Any, topology: Topology) -> None:
    placing = PLACINGS[topology.layout]
    n, at = topology.num_clients, placing.places(topology.num_clients)
    links: dict[tuple[int, int], float] = {}
    for matrix in topology.matrices:
        for j, i, w in zip(matrix.sources.tolist(), matrix.targets.tolist(), matrix.weights.tolist(), strict=True):
            if j != i:
                links[j, i] = max(w, links.get((j, i), 0.0))
    heaviest = max(links.values(), default=1.0)
    both = {(j, i) for j, i in links if (i, j) in links}
    thin = 1.0 if len(links) <= 400 else 0.35
    for (j, i), weight in links.items():
        if (j, i) in both and j > i:
            continue
        width = thin * (0.4 + 1.4 * weight / heaviest)
        if placing.bends and np.linalg.norm(at[i] - at[j]) > 1.5 * np.linalg.norm(at[1] - at[0]):
            look = {"arrowstyle": "-", "color": COLOURS[0], "linewidth": width, "connectionstyle": "arc3,rad=0.22"}
            axes.annotate("", at[i], at[j], arrowprops={**look, "alpha": 0.75}, zorder=1)
        elif (j, i) in both or len(links) > MAX_ARROWS:
            axes.plot(*zip(at[j], at[i], strict=True), color=COLOURS[0], linewidth=width, alpha=0.75, zorder=1)
        else:
            look = {"arrowstyle": "-|>", "color": COLOURS[0], "linewidth": width, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", at[i], at[j], arrowprops={**look, "connectionstyle": "arc3,rad=0.08"}, zorder=1)
    # Neighbours stand 700 / N points apart on the circle: dots half as wide leave the links between them in sight.
    size = 190 if n <= MAX_LABELS else max(0.6, (350 / n) ** 2)
    axes.scatter(*at.T, s=size, color="white" if n <= 100 else DARK, edgecolors=DARK, linewidths=n <= 100, zorder=2)
    if n <= MAX_LABELS:
        for client, (x, y) in enumerate(at):
            axes.text(x, y, str(client), ha="center", va="center", fontsize=7.5, zorder=3)
    axes.set_box_aspect(1)
    axes.set_xlim(-1.25, 1.25)
    axes.set_ylim(-1.25, 1.25)
    axes.set_axis_off()
    kind = f", over {topology.period} rounds" if topology.period > 1 else ""
    _title_of(axes, f"{Path(topology.name).name}, N = {n:,}{kind}")


def _draw_spectrum(axes: Any, topology: Topology) -> None:
    values = np.asarray(topology.spectrum, dtype=complex)
    axes.plot(np.cos(_AROUND), np.sin(_AROUND), color=DARK, linewidth=0.8)
    second = abs(values[1]) if len(values) > 1 else 0.0
    axes.plot(second * np.cos(_AROUND), second * np.sin(_AROUND), color=COLOURS[1], linewidth=1.0, linestyle="--")
    axes.axhline(0, color=LIGHT, linewidth=0.6, zorder=0)
    axes.axvline(0, color=LIGHT, linewidth=0.6, zorder=0)
    axes.scatter(
        values.real,
        values.imag,
        s=26,
        color=COLOURS[0],
        edgecolors="white",
        linewidths=0.5 if len(values) <= 100 else 0,
        zorder=3,
    )
    axes.set_box_aspect(1)
    axes.set_xlim(-1.12, 1.12)
    axes.set_ylim(-1.12, 1.12)
    plain_axes(axes, grid=None)
    axes.set_xlabel("Re λ")
    axes.set_ylabel("Im λ")
    what = f"Eigenvalues of W{' over a period' if topology.period > 1 else ''}"
    _title_of(axes, f"{what}: |λ₂| = {topology.second_eigenvalue:.4g} per round (dashed)" if len(values) > 1 else what)


def _title_of(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", parse_math=False)
