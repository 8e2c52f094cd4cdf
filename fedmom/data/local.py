"""Data set "local": every client's examples are its own, read where the client runs.

What the server must know of all of them is `Facts`: a size, a shape, how many classes, and per colour the sums by which
images are normalised. given/own_files.py reads the examples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import check_cast, dtype_as_used, pixel_counts
from fedmom.data.datasets import Dataset
from fedmom.data.given.held_out import OwnSplit, OwnTests
from fedmom.data.given.own_files import KEY, WHOLE, Examples, client_source, read_client, read_server
from fedmom.data.partition import Partition
from fedmom.data.targets import TARGETS, count_classes
from fedmom.errors import InputError


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
        raise InputError(f"{KEY}: the server did not say {error}") from None
    return Common._make(tuple(v) if isinstance(v, list) else v for v in fields.values())


def facts_of(examples: Examples, dtype: str = "float64", targets: str = "labels") -> Facts:
    """A client's facts; the sums are exact whole numbers, so those of all clients are those of all images.

    Raises InputError where the run's `dtype` cannot hold the examples.
    """
    for split, features in (("train", examples.x_train), ("test", examples.x_test)):
        check_cast(KEY, split, features, getattr(torch, dtype))
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
                f"{KEY}: examples of client {client} are {other.dtype} {list(other.shape)}, those of client 0 "
                f"{first.dtype} {list(first.shape)}"
            )
        if other.target != first.target:
            raise InputError(
                f"{KEY}: targets of client {client} have the shape {list(other.target)}, those of client 0 "
                f"{list(first.target)}; one for all"
            )
    how = TARGETS[targets]
    num_classes = max(one.num_classes for one in facts)
    if server is not None:
        needed = how.size(server.y_test)
        if not how.grows and needed != num_classes:
            raise InputError(f"{KEY}: the server's targets have {needed} numbers each, those of client 0 {num_classes}")
        num_classes = max(num_classes, needed)
        shape, dtype = tuple(server.x_test.shape[1:]), dtype_as_used(server.x_test)
        if (shape, dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{KEY}: the server's test examples are {dtype} {list(shape)}, those of client 0 "
                f"{first.dtype} {list(first.shape)}"
            )
    elif not any(one.test_size for one in facts):
        raise InputError(f"{KEY}: nobody has test examples; give the server a test.npz, or clients x_test and y_test")
    if how.grows:
        labels = sum(one.labels for one in facts) + (0 if server is None else server.y_test.numel())
        count_classes(KEY, num_classes - 1, labels)
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
    data_dir: str, num_clients: int, classes: str = "", targets: str = "labels", how: OwnSplit = WHOLE
) -> tuple[Dataset, Partition, OwnTests | None]:
    """All clients' examples one after another, for an engine that has them all, and who holds which; own tests too."""
    places = [client_source(data_dir, client) for client in range(num_clients)]
    held = [read_client(place, client, classes, targets, how) for client, place in enumerate(places)]
    server = read_server(data_dir, classes, targets)
    common = agreed([facts_of(one, targets=targets) for one in held], server, targets)
    own = _own_tests(held, common)
    tests = (server.x_test, server.y_test) if server else own[:2] if own else None
    assert tests is not None  # as `agreed` has seen
    x, y = torch.cat([one.x_train for one in held]), torch.cat([one.y_train for one in held])
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    data = Dataset(x, y, *tests, common.num_classes, common.mean, common.std, "none")
    return data, Partition(np.arange(len(y)), offsets), own


def _own_tests(held: Sequence[Examples], common: Common) -> OwnTests | None:
    tests = [(one.x_test, one.y_test) for one in held if len(one.y_test)]
    if not tests:
        return None
    x, y = (torch.cat(parts) for parts in zip(*tests, strict=True))
    return OwnTests(x, y, Partition(np.arange(len(y)), np.concatenate([[0], np.cumsum(common.test_sizes)])))


def one_of(
    common: Common, client: int, examples: Examples, targets: str = "labels"
) -> tuple[Dataset, Partition, OwnTests]:
    """The same from client c's side: its own examples, and partitions in which only its own part is filled.

    Raises InputError where the examples are no longer those of `common`.
    """
    facts = facts_of(examples, targets=targets)
    held, right = (facts.shape, facts.dtype, facts.size), (common.shape, common.dtype, common.sizes[client])
    if (*held, facts.test_size) != (*right, common.test_sizes[client]):
        raise InputError(
            f"{KEY}: client {client} holds {facts.size} examples {facts.dtype} {list(facts.shape)} and "
            f"{facts.test_size} to test; when the run began they were {common.sizes[client]} of {common.dtype} "
            f"{list(common.shape)} and {common.test_sizes[client]} to test"
        )
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    indices = np.zeros(offsets[-1], dtype=np.int64)
    indices[offsets[client] : offsets[client + 1]] = np.arange(facts.size)
    ends = np.zeros(len(offsets), dtype=np.int64)
    ends[client + 1 :] = len(examples.y_test)
    own = OwnTests(examples.x_test, examples.y_test, Partition(np.arange(len(examples.y_test)), ends))
    data = Dataset(*examples, common.num_classes, common.mean, common.std, "none")
    return data, Partition(indices, offsets), own


def none_of(common: Common, server: Examples | None, targets: str = "labels") -> tuple[Dataset, Partition]:
    """The same from the server's side, which holds no training example."""
    dtype = getattr(torch, common.dtype)
    x, y = torch.zeros(0, *common.shape, dtype=dtype), TARGETS[targets].none(common.shape, common.num_classes)
    x_test, y_test = (server.x_test, server.y_test) if server else (x, y)
    offsets = np.concatenate([[0], np.cumsum(common.sizes)])
    data = Dataset(x, y, x_test, y_test, common.num_classes, common.mean, common.std, "none")
    return data, Partition(np.zeros(offsets[-1], dtype=np.int64), offsets)
