"""What was measured on this machine, in small JSON files of the user's cache folder that the next start may read.

Nothing depends on them: a file that is missing, damaged, somebody else's or cannot be written is done without.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

CACHE = "FEDMOM_CACHE"  # the environment's own word on where the folder is; empty: there is none
_shut = False  # within `nothing_kept`
_PATIENCE = 2.0  # seconds: another process has the folder for milliseconds, and one that was stopped must not stop us


def folder() -> Path | None:
    """$FEDMOM_CACHE, else $XDG_CACHE_HOME/fedmom, else ~/.cache/fedmom; None where FEDMOM_CACHE is empty."""
    own = os.environ.get(CACHE)
    if own is not None:
        return Path(own) if own else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmom"
    except RuntimeError:  # a user without a home
        return None


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it this process reads what was kept and puts nothing there: it only looks."""
    global _shut
    before, _shut = _shut, True
    try:
        yield
    finally:
        _shut = before


class Kept(Generic[T]):
    """{name: value} in one file: the last `most` that any process has put there."""

    def __init__(self, path: Path | None, value: Callable[[Any], T], most: int) -> None:
        """path: None for no file.

        value: makes a value of what JSON gave. What it cannot take (it raises) was not put here, and is left out.
        """
        self.path, self._value, self._most = path, value, most

    def read(self) -> dict[str, T]:
        """All that can be read, the oldest first."""
        found: dict[str, T] = {}
        for name, raw in self._raw().items():
            with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError, OverflowError):
                found[name] = self._value(raw)
        return found

    def put(self, name: str, value: T) -> bool:
        """Keep one more, beside what other processes have put meanwhile; False where it cannot be written.

        The file is always a whole one.
        """
        if self.path is None or _shut:
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                known: dict[str, Any] = dict(self.read())
                known.pop(name, None)
                known[name] = value
                _replace(self.path, json.dumps(dict(list(known.items())[-self._most :]), indent=1))
        except OSError:
            return False
        return True

    def _raw(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def _replace(path: Path, text: str) -> None:
    """Written beside, under a name that no other process has: their numbers are alike in two containers."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Within it no other process puts anything into the folder; where that cannot be had, an entry may be lost."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not a POSIX system
        yield
        return
    handle = os.open(place, os.O_RDONLY)  # the folder itself: there is no lock file to leave
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)
