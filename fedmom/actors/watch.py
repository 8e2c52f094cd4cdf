"""A watch on whether the Ray that this process uses still lives."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_DIE = 0.2, 0.3
# A cluster's head may be started anew elsewhere; one of our own is not.
_SECONDS_WITHOUT_HEAD = 20.0


class Watch:
    """Tells, once, when a part of Ray without which nothing is answered any more has ended on this machine.

    Ray itself notices after 15 to 60 s; then it ends the whole process, and says nothing.
    """

    def __init__(self, ray: Any, tell: Callable[[str], None]) -> None:
        self._node, self._tell, self._stop = ray._private.worker._global_node, tell, threading.Event()
        self._head_seen = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="fedmom-watch", daemon=True)
        self._thread.start()

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
        return f"Ray's {gone} has ended, killed perhaps for want of memory" if gone else ""

    def _gone(self) -> str:
        """Which part has ended, "" for none."""
        processes = getattr(self._node, "all_processes", {})
        for kind, name in (("raylet", "raylet"), ("gcs_server", "head (its GCS)")):
            if any(info.process.poll() is not None for info in processes.get(kind, ())):
                return name
        if processes or self._node is None:
            return ""
        # Joined: the raylet is another's child, and the head may be far away.
        path = getattr(self._node, "raylet_socket_name", None)
        if path and sys.platform == "linux" and _listens(path) is False:
            return "raylet"
        return self._far_head()

    def _far_head(self) -> str:
        host, _, port = str(getattr(self._node, "gcs_address", "")).rpartition(":")
        now = time.monotonic()
        if not port.isdigit() or now - self._head_seen < 2.0:
            return ""
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except ConnectionRefusedError:
            return "head (its GCS)" if now - self._head_seen > _SECONDS_WITHOUT_HEAD else ""
        except OSError:  # the network's fault, which passes
            return ""
        self._head_seen = now
        return ""


def _listens(path: str) -> bool | None:
    """Whether somebody listens at the Unix socket of that path; None where that is not told."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return None
    path = path.removeprefix("unix://")
    return any(words[-1] == path and int(words[3], 16) & 0x10000 for line in lines if len(words := line.split()) == 8)
