"""The files of clients that bring their own data, where data.dataset = "local".

A client's source is an .npz file (x_train, y_train, and x_test, y_test where it keeps test examples), a folder with one
such file, or a folder of images, train/LABEL/…, and test/LABEL/… likewise.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import are_words, checked_part, dtype_as_used, kind_of
from fedmom.data.given.held_out import OwnSplit, held_out
from fedmom.data.sources.array_files import read_npz_arrays
from fedmom.data.sources.images import named_classes, read_images
from fedmom.errors import InputError
from fedmom.machine.files import at_home

KEY = "data.dataset = 'local'"
WHOLE = OwnSplit()


class Examples(NamedTuple):
    """What one client, or the server, holds."""

    x_train: Tensor  # [n, *shape]: uint8 images [n, C, H, W], or features; n may be 0 at the server
    y_train: Tensor  # [n, ...] labels, or what the task asks for
    x_test: Tensor  # [m, *shape], m may be 0
    y_test: Tensor  # [m, ...]


def client_source(data_dir: str, client: int) -> Path:
    """Where a client's examples lie below `data_dir`: client-C.npz, client-C/data (as in a deployment), client-C."""
    root = at_home(data_dir)
    file, folder = root / f"client-{client}.npz", root / f"client-{client}"
    places = [file, folder / "data", folder]
    there = [place for place in places if place.exists()]
    if file in there and folder in there:
        raise InputError(f"{KEY}: client {client} has {file} and {folder}; leave one of them")
    if there:
        return there[0]
    raise InputError(f"{KEY}: client {client} has nothing (looked for {', '.join(map(str, places))})")


def read_server(data_dir: str, classes: str = "", targets: str = "labels") -> Examples | None:
    """The server's test examples: test.npz, test/LABEL/…, or in server/data; None where it has none."""
    root = at_home(data_dir)
    for place in (root, root / "server" / "data"):
        files = [file] if (file := place / "test.npz").is_file() else []
        if place != root and place.is_dir():
            files = sorted(path for path in place.iterdir() if path.suffix.lower() == ".npz")
        folders = [folder] if (folder := place / "test").is_dir() else []
        if len(found := files + folders) > 1:
            raise InputError(f"{KEY}: {place} has {found[0].name} and {found[1].name}; leave the server one test set")
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
            raise InputError(f"{KEY}: {place}: {what}; it needs one .npz file, or images in train/LABEL/")
        place = files[0]
    folder = place.is_dir()
    if folder:
        examples = _read_folder(place, classes, ("train", "test"), targets)
    else:
        examples = _read_npz(place, (), targets, classes)
    if not len(examples.y_train):
        raise InputError(f"{KEY}: {place}: has no training examples")
    return examples


def read_client(
    place: Path, client: int, classes: str = "", targets: str = "labels", how: OwnSplit = WHOLE
) -> Examples:
    """`read_source`, with the share of its training examples that the client holds out as its test examples."""
    found = read_source(place, classes, targets)
    if not how.share:
        return found
    if len(found.y_test):
        raise InputError(
            f"data.client-test-share = {how.share:g}: client {client} brings {len(found.y_test)} test examples of its "
            "own; leave it 0"
        )
    out = torch.from_numpy(held_out(np.array([len(found.y_train)]), how.share, how.seed, np.array([client])))
    return Examples(found.x_train[~out], found.y_train[~out], found.x_train[out], found.y_train[out])


def _read_npz(path: Path, required: tuple[str, ...], targets: str, classes: str) -> Examples:
    arrays = read_npz_arrays(KEY, path)
    required = required or ("x_train", "y_train")
    missing = [name for name in required if name not in arrays]
    if missing:
        raise InputError(f"{KEY}: {path}: has no {', '.join(missing)}")
    parts = {}
    for split in ("train", "test"):
        for one, other in ((f"x_{split}", f"y_{split}"), (f"y_{split}", f"x_{split}")):
            if one in arrays and other not in arrays:
                raise InputError(f"{KEY}: {path}: has {one} and no {other}")
        if f"x_{split}" in arrays and f"y_{split}" in arrays:
            y_given = arrays[f"y_{split}"]
            if targets == "labels" and are_words(y_given):
                y_given = numbered(f"{KEY}: {path}: y_{split}", y_given, classes)
            pair = arrays[f"x_{split}"], y_given
            x, y = checked_part(f"{KEY}: {path}", split, *pair, targets=targets)
            if isinstance(x, dict):
                raise InputError(f"{KEY}: {path}: has several inputs; a client's own examples are one array")
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
        raise InputError(f"{KEY}: examples of x_train are {kinds}")
    if train[1].shape[1:] != test[1].shape[1:]:
        kinds = f"{list(train[1].shape[1:])}, those of y_test {list(test[1].shape[1:])}"
        raise InputError(f"{KEY}: targets of y_train have the shape {kinds}; give both in one shape")
    return Examples(*train, *test)


def _read_folder(folder: Path, classes: str, splits: tuple[str, ...], targets: str) -> Examples:
    if targets != "labels":
        raise InputError(f"{KEY}: {folder}: folders of images have labels, and data.task asks for {targets}")
    parts = {split: read_images(KEY, folder / split, classes) for split in splits if (folder / split).is_dir()}
    if not parts:
        raise InputError(f"{KEY}: {folder}: has no folder {' or '.join(splits)}")
    return _filled(parts)
