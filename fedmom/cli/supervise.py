"""A parent that says how a run ended where the run's own process cannot: killed, or ended by Ray without a word.

Ray ends the process that called it as soon as its object store is gone, by `_exit(1)`: nothing in that process can say
why. So a command that is about to start Ray forks. The child goes on as if nothing had been; the parent waits, hands
signals on, and takes over the exit status that the child reports.

The child has a process group of its own: Ctrl-C on a terminal reaches the parent alone, which tells the child alone,
and none of Ray's processes hears of it. A second Ctrl-C ends the child at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

FAILED, INTERRUPTED = 4, 130  # exit statuses, as in options.py, which takes seconds to import

_armed = False
_report = -1  # in a child: where its exit status goes


def main(call: Callable[[], int]) -> int:
    """The exit status of a command line, `call`, that may make itself a child."""
    global _armed
    _armed = hasattr(os, "fork") and hasattr(signal, "sigwaitinfo")
    status = 1  # of a traceback
    try:
        status = call()
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    except SystemExit as end:  # an app's own
        status = end.code % 256 if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if _report >= 0:
            os.write(_report, bytes([status]))
    return status


def stand_by(folder: Path | None, go_on: str) -> None:
    """Go on in a child, if this is a command line's process and not a child yet.

    `go_on`: how to go on after the child was killed, in one line, once `folder` (None: nothing) is there.
    """
    global _report
    if not _armed or _report >= 0:
        return
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    heard = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    parent = os.getpid()
    with warnings.catch_warnings():  # torch and numpy are loaded, and have threads that nothing was asked of yet
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _report = writing
        os.setpgid(0, 0)
        for number in (signal.SIGTTOU, signal.SIGTTIN):  # it may write though it is not the terminal's foreground
            signal.signal(number, signal.SIG_IGN)
        _die_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os.close(writing)
    os._exit(_wait(child, reading, heard, folder, go_on))


def _die_with(parent: int) -> None:
    """A parent that is killed takes its child along, as if they were one."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _wait(child: int, reading: int, heard: set[signal.Signals], folder: Path | None, go_on: str) -> int:
    """The exit status once the child has ended."""
    interrupted = False
    while True:
        number = signal.sigwaitinfo(heard).si_signo
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGCHLD:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    break
            elif number == signal.SIGTSTP:
                os.kill(child, signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(child, signal.SIGCONT)
            elif number == signal.SIGINT and interrupted:
                os.kill(child, signal.SIGKILL)
            else:
                interrupted = interrupted or number == signal.SIGINT
                os.kill(child, number)
    os.set_blocking(reading, False)
    with contextlib.suppress(BlockingIOError):
        reported = os.read(reading, 1)
        if reported:
            return reported[0]
    code = os.waitstatus_to_exitcode(status)
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)  # a bar had hidden the cursor
    if code == -signal.SIGKILL and interrupted:
        why = "interrupted"
    elif code < 0:
        why = f"the run's process was killed (signal {-code}), perhaps for want of memory"
    else:
        why = "Ray ended the run's process: its raylet or its head was killed, perhaps for want of memory"
    print(f"fedmom: {why}", file=sys.stderr)
    if go_on and folder is not None and folder.exists():
        print(f"fedmom: {go_on}", file=sys.stderr)
    sys.stderr.flush()
    return INTERRUPTED if why == "interrupted" else FAILED
