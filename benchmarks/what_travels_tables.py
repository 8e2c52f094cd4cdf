"""The tables and pictures of benchmarks/what_travels.py, of the lines of runs.jsonl and nothing else."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedmom.results.pictures.curves import line_style
from fedmom.results.pictures.style import add_legend, new_figure, plain_axes, save_picture

Line = dict[str, Any]
Found = Mapping[Any, Sequence[Line]]  # {cell: its runs at the best learning rate}
STEPS, SENT, VALUE = range(3)  # of a point of a curve
# What a table compares its rows with, if these are of another part.
BESIDE = {"codecs": ("fashion", ("u average", "m, v average"))}


def last_quarter(count: int) -> int:
    """Of so many evaluations, those whose mean is a run's value: one alone jumps where clients are skewed."""
    return max(1, round(count / 4))


def value(line: Line, most: float | None = None) -> float | None:
    """The mean of the last quarter of the evaluations, of all or of those until so many MB were sent; None of none."""
    points = [point[VALUE] for point in line["curve"] if most is None or point[SENT] <= most * (1 + 1e-6)]
    return fmean(points[-last_quarter(len(points)) :]) if points else None


def shown(lines: Sequence[Line], digits: str, most: float | None = None) -> str:
    """Mean and deviation over seeds; how many of them there are where some diverged."""
    if not lines:
        return "–"
    found = [end for line in lines if (end := value(line, most)) is not None]
    if not found:
        return "diverged" if all(line["status"] != "done" for line in lines) else "–"
    text = format(fmean(found), digits) + (f" ± {format(stdev(found), digits)}" if len(found) > 1 else "")
    return text + (f" [{len(found)} of {len(lines)}]" if len(found) < len(lines) else "")


def sent(found: Found, part: str, interval: int, row: str) -> float | None:
    """MB that all clients of a row sent in a whole run."""
    ends = [
        line["curve"][-1][SENT]
        for cell, lines in found.items()
        if (cell.part, cell.interval, cell.row) == (part, interval, row)
        for line in lines
        if line["curve"]
    ]
    return max(ends, default=None)


def cheapest(parts: Mapping[str, Any], found: Found, part: str, interval: int) -> float | None:
    """The MB of the row that sent least in a whole run; of codecs, of the rows without."""
    part = BESIDE.get(part, (part,))[0]
    ends = [sent(found, part, interval, row) for row in parts[part].rows]
    return min((end for end in ends if end is not None), default=None)


def megabytes(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:,.0f}" if amount >= 1000 else f"{amount:.3g}"


def rate(part: Any, row: str, interval: int, lines: Sequence[Line]) -> str:
    """The learning rate, with a star where it is the largest or the smallest of those tried."""
    tried, lr = part.rates(row, interval), lines[0]["lr"]
    return f"{lr:g}{'*' if lr in (min(tried), max(tried)) else ''}"


def table(parts: Mapping[str, Any], found: Found, name: str, interval: int) -> str:
    """One part at one I."""
    part, cells = parts[name], {(c.part, c.interval, c.data, c.row): lines for c, lines in found.items()}
    digits = ".1f" if part.scale == 100.0 else ".3g"
    most = cheapest(parts, found, name, interval)
    heads = ["states", "optimizer", "MB sent"]
    for data in part.data:
        heads += [f"{data} (lr)", f"{data}, {megabytes(most)} MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    other, rows = BESIDE.get(name, ("", ()))
    for home, row in [*((other, row) for row in rows), *((name, row) for row in part.rows)]:
        mine = [cells.get((home, interval, data, row), []) for data in part.data]
        end = sent(found, home, interval, row)
        texts = [row, parts[home].rows[row].optimizer, megabytes(end)]
        for runs in mine:
            lr = f" ({rate(parts[home], row, interval, runs)})" if runs else ""
            texts += [shown(runs, digits) + lr, shown(runs, digits, most)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def tables(parts: Mapping[str, Any], found: Found) -> dict[str, str]:
    """{part: its tables as Markdown}, one for every I of which something is finished."""
    texts = {}
    for name, part in parts.items():
        blocks = []
        for interval in part.intervals:
            if any(lines for c, lines in found.items() if (c.part, c.interval) == (name, interval)):
                title = f"{part.title[0].upper()}{part.title[1:]}: I = {interval}, {part.steps:,} steps"
                blocks.append(f"{title}.\n\n{table(parts, found, name, interval)}\n")
        texts[name] = "\n".join(blocks) or "Not run.\n"
    return texts


def with_tables(page: str, texts: Mapping[str, str]) -> str:
    """A page whose tables, between marks with the names of the parts, are these."""
    for name, text in texts.items():
        first, last = (f"<!-- {word} {name} -->\n" for word in ("tables", "end"))
        before, _, rest = page.partition(first)
        _, found, after = rest.partition(last)
        if not found:
            raise SystemExit(f"the page has no {first.strip()} … {last.strip()}")
        page = f"{before}{first}\n{text}\n{last}{after}"
    return page


# --- pictures -----------------------------------------------------------------------------------------------------


def policy(row: str) -> str:
    """What a row of SGD's and a row of AdamW's have in common: "u local" and "m, v local" are local."""
    return row.removeprefix("u ").removeprefix("m, v ")


def looks(part: Any) -> dict[str, dict[str, Any]]:
    """{policy: how its line is drawn}, in both optimizers' panels."""
    return {name: line_style(place, place, place) for place, name in enumerate(dict.fromkeys(map(policy, part.rows)))}


def draw(parts: Mapping[str, Any], found: Found, out: Path) -> None:
    """what-travels-bytes.png and what-travels-steps.png, of the part on Fashion-MNIST."""
    if not any(lines for cell, lines in found.items() if cell.part == "fashion"):
        return
    try:
        save_picture(bytes_figure(parts["fashion"], found), out / "what-travels-bytes.png")
        save_picture(steps_figure(parts["fashion"], found), out / "what-travels-steps.png")
    except ImportError as error:
        print(f"no pictures: {error}; elsewhere: what_travels.py --out {out} --draw", file=sys.stderr)


def rows_by_optimizer(part: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, row in part.rows.items():
        found.setdefault(row.optimizer, []).append(name)
    return found


def bytes_figure(part: Any, found: Found) -> Any:
    """Accuracy over the MB that were sent until then: optimizers below one another, I side by side, skewed clients."""
    from matplotlib.ticker import LogLocator

    cells = {(c.interval, c.data, c.row): lines for c, lines in found.items() if c.part == "fashion"}
    groups, data = rows_by_optimizer(part), next(iter(part.data))
    figure = new_figure(9.6, 6.4)
    panels = figure.subplots(len(groups), len(part.intervals), sharey="row")
    for line, (optimizer, rows) in zip(panels, groups.items(), strict=True):
        for axes, interval in zip(line, part.intervals, strict=True):
            for row in rows:
                runs = [run["curve"] for run in cells.get((interval, data, row), []) if run["curve"]]
                if not runs:
                    continue
                points = list(zip(*runs, strict=True))  # [points, seeds, 3]
                x, y = [at[0][SENT] for at in points], [fmean(p[VALUE] for p in at) for at in points]
                axes.plot(x, y, **looks(part)[policy(row)])
            axes.set_title(f"{optimizer}, I = {interval}", fontsize=9, loc="left")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            plain_axes(axes)
        line[0].set_ylabel("Test accuracy (%)")
        line[0].set_ylim(bottom=20)
    for axes in panels[-1]:
        axes.set_xlabel("MB that all clients sent")
    legend_of(figure, part, f"Fashion-MNIST, {data} clients: means over seeds")
    return figure


def steps_figure(part: Any, found: Found) -> Any:
    """Accuracy at equal steps over I: optimizers below one another, kinds of clients side by side."""
    cells = {(c.interval, c.data, c.row): lines for c, lines in found.items() if c.part == "fashion"}
    groups = rows_by_optimizer(part)
    figure = new_figure(9.6, 6.4)
    panels = figure.subplots(len(groups), len(part.data), sharey="row", squeeze=False)
    for line, (optimizer, rows) in zip(panels, groups.items(), strict=True):
        for axes, data in zip(line, part.data, strict=True):
            for place, row in enumerate(rows):
                ends = {
                    interval: [end for run in cells.get((interval, data, row), []) if (end := value(run)) is not None]
                    for interval in part.intervals
                }
                ends = {interval: values for interval, values in ends.items() if values}
                error = [stdev(values) if len(values) > 1 else 0.0 for values in ends.values()]
                shift = 1.03 ** (place - len(rows) / 2)
                x = [shift * interval for interval in ends]
                axes.errorbar(
                    x, [fmean(values) for values in ends.values()], error, capsize=2, **looks(part)[policy(row)]
                )
            axes.set_title(f"{optimizer}, {data} clients", fontsize=9, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(part.intervals), [str(interval) for interval in part.intervals])
            axes.minorticks_off()
            plain_axes(axes)
        line[0].set_ylabel("Test accuracy (%)")
    for axes in panels[-1]:
        axes.set_xlabel("Local steps I between two averagings of x")
    legend_of(figure, part, f"Fashion-MNIST, {part.steps:,} steps of every client")
    return figure


def legend_of(figure: Any, part: Any, note: str) -> None:
    drawn = figure.axes[0]
    handles = [drawn.plot([], [], **how)[0] for how in looks(part).values()]
    add_legend(figure, handles, [*looks(part)], 4, note, handlelength=3.4)
