"""The header of an .npy file, parsed once for all that have the same. No torch: any Flower app's actors load this."""

import functools
import tokenize
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np


class Header(NamedTuple):
    """What the first bytes of an .npy file say."""

    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    num_bytes: int  # of the header itself


def npy_header(view: memoryview) -> Header | None:
    """Of an .npy file without pickled objects; None for anything else."""
    if len(view) < 12 or view[:6] != b"\x93NUMPY":
        return None
    size = 10 + int.from_bytes(view[8:10], "little") if view[6] == 1 else 12 + int.from_bytes(view[8:12], "little")
    return _parsed(bytes(view[:size]))


@functools.lru_cache(maxsize=1024)  # a model's arrays have the same headers in every message
def _parsed(header: bytes) -> Header | None:
    read = np.lib.format.read_array_header_1_0 if header[6] == 1 else np.lib.format.read_array_header_2_0
    file = BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = read(file)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError):  # numpy reads it as Python
        return None
    return None if dtype.hasobject else Header(dtype, fortran, shape, len(header))
