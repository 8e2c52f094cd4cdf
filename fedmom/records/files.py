"""Files that appear whole or not at all, and the names of those in a run folder."""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmom.errors import InputError
from fedmom.method.state import Tree

CONFIG, ENVIRONMENT, ROUNDS = "config.toml", "environment.json", "rounds.jsonl"
MANIFEST = "sweep.json"  # of a sweep's folder: what runs there are to be, and how each ended
CHECKPOINT, CLIENTS, FINAL = "checkpoint.safetensors", "clients.safetensors", "final.safetensors"
STATUS = "status.json"  # how the run is or how it ended: `fedmom.records.status` writes and reads it
ENDED = "ended.json"  # of a run under Flower's own command: how it ended, for whoever follows it from afar
# What a checked file says of itself begins so; the others' begins with {, which is no flipped bit away from it.
_CHECKED = re.compile(r"crc32:([0-9a-f]{8}) ")


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


def write_tensors(path: Path, tensors: Tree, about: dict[str, Any]) -> None:
    """A safetensors file; the same tensors and `about` give the same bytes.

    Those that a run goes on from get a checksum, by which a damaged disk or copy is found.
    """
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    if path.name in (CHECKPOINT, CLIENTS):
        text = f"crc32:{_checksum(content, text)} {text}"
    # One metadata entry: safetensors keeps several in a hash map, whose order differs from process to process.
    data = save(content, {"fedmom": text})
    with whole_file(path) as aside:
        aside.write_bytes(data)


def _checksum(tensors: Tree, about: str) -> str:
    """Of names, dtypes, shapes, bytes and `about`. CRC-32 finds every damage of up to 32 bits, and costs little."""
    total = zlib.crc32(about.encode())
    for name, value in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def read_about(path: Path) -> dict[str, Any]:
    """What a file of `write_tensors` says of itself; InputError where the file is missing or broken."""
    return _read(path, tensors=False)[1]


def read_tensors(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Tensors and `about` of a file of `write_tensors`; InputError where the file is missing, broken or damaged."""
    return _read(path, tensors=True)


def _read(path: Path, tensors: bool) -> tuple[Tree, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["fedmom"]
            checked = _CHECKED.match(text)
            text = text[checked.end() :] if checked else text
            about = json.loads(text)
            if not isinstance(about, dict):
                raise ValueError("it does not say what it is")
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            if tensors and checked and checked[1] != _checksum(found, text):
                raise ValueError("damaged: its content does not fit its checksum")
            return found, about
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is not a whole checkpoint of fedmom ({reason}){_hint(path)}") from None


def _hint(path: Path) -> str:
    if path.name == CHECKPOINT:
        return "; without it the run starts again from round 1"
    return f"; without it and {CHECKPOINT} the run starts again from round 1" if path.name == CLIENTS else ""
