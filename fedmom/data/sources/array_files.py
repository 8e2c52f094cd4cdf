"""Files that hold arrays, .npz, MNIST's idx and our own digits: read whole, or one line that names the file."""

import base64
import gzip
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmom.data.sources.mapped import mapped_member
from fedmom.errors import InputError
from fedmom.user_code import one_line

DIGITS = Path(__file__).with_name("digits.json")  # which names its source and its licence
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [1797, 8, 8] of values 0 to 16, labels int64 [1797]): scikit-learn's digits, in its order."""
    found = json.loads(DIGITS.read_text(encoding="utf-8"))
    pixels = zlib.decompress(base64.b85decode("".join(found["images"])))
    labels = np.array([int(label) for label in found["labels"]], dtype=np.int64)
    return np.frombuffer(pixels, dtype=np.uint8).reshape(len(labels), 8, 8), labels


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits of digits.json: values 0 to 16 become round(255 v / 16), every fifth example of a class is test.

    The split uses no random generator, so that it is the same for ever: 1,437 + 360 examples.
    """
    images, labels = read_digits()
    images = ((images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    is_test = np.zeros(len(images), dtype=bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def read_npz_arrays(key: str, path: Path) -> dict[str, object]:
    """Those of ARRAYS that an .npz file has, unchecked, `x_train/ids` and the like as a dict; large ones are mapped.

    Raises InputError beginning with `key` where the file cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{key}: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{key}: {path} is not an .npz file, or truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: _member(path, archive, name) for name in archive.files if name.partition("/")[0] in ARRAYS}
    except Exception as error:  # zipfile, zlib and numpy's header parser each have their own
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from error
    return _by_name(f"{key}: {path}", found)


def _member(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    zipped = archive.zip
    mapped = mapped_member(path, zipped, f"{name}.npy") if zipped and f"{name}.npy" in zipped.namelist() else None
    return archive[name] if mapped is None else mapped


def _by_name(where: str, found: Mapping[str, np.ndarray]) -> dict[str, object]:
    """{"x_train/ids": …, "y_train": …} -> {"x_train": {"ids": …}, "y_train": …}."""
    arrays: dict[str, Any] = {}
    for name in sorted(found, key=lambda name: (ARRAYS.index(name.partition("/")[0]), name)):
        array, slash, own = name.partition("/")
        if slash and not isinstance(arrays.setdefault(array, {}), dict):
            raise InputError(f"{where}: has {array} and {name}; leave the one array, or the inputs by name")
        if slash and array.startswith("y"):
            raise InputError(f"{where}: has {name}: inputs may be several, x_train/NAME; targets are one array")
        if slash:
            arrays[array][own] = found[name]
        else:
            arrays[array] = found[name]
    return arrays


def idx_files(folder: Path) -> list[Path] | None:
    """MNIST's four files in the order of ARRAYS, each plain or gzipped; None unless all are there."""
    files = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        found = [path for end in ("-ubyte", "-ubyte.gz") if (path := folder / f"{stem}{end}").is_file()]
        if not found:
            return None
        files.append(found[0])
    return files


def read_idx(key: str, path: Path) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0 0 8 ndim, ndim big-endian int32 sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise InputError(f"{key}: {path} is not an idx file of bytes (it must start with 0 0 8)")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start]) if len(content) >= start else ()
    expected = start + math.prod(shape)
    if not shape or len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise InputError(f"{key}: {path} is {problem}: {len(content)} bytes, expected {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()
