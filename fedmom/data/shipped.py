"""Data sets by name: what each is, where its files may be, and how they are read or fetched.

torchvision is imported here only, and only by what needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmom.data.given.natural import names_of_ids
from fedmom.data.sources import small
from fedmom.data.sources.array_files import ARRAYS, Source, idx_files, read_idx, read_npz
from fedmom.data.sources.small import NUM_TOKENS, WINDOW, RawArrays, read_python_sources
from fedmom.errors import InputError, missing_package, unknown
from fedmom.machine.files import at_home
from fedmom.user_code import one_line

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist


class DatasetEntry(NamedTuple):
    """A named data set. Mean and std are those of the training images, as usually quoted."""

    summary: str
    shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    targets: str = "labels"  # a kind of TARGETS
    own: Callable[[], RawArrays] | None = None  # its arrays, where they come with fedmom
    text: Callable[[str, int], Mapping[str, np.ndarray]] | None = None  # (key, T) -> windows, where it is a text
    torchvision: str = ""  # the class in torchvision.datasets that fetches it, if there is one
    folders: tuple[str, ...] = ()  # where its files may be, below data.data-dir or anywhere
    # (name, folder) -> the arrays of the files there; None: there are none.
    read: Callable[[str, Path], RawArrays | None] | None = None
    advice: str = ""  # another way to get it


def _read_idx_files(name: str, folder: Path) -> RawArrays | None:
    if (files := idx_files(folder)) is None:
        return None
    x_train, y_train, x_test, y_test = (read_idx(f"data.dataset = {name!r}", file) for file in files)
    return x_train, y_train, x_test, y_test


def _read_cifar(name: str, folder: Path) -> RawArrays | None:
    """By torchvision, which looks for the folder by its name below a root."""
    if not folder.is_dir():
        return None
    dataset_class = _torchvision_class(name)
    try:
        train, test = (dataset_class(root=str(folder.parent), train=train, download=False) for train in (True, False))
    except Exception as error:  # a wrong checksum, a truncated pickle, a missing batch
        raise InputError(f"data.dataset = {name!r}: cannot read {folder}: {one_line(error)}") from error
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        "1,437 + 360 handwritten digits, 1x8x8, 10 classes: they come with fedmom, nothing to download",
        (1, 8, 8), 10, (0.3058,), (0.3761,), own=small.digits,
    ),
    "digit-traits": DatasetEntry(
        "the digits' images with three labels each, made of the digit: even, above 4, has a closed loop; multi-label",
        (1, 8, 8), 3, (0.3058,), (0.3761,), own=small.digit_traits, targets="sets",
    ),
    "diabetes": DatasetEntry(
        "354 + 88 patients, 10 measurements, the disease's progress to predict; regression: needs scikit-learn",
        (10,), 1, (), (), own=small.diabetes, targets="numbers",
    ),
    "fashion-mnist": DatasetEntry(
        "60,000 + 10,000 photos of clothes, 1x28x28, 10 classes: --download, or apt's dataset-fashion-mnist",
        (1, 28, 28), 10, (0.2860,), (0.3530,), torchvision="FashionMNIST", read=_read_idx_files,
        folders=("", "fashion-mnist", "FashionMNIST/raw", DEBIAN_FASHION_MNIST),
        advice="apt install dataset-fashion-mnist",
    ),
    "mnist": DatasetEntry(
        "60,000 + 10,000 handwritten digits, 1x28x28, 10 classes: --download",
        (1, 28, 28), 10, (0.1307,), (0.3081,), torchvision="MNIST", read=_read_idx_files,
        folders=("", "mnist", "MNIST/raw"),
    ),
    "cifar10": DatasetEntry(
        "50,000 + 10,000 photos, 3x32x32, 10 classes: --download",
        (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop-flip",
        torchvision="CIFAR10", folders=("cifar-10-batches-py",), read=_read_cifar,
    ),
    "cifar100": DatasetEntry(
        "50,000 + 10,000 photos, 3x32x32, 100 classes: --download",
        (3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop-flip",
        torchvision="CIFAR100", folders=("cifar-100-python",), read=_read_cifar,
    ),
    "python-sources": DatasetEntry(
        "the .py files of this Python's standard library as bytes, per-token; each window's module for data.clients; "
        "another version of Python has another text",
        (WINDOW,), NUM_TOKENS, (), (), targets="tokens", text=read_python_sources,
    ),
}  # fmt: skip


def download(name: str, data_dir: str) -> None:
    """Fetch a named data set into `data_dir` through torchvision, where load_dataset then finds it."""
    if name not in DATASETS:
        raise unknown("data.dataset", name, DATASETS)
    if not DATASETS[name].torchvision:
        comes = DATASETS[name].own or DATASETS[name].text
        place = "it is there" if comes else f"write its arrays into {at_home(data_dir) / name}.npz"
        raise InputError(f"data.dataset = {name!r}: there is nothing to download; {place}")
    dataset_class = _torchvision_class(name)
    try:
        for train in (True, False):
            dataset_class(root=str(at_home(data_dir)), train=train, download=True)
    except Exception as error:  # torchvision lets through whatever the network and the disk raise
        raise InputError(f"data.dataset = {name!r}: the download to {data_dir!r} failed: {one_line(error)}") from error


def read_shipped(name: str, data_dir: Path, clients: str) -> Source:
    """The arrays of one of DATASETS. InputError, with where it was looked for, where they are not there."""
    own = DATASETS[name].own
    return four_arrays(own()) if own is not None else _find(name, data_dir, clients)


def _find(name: str, data_dir: Path, clients: str) -> Source:
    """The first of the places where a named data set may be."""
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    if data_dir.suffix.lower() == ".npz":
        return whole_npz(key, data_dir, clients)
    looked = [data_dir / f"{name}.npz"]
    if looked[0].exists():
        return whole_npz(key, looked[0], clients)
    for folder in entry.folders:
        looked.append(data_dir / folder)
        if entry.read is not None and (arrays := entry.read(name, looked[-1])) is not None:
            return four_arrays(arrays)
    fetch = f"fetch it with: fedmom datasets --download {name} --data-dir {data_dir}" if entry.torchvision else ""
    advice = ", or: ".join(filter(None, (fetch, entry.advice))) or f"write its arrays into {looked[0]}"
    places = ", ".join(str(path) for path in looked)
    raise InputError(f"{key}: not found (looked for {places}); {advice}")


def _torchvision_class(name: str) -> Callable:
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise missing_package(f"data.dataset = {name!r}", str(error.name), "vision") from error
    except (ImportError, RuntimeError) as error:  # one that was built for another torch
        problem = f"torchvision is installed, but cannot be imported: {one_line(error)}"
        raise InputError(f"data.dataset = {name!r}: {problem}") from error
    return getattr(torchvision.datasets, DATASETS[name].torchvision)


def whole_npz(key: str, path: Path, clients: str) -> Source:
    return has_four(f"{key}: {path}", read_npz(key, path, (*ARRAYS, *names_of_ids(clients))))


def four_arrays(arrays: Sequence[object]) -> Source:
    return Source(dict(zip(ARRAYS, arrays, strict=True)), ARRAYS)


def has_four(key: str, source: Source) -> Source:
    missing = [name for name in ARRAYS if name not in source.arrays]
    if missing:
        raise InputError(f"{key}: has no {', '.join(missing)} (needs {', '.join(ARRAYS)})")
    return source
