"""The bars of calls from Python: below a notebook's cell, on a terminal, over the runs of a sweep."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fedmom.method.state import ClientState
from fedmom.records.status import CellEnded
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import Callback, Start
from fedmom.runs.progress import Bar, Left, Lines, Quiet, describe, is_live
from fedmom.runs.result import Result

_SECONDS_BETWEEN_UPDATES = 0.25


class NotebookBar(Callback):
    """The same below a notebook's cell, by its own display: one line that is written over, and stays at the end."""

    wants_state = takes_notes = False

    def __init__(self, display: Callable[..., Any]) -> None:
        """display: IPython's, which gives a handle whose `update` writes over what it shows."""
        self.display = display
        self.handle: Any = None
        self.last, self.seen = 0.0, dict[str, Any]()

    def on_prepare(self, what: str) -> None:
        self._show(f"{what} …")

    def on_start(self, start: Start) -> None:
        self.total = start.config.run.num_rounds
        self.left = Left(self.total)

    def on_round(self, record: Record, state: ClientState) -> None:
        self.seen |= record
        left = self.left.seconds(record)
        now, number = time.monotonic(), record["round"]
        if number == self.total or now - self.last >= _SECONDS_BETWEEN_UPDATES:
            self.last = now
            self._show(f"round {number}/{self.total} · {describe(self.seen)} · {timedelta(seconds=round(left))} left")

    def on_end(self, result: Result) -> None:
        number = result.rounds[-1]["round"] if result.rounds else 0
        told = f" · {describe(self.seen)}" if self.seen else ""
        why = f" · {result.message}" if result.message else ""
        self._show(f"{result.status} · round {number}/{self.total}{told}{why}")

    def _show(self, text: str) -> None:
        if self.handle is None:
            self.handle = self.display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)


def python_bar(wanted: bool | None, given: Sequence[Callback]) -> list[Callback]:
    """The bar of a call from Python: in a notebook below its cell, else on standard error.

    wanted: None for one where somebody may see it (a terminal, a notebook), and none beside a caller's own.
    """
    if wanted is False or (wanted is None and any(isinstance(one, Bar | Lines | NotebookBar | Quiet) for one in given)):
        return []
    console = Console(stderr=True, highlight=False)
    if console.is_jupyter:
        from IPython.display import display

        return [NotebookBar(display)]
    if is_live(console):
        return [Bar(console)]
    return [Lines(console)] if wanted else []


def over_runs(
    under_way: Iterable[CellEnded],
    total: int,
    wanted: bool | None,
    *,
    lines: bool = False,
    where: Callable[[CellEnded], str] | None = None,
) -> Iterator[CellEnded]:
    """The runs of a sweep as they end, with a bar over all of them where `python_bar` would have one.

    lines: a line for each in any case; else where there is a bar. where: on which machine one ran, "" for not known.
    """
    console = Console(stderr=True, highlight=False, force_jupyter=False)
    seen = is_live(console) if wanted is None else wanted
    with Progress(*Progress.get_default_columns(), console=console, disable=not seen) as bar:
        task = bar.add_task("runs", total=total)
        for number, one in enumerate(under_way, 1):
            bar.advance(task)
            if (seen or lines) and (one.seconds or one.status != "done"):
                why = f": {one.message}" if one.message else f" in {one.seconds:.0f} s"
                on = f" on {host}" if where and (host := where(one)) else ""
                line = f"{number}/{total} {one.cell.name}: {one.status}{on}{why}"
                bar.console.print(line, soft_wrap=True, markup=False)
            yield one
