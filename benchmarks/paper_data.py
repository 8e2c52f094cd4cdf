"""What benchmarks/paper.py reads and writes: images, from whatever holds them, and the rows of a folder."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmom.data.datasets import Dataset, load_dataset
from fedmom.data.sources.array_files import idx_files

SIDE, COLUMNS = 32, 64  # of a tile, in pixels; of an atlas, in tiles


def read_images(path: Path) -> Dataset:
    """CIFAR-10 as an .npz file or as atlases (labels.npz, train_0.webp, …), or Fashion-MNIST's idx files.

    A folder may also hold cifar10.npz, or what torchvision unpacks. Raises InputError, or SystemExit in one line.
    """
    if path.suffix.lower() == ".npz":
        return load_dataset("cifar10", str(path))
    if (path / "labels.npz").is_file():
        return read_atlases(path)
    if idx_files(path) is not None:
        return load_dataset("fashion-mnist", str(path))
    return load_dataset("cifar10", str(path))


def read_atlases(folder: Path) -> Dataset:
    """CIFAR-10 of which each class of each split is one picture, tiled row by row in the order of its labels."""
    with np.load(folder / "labels.npz") as file:
        labels = {name: file[name].astype(np.int64) for name in ("train", "test")}
    parts = []
    for name, y in labels.items():
        x = np.empty((len(y), 3, SIDE, SIDE), np.uint8)
        for label in np.unique(y):
            where = np.flatnonzero(y == label)
            x[where] = tiles(folder / f"{name}_{label}.webp", len(where))
        parts += [torch.from_numpy(x), torch.from_numpy(y)]
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Dataset(*parts, 10, mean, std, "crop-flip")


def tiles(atlas: Path, count: int) -> np.ndarray:
    """The first `count` images [count, 3, 32, 32] of an atlas."""
    from PIL import Image

    with Image.open(atlas) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    if columns != COLUMNS or rows * columns < count:
        raise SystemExit(f"{atlas}: {rows} x {columns} tiles, expected {COLUMNS} a row and {count} in all")
    tiled = pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3)
    return tiled.reshape(rows * columns, 3, SIDE, SIDE)[:count]


def first_images(data: Dataset, train: int, test: int) -> Dataset:
    """The first so many examples of both splits, which are in random order; 0: all."""
    parts: Sequence[torch.Tensor] = data[:4]
    kept = [part[: count or None] for part, count in zip(parts, (train, train, test, test), strict=True)]
    return data._replace(x_train=kept[0], y_train=kept[1], x_test=kept[2], y_test=kept[3])


def rows_of(out: Path, kind: str = "") -> list[dict[str, Any]]:
    """All rows, or those of a kind; of a run that was run twice the last. A line that was cut off is none."""
    path = out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    names = ("kind", "seed", "interval", "clients", "schedule", "lr")
    last = {tuple(str(row.get(name)) for name in names): row for row in map(json.loads, lines)}
    return [row for row in last.values() if not kind or row["kind"] == kind]


def append(out: Path, row: dict[str, Any], name: str = "rows.jsonl") -> None:
    """A whole line or none, whoever else writes; what a kill cut off before is taken away."""
    with (out / name).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
