"""The files of a run folder by name, and how tensors are written to them and read back."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedmom.errors import InputError
from fedmom.machine.files import whole_file
from fedmom.method.state import Tree

CONFIG, ENVIRONMENT, ROUNDS = "config.toml", "environment.json", "rounds.jsonl"
RESULTS = "clients.jsonl"  # every client's own results: a line on the clients, then one per evaluation
MANIFEST = "sweep.json"  # of a sweep's folder: what runs there are to be, and how each ended
CHECKPOINT, CLIENTS, FINAL = "checkpoint.safetensors", "clients.safetensors", "final.safetensors"
BEST = "best.safetensors"  # of the best evaluation so far, where run.keep-best asks for it
FIXED = "fixed.safetensors"  # of a model with frozen or tied tensors: what its state_dict has beyond x and the buffers
STATUS = "status.json"  # how the run is or how it ended: `fedmom.records.status` writes and reads it
ENDED = "ended.json"  # of a run under Flower's own command: how it ended, for whoever follows it from afar
# What a checked file says of itself begins so; the others' begins with {, which is no flipped bit away from it.
_CHECKED = re.compile(r"crc32:([0-9a-f]{8}) ")


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


def write_fixed(folder: Path, tensors: Tree, about: dict[str, Any]) -> None:
    """What `Supervised.beside` gives, but for tensors that safetensors has not; nothing where that is nothing."""
    if about:
        plain = {
            n: t for n, t in tensors.items() if t.layout == torch.strided and not (t.is_quantized or t.is_complex())
        }
        write_tensors(folder / FIXED, plain, about)


def whole_model(folder: Path, moving: Tree) -> Tree:
    """The state_dict of the model whose x and buffers are `moving`."""
    if not moving or not (folder / FIXED).is_file():
        return moving
    fixed, about = read_tensors(folder / FIXED)
    moving = {n: torch.view_as_complex(t) if n in about["complex"] else t for n, t in moving.items()}
    found = {name: moving[own].clone() for name, own in about["names"].items() if own}
    return {**found, **fixed}


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
