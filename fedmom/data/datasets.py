"""Data sets by name, as uint8 images (or features) and int64 labels on the CPU, checked on the way in (arrays.py).

torchvision is imported here only, and only by what needs it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import checked_whole, kind_of, statistics
from fedmom.data.inputs import Inputs, Shapes, is_integer, shape_of
from fedmom.data.sources.array_files import ARRAYS, idx_files, read_idx, read_npz_arrays, split_digits
from fedmom.data.sources.hugging_face import read_hub
from fedmom.data.sources.pairs import call_user, is_map_style, read_pair
from fedmom.data.sources.python_sources import NUM_TOKENS, WINDOW, read_python_sources
from fedmom.data.sources.streams import is_stream, is_token_path, read_token_files, windows_of
from fedmom.data.targets import TARGETS, num_outputs
from fedmom.errors import InputError, missing_package, unknown
from fedmom.machine.files import at_home
from fedmom.user_code import HUB, is_spec, one_line


class Dataset(NamedTuple):
    """Train and test examples; uint8 means images, which training scales to (x / 255 - mean) / std."""

    x_train: Inputs  # [n, *shape]: uint8 images [n, C, H, W], float or int64 features, or several of them by name
    y_train: Tensor  # [n] int64 labels, or what the task asks for (fedmom/data/targets.py)
    x_test: Inputs  # [m, *shape]
    y_test: Tensor  # [m, ...]
    num_classes: int  # or how many numbers or labels are predicted: what a model has outputs for
    mean: tuple[float, ...]  # [C] of uint8 / 255; () for features
    std: tuple[float, ...]  # [C]; () for features
    augment: str  # what data.augment = "auto" means here: "none" or "crop-flip"

    @property
    def input_shape(self) -> Shapes:
        return shape_of(self.x_train)


RawArrays = tuple[object, object, object, object]  # x_train, y_train, x_test, y_test, not yet checked
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist


class DatasetEntry(NamedTuple):
    """A named data set. Mean and std are those of the training images, as usually quoted."""

    summary: str
    shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    own: Callable[[], RawArrays] | None = None  # its arrays, where they come with fedmom
    text: Callable[[str, int], Mapping[str, object]] | None = None  # (key, T) -> windows, where it is a text
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
        (1, 8, 8), 10, (0.3058,), (0.3761,), own=split_digits,
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
        "the .py files of this Python's standard library as bytes, for data.task = per-token: it is another text by "
        "another version of Python; nothing to download",
        (WINDOW,), NUM_TOKENS, (), (), text=read_python_sources,
    ),
}  # fmt: skip


def load_dataset(
    name: str, data_dir: str = "data", targets: str = "labels", *, context: int = 0, columns: str = ""
) -> Dataset:
    """One of DATASETS, a file's or folder's examples, or what the user's "module:function" gives.

    `targets`: a kind of TARGETS. `context`: T, of the windows into which a stream of tokens is cut.
    `columns`: inputs and the target of a table hf:NAME, by commas.
    """
    key, asked = f"data.dataset = {name!r}", Asking(targets, context)
    if name.startswith(HUB):
        return _of_arrays(key, read_hub(key, name, columns), asked)
    if columns:
        raise InputError(f"data.columns = {columns!r}: are those of hf:NAME, and {key} has none; leave it ''")
    if is_spec(name):
        return _of_user(key, call_user(name, data_dir), asked)
    if name.lower().endswith(".npz"):
        return _of_arrays(key, read_npz_arrays(key, at_home(name)), asked, f": {at_home(name)}")
    if is_token_path(name):
        return _of_arrays(key, read_token_files(key, at_home(name)), asked)
    if name not in DATASETS:
        raise unknown(
            "data.dataset", name, [*DATASETS, "FILE.npz", "FILE.bin", "FOLDER/", "hf:NAME", '"module:function"']
        )
    if (text := DATASETS[name].text) is not None:
        return _of_text(key, text, asked)
    if targets != "labels":
        raise InputError(f"{key}: has one label for each example, and data.task asks for {targets}")
    _check_no_context(key, asked)
    own = DATASETS[name].own
    arrays = own() if own is not None else _find(name, at_home(data_dir))
    return _named_dataset(name, arrays)


def download(name: str, data_dir: str) -> None:
    """Fetch a named data set into `data_dir` through torchvision, where load_dataset then finds it."""
    if name not in DATASETS:
        raise unknown("data.dataset", name, DATASETS)
    if not DATASETS[name].torchvision:
        place = (
            "it is there"
            if DATASETS[name].own or DATASETS[name].text
            else f"write its arrays into {at_home(data_dir) / name}.npz"
        )
        raise InputError(f"data.dataset = {name!r}: there is nothing to download; {place}")
    dataset_class = _torchvision_class(name)
    try:
        for train in (True, False):
            dataset_class(root=str(at_home(data_dir)), train=train, download=True)
    except Exception as error:  # torchvision lets through whatever the network and the disk raise
        raise InputError(f"data.dataset = {name!r}: the download to {data_dir!r} failed: {one_line(error)}") from error


def _named_dataset(name: str, arrays: RawArrays) -> Dataset:
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    x_train, y_train, x_test, y_test = checked_whole(key, arrays)
    assert isinstance(x_train, Tensor)
    if x_train.dtype != torch.uint8 or x_train.shape[1:] != entry.shape:
        expected = f"uint8 {list(entry.shape)}"
        raise InputError(f"{key}: examples of x_train are {kind_of(x_train)}, expected {expected}")
    top = max(int(y_train.max()), int(y_test.max()))
    if top >= entry.num_classes:
        raise InputError(f"{key}: has a label {top}, expected 0 to {entry.num_classes - 1}")
    return Dataset(x_train, y_train, x_test, y_test, entry.num_classes, entry.mean, entry.std, entry.augment)


class Asking(NamedTuple):
    """What the keys say of a data set besides its name."""

    targets: str
    context: int


def _check_no_context(key: str, asked: Asking) -> None:
    if asked.context:
        raise InputError(
            f"data.context = {asked.context}: cuts a stream of tokens (x_train of one axis of whole numbers, no "
            f"y_train), and {key} has examples; leave it 0"
        )


def _of_arrays(key: str, arrays: Mapping[str, object], asked: Asking, where: str = "") -> Dataset:
    """Examples with targets, or a stream of tokens, whose windows they are."""
    if is_stream(arrays):
        return Dataset(*windows_of(key, arrays, asked.context, asked.targets), (), (), "none")
    _check_no_context(key, asked)
    return _user_dataset(key, _four(key + where, arrays), asked.targets)


def _of_text(key: str, read: Callable[[str, int], Mapping[str, object]], asked: Asking) -> Dataset:
    if asked.targets != "tokens":
        raise InputError(f"{key}: is text, for data.task = 'per-token'; this task asks for {asked.targets}")
    arrays = read(key, asked.context)
    x_train, y_train, x_test, y_test = (torch.as_tensor(arrays[name]) for name in ARRAYS)
    return Dataset(x_train, y_train, x_test, y_test, NUM_TOKENS, (), (), "none")


def _user_dataset(key: str, arrays: RawArrays, targets: str) -> Dataset:
    x_train, y_train, x_test, y_test = checked_whole(key, arrays, targets=targets)
    num_classes = num_outputs(key, targets, (y_train, y_test))
    if isinstance(x_train, dict) and (images := [n for n, one in x_train.items() if one.dtype == torch.uint8]):
        raise InputError(f"{key}: x_train[{images[0]!r}] is uint8: among several inputs give images as float features")
    mean, std = statistics(x_train) if isinstance(x_train, Tensor) and x_train.dtype == torch.uint8 else ((), ())
    return Dataset(x_train, y_train, x_test, y_test, num_classes, mean, std, "none")


# Where the arrays come from.


def _find(name: str, data_dir: Path) -> RawArrays:
    """The first of the places where a named data set may be."""
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    if data_dir.suffix.lower() == ".npz":
        return _read_npz(key, data_dir)
    looked = [data_dir / f"{name}.npz"]
    if looked[0].exists():
        return _read_npz(key, looked[0])
    for folder in entry.folders:
        looked.append(data_dir / folder)
        if entry.read is not None and (arrays := entry.read(name, looked[-1])) is not None:
            return arrays
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


def _read_npz(key: str, path: Path) -> RawArrays:
    return _four(f"{key}: {path}", read_npz_arrays(key, path))


def _of_user(key: str, result: object, asked: Asking) -> Dataset:
    """What the user's function returned: a Dataset, four arrays, or two streams or data sets of torch's kind."""
    if isinstance(result, Dataset):
        _check_no_context(key, asked)
        return _checked_dataset(key, result, asked.targets)
    if isinstance(result, Mapping):
        return _of_arrays(key, result, asked)
    if isinstance(result, tuple | list) and len(result) == 4:
        return _of_arrays(key, dict(zip(ARRAYS, result, strict=True)), asked)
    if isinstance(result, tuple | list) and len(result) == 2:
        if is_stream(streams := dict(zip(("x_train", "x_test"), result, strict=True))):
            return _of_arrays(key, streams, asked)
        if all(map(is_map_style, result)):
            return _of_arrays(key, read_pair(key, *result), asked)
    got = type(result).__name__ + (f" of {len(result)}" if isinstance(result, tuple | list) else "")
    wanted = f"a Dataset, {', '.join(ARRAYS)} as a dict or tuple, or two data sets of (x, y) by number"
    raise InputError(f"{key}: must return {wanted}; returned {got}")


def _four(key: str, arrays: Mapping[str, object]) -> RawArrays:
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise InputError(f"{key}: has no {', '.join(missing)} (needs {', '.join(ARRAYS)})")
    return arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]


# What is checked of a Dataset that the user made.


def _checked_dataset(key: str, dataset: Dataset, targets: str) -> Dataset:
    """A Dataset that the user made: its arrays are checked like any others, its statistics are kept."""
    try:
        mean, std = tuple(map(float, dataset.mean)), tuple(map(float, dataset.std))
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: mean and std must be tuples of floats: {one_line(error)}") from error
    x_train, y_train, x_test, y_test = checked_whole(
        key, (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test), len(mean), targets=targets
    )
    how = TARGETS[targets]
    least = max(how.size(y_train), how.size(y_test))
    num_classes = dataset.num_classes.item() if isinstance(dataset.num_classes, np.integer) else dataset.num_classes
    if type(num_classes) is not int or num_classes < least or num_classes < 1:
        there = f"there is a label {least - 1}" if how.grows else f"{least} numbers are predicted"
        raise InputError(f"{key}: num_classes = {num_classes!r}, but {there}")
    if dataset.augment not in ("none", "crop-flip"):
        raise unknown(f"{key}: augment", str(dataset.augment), ("none", "crop-flip"))
    image = isinstance(x_train, Tensor) and x_train.ndim == 4 and not is_integer(x_train)
    if dataset.augment == "crop-flip" and not image:
        raise InputError(f"{key}: augment = 'crop-flip' needs images [n, C, H, W], not {kind_of(x_train)}")
    channels = x_train.shape[1] if isinstance(x_train, Tensor) and x_train.dtype == torch.uint8 else 0
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean)):
        raise InputError(f"{key}: mean = {mean}, std = {std}: needs {channels} numbers each")
    if not all(0 < s < math.inf for s in std):
        raise InputError(f"{key}: std = {std}: must be positive")
    return Dataset(x_train, y_train, x_test, y_test, num_classes, mean, std, dataset.augment)
