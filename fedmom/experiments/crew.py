"""Who runs the cells of a sweep: this process, processes.py or ray_crew.py; and how all of them are told to end.

The process that was asked to end (Ctrl-C, SIGTERM) hears it alone, and nothing is handed out in advance: those who run
a cell are told, leave its checkpoint and answer, and no other cell is begun. Asked once more, it ends them at once.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fedmom.config.load import parse_sets
from fedmom.errors import InputError
from fedmom.experiments.run import run
from fedmom.method.state import ClientState
from fedmom.records.files import CONFIG
from fedmom.records.status import Cell, CellEnded
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import STOPPING, Callback
from fedmom.runs.progress import Quiet
from fedmom.runs.trackers import Tracking
from fedmom.user_code import one_line

LOOK_SECONDS = 0.5  # between two looks at the file that tells actors to end, and at whether the parent lives
ONE_REQUEST_SECONDS = 1.0  # a scheduler may send several signals for one
ENDING = "ending: what runs leaves its checkpoint; once more ends it at once"


class SweepWork(NamedTuple):
    """What every run of a sweep has in common; it travels to other processes."""

    config: str
    out: str
    sets: tuple[str, ...]
    track: tuple[str, ...]
    threads: int = 0  # of torch; 0: as the configuration says


def one_by_one(work: SweepWork, cells: Sequence[Cell]) -> Iterator[CellEnded]:
    """In this process. The last one given may be interrupted; then no other was begun."""
    for cell in cells:
        ended = run_cell(work, cell)
        yield ended
        if ended.status == "interrupted":
            return


def run_cell(work: SweepWork, cell: Cell, followers: Sequence[Callback] = ()) -> CellEnded:
    """One cell, new or from where it was; an interruption is how it ended."""
    begin, folder = time.monotonic(), Path(work.out) / cell.name
    changes = {**parse_sets(work.sets), **cell.sets, "run.out": "", "run.resume": ""}
    followers = [Quiet(), *([Tracking(work.track)] if work.track else []), *followers]
    try:
        if (folder / CONFIG).exists():
            result = run(work.config, sets=changes, resume=folder, callbacks=followers)
        else:
            if work.threads:
                changes.setdefault("engine.threads", work.threads)
            result = run(work.config, sets=changes, out=folder, callbacks=followers)
    except KeyboardInterrupt:  # before its first round: what was there stays as it is
        return CellEnded(cell, "interrupted", "interrupted before a round", time.monotonic() - begin)
    except InputError as error:
        return CellEnded(cell, "refused", str(error), time.monotonic() - begin)
    except Exception as error:  # of the user's own model, say: the other runs go on
        return CellEnded(cell, "failed", one_line(error), time.monotonic() - begin)
    return CellEnded(cell, result.status, result.message, time.monotonic() - begin)


class Requests:
    """Ctrl-C, SIGTERM and SIGHUP within the block are noted, so that no answer is lost; a later one is raised.

    Those alone that are raised outside of it; outside of the main thread there is nothing to note.
    """

    def __init__(self) -> None:
        self.asked, self._since = False, 0.0
        self.line, self._wake = multiprocessing.Pipe(duplex=False)  # readable once somebody asked
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if callable(before := signal.getsignal(number)):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.line.close()
        self._wake.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._since > ONE_REQUEST_SECONDS:
                self._before[number](number, frame)
            return
        self.asked, self._since = True, time.monotonic()
        self._wake.send_bytes(b"!")
        with suppress(OSError):  # print might be interrupted print
            os.write(2, f"fedmom: {ENDING}\n".encode())


class Asked(Callback):
    """Interrupts a run, as Ctrl-C would, once it was asked to end: by a file, or by a signal whose exception got lost.

    Python drops what is raised in a destructor, say.
    """

    wants_state = False

    def __init__(self, was_asked: Callable[[], bool]) -> None:
        self.was_asked, self.looked = was_asked, 0.0

    def on_steps(self, client_steps: int) -> None:
        self.look()

    def on_round(self, record: Record, state: ClientState) -> None:
        self.look()

    def look(self) -> None:
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            if self.was_asked():
                raise KeyboardInterrupt
