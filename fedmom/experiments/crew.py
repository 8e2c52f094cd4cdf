"""Who runs the cells of a sweep: this process, processes beside it, or Ray actors; and how all of them are told to end.

The process that was asked to end (Ctrl-C, SIGTERM) hears it alone, and nothing is handed out in advance: those who run
a cell are told, leave its checkpoint and answer, and no other cell is begun. Asked once more, it ends them at once.
"""

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fedmom.config.build import share_of_gpus
from fedmom.config.keys import Scalar
from fedmom.config.load import load, parse_sets
from fedmom.errors import InputError
from fedmom.experiments.run import run
from fedmom.machine.cores import usable_cores
from fedmom.method.state import ClientState
from fedmom.records.files import CONFIG
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import STOPPING, Callback
from fedmom.runs.progress import Quiet
from fedmom.runs.trackers import Tracking
from fedmom.user_code import one_line

LOOK_SECONDS = 0.5  # between two looks at the file that tells actors to end, and at whether the parent lives
ONE_REQUEST_SECONDS = 1.0  # a scheduler may send several signals for one
ENDING = "ending: what runs leaves its checkpoint; once more ends it at once"


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    sets: dict[str, Scalar]  # what it changes, run.seed included
    group: str  # the name without the seed


class Ended(NamedTuple):
    """How a cell ended, now or in an earlier call."""

    cell: Cell
    status: str  # "done", "diverged", "failed" or "interrupted" as of a run; "refused": bad input
    message: str
    seconds: float  # 0 if nothing had to be run


class Work(NamedTuple):
    """What every run of a sweep has in common; it travels to other processes."""

    config: str
    out: str
    sets: tuple[str, ...]
    track: tuple[str, ...]
    threads: int = 0  # of torch; 0: as the configuration says


def one_by_one(work: Work, cells: Sequence[Cell]) -> Iterator[Ended]:
    """In this process. The last one given may be interrupted; then no other was begun."""
    for cell in cells:
        ended = run_cell(work, cell)
        yield ended
        if ended.status == "interrupted":
            return


def run_cell(work: Work, cell: Cell, followers: Sequence[Callback] = ()) -> Ended:
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
        return Ended(cell, "interrupted", "interrupted before a round", time.monotonic() - begin)
    except InputError as error:
        return Ended(cell, "refused", str(error), time.monotonic() - begin)
    except Exception as error:  # of the user's own model, say: the other runs go on
        return Ended(cell, "failed", one_line(error), time.monotonic() - begin)
    return Ended(cell, result.status, result.message, time.monotonic() - begin)


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


# --- processes here -------------------------------------------------------------------------------------------


def side_by_side(work: Work, cells: Sequence[Cell], workers: int) -> Iterator[Ended]:
    """In processes beside this one, each of which is given its next cell when it has answered for the last.

    Raises KeyboardInterrupt at its end where it was asked to end before.
    """
    work = work._replace(threads=max(1, usable_cores() // workers))
    waiting, busy = deque(cells), dict[Connection, tuple[BaseProcess, Cell]]()
    told = False
    with Requests() as requests:
        try:
            while waiting or busy:
                if requests.asked and not told:
                    told = True
                    waiting.clear()
                    for process, _ in busy.values():
                        process.terminate()
                while waiting and len(busy) < workers:
                    connection, process = _hire(work)
                    busy[connection] = process, waiting.popleft()
                    with suppress(OSError):  # it is dead: so says its line
                        connection.send(busy[connection][1])
                ready = wait([*busy, *([] if told else [requests.line])])
                for connection in [one for one in [*busy] if one in ready]:
                    process, cell = busy.pop(connection)
                    ended = _answer(connection, process, cell, told)
                    if ended.status == "interrupted":  # a scheduler may have asked it and not us
                        requests.asked = True
                    elif waiting and _give(connection, waiting[0]):
                        busy[connection] = process, waiting.popleft()
                    if connection not in busy:
                        connection.close()
                    yield ended
        finally:
            for connection, (process, _) in busy.items():
                # Some are at work where a reader went away, or at a second Ctrl-C.
                process.kill() if told else process.terminate()
                connection.close()
    if requests.asked:
        raise KeyboardInterrupt


def _hire(work: Work) -> tuple[Connection, BaseProcess]:
    """A process, and the line to it. It never hears the terminal's Ctrl-C, not even while it starts."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # the first process would start it, and it lets Ctrl-C in again
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, os.getpid()))
    with _interrupts_blocked():
        process.start()
    theirs.close()  # so that its death ends the line
    return ours, process


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits until the block's end; processes that are started in it have it blocked from their beginning."""
    if not hasattr(signal, "pthread_sigmask"):  # pragma: no cover - Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(connection: Connection, cell: Cell) -> bool:
    """Whether the process that answered took another cell; one that died since then did not."""
    try:
        connection.send(cell)
    except OSError:
        return False
    return True


def _answer(connection: Connection, process: BaseProcess, cell: Cell, told: bool) -> Ended:
    """What a process answered for its cell, or why it did not."""
    try:
        answer = connection.recv()
        assert isinstance(answer, Ended)
        return answer
    except (EOFError, OSError):
        process.join()
    if told:
        return Ended(cell, "interrupted", "interrupted before a round", 0.0)
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Ended(cell, "failed", f"its process {how}", 0.0)


def _serve(connection: Connection, work: Work, parent: int) -> None:
    """Run cells until the line ends. Asked to end, a cell under way leaves its checkpoint and is the last one."""
    asked = at_work = False
    check = Asked(lambda: asked)

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not at_work:
            os._exit(0)
        if not asked:  # a second signal must not strike while the checkpoint is written
            asked = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while not asked:
            cell = connection.recv()
            at_work = True
            ended = run_cell(work, cell, [check])
            at_work = False
            connection.send(ended)


def _die_with(parent: int) -> None:
    """A sweep that was killed leaves no runs behind, which would hold their folders against the next call."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


# --- Ray actors -----------------------------------------------------------------------------------------------


def on_ray(work: Work, cells: Sequence[Cell], workers: int, address: str) -> Iterator[Ended]:
    """On Ray actors, of a Ray that is started here ("local") or of a cluster that sees the same folders.

    Raises KeyboardInterrupt at its end where it was asked to end before.
    """
    from fedmom.actors.pool import Failure, Pool, PoolOptions

    here = os.getcwd()
    work = work._replace(threads=max(1, usable_cores() // workers))
    stop = Path(work.out) / f".stop-{uuid.uuid4().hex[:8]}"  # signals do not reach other machines

    def make_worker() -> Callable[[Cell], Ended]:
        if os.path.isdir(here):  # data.data-dir and module:function are looked for where the sweep was started
            os.chdir(here)
        return lambda cell: Ended(cell, "", "", 0.0) if stop.exists() else run_cell(work, cell, [Asked(stop.exists)])

    count = min(workers, len(cells))
    share = share_of_gpus(load(work.config or {}, work.sets).config, count)
    options = PoolOptions(num_workers=count, num_gpus=share, ray_address="" if address == "local" else address)
    try:
        with Pool(make_worker, options) as pool, Requests() as requests:
            cell_of = {cell.name: cell for cell in cells}
            for cell in cells:
                pool.submit(cell.name, cell)
            while cell_of:
                if requests.asked:
                    stop.touch()
                if (taken := pool.take(LOOK_SECONDS)) is None:
                    continue
                cell, answer = cell_of.pop(str(taken[0])), taken[1]
                ended = Ended(cell, "failed", answer.reason, 0.0) if isinstance(answer, Failure) else answer
                if ended.status:  # else it was not begun
                    yield ended
    finally:
        stop.unlink(missing_ok=True)
    if requests.asked:
        raise KeyboardInterrupt


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
