"""Streams of tokens, cut into windows: x of T tokens, y the same T shifted by one, both views of one memory.

A stream is an array x_train of one axis of whole numbers without y_train, and x_test likewise; or files of raw uint16,
train.bin beside val.bin, as nanoGPT (github.com/karpathy/nanoGPT) writes them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import plain_tensor
from fedmom.data.inputs import ends
from fedmom.data.sources.mapped import mapped_numbers
from fedmom.data.targets import count_classes
from fedmom.errors import InputError
from fedmom.machine.files import at_home

TRAIN, TEST = "train.bin", "val.bin"


def is_stream(arrays: Mapping[str, object]) -> bool:
    """Whether x_train is one axis of whole numbers, and nothing says what is to be predicted."""
    x: Any = arrays.get("x_train")
    if "y_train" in arrays or "y_test" in arrays or getattr(x, "ndim", 0) != 1:
        return False
    kind = np.dtype(str(x.dtype).removeprefix("torch.")).kind if not isinstance(x, Tensor) else ""
    whole = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    return whole or kind in ("i", "u")


def windows_of(
    key: str, arrays: Mapping[str, object], context: int, targets: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """x_train [n, T], y_train [n, T], x_test, y_test, and one more than the highest token of both streams.

    n = ⌊(tokens − 1) / T⌋; what remains at the end is in no window. Raises InputError.
    """
    if targets != "tokens":
        raise InputError(f"{key}: is a stream of tokens, for data.task = 'per-token'; this task asks for {targets}")
    if "x_test" not in arrays:
        raise InputError(f"{key}: has no x_test (a stream of tokens has x_train and x_test)")
    train, test = (_tokens_of(f"{key}: {name}", arrays[name]) for name in ("x_train", "x_test"))
    if context == 0:
        raise InputError(
            f"data.context = 0: {key} is a stream of {len(train)} tokens; give T, and its windows of T are the examples"
        )
    for name, stream in (("x_train", train), ("x_test", test)):
        if len(stream) <= context:
            least = f"a window needs {context + 1}"
            raise InputError(f"data.context = {context}: {name} of {key} has {len(stream)} tokens, and {least}")
    highest = max(ends(train)[1], ends(test)[1])
    return (*_cut(train, context), *_cut(test, context), count_classes(key, highest, len(train) + len(test)))


def _tokens_of(what: str, array: object) -> Tensor:
    """[N] whole numbers of 0 and more, as narrow as they came."""
    narrow = array
    if isinstance(array, np.ndarray) and array.dtype.kind == "u" and array.dtype.itemsize == 1:
        narrow = array.astype(np.int16)  # uint8 means pixels
    elif isinstance(array, Tensor) and array.dtype == torch.uint8:
        narrow = array.to(torch.int16)
    stream = plain_tensor(what, narrow, narrow=True)
    if stream.is_floating_point() or stream.dtype == torch.bool or stream.ndim != 1:
        raise InputError(f"{what} is {stream.dtype} {list(stream.shape)}: a stream of tokens is whole numbers [n]")
    if (low := ends(stream)[0]) < 0:
        raise InputError(f"{what} has a negative token, {low}: tokens are 0, 1, 2, …")
    return stream


def _cut(stream: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Views [n, T]: the tokens, and the next of each."""
    size = (len(stream) - 1) // context * context
    return stream[:size].view(-1, context), stream[1 : size + 1].view(-1, context)


def is_token_path(name: str) -> bool:
    """Whether data.dataset means a file of tokens, or a folder of them."""
    return name.lower().endswith(".bin") or ("/" in name and (at_home(name) / TRAIN).is_file())


def read_token_files(key: str, place: Path) -> dict[str, object]:
    """x_train and x_test of a folder with train.bin and val.bin, or of a file of tokens with val.bin beside it."""
    single = place.suffix.lower() == ".bin"
    if not single and not place.is_dir():
        what = "is no folder of tokens" if place.exists() else "is not there"
        raise InputError(f"{key}: {place} {what}: give FILE.npz, FILE.bin, or a folder with {TRAIN} and {TEST}")
    train, test = (place, place.with_name(TEST)) if single else (place / TRAIN, place / TEST)
    if train.name == TEST:
        raise InputError(f"{key}: holds the test tokens; name {train.with_name(TRAIN)}, or the folder of both")
    for path in (train, test):
        if not path.is_file():
            raise InputError(f"{key}: there is no file {path} (tokens are {TRAIN} and {TEST}, raw uint16)")
    return {"x_train": mapped_numbers(key, train, "<u2"), "x_test": mapped_numbers(key, test, "<u2")}
