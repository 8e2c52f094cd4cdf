"""Arrays that stay in their file: a member of an .npz file that is stored as it is, and raw numbers.

The kernel reads what is looked at, keeps it while there is memory, and gives all processes of a machine the same pages.
"""

import struct
import zipfile
from pathlib import Path

import numpy as np

from fedmom.errors import InputError
from fedmom.user_code import one_line

LEAST = 64 << 20  # bytes of a member that stays in its file; a smaller one is read, and its checksum compared
_LOCAL = 30  # bytes of a zip's header before a member, without its name and extra field


def mapped_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """The array `name` of an .npz file, mapped copy-on-write; None where it is small, compressed or no plain array."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < LEAST:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_size, extra_size = struct.unpack("<26x2H", file.read(_LOCAL))
        file.seek(name_size + extra_size, 1)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            return None
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read(file)
        if dtype.hasobject:
            return None
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if in_columns else "C")


def mapped_numbers(key: str, path: Path, dtype: str) -> np.ndarray:
    """A file of nothing but numbers, [n], mapped copy-on-write. InputError beginning with `key`."""
    width = np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if size == 0 or size % width:
            raise InputError(
                f"{key}: {path} has {size} bytes: it must be raw {np.dtype(dtype).name}, {width} bytes each"
            )
        return np.memmap(path, dtype, "c")
    except OSError as error:
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from error
