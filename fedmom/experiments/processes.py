"""A sweep's cells in processes beside this one.

None of them hears the terminal's Ctrl-C, and none outlives its parent.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from fedmom.experiments.crew import LOOK_SECONDS, Asked, Cell, CellEnded, Requests, SweepWork, run_cell
from fedmom.machine.cores import usable_cores


def side_by_side(work: SweepWork, cells: Sequence[Cell], workers: int) -> Iterator[CellEnded]:
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


def _hire(work: SweepWork) -> tuple[Connection, BaseProcess]:
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


def _answer(connection: Connection, process: BaseProcess, cell: Cell, told: bool) -> CellEnded:
    """What a process answered for its cell, or why it did not."""
    try:
        answer = connection.recv()
        assert isinstance(answer, CellEnded)
        return answer
    except (EOFError, OSError):
        process.join()
    if told:
        return CellEnded(cell, "interrupted", "interrupted before a round", 0.0)
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return CellEnded(cell, "failed", f"its process {how}", 0.0)


def _serve(connection: Connection, work: SweepWork, parent: int) -> None:
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
