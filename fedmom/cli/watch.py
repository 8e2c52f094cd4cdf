"""`fedmom watch`: a live view of a run, or of a sweep, in the terminal."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite, log10
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmom.config.load import flat, to_toml
from fedmom.machine.output import nobody_reads
from fedmom.records.follow import Follower
from fedmom.records.status import STATUSES, read_status
from fedmom.results.reading import is_run, sweep_runs
from fedmom.results.tables import finite, measures_in
from fedmom.rounds.loop import Record
from fedmom.runs.progress import describe
from fedmom.runs.trackers import Tracked, Tracking

SECONDS = 1.0  # between two looks
QUIET_SECONDS = 30.0  # without a new round, and ten times longer than a round takes: said to be silent
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille letter, by row and column


def curve(x: Sequence[float], y: Sequence[float], width: int, height: int) -> list[str]:
    """Lines of Braille letters that draw y over x: 2 × 4 dots a letter, joined from point to point."""
    dots = np.zeros((4 * height, 2 * width), dtype=bool)
    low, high = min(y), max(y)
    across = (np.asarray(x, float) - min(x)) / (max(x) - min(x) or 1) * (2 * width - 1)
    down = (1 - (np.asarray(y, float) - low) / (high - low or 1)) * (4 * height - 1)
    for a in range(len(across)):
        b = min(a + 1, len(across) - 1)
        steps = 1 + int(max(abs(across[b] - across[a]), abs(down[b] - down[a])))
        columns, rows = (np.linspace(v[a], v[b], steps + 1).round().astype(int) for v in (across, down))
        dots[rows, columns] = True
    letters = []
    for r in range(height):
        cells = [
            sum(_DOTS[i][j] for i in range(4) for j in range(2) if dots[4 * r + i, 2 * c + j]) for c in range(width)
        ]
        letters.append("".join(chr(0x2800 + cell) for cell in cells))
    return letters


class Watched:
    """A run folder and when something new was last seen in it, by the watcher's own clock."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.follower, self.clock = Follower(folder), clock
        self.changed = clock()
        self.looked = self.moved = False
        self.status = read_status(folder)

    def look(self) -> bool:
        """Whether there is something new."""
        # The status first: a run that was at its end then has no line that the next look would not see.
        self.status = read_status(self.follower.folder)
        news = self.follower.look()
        if (news.records or news.rewound) and self.looked:
            self.changed, self.moved = self.clock(), True
        self.looked = True
        return bool(news.records or news.rewound)

    @property
    def is_running(self) -> bool:
        """Whether there may be more to see. An older version's run says nothing of itself but its rounds."""
        return self.status.is_running or (self.status.status == "unfinished" and self.moved)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to come; who cannot tell (an older version, another machine) looks on."""
        return self.status.status not in ("running", "silent", "unfinished")

    @property
    def state(self) -> str:
        """In a word or two; `self.status.reason` says why."""
        if not self.is_running:
            return self.status.status
        rounds = self.follower.rounds
        if not rounds:
            return "no round yet"
        quiet = self.clock() - self.changed
        usual = rounds[-1].get("wall_seconds", 0.0) / rounds[-1]["round"]
        return f"no round for {quiet:.0f} s" if quiet > max(QUIET_SECONDS, 10 * usual) else "running"


def run_view(watched: Watched, width: int) -> RenderableType:
    """One run: progress, the last numbers and the best, and curves."""
    from fedmom.config.method.said import method_of  # which needs torch

    follower = watched.follower
    config, rounds = follower.config, follower.rounds
    total = config.run.num_rounds
    done = rounds[-1]["round"] if rounds else 0
    algorithm, data = config.algorithm, config.data
    what = f"{method_of(config)}, N = {data.num_clients}, "
    what += f"I = {algorithm.num_local_steps}, {data.dataset}, {config.model.name}"
    parts: list[RenderableType] = [Text(what, style="dim")]
    bar = Table.grid(padding=(0, 1))
    seconds = rounds[-1].get("wall_seconds", 0.0) if rounds else 0.0
    left = f"{seconds / done * (total - done):,.0f} s left" if 0 < done < total and watched.is_running else ""
    bar.add_row(ProgressBar(total=total, completed=done, width=max(10, min(40, width - 50))), f"{done}/{total}", left)
    parts.append(bar)
    if watched.status.reason and not watched.is_running:
        parts.append(Text(watched.status.reason, style="bold"))
    if rounds:
        parts.append(Text(describe(_last_known(rounds))))
        sent, rate = rounds[-1].get("bytes_sent", 0) / 1e6, rounds[-1].get("client_steps_per_second", 0.0)
        numbers = [f"{seconds:,.1f} s", f"{sent:,.4g} MB sent", f"{rate:,.0f} client-steps/s", _best(rounds)]
        parts.append(Text(" · ".join(filter(None, numbers))))
        parts += _curves(rounds, width)
    return Panel(Group(*parts), title=f"{follower.name}: {watched.state}", title_align="left")


def _last_known(rounds: Sequence[Record]) -> Record:
    """The last round, with the last evaluation where it had none."""
    known = dict(rounds[-1])
    for key in ("distance", *(measure.key for measure in measures_in([rounds]))):
        found = finite(rounds, key)
        if found and key not in known:
            known[key] = found[-1]
    return known


def _best(rounds: Sequence[Record]) -> str:
    measure = next((m for m in measures_in([rounds]) if m.rises and finite(rounds, m.key)), None)
    if measure is None:
        return ""
    best = measure.factor * max(finite(rounds, measure.key))
    return f"best {measure.title.removeprefix('test ')} {best:{measure.digits}}{measure.unit}"


def _curves(rounds: Sequence[Record], width: int) -> list[RenderableType]:
    keys = [m for m in measures_in([rounds]) if len(finite(rounds, m.key)) > 1][:2]
    if not keys:
        return []
    each = max(16, min(60, (width - 8) // len(keys) - 12))
    table = Table.grid(padding=(0, 2))
    cells = []
    for measure in keys:
        pairs = [(r["round"], r[measure.key]) for r in rounds if isinstance(r.get(measure.key), int | float)]
        pairs = [(x, measure.factor * y) for x, y in pairs if isfinite(y) and (not measure.log or y > 0)]
        if len(pairs) < 2:
            continue
        x, y = zip(*pairs, strict=True)
        lines = curve(x, [log10(v) for v in y] if measure.log else y, each, 7)
        high, low = (f"{end:{measure.digits}}{measure.unit}" for end in (max(y), min(y)))
        labels = [high, *[""] * (len(lines) - 2), low]
        text = Text(f"{measure.title}{' (log)' if measure.log else ''}\n", style="bold")
        for label, line in zip(labels, lines, strict=True):
            text.append(f"{label:>9} ", style="dim not bold").append(line + "\n", style="cyan not bold")
        cells.append(text)
    if cells:
        table.add_row(*cells)
    return [table]


def sweep_view(runs: Sequence[Watched]) -> RenderableType:
    """A line per run."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "rounds", "state", ""):
        table.add_column(name, justify="right" if name == "rounds" else "left", overflow="fold")
    for one in runs:
        rounds, total = one.follower.rounds, one.follower.config.run.num_rounds
        text = describe(_last_known(rounds)) if rounds else ""
        table.add_row(one.follower.name, f"{rounds[-1]['round'] if rounds else 0}/{total}", one.state, text)
    counts = Counter(one.status.status for one in runs)
    others = "".join(f", {counts[name]} {name}" for name in STATUSES if counts[name] and name != "done")
    return Group(table, Text(f"{counts['done']} of {len(runs)} runs done{others}", style="dim"))


def watch(folder: Path, console: Console, *, once: bool = False, trackers: Sequence[str] = ()) -> None:
    """Show a run folder, or a sweep's, until all its runs have ended (or once). Trackers hear of every round.

    Reads files alone, so the run may be another process's, another machine's, or a container's on a shared folder.
    """
    single = is_run(folder)
    watched = [Watched(run) for run in ([folder] if single else sweep_runs(folder))]
    tracking = [Tracking(trackers) for _ in watched] if trackers else []
    for one, track in zip(watched, tracking, strict=False):
        config = one.follower.config
        track.begin(Tracked(one.follower.name, flat(config), to_toml(config), one.follower.folder, 1))

    def look() -> bool:
        news = False
        for place, one in enumerate(watched):
            before = len(one.follower.rounds)
            news |= one.look()
            for record in one.follower.rounds[before:] if tracking else ():
                tracking[place].log(record)
        if not single:  # runs that the sweep has begun meanwhile
            known = {one.follower.folder for one in watched}
            watched.extend(Watched(run) for run in sweep_runs(folder) if run not in known and not tracking)
        return news

    def view() -> RenderableType:
        return run_view(watched[0], console.width) if single else sweep_view(watched)

    def all_ended() -> bool:
        return all(one.has_ended for one in watched)

    look()
    try:
        if once or all_ended():
            console.print(view())
        elif console.is_terminal:
            with Live(view(), console=console, auto_refresh=False, transient=False) as live:
                while not all_ended() and not nobody_reads():
                    time.sleep(SECONDS)
                    look()
                    live.update(view(), refresh=True)
        else:
            _lines(watched, console, look, all_ended)
    finally:
        for one, track in zip(watched, tracking, strict=False):
            track.end(one.status.status if one.status.status in ("done", "diverged", "failed") else "interrupted")


def _lines(
    watched: Sequence[Watched], console: Console, look: Callable[[], bool], all_ended: Callable[[], bool]
) -> None:
    """Where nobody looks at a terminal: a line when something is new, at most one in two seconds and run."""
    said: dict[str, int] = {}
    while True:
        for one in watched:
            rounds = one.follower.rounds
            at = rounds[-1]["round"] if rounds else 0
            if said.get(one.follower.name) != at:
                said[one.follower.name] = at
                text = describe(_last_known(rounds)) if rounds else "no round yet"
                line = f"{one.follower.name}: round {at}/{one.follower.config.run.num_rounds} · {text}"
                console.print(line, soft_wrap=True, markup=False, highlight=False)
        if all_ended() or nobody_reads():
            for one in watched:
                if not one.status.is_done:
                    console.print(f"{one.follower.name}: {one.status.text}", soft_wrap=True, markup=False)
            return
        time.sleep(2 * SECONDS)
        look()
