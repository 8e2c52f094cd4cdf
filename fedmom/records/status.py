"""How a run is, or how it ended: status.json in its folder, written while it runs and at every end.

A reader on the same machine looks for the process itself, one elsewhere can only see when it was last heard of.
"""

import contextlib
import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config.keys import Scalar
from fedmom.config.load import load
from fedmom.errors import InputError
from fedmom.machine.files import over_text, write_text
from fedmom.records.files import CONFIG, FINAL, ROUNDS, STATUS
from fedmom.records.history import last_round

# The first five are written, the others are what a reader finds.
STATUSES = {
    "running": "its process is at work",
    "done": "it came to its end",
    "interrupted": "by Ctrl-C, SIGTERM or SIGHUP",
    "diverged": "a number became NaN or infinite",
    "failed": "clients did not answer, the user's own code raised, or the disk is full: the reason says which",
    "killed": "its process is gone without a word",
    "silent": "it runs on another machine, and was not heard of for two minutes",
    "unfinished": "a folder of an older version that lacks rounds",
}
BEAT_SECONDS = 2.0  # between two writes of a run whose rounds are short
SLOW_BEAT_SECONDS = 10.0  # between two writes while nothing changes
SILENT_SECONDS = 120.0  # on another machine, whose clock may differ: longer than any disk makes a write wait


class Status(NamedTuple):
    """One look at a run folder."""

    status: str  # of STATUSES
    reason: str = ""  # in one line
    round: int = 0  # the last one that is done
    pid: int = 0  # of the process that ran it last; 0: not known
    host: str = ""
    seen: float = 0.0  # Unix time at which that process was last heard of; 0: not known

    @property
    def is_running(self) -> bool:
        return self.status == "running"

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    @property
    def text(self) -> str:
        """In words: the status and, unless all is well, why."""
        return f"{self.status}: {self.reason}" if self.reason and not self.is_done else self.status


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    sets: dict[str, Scalar]  # what it changes, run.seed included
    group: str  # the name without the seed


class CellEnded(NamedTuple):
    """How a cell ended, now or in an earlier call."""

    cell: Cell
    status: str  # "done", "diverged", "failed" or "interrupted" as of a run; "refused": bad input
    message: str
    seconds: float  # 0 if nothing had to be run


class Heart:
    """Writes a run's status.json: at the start, every few seconds by a thread of its own, and at the end.

    Nothing of it may end a run: what cannot be written is left, and the reader finds the process gone.
    """

    def __init__(self, folder: Path, round_number: int) -> None:
        self.path, self.round = folder / STATUS, round_number
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._place = _this_process()
        self._write("running", "")
        self._thread = threading.Thread(target=self._beat, name="fedmom-status", daemon=True)
        self._thread.start()

    def end(self, status: str, reason: str = "") -> None:
        """The last word; later ones change nothing."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            self._write(status, reason, last=True)

    def _beat(self) -> None:
        written, at = self.round, time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            if self.round == written and time.monotonic() - at < SLOW_BEAT_SECONDS:
                continue
            with self._lock:
                if not self._ended.is_set():
                    written, at = self.round, time.monotonic()
                    self._write("running", "")

    def _write(self, status: str, reason: str, last: bool = False) -> None:
        content = {"status": status, "reason": " ".join(reason.split()), "round": self.round}
        content |= {"seen": datetime.now(UTC).isoformat(timespec="seconds"), **self._place}
        text = json.dumps(content, indent=1) + "\n"
        try:
            write_text(self.path, text, sync=last)
        except InputError:
            if last:  # a full disk has no room for a new file, but an old one's place is its own
                with contextlib.suppress(OSError):
                    over_text(self.path, text)


def read_status(folder: Path) -> Status:
    """How the run in `folder` is; where it has no status.json (an older version's), what its other files say."""
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        found = Status(
            status=str(content["status"]),
            reason=str(content["reason"]),
            round=int(content["round"]),
            pid=int(content["pid"]),
            host=str(content["host"]),
            seen=datetime.fromisoformat(content["seen"]).timestamp(),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return _derived(folder)
    # The heart beats less often than rounds end.
    found = found._replace(round=max(found.round, last_round(folder))) if found.is_running else found
    return _looked_for(found, content) if found.is_running else found


def _looked_for(found: Status, content: dict[str, Any]) -> Status:
    """The status of a run that was at work when it was last heard of."""
    silent = time.time() - found.seen
    if (found.host, content.get("boot")) == (socket.gethostname(), _boot()):
        alive = _is_alive(found.pid, content.get("born"))
        if alive:
            return found
        if alive is False or silent > SILENT_SECONDS:
            return found._replace(status="killed", reason=f"its process {found.pid} on {found.host} is gone")
        return found
    if silent > SILENT_SECONDS:
        when = f"{datetime.fromtimestamp(found.seen, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return found._replace(status="silent", reason=f"not heard of from {found.host} since {when}")
    return found


def _derived(folder: Path) -> Status:
    number = last_round(folder)
    try:
        wanted = load(folder / CONFIG).config.run.num_rounds
    except InputError:
        wanted = None
    if wanted is not None and number >= wanted and (folder / FINAL).is_file():
        return Status("done", round=number)
    seen = 0.0
    with contextlib.suppress(OSError):
        seen = (folder / ROUNDS).stat().st_mtime
    reason = f"{number} of {wanted} rounds" if wanted is not None else f"{number} rounds"
    return Status("unfinished", reason, number, seen=seen)


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname(), "boot": _boot()}


def _boot() -> str:
    """Which kernel, since when, and which of its worlds of process ids (a container has its own); "" if unknown."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _born(pid: int) -> int | None:
    """When a process started, in the kernel's ticks, by which a reused id is told; 0: it is dead; None: unknown."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if words[0] in (b"Z", b"X") else int(words[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_alive(pid: int, born: int | None) -> bool | None:
    """Whether this very process still is; None where that cannot be seen."""
    if os.name != "posix":  # elsewhere os.kill kills, whatever the number
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's, so it is
        pass
    now = _born(pid)
    if now is None or born is None:
        return None
    return now == born
