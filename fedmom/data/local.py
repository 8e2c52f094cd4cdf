"""Data set "local": every client's examples are its own, read where the client runs.

A client's source is an .npz file (x_train, y_train, and x_test, y_test where it keeps test examples), a folder with one
such file, or a folder of images, train/LABEL/…, and test/LABEL/… likewise. What the server must know of all of them
is `Facts`: a size, a shape, how many classes, and per colour the sums by which images are normalised.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import are_words, check_cast, checked_part, dtype_as_used, kind_of, pixel_counts
from fedmom.data.datasets import Dataset
from fedmom.data.partition import Partition
from fedmom.data.sources.array_files import read_npz_arrays
from fedmom.data.sources.images import named_classes, read_images
from fedmom.data.targets import TARGETS, count_classes
from fedmom.errors import InputError
from fedmom.machine.files import at_home

_KEY = "data.dataset = 'local'"


class Examples(NamedTuple):
    """What one client, or the server, holds."""

    x_train: Tensor  # [n, *shape]: uint8 images [n, C, H, W], or features; n may be 0 at the server
    y_train: Tensor  # [n, ...] labels, or what the task asks for
    x_test: Tensor  # [m, *shape], m may be 0
    y_test: Tensor  # [m, ...]


class Facts(NamedTuple):
    """What leaves a client before the first round."""

    size: int  # n, training examples
    test_size: int  # m
    num_classes: int  # how many outputs its targets need: of labels the highest + 1
    shape: tuple[int, ...]
    dtype: str
    pixels: int  # per channel, of all training images; 0 for features
    sums: tuple[int, ...]  # [C] of the pixels' values 0 … 255
    squares: tuple[int, ...]  # [C] of their squares
    target: tuple[int, ...]  # shape of one target: () of labels
    labels: int  # how many targets there are in all, of tokens each


class Common(NamedTuple):
    """What all clients and the server agree on: the facts of all, put together."""

    sizes: tuple[int, ...]  # [N]
    test_sizes: tuple[int, ...]  # [N]
    num_classes: int
    shape: tuple[int, ...]
    dtype: str
    mean: tuple[float, ...]  # [C] of uint8 / 255; () for features
    std: tuple[float, ...]  # [C]


def as_record(common: Common) -> dict[str, list[int] | list[float] | int | str]:
    """Common as scalars and lists, as a message carries it."""
    return {f"data-{name}": list(v) if isinstance(v, tuple) else v for name, v in common._asdict().items()}


def from_record(record: Mapping[str, Any]) -> Common:
    """The same back; InputError where the server did not send it."""
    try:
        fields = {name: record[f"data-{name}"] for name in Common._fields}
    except KeyError as error:
        raise InputError(f"{_KEY}: the server did not say {error}") from None
    return Common._make(tuple(v) if isinstance(v, list) else v for v in fields.values())


def client_source(data_dir: str, client: int) -> Path:
    """Where a client's examples lie below `data_dir`: client-C.npz, client-C/data (as in a deployment), client-C."""
    root = at_home(data_dir)
    file, folder = root / f"client-{client}.npz", root / f"client-{client}"
    places = [file, folder / "data", folder]
    there = [place for place in places if place.exists()]
    if file in there and folder in there:
        raise InputError(f"{_KEY}: client {client} has {file} and {folder}; leave one of them")
    if there:
        return there[0]
    raise InputError(f"{_KEY}: client {client} has nothing (looked for {', '.join(map(str, places))})")


def read_server(data_dir: str, classes: str = "", targets: str = "labels") -> Examples | None:
    """The server's test examples: test.npz, test/LABEL/…, or in server/data; None where it has none."""
    root = at_home(data_dir)
    for place in (root, root / "server" / "data"):
        files = [file] if (file := place / "test.npz").is_file() else []
        if place != root and place.is_dir():
            files = sorted(path for path in place.iterdir() if path.suffix.lower() == ".npz")
        folders = [folder] if (folder := place / "test").is_dir() else []
        if len(found := files + folders) > 1:
            raise InputError(f"{_KEY}: {place} has {found[0].name} and {found[1].name}; leave the server one test set")
        if files:
            return _read_npz(files[0], ("x_test", "y_test"), targets, classes)
        if folders:
            return _read_folder(place, classes, ("test",), targets)
    return None


def read_source(place: Path, classes: str = "", targets: str = "labels") -> Examples:
    """A client's examples. Raises InputError naming the file and what would be right."""
    if place.is_dir() and not (place / "train").is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix.lower() == ".npz")
        if len(files) != 1:
            what = f"has {len(files)} .npz files" if files else "has neither an .npz file nor a folder train"
            raise InputError(f"{_KEY}: {place}: {what}; it needs one .npz file, or images in train/LABEL/")
        place = files[0]
    folder = place.is_dir()
    if folder:
        examples = _read_folder(place, classes, ("train", "test"), targets)
    else:
        examples = _read_npz(place, (), targets, classes)
    if not len(examples.y_train):
        raise InputError(f"{_KEY}: {place}: has no training examples")
    return examples


def facts_of(examples: Examples, dtype: str = "float64", targets: str = "labels") -> Facts:
    """A client's facts; the sums are exact whole numbers, so those of all clients are those of all images.

    Raises InputError where the run's `dtype` cannot hold the examples.
    """
    for split, features in (("train", examples.x_train), ("test", examples.x_test)):
        check_cast(_KEY, split, features, getattr(torch, dtype))
    x, labels = examples.x_train, (examples.y_train, examples.y_test)
    needed = max(TARGETS[targets].size(y) for y in labels if len(y))
    pixels, sums, squares = 0, list[int](), list[int]()
    if x.dtype == torch.uint8:
        values = torch.arange(256, dtype=torch.int64)
        for counts in pixel_counts(x):
            pixels = int(counts.sum())
            sums.append(int(counts @ values))
            squares.append(int(counts @ values**2))
    dtype = dtype_as_used(x)
    shape = tuple(x.shape[1:])
    return Facts(
        len(x), len(examples.x_test), needed, shape, dtype, pixels, tuple(sums), tuple(squares), *_targets_of(labels)
    )


def _targets_of(labels: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    """(shape of one target, how many numbers all of them are)."""
    return tuple(labels[0].shape[1:]), sum(y.numel() for y in labels)


def agreed(facts: Sequence[Facts], server: Examples | None = None, targets: str = "labels") -> Common:
    """The facts of clients 0 … N − 1 (and the server's labels) put together. InputError names who does not fit."""
    first = facts[0]
    for client, other in enumerate(facts):
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{_KEY}: examples of client {client} are {other.dtype} {list(other.shape)}, those of client 0 "
                f"{first.dtype} {list(first.shape)}"
            )
        if other.target != first.target:
            raise InputError(
                f"{_KEY}: targets of client {client} have the shape {list(other.target)}, those of client 0 "
                f"{list(first.target)}; one for all"
            )
    how = TARGETS[targets]
    num_classes = max(one.num_classes for one in facts)
    if server is not None:
        needed = how.size(server.y_test)
        if not how.grows and needed != num_classes:
            raise InputError(
                f"{_KEY}: the server's targets have {needed} numbers each, those of client 0 {num_classes}"
            )
        num_classes = max(num_classes, needed)
        shape, dtype = tuple(server.x_test.shape[1:]), dtype_as_used(server.x_test)
        if (shape, dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{_KEY}: the server's test examples are {dtype} {list(shape)}, those of client 0 "
                f"{first.dtype} {list(first.shape)}"
            )
    elif not any(one.test_size for one in facts):
        raise InputError(f"{_KEY}: nobody has test examples; give the server a test.npz, or clients x_test and y_test")
    if how.grows:
        labels = sum(one.labels for one in facts) + (0 if server is None else server.y_test.numel())
        count_classes(_KEY, num_classes - 1, labels)
    mean, std = list[float](), list[float]()
    pixels = sum(one.pixels for one in facts)
    for channel in range(len(first.sums)):
        total, squares = (sum(getattr(one, name)[channel] for one in facts) for name in ("sums", "squares"))
        mean.append(total / pixels / 255)
        variance = pixels * squares - total**2  # a whole number: nothing is lost before the root
        std.append(math.sqrt(variance) / pixels / 255 if variance else 1.0)
    sizes, test_sizes = tuple(one.size for one in facts), tuple(one.test_size for one in facts)
    return Common(sizes, test_sizes, num_classes, first.shape, first.dtype, tuple(mean), tuple(std))


def everything(
    data_dir: str, num_clients: int, classes: str = "", targets: str = "labels"
) -> tuple[Dataset, Partition]:
    """All clients' examples one after another, for an engine that has them all, and who holds which."""
    held = [read_source(client_source(data_dir, client), classes, targets) for client in range(num_clients)]
    server = read_server(data_dir, classes, targets)
    common = agreed([facts_of(one, targets=targets) for one in held], server, targets)
    tests = [(server.x_test, server.y_test)] if server else [(one.x_test, one.y_test) for one in held]
    x_test, y_test = (torch.cat([pair[part] for pair in tests if len(pair[1])]) for part in (0, 1))
    x, y = torch.cat([one.x_train for one in held]), torch.cat([one.y_train for one in held])
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    data = Dataset(x, y, x_test, y_test, common.num_classes, common.mean, common.std, "none")
    return data, Partition(np.arange(len(y)), offsets)


def one_of(common: Common, client: int, examples: Examples, targets: str = "labels") -> tuple[Dataset, Partition]:
    """The same from client c's side: its own examples, and a partition in which only its own part is filled.

    Raises InputError where the examples are no longer those of `common`.
    """
    facts = facts_of(examples, targets=targets)
    if facts.size != common.sizes[client] or (facts.shape, facts.dtype) != (common.shape, common.dtype):
        raise InputError(
            f"{_KEY}: client {client} holds {facts.size} examples {facts.dtype} {list(facts.shape)}; when the run "
            f"began they were {common.sizes[client]} of {common.dtype} {list(common.shape)}"
        )
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    indices = np.zeros(offsets[-1], dtype=np.int64)
    indices[offsets[client] : offsets[client + 1]] = np.arange(facts.size)
    return Dataset(*examples, common.num_classes, common.mean, common.std, "none"), Partition(indices, offsets)


def none_of(common: Common, server: Examples | None, targets: str = "labels") -> tuple[Dataset, Partition]:
    """The same from the server's side, which holds no training example."""
    dtype = getattr(torch, common.dtype)
    x, y = torch.zeros(0, *common.shape, dtype=dtype), TARGETS[targets].none(common.shape, common.num_classes)
    x_test, y_test = (server.x_test, server.y_test) if server else (x, y)
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    data = Dataset(x, y, x_test, y_test, common.num_classes, common.mean, common.std, "none")
    return data, Partition(np.zeros(offsets[-1], dtype=np.int64), offsets)


# Where the arrays come from.


def _read_npz(path: Path, required: tuple[str, ...], targets: str, classes: str) -> Examples:
    arrays = read_npz_arrays(_KEY, path)
    required = required or ("x_train", "y_train")
    missing = [name for name in required if name not in arrays]
    if missing:
        raise InputError(f"{_KEY}: {path}: has no {', '.join(missing)}")
    parts = {}
    for split in ("train", "test"):
        for one, other in ((f"x_{split}", f"y_{split}"), (f"y_{split}", f"x_{split}")):
            if one in arrays and other not in arrays:
                raise InputError(f"{_KEY}: {path}: has {one} and no {other}")
        if f"x_{split}" in arrays and f"y_{split}" in arrays:
            y_given = arrays[f"y_{split}"]
            if targets == "labels" and are_words(y_given):
                y_given = numbered(f"{_KEY}: {path}: y_{split}", y_given, classes)
            pair = arrays[f"x_{split}"], y_given
            x, y = checked_part(f"{_KEY}: {path}", split, *pair, targets=targets)
            if isinstance(x, dict):
                raise InputError(f"{_KEY}: {path}: has several inputs; a client's own examples are one array")
            parts[split] = x, y
    return _filled(parts)


def numbered(what: str, words: Any, classes: str) -> np.ndarray:
    """[n] words as numbers: their places among `classes`, for no client knows the words of all others."""
    names = named_classes(classes)
    if unknown := [word for word in np.unique(words).tolist() if word not in names]:
        right = f"data.classes = {classes!r} does not name" if names else "data.classes must name all, as in 'cat,dog':"
        raise InputError(f"{what} has words; {right} {unknown[0]!r}")
    return np.array([names.index(word) for word in words.tolist()], dtype=np.int64)


def _filled(parts: dict[str, tuple[Tensor, Tensor]]) -> Examples:
    """Examples of which a split may be missing: it is then empty, in the other's shape."""
    x, y = next(iter(parts.values()))
    empty = x[:0], y[:0]
    train, test = parts.get("train", empty), parts.get("test", empty)
    if train[0].shape[1:] != test[0].shape[1:] or dtype_as_used(train[0]) != dtype_as_used(test[0]):
        kinds = f"{kind_of(train[0])}, those of x_test are {kind_of(test[0])}"
        raise InputError(f"{_KEY}: examples of x_train are {kinds}")
    if train[1].shape[1:] != test[1].shape[1:]:
        kinds = f"{list(train[1].shape[1:])}, those of y_test {list(test[1].shape[1:])}"
        raise InputError(f"{_KEY}: targets of y_train have the shape {kinds}; give both in one shape")
    return Examples(*train, *test)


def _read_folder(folder: Path, classes: str, splits: tuple[str, ...], targets: str) -> Examples:
    if targets != "labels":
        raise InputError(f"{_KEY}: {folder}: folders of images have labels, and data.task asks for {targets}")
    parts = {split: read_images(_KEY, folder / split, classes) for split in splits if (folder / split).is_dir()}
    if not parts:
        raise InputError(f"{_KEY}: {folder}: has no folder {' or '.join(splits)}")
    return _filled(parts)
