"""A watch on whether the Ray that this process uses still lives."""

import atexit
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_DIE = 0.2, 0.3
# A cluster's head may be started anew, and a network be repaired. Ray itself waits for 60 s, then ends the process.
_SECONDS_WITHOUT_HEAD = {"refused": 20.0, "silent": 30.0}
_SECONDS_BETWEEN_CALLS, _SECONDS_OF_A_CALL = 2.0, 2.0

_SECONDS_TO_LEAVE = 10.0  # ray.shutdown takes 1 s where somebody answers


class Watch:
    """Tells, once, when a part of Ray without which nothing is answered any more has ended or cannot be reached.

    That is the raylet of this machine and the cluster's head, wherever it is. Ray itself notices after 15 to 60 s; then
    it ends the whole process, and says nothing.
    """

    def __init__(self, ray: Any, tell: Callable[[str], None]) -> None:
        self._node, self._tell, self._stop = ray._private.worker._global_node, tell, threading.Event()
        self._head_called = self._head_missed = 0.0  # when; the first time in a row that nobody answered, 0: it did
        self._thread = threading.Thread(target=self._watch, name="fedmom-watch", daemon=True)
        self._thread.start()

    def head_answers(self) -> bool:
        """Whether the cluster's head does, at this moment: else Ray's own calls to it wait, and one core with them."""
        self._head_called = 0.0
        self._far_head()
        return not self._head_missed

    def close(self) -> None:
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_LOOKS):
            gone = self.look()
            if gone and not self._stop.is_set():
                self._tell(gone)
                return

    def look(self, error_seen: bool = False) -> str:
        """What has ended, in words, "" for nothing.

        error_seen: by somebody, who asks whether this explains it. A process that dies closes its connections some
        moments before it is seen to be dead.
        """
        deadline = time.monotonic() + (_SECONDS_TO_DIE if error_seen else 0.0)
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return gone

    def _gone(self) -> str:
        """What has ended, in words, "" for nothing."""
        processes = getattr(self._node, "all_processes", {})
        for kind, name in (("raylet", "raylet"), ("gcs_server", "head (its GCS)")):
            if any(info.process.poll() is not None for info in processes.get(kind, ())):
                return _ended(name)
        if processes or self._node is None:
            return ""
        # Joined: the raylet is another's child, and the head may be far away.
        path = getattr(self._node, "raylet_socket_name", None)
        if path and sys.platform == "linux" and _listens(path) is False:
            return _ended("raylet")
        return self._far_head()

    def _far_head(self) -> str:
        """The same of a head that may be another machine: it may be away for a while."""
        address = str(getattr(self._node, "gcs_address", ""))
        host, _, port = address.rpartition(":")
        if not port.isdigit() or time.monotonic() - self._head_called < _SECONDS_BETWEEN_CALLS:
            return ""
        self._head_called = time.monotonic()
        try:
            socket.create_connection((host, int(port)), timeout=_SECONDS_OF_A_CALL).close()
        except OSError as error:
            how = "refused" if isinstance(error, ConnectionRefusedError) else "silent"
            self._head_missed = self._head_missed or self._head_called
            seconds = _SECONDS_WITHOUT_HEAD[how]
            if time.monotonic() - self._head_missed < seconds:
                return ""
            silent = f"Ray's head at {address} has not answered for {seconds:g} s"
            return silent if how == "silent" else _ended("head (its GCS)")
        self._head_missed = 0.0
        return ""


def leave_ray(ray: Any, *, gone: bool) -> None:
    """Shut down a Ray that was started or joined here; gone: that it has ended, or its head does not answer.

    Ray asks the head whether it may leave. Where the cable is out, that call has no end.
    """
    if not gone:
        ray.shutdown()
        return
    leaving = threading.Thread(target=ray.shutdown, name="fedmom-leave", daemon=True)
    leaving.start()
    leaving.join(_SECONDS_TO_LEAVE)
    if leaving.is_alive():
        atexit.unregister(ray.shutdown)  # it would wait for this one


def _ended(part: str) -> str:
    return f"Ray's {part} has ended, killed perhaps for want of memory"


def _listens(path: str) -> bool | None:
    """Whether somebody listens at the Unix socket of that path; None where that is not told."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return None
    path = path.removeprefix("unix://")
    return any(words[-1] == path and int(words[3], 16) & 0x10000 for line in lines if len(words := line.split()) == 8)
