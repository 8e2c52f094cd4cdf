"""The table and the two pictures of benchmarks/paper.py, of the rows of a folder and nothing else."""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from textwrap import wrap
from typing import Any, NamedTuple

from paper_data import rows_of
from paper_runs import SCHEDULES, schedules_of

from fedmom.results.pictures.style import COLOURS, DARK, DASHES, LIGHT, MARKERS, add_legend, new_figure, plain_axes

Row = dict[str, Any]
STEPS, EPOCHS, SECONDS, TRAIN_LOSS, _, ACCURACY = range(6)  # of a point of a curve


class Group(NamedTuple):
    """The runs that differ in the seed alone."""

    clients: int  # N
    interval: int  # I
    schedule: str
    curves: dict[int, Any]  # {seed: [points, 6]} of the finished ones
    seeds: str  # "3", or "2 of 3" where some are missing or diverged
    diverged: int


def groups_of(out: Path) -> list[Group]:
    """Every N, I and schedule that the folder's protocol asks for, those without a run too."""
    protocol, rows = rows_of(out, "protocol")[0], rows_of(out, "run")
    wanted = max(protocol.get("seeds", 0), len({row["seed"] for row in rows}))
    asked = partial(schedules_of, most=max(protocol["clients"]), speedup=protocol.get("speedup", []))
    groups = []
    for schedule in SCHEDULES:
        for n in sorted(protocol["clients"]):
            for i in (i for i in sorted(protocol["intervals"]) if schedule in asked(n, i)):
                mine = [r for r in rows if (r["schedule"], r["clients"], r["interval"]) == (schedule, n, i)]
                curves = {r["seed"]: r["curve"] for r in mine if r["status"] == "done"}
                seeds = f"{len(curves)}" if len(curves) == wanted else f"{len(curves)} of {wanted}"
                groups.append(Group(n, i, schedule, curves, seeds, len(mine) - len(curves)))
    return groups


def shown(values: Sequence[float], digits: int = 2) -> str:
    """mean ± sample standard deviation; a dash of none."""
    text = f"{fmean(values):,.{digits}f}" if values else "–"
    return text + (f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else "")


def title_of(out: Path) -> str:
    """What was run, with E and the milestones: it is not the paper's 160 unless it says so."""
    p = rows_of(out, "protocol")[0]
    epochs = p["units"] * unit_of(p) / p["images"]
    name = "a small CNN" if p["model"] == "small-cnn" else p["model"]
    return (
        f"{name}, {p['data']}, {p['images']:,} images, iid, B = {p['batch']}: E = {epochs:.3g} joint epochs, "
        f"lr ÷ 10 at {epochs / 2:.3g} and {0.75 * epochs:.3g} where decayed"
    )


def unit_of(protocol: Row) -> int:
    return 4 * math.lcm(*protocol["intervals"]) * max(protocol["clients"]) * protocol["batch"]


# --- to a target ----------------------------------------------------------------------------------------------


def target_of(groups: Sequence[Group]) -> float:
    """The highest test accuracy that every run reached, rounded down to 0.1 %.

    Runs half as good as the best do not hold the others back.
    """
    best = [max(point[ACCURACY] for point in curve) for group in groups for curve in group.curves.values()]
    kept = [value for value in best if value >= 0.5 * max(best)]
    return math.floor(1000 * min(kept) + 1e-9) / 1000 if kept else 0.0


def reached(curve: Sequence[Sequence[float]], target: float, column: int) -> float | None:
    """Steps, joint epochs or seconds when the accuracy first passed the target, on the line between evaluations."""
    before = [0.0] * 6
    for point in curve:
        if point[ACCURACY] >= target:
            share = (target - before[ACCURACY]) / ((point[ACCURACY] - before[ACCURACY]) or 1)
            return before[column] + max(0.0, share) * (point[column] - before[column])
        before = list(point)
    return None


def costs(group: Group, target: float, column: int) -> dict[int, float]:
    """{seed: what it took} of the seeds that got there."""
    found = {seed: reached(curve, target, column) for seed, curve in group.curves.items()}
    return {seed: cost for seed, cost in found.items() if cost is not None}


def several(groups: Sequence[Group]) -> bool:
    """Whether there is a speedup at all: not for one N."""
    return len({group.clients for group in groups}) > 1


def speedups(groups: Sequence[Group], target: float) -> dict[tuple[int, int], list[float]]:
    """{(N, I): of each seed, how many times fewer local steps of one client than with the fewest clients}."""
    found = {}
    fewest = {group.interval: group for group in groups if group.clients == min(g.clients for g in groups)}
    for group in groups:
        own, base = (costs(g, target, STEPS) for g in (group, fewest[group.interval]))
        found[group.clients, group.interval] = [base[seed] / own[seed] for seed in own if seed in base and own[seed]]
    return found


# --- the table ------------------------------------------------------------------------------------------------


def table(out: Path) -> str:
    groups, rows = groups_of(out), rows_of(out, "run")
    protocol = rows_of(out, "protocol")[0]
    base = min(protocol["clients"])
    scaled = f"γ times N / {base}" if protocol["scale"] == "linear" else "the same γ for all N"
    lines = [title_of(out), ""]
    if tried := rows_of(out, "lr"):
        losses = ", ".join(f"{r['lr']:g}: {r['train_loss'] or math.inf:.4f}" for r in tried)
        best = min(tried, key=lambda r: r["train_loss"] or math.inf)["lr"]
        edge = ", at the edge of those tried" if best in (min(protocol["lrs"]), max(protocol["lrs"])) else ""
        lines += [f"γ by training loss after half a run of N = {base}, I = 1 ({losses}): {best:g}{edge}; {scaled}.", ""]
    else:
        lines += [f"γ = {protocol['lrs'][0]:g} for N = {base}; {scaled}.", ""]
    where = sorted({f"{r['device']}, torch {r['torch']}, commit {r['commit']}" for r in rows})
    lines += [f"Run on {'; '.join(where)}.", ""]
    for schedule in SCHEDULES:
        lines += rows_for([g for g in groups if g.schedule == schedule], schedule, base)
    return "\n".join(lines)


def rows_for(groups: Sequence[Group], schedule: str, base: int) -> list[str]:
    if not any(group.curves for group in groups):
        return [f"lr {schedule}: no run is finished.", ""]
    target = target_of(groups)
    faster = speedups(groups, target)
    to = f"to {100 * target:.1f} % test accuracy (on the line between evaluations)"
    lines = [f"lr {schedule}: at the end, and {to}.", ""]
    heads = ["N", "I", "seeds", "test accuracy (%)", "train loss", "local steps", "joint epochs", "seconds"]
    if compared := several(groups):
        heads.append(f"speedup over N = {base}")
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for group in groups:
        ends = [curve[-1] for curve in group.curves.values()]
        said = f"{group.seeds} ({group.diverged} diverged)" if group.diverged else group.seeds
        cells = [str(group.clients), str(group.interval), said]
        cells += [shown([100 * end[ACCURACY] for end in ends]), shown([end[TRAIN_LOSS] for end in ends], 4)]
        for column, digits in ((STEPS, 0), (EPOCHS, 2), (SECONDS, 1)):
            cells.append(shown([*costs(group, target, column).values()], digits))
        if compared:
            cells.append(shown(faster.get((group.clients, group.interval), [])))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


# --- the pictures ---------------------------------------------------------------------------------------------


def look(index: int) -> dict[str, Any]:
    marks = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }
    return {**marks, "linewidth": 1.2, "markersize": 3.2}


def draw_curves(out: Path) -> None:
    """Training loss and test accuracy over joint epochs, of a pair of rows per schedule; for a speedup of one pair."""
    groups, pairs = groups_of(out), len(SCHEDULES)
    if speedup := rows_of(out, "protocol")[0].get("speedup", []):
        groups, pairs = [group for group in groups if group.curves], 1
    if not any(group.curves for group in groups):
        return  # all of them diverged
    columns = columns_of(groups, bool(speedup))
    names = [*dict.fromkeys(name for lines in columns.values() for name in lines)]
    width = len(columns) // pairs
    figure = new_figure(0.8 + (3.6 if speedup else 2.8) * width, 1 + 3.6 * pairs)
    panels = figure.subplots(2 * pairs, width, sharex=True, sharey="row", squeeze=False)
    measures = ((TRAIN_LOSS, 1, "Train loss"), (ACCURACY, 100, "Test accuracy (%)"))
    for place, (title, lines) in enumerate(columns.items()):
        pair, column = divmod(place, width)
        for panel, (measure, factor, label) in zip(panels[2 * pair : 2 * pair + 2, column], measures, strict=True):
            for name, group in lines.items():
                if group.curves:
                    draw_line(panel, group, measure, factor, names.index(name))
            plain_axes(panel)
            panel.set_title(title, fontsize=9, loc="left")
            if column == 0:
                panel.set_ylabel(label, fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("Joint epochs", fontsize=9)
    handles = [panels[0, 0].plot([], [], **look(k))[0] for k in range(len(names))]
    most, least = (of(len(group.curves) for group in groups if group.curves) for of in (max, min))
    seeds = f"{most}" if most == least else f"{least} to {most}"
    note = title_of(out) + (f"; mean ± standard deviation over {seeds} seeds" if most > 1 else "; one seed")
    note = "\n".join(wrap(note, int(figure.get_figwidth() / 0.075)))
    add_legend(figure, handles, names, len(names), note, handlelength=3.4)
    save(figure, out / "curves.png", 100)


def columns_of(groups: Sequence[Group], speedup: bool) -> dict[str, dict[str, Group]]:
    """{title: {name of a line: its runs}}: an N and its I; the constant lr of a speedup an I and its N."""
    columns: dict[str, dict[str, Group]] = {}
    for group in groups:
        head, name = f"N = {group.clients}", f"I = {group.interval}"
        if speedup and group.schedule == "constant":
            head, name = name, head
        columns.setdefault(f"{head}, lr {group.schedule}", {})[name] = group
    return columns


def draw_line(panel: Any, group: Group, column: int, factor: float, index: int) -> None:
    points = list(zip(*group.curves.values(), strict=True))  # [points, seeds, 6]
    x = [at[0][EPOCHS] for at in points]
    y = [factor * fmean(p[column] for p in at) for at in points]
    panel.plot(x, y, **look(index))
    if len(group.curves) > 1:
        sd = [factor * stdev(p[column] for p in at) for at in points]
        low, high = ([a + sign * b for a, b in zip(y, sd, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=COLOURS[index], alpha=0.16, linewidth=0)


def draw_speedup(out: Path) -> None:
    """To a target over N: the speedup in local steps of one client beside the linear one, joint epochs, seconds."""
    groups = groups_of(out)
    parts = {schedule: [g for g in groups if g.schedule == schedule] for schedule in SCHEDULES}
    parts = {schedule: mine for schedule, mine in parts.items() if several(mine)}
    if not parts:
        return
    groups = [group for mine in parts.values() for group in mine]
    sizes, intervals = sorted({g.clients for g in groups}), sorted({g.interval for g in groups})
    figure = new_figure(9.2, 0.9 + 2.65 * len(parts))
    panels = figure.subplots(len(parts), 3, squeeze=False)
    for row, (schedule, mine) in zip(panels, parts.items(), strict=True):
        target = target_of(mine)
        faster = speedups(mine, target) if any(g.curves for g in mine) else {}
        row[0].plot(sizes, [n / sizes[0] for n in sizes], color=DARK, linestyle=(0, (1, 1.5)), linewidth=1.2)
        row[0].annotate(
            "linear", (sizes[-1], sizes[-1] / sizes[0]), (-6, -2), textcoords="offset points", ha="right", fontsize=8
        )
        for index, i in enumerate(intervals):
            of_n = {g.clients: g for g in mine if g.interval == i}
            panels_of = [{n: faster.get((n, i), []) for n in sizes}]
            panels_of += [
                {n: [*costs(of_n[n], target, column).values()] for n in sizes} for column in (EPOCHS, SECONDS)
            ]
            for panel, values in zip(row, panels_of, strict=True):
                kept = {n: found for n, found in values.items() if found}
                error = [stdev(found) if len(found) > 1 else 0.0 for found in kept.values()]
                mean = [fmean(found) for found in kept.values()]
                panel.errorbar([*kept], mean, error if any(error) else None, **look(index), capsize=2.5)
        titles = ("Speedup in local steps of one client", "Joint epochs", "Seconds on this machine")
        for panel, title in zip(row, titles, strict=True):
            finish(panel, f"{title}, lr {schedule}", sizes)
        row[0].set_yscale("log", base=2)
        row[0].yaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel(f"To {100 * target:.1f} % test accuracy", fontsize=9)
        for panel in row[1:]:
            panel.set_ylim(bottom=0)
    lines = [panels[0, 0].plot([], [], **look(k))[0] for k in range(len(intervals))]
    add_legend(figure, lines, [f"I = {i}" for i in intervals], len(intervals), title_of(out), handlelength=3.4)
    save(figure, out / "speedup.png", 120)


def finish(panel: Any, title: str, sizes: Sequence[int]) -> None:
    panel.set_title(title, fontsize=8.5, loc="left")
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(sizes), [str(n) for n in sizes])
    panel.minorticks_off()
    panel.set_xlabel("Clients N")
    plain_axes(panel)
    panel.grid(color=LIGHT, linewidth=0.6)


def save(figure: Any, path: Path, dpi: int) -> None:
    """A PNG below 200 kB."""
    figure.savefig(path, dpi=dpi, facecolor="white", metadata={"Software": None})


def draw_all(out: Path) -> None:
    """paper.md, and where matplotlib is there curves.png and speedup.png; nothing where no run is finished."""
    if not rows_of(out, "run"):
        print(f"{out}: no run is finished", file=sys.stderr)
        return
    text = table(out)
    (out / "paper.md").write_text(text, encoding="utf-8")
    try:
        draw_curves(out)
        draw_speedup(out)
    except ImportError as error:
        print(f"no pictures: {error}; elsewhere: paper.py --out {out} --draw", file=sys.stderr)
    print(text)
