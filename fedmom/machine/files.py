"""Paths as people type them, and files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedmom.errors import InputError


def at_home(path: str | Path) -> Path:
    """The path, its leading ~ or ~user as the shell has it: it leaves --out=~/x and all values of keys as they are.

    Raises InputError for a user that this machine does not know.
    """
    found = Path(os.path.expanduser(path))
    if (user := found.parts[0] if found.parts else "").startswith("~"):
        raise InputError(f"{path}: {user} is no user of this machine; ./{path} is a folder or file of that name here")
    return found


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """A name to write to; when the block ends well the file is synced and takes `path`'s place, else removed.

    sync: wait until it is on the disk, so that not even a power cut leaves an empty file.
    Raises InputError in one line when the disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        if sync:
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was there is unharmed") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    with whole_file(path, sync) as aside:
        aside.write_text(text, encoding="utf-8")


def over_text(path: Path, text: str) -> None:
    """Write over a file that is there, where no disk space is left for a new one. Raises OSError."""
    with open(path, "r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()
