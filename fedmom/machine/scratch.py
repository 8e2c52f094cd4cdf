"""Folders for the time of one process: whoever comes next removes those whose process was killed."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TextIO

_PREFIX = "fedmom-"
_LOCK = "alive"  # locked as long as the process lives, which a number of a process would not say across containers


class ScratchFolder:
    """A folder in the system's place for temporary files, until `close` or the end of the process."""

    def __init__(self) -> None:
        remove_orphans()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = open(self.path / f"{_LOCK}.new", "w")  # noqa: SIM115
        _is_free(self._lock)
        os.rename(self._lock.name, self.path / _LOCK)  # so that nobody ever sees it unlocked

    def close(self) -> None:
        """Remove it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_orphans() -> None:
    """Remove the folders of processes that are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), open(path, "r+") as file:
            # Owned by somebody else, it could be a trap, and a symbolic link lead anywhere.
            if path.parent.lstat().st_uid == os.getuid() and not path.parent.is_symlink() and _is_free(file):
                shutil.rmtree(path.parent, ignore_errors=True)


def _is_free(file: TextIO) -> bool:
    """Lock the file, if nobody else has."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover: no such locks, so nothing is known to be free
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
