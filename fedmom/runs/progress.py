"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column

from fedmom.config.method.said import method_of
from fedmom.config.numbers import counted, percent
from fedmom.method.algorithms import ALGORITHMS, INTERVALS
from fedmom.method.state import ClientState
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import Callback, Start
from fedmom.runs.result import Result
from fedmom.tasks.metrics import is_share
from fedmom.tasks.problem import data_kind

_SECONDS_BETWEEN_LINES = 2.0


def describe(record: Record, *, short: bool = False) -> str:
    """The measurements of a round that a person follows; `short` leaves the test loss out."""
    parts = [f"train loss {record['train_loss']:.4f}"]
    names = ("distance",) if short else ("test_loss", "distance")
    parts += [f"{name.replace('_', ' ')} {record[name]:.4g}" for name in names if name in record]
    name = next((name for name in record if name.startswith("test_") and name != "test_loss"), "")
    if name:  # the first of the task's measures
        value = record[name]
        parts.append(f"{name.removeprefix('test_')} {percent(value) if is_share(name) else format(value, '.4g')}")
    return " · ".join(parts)


class Left:
    """Seconds left of a run by what its records say a round took, whenever they are read.

    Whoever follows a run that goes on elsewhere reads many of them at once.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[int, float] | None = None  # (round, wall seconds) of the first record

    def seconds(self, record: Record) -> float:
        """After this record: by the rounds since the first one, after that one itself by all before it."""
        number, wall = record["round"], record["wall_seconds"]
        self.first = self.first or (number, wall)
        since, begin = self.first if number > self.first[0] else (0, 0.0)
        return float((wall - begin) / (number - since) * (self.total - number))


def _fixed(width: int) -> Column:
    return Column(min_width=width, no_wrap=True, justify="right")


class Bar(Callback):
    """A bar with round, loss, accuracy, client-steps/s and time left."""

    wants_state = takes_notes = False

    def __init__(self, console: Console, *, follows: bool = False) -> None:
        """`follows`: a run that goes on elsewhere; its rounds come in bursts, so its records say how fast it is."""
        self.console, self.follows = console, follows
        self.seen: Record = {}
        self.bar = Progress(console=console)  # until a run begins, and says what there is to show
        self.waiting: Status | None = None

    def on_prepare(self, what: str) -> None:
        if self.waiting is None:
            self.waiting = self.console.status(what)
            self.waiting.start()
        self.waiting.update(what)

    def _prepared(self) -> None:
        if self.waiting is not None:
            self.waiting.stop()
            self.waiting = None

    def on_start(self, start: Start) -> None:
        self._prepared()
        total = start.config.run.num_rounds
        self.per_round = max(1, start.client_steps)
        width, digits = self.console.width, len(str(total))
        self.narrow = width < 110
        left = TextColumn("{task.fields[left]}", table_column=_fixed(7))
        # What has no room is left out whole, the rate first and then the bar: a cut word says nothing.
        columns = {
            TextColumn("{task.fields[round]}/" + str(total), table_column=_fixed(2 * digits + 1)): 0,
            BarColumn(bar_width=8 if self.narrow else 24, table_column=_fixed(8)): 56,
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")): 0,
            TextColumn("{task.fields[rate]} client-steps/s", table_column=_fixed(21)): 80,
            left if self.follows else TimeRemainingColumn(table_column=_fixed(7)): 0,
        }
        wide_enough = [column for column, least in columns.items() if width >= least]
        self.bar = Progress(*wide_enough, console=self.console, transient=True)
        done = start.first_round - 1
        self.left = Left(total)
        self.task = self.bar.add_task(
            "",
            True,
            total * self.per_round,
            done * self.per_round,
            round=done,
            text="starting",
            rate="–",
            left="–",
        )
        self.done = done * self.per_round
        self.bar.start()

    def on_steps(self, client_steps: int) -> None:
        self.done += client_steps
        self.bar.update(self.task, completed=self.done)

    def on_round(self, record: Record, state: ClientState) -> None:
        # Between evaluations the last accuracy stays in view.
        self.seen |= record
        self.done = record["round"] * self.per_round
        rate = f"{record['client_steps_per_second']:,.0f}"
        text = describe(self.seen, short=self.narrow)
        if self.console.width < 56:
            text = text.rpartition(" · ")[2]  # the accuracy, or what else is there
        left = str(timedelta(seconds=round(self.left.seconds(record)))) if self.follows else ""
        self.bar.update(self.task, completed=self.done, round=record["round"], text=text, rate=rate, left=left)

    def on_end(self, result: Result) -> None:
        self.bar.stop()

    def on_error(self) -> None:
        self._prepared()
        self.bar.stop()


class Lines(Callback):
    """One line for the first and last round, and in between at most one every two seconds."""

    wants_state = False

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last = 0.0

    def on_start(self, start: Start) -> None:
        self.first, self.total = start.first_round, start.config.run.num_rounds
        self.left = Left(self.total)

    def on_round(self, record: Record, state: ClientState) -> None:
        left = self.left.seconds(record)
        now, number = time.monotonic(), record["round"]
        if number not in (self.first, self.total) and now - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.last = now
        rate = f"{record['client_steps_per_second']:,.0f} client-steps/s"
        text = f"round {number}/{self.total} · {describe(record)} · {rate} · {left:.0f} s left"
        self.console.print(text, soft_wrap=True, highlight=False)


def show_output(console: Console, node: int, text: str) -> None:
    """What a node's client printed, line by line, each with the node's number."""
    for line in text.splitlines():
        console.print(f"node {node}: {line}", soft_wrap=True, highlight=False, markup=False)


class Notes(Callback):
    """What was overruled, chosen or should be known, before the first round."""

    wants_state = False

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        """verbose: with the details of what was chosen."""
        self.console, self.verbose = console, verbose

    def on_start(self, start: Start) -> None:
        data, algorithm, run = start.config.data, start.config.algorithm, start.config.run
        epochs = algorithm.local_epochs
        steps = f"{epochs} local epochs" if epochs else f"I = {algorithm.num_local_steps}"
        steps += f" at first ({algorithm.interval})" if INTERVALS[algorithm.interval].follow is not None else ""
        model = f", {start.config.model.name}" if data_kind(data.dataset).has_examples else ""
        some = f" ({algorithm.cohort_size} per round)" if algorithm.cohort_size < data.num_clients else ""
        some += f", {algorithm.topology}" if ALGORITHMS[algorithm.name].decentralized else ""
        who = f"N = {data.num_clients}{some}, {steps}, {run.num_rounds} rounds, {data.dataset}{model}"
        self._say(f"{method_of(start.config)}: {who}")
        if start.folder:  # in one line however long it is, for whoever copies it
            self.console.print(f"run folder: {start.folder}", soft_wrap=True, highlight=False, markup=False)
        if start.first_round > 1:
            self._say(f"resumed after round {start.first_round - 1}")
        for note in (*start.notes, *(start.details if self.verbose else ())):
            self._say(note)

    def on_end(self, result: Result) -> None:
        if result.status == "done" and result.message:
            self._say(result.message)

    def on_output(self, node: int, text: str) -> None:
        show_output(self.console, node, text)

    def _say(self, text: str) -> None:
        """Broken between words on a terminal; elsewhere in one line."""
        self.console.print(text, soft_wrap=not self.console.is_terminal, highlight=False, markup=False)


class Quiet(Callback):
    """Says nothing."""

    wants_state = False


def callbacks(console: Console, *, quiet: bool, verbose: bool = False) -> list[Callback]:
    """Those of a command."""
    if quiet:
        return [Quiet()]
    return [Notes(console, verbose=verbose), Bar(console) if is_live(console) else Lines(console)]


def is_live(console: Console) -> bool:
    """Whether a line may be written over: on a terminal, and not into a pipe for which colours are forced.

    Notebooks set FORCE_COLOR for the commands of their cells, and show every stroke of a bar below the last.
    """
    return console.is_terminal and console.file.isatty()


class Replies:
    """How many replies have come and how fast: a line that is written over on a terminal, elsewhere every 10 s."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.number = self.errors = 0
        self.first_error = ""

    def __enter__(self) -> "Replies":
        self.begin = self.last = time.monotonic()
        self.status = self.console.status("starting") if self.console.is_terminal else None
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def count(self, reply: Any) -> None:
        self.number += 1
        if reply.has_error():
            self.errors += 1
            self.first_error = self.first_error or " ".join((reply.error.reason or "").split())
        now = time.monotonic()
        if now - self.last > (0.2 if self.status else 10):
            self.last = now
            rate = f"{self.number / (now - self.begin):,.0f}/s"
            text = f"{counted(self.number, 'reply', 'replies')}, {rate}{self.failed()}"
            if self.status:
                self.status.update(text)
            else:
                self.console.print(text)

    def failed(self) -> str:
        """Of them, how many are errors, and the first one's reason."""
        if not self.errors:
            return ""
        return f"; {self.errors:,} {'is an error' if self.errors == 1 else 'are errors, the first'}: {self.first_error}"
