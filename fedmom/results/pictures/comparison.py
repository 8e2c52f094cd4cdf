"""Figures of groups of runs, for papers: means over seeds with bands, spreads, and the speedup over N."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from fedmom.results.comparison import AXES, Speedup, Target
from fedmom.results.groups import Group, counted_of, rivals
from fedmom.results.pictures.curves import draw_grid, end_of, line_style
from fedmom.results.pictures.style import DARK, LIGHT, add_legend, new_figure, plain_axes, save_picture
from fedmom.results.tables import MEASURES, SPREADS, Measure, finite, measures_in

KINDS = (".png", ".pdf")


def foot(groups: Sequence[Group]) -> str:
    """What a figure says below of runs that are not finished or not counted; the tables name them."""
    left = sum(len(group.left) for group in groups)
    counted = sum(not run.is_finished for run in counted_of(groups))
    of = sum(len(group.members) for group in groups)
    parts = [f"{left} of {of} runs left out"] * bool(left) + [f"{counted} of {of} runs unfinished"] * bool(counted)
    return ", ".join(parts)


def draw_comparison(groups: Sequence[Group], stem: Path) -> list[Path]:
    """A row per measure, against rounds, joint epochs, bytes and seconds, as PNG and PDF."""
    runs = counted_of(rivals(groups))
    rows = [m for m in measures_in(run.rounds for run in runs) if any(finite(run.rounds, m.key) for run in runs)]
    return _draw_grid(groups, rows, list(AXES), stem)


def draw_spreads(groups: Sequence[Group], stem: Path) -> list[Path]:
    """How far clients are apart, in x and in u, just before the exchange (and after it, under Algorithm 2)."""
    groups = rivals(groups)
    runs = counted_of(groups)
    rows = [m for m in SPREADS if any(value > 0 for run in runs for value in finite(run.rounds, m.key))]
    return _draw_grid(groups, rows, ["round", "joint_epochs"], stem)


def _with_one_baseline(groups: Sequence[Group]) -> list[Group]:
    """Of several pooled models the best: more lines would be taken for what is compared."""
    pooled = [group for group in groups if group.pooled and group.runs]
    key = next(
        (m for m in sorted(MEASURES, key=lambda m: not m.rises) if pooled and end_of(pooled[0], m) is not None), None
    )
    if key is None or len(pooled) < 2:
        return list(groups)
    ends = [(end_of(group, key) or 0.0) * (-1 if key.rises else 1) for group in pooled]
    return [*rivals(groups), pooled[ends.index(min(ends))]]


def _draw_grid(groups: Sequence[Group], rows: Sequence[Measure], axes: Sequence[str], stem: Path) -> list[Path]:
    if not rows:
        return []
    seeds = any(len(group.runs) > 1 for group in groups)
    groups = _with_one_baseline(groups)
    notes = [*["mean ± standard deviation over seeds"] * seeds, foot(groups)]
    labels = [group.title for group in groups if group.runs]
    return _save_all(draw_grid(groups, rows, axes, labels, "; ".join(filter(None, notes))), stem)


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
            kept = [(n, cell) for n, cell in zip(family.num_clients, getattr(family, kind), strict=True) if cell]
            deviations = [cell.sd or 0.0 for _, cell in kept]
            panel.errorbar(
                [n for n, _ in kept],
                [cell.mean for _, cell in kept],
                deviations if any(deviations) else None,
                **line_style(index, index, index) | {"markersize": 4.5},
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
    add_legend(figure, handles, labels, 2, footing)
    return _save_all(figure, stem)


def _save_all(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_name(stem.name + kind) for kind in KINDS]
    for path in paths:
        save_picture(figure, path)
    return paths
