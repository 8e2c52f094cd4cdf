"""Data sets by name, as uint8 images (or float features) and int64 labels on the CPU, checked on the way in.

torchvision and scikit-learn are imported here only, and only by the data sets that need them.
"""

import gzip
import inspect
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.errors import InputError, unknown
from fedmom.imports import is_spec, load_object, one_line


class Dataset(NamedTuple):
    """Train and test examples; uint8 means images, which training scales to (x / 255 - mean) / std."""

    x_train: Tensor  # [n, *shape]: uint8 images [n, C, H, W], or float features
    y_train: Tensor  # [n] int64
    x_test: Tensor  # [m, *shape]
    y_test: Tensor  # [m] int64
    num_classes: int
    mean: tuple[float, ...]  # [C] of uint8 / 255; () for float features
    std: tuple[float, ...]  # [C]; () for float features
    augment: str  # what data.augment = "auto" means here: "none" or "crop-flip"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])


class Entry(NamedTuple):
    """A named data set. Mean and std are those of the training images, as usually quoted."""

    summary: str
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    torchvision: str = ""  # the class in torchvision.datasets, if there is one
    folder: str = ""  # where torchvision unpacks it, below its root


DATASETS: dict[str, Entry] = {
    "digits": Entry(
        "1,437 + 360 handwritten digits, 1x8x8, 10 classes: scikit-learn's, nothing to download",
        (1, 8, 8), 10, (0.3058,), (0.3761,),
    ),
    "fashion-mnist": Entry(
        "60,000 + 10,000 photos of clothes, 1x28x28, 10 classes: --download, or apt's dataset-fashion-mnist",
        (1, 28, 28), 10, (0.2860,), (0.3530,), "none", "FashionMNIST", "FashionMNIST/raw",
    ),
    "mnist": Entry(
        "60,000 + 10,000 handwritten digits, 1x28x28, 10 classes: --download",
        (1, 28, 28), 10, (0.1307,), (0.3081,), "none", "MNIST", "MNIST/raw",
    ),
    "cifar10": Entry(
        "50,000 + 10,000 photos, 3x32x32, 10 classes: --download",
        (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
        "crop-flip", "CIFAR10", "cifar-10-batches-py",
    ),
    "cifar100": Entry(
        "50,000 + 10,000 photos, 3x32x32, 100 classes: --download",
        (3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
        "crop-flip", "CIFAR100", "cifar-100-python",
    ),
}  # fmt: skip

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

Arrays = tuple[object, object, object, object]  # x_train, y_train, x_test, y_test, not yet checked


def load_dataset(name: str, data_dir: str = "data") -> Dataset:
    """One of DATASETS, the path of an .npz file, or the user's "module:function"."""
    if name.endswith(".npz"):
        path = Path(name).expanduser()
        return _user_dataset(name, _read_npz(f"data.dataset = {name!r}", path))
    if is_spec(name):
        return _call_user(name, data_dir)
    if name not in DATASETS:
        raise unknown("data.dataset", name, [*DATASETS, "FILE.npz", '"module:function"'])
    arrays = _digits() if name == "digits" else _find(name, Path(data_dir).expanduser())
    return _named_dataset(name, arrays)


def download(name: str, data_dir: str) -> None:
    """Fetch a named data set into `data_dir` through torchvision, where load_dataset then finds it."""
    if name not in DATASETS:
        raise unknown("data.dataset", name, DATASETS)
    if not DATASETS[name].torchvision:
        raise InputError(f"data.dataset = {name!r}: comes with scikit-learn, there is nothing to download")
    dataset_class = _torchvision_class(name)
    try:
        for train in (True, False):
            dataset_class(root=str(Path(data_dir).expanduser()), train=train, download=True)
    except Exception as error:  # torchvision lets through whatever the network and the disk raise
        raise InputError(f"data.dataset = {name!r}: the download to {data_dir!r} failed: {one_line(error)}") from error


def _named_dataset(name: str, arrays: Arrays) -> Dataset:
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    x_train, y_train, x_test, y_test = _checked(key, arrays)
    if x_train.dtype != torch.uint8 or x_train.shape[1:] != entry.shape:
        expected = f"uint8 {list(entry.shape)}"
        raise InputError(f"{key}: examples of x_train are {_kind(x_train)}, expected {expected}")
    top = max(int(y_train.max()), int(y_test.max()))
    if top >= entry.num_classes:
        raise InputError(f"{key}: has a label {top}, expected 0 to {entry.num_classes - 1}")
    return Dataset(x_train, y_train, x_test, y_test, entry.num_classes, entry.mean, entry.std, entry.augment)


def _user_dataset(name: str, arrays: Arrays) -> Dataset:
    x_train, y_train, x_test, y_test = _checked(f"data.dataset = {name!r}", arrays)
    num_classes = max(int(y_train.max()), int(y_test.max())) + 1
    mean, std = _statistics(x_train) if x_train.dtype == torch.uint8 else ((), ())
    return Dataset(x_train, y_train, x_test, y_test, num_classes, mean, std, "none")


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images / 255, exactly: from counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).to(torch.float64)
        weights = counts / counts.sum()
        mean.append(float(weights @ values))
        variance = float(weights @ (values - mean[-1]) ** 2)
        # A constant channel would be divided by zero; one keeps it at zero.
        std.append(math.sqrt(variance) if counts.count_nonzero() > 1 else 1.0)
    return tuple(mean), tuple(std)


# Where the arrays come from.


def _digits() -> Arrays:
    """scikit-learn's digits: values 0 to 16 become round(255 v / 16), every fifth example of a class is test.

    The split uses no random generator, so that it is the same for ever: 1,437 + 360 examples.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("data.dataset = 'digits': needs scikit-learn (pip install scikit-learn)") from error
    digits = load_digits()
    images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    is_test = np.zeros(len(images), dtype=bool)
    is_test[np.argsort(digits.target, kind="stable")[::5]] = True
    return images[~is_test], digits.target[~is_test], images[is_test], digits.target[is_test]


def _find(name: str, data_dir: Path) -> Arrays:
    """The first of the places where a named data set may be."""
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    if data_dir.suffix == ".npz":
        return _read_npz(key, data_dir)
    looked = [data_dir / f"{name}.npz"]
    if looked[0].exists():
        return _read_npz(key, looked[0])
    if name in ("mnist", "fashion-mnist"):
        folders = [data_dir, data_dir / name, data_dir / entry.folder]
        if name == "fashion-mnist":
            folders.append(DEBIAN_FASHION_MNIST)
        for folder in folders:
            if (files := _idx_files(folder)) is not None:
                x_train, y_train, x_test, y_test = (_read_idx(key, file) for file in files)
                return x_train, y_train, x_test, y_test
        looked += folders
    else:
        looked.append(data_dir / entry.folder)
        if looked[-1].is_dir():
            return _read_cifar(name, data_dir)
    advice = f"fetch it with: fedmom datasets --download {name} --data-dir {data_dir}"
    if name == "fashion-mnist":
        advice += ", or: apt install dataset-fashion-mnist"
    places = ", ".join(str(path) for path in looked)
    raise InputError(f"{key}: not found (looked for {places}); {advice}")


def _idx_files(folder: Path) -> list[Path] | None:
    """MNIST's four files in the order of ARRAYS, each plain or gzipped; None unless all are there."""
    files = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        found = [path for end in ("-ubyte", "-ubyte.gz") if (path := folder / f"{stem}{end}").is_file()]
        if not found:
            return None
        files.append(found[0])
    return files


def _read_idx(key: str, path: Path) -> np.ndarray:
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


def _read_cifar(name: str, data_dir: Path) -> Arrays:
    dataset_class = _torchvision_class(name)
    try:
        train = dataset_class(root=str(data_dir), train=True, download=False)
        test = dataset_class(root=str(data_dir), train=False, download=False)
    except Exception as error:  # a wrong checksum, a truncated pickle, a missing batch
        folder = data_dir / DATASETS[name].folder
        raise InputError(f"data.dataset = {name!r}: cannot read {folder}: {one_line(error)}") from error
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def _torchvision_class(name: str) -> Callable:
    try:
        import torchvision
    except ImportError as error:
        raise InputError(f"data.dataset = {name!r}: needs torchvision (pip install torchvision)") from error
    return getattr(torchvision.datasets, DATASETS[name].torchvision)


def _read_npz(key: str, path: Path) -> Arrays:
    return _four(f"{key}: {path}", read_npz_arrays(key, path))


def read_npz_arrays(key: str, path: Path) -> dict[str, object]:
    """Those of ARRAYS that an .npz file has, unchecked; InputError beginning with `key` where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{key}: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{key}: {path} is not an .npz file, or truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ARRAYS if name in archive}
    except Exception as error:  # zipfile, zlib and numpy's header parser each have their own
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from error


def _call_user(name: str, data_dir: str) -> Dataset:
    """The user's function; it gets `data_dir` if it has such a parameter or one without a default."""
    key = f"data.dataset = {name!r}"
    function = load_object("data.dataset", name)
    try:
        parameters = inspect.signature(function).parameters
        if "data_dir" in parameters:
            result = function(data_dir=data_dir)
        elif any(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
            result = function(data_dir)
        else:
            result = function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{key}: the function raised {one_line(error)}") from error
    if isinstance(result, Dataset):
        return _checked_dataset(key, result)
    if isinstance(result, Mapping):
        return _user_dataset(name, _four(key, result))
    if isinstance(result, tuple | list) and len(result) == 4:
        x_train, y_train, x_test, y_test = result
        return _user_dataset(name, (x_train, y_train, x_test, y_test))
    got = type(result).__name__ + (f" of {len(result)}" if isinstance(result, tuple | list) else "")
    wanted = f"a Dataset, or {', '.join(ARRAYS)} as a dict or tuple"
    raise InputError(f"{key}: must return {wanted}; returned {got}")


def _four(key: str, arrays: Mapping[str, object]) -> Arrays:
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise InputError(f"{key}: has no {', '.join(missing)} (needs {', '.join(ARRAYS)})")
    return arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]


# What is checked of them.


def _checked(key: str, arrays: Arrays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [_tensor(f"{key}: {name}", array) for name, array in zip(ARRAYS, arrays, strict=True)]
    x_train, x_test = _inputs(f"{key}: x_train", tensors[0]), _inputs(f"{key}: x_test", tensors[2])
    y_train, y_test = _labels(f"{key}: y_train", tensors[1]), _labels(f"{key}: y_test", tensors[3])
    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise InputError(f"{key}: x_{split} has {len(x)} examples, y_{split} has {len(y)}")
        if len(x) == 0:
            raise InputError(f"{key}: x_{split} is empty")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        kinds = f"{_kind(x_train)}, those of x_test are {_kind(x_test)}"
        raise InputError(f"{key}: examples of x_train are {kinds}")
    return x_train, y_train, x_test, y_test


def checked_part(key: str, split: str, x: object, y: object) -> tuple[Tensor, Tensor]:
    """One split by itself, "train" or "test", checked as in a whole data set."""
    inputs = _inputs(f"{key}: x_{split}", _tensor(f"{key}: x_{split}", x))
    labels = _labels(f"{key}: y_{split}", _tensor(f"{key}: y_{split}", y))
    if len(inputs) != len(labels):
        raise InputError(f"{key}: x_{split} has {len(inputs)} examples, y_{split} has {len(labels)}")
    return inputs, labels


def _checked_dataset(key: str, dataset: Dataset) -> Dataset:
    """A Dataset that the user made: its arrays are checked like any others, its statistics are kept."""
    x_train, y_train, x_test, y_test = _checked(key, dataset[:4])
    highest = max(int(y_train.max()), int(y_test.max()))
    if not isinstance(dataset.num_classes, int) or dataset.num_classes <= highest:
        raise InputError(f"{key}: num_classes = {dataset.num_classes!r}, but there is a label {highest}")
    if dataset.augment not in ("none", "crop-flip"):
        raise unknown(f"{key}: augment", str(dataset.augment), ("none", "crop-flip"))
    if dataset.augment == "crop-flip" and x_train.ndim != 4:
        raise InputError(f"{key}: augment = 'crop-flip' needs images [n, C, H, W], not {_kind(x_train)}")
    channels = x_train.shape[1] if x_train.dtype == torch.uint8 else 0
    try:
        mean, std = tuple(map(float, dataset.mean)), tuple(map(float, dataset.std))
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: mean and std must be tuples of floats: {one_line(error)}") from error
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean)):
        raise InputError(f"{key}: mean = {mean}, std = {std}: needs {channels} numbers each")
    if not all(0 < s < math.inf for s in std):
        raise InputError(f"{key}: std = {std}: must be positive")
    return Dataset(x_train, y_train, x_test, y_test, dataset.num_classes, mean, std, dataset.augment)


def _kind(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape[1:])}".removeprefix("torch.")


def _tensor(what: str, array: object) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    if not isinstance(array, np.ndarray):
        raise InputError(f"{what} is a {type(array).__name__}, not a numpy array or tensor")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"{what} has dtype {array.dtype}, not numbers")
    # torch reads neither another machine's byte order nor negative strides.
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _inputs(what: str, x: Tensor) -> Tensor:
    """uint8 images as [n, C, H, W]; float features as they are."""
    shape = list(x.shape)
    if 0 in shape[1:]:
        raise InputError(f"{what} has shape {shape}: its examples are empty")
    if x.dtype == torch.uint8:
        if x.ndim == 3:
            return x[:, None]
        if x.ndim != 4:
            raise InputError(f"{what} has shape {shape}: uint8 images are [n, H, W] or [n, C, H, W]")
        if shape[3] in (1, 3) and shape[1] not in (1, 3):
            return x.movedim(3, 1).contiguous()
        return x
    if not x.dtype.is_floating_point:
        dtype = str(x.dtype).removeprefix("torch.")
        raise InputError(f"{what} has dtype {dtype}: give uint8 images or float features")
    if x.ndim < 2:
        raise InputError(f"{what} has shape {shape}: float features are [n, d] or [n, ...]")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{what} has values that are NaN or infinite")
    return x


def _labels(what: str, y: Tensor) -> Tensor:
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        dtype = str(y.dtype).removeprefix("torch.")
        raise InputError(f"{what} has dtype {dtype}: labels are integers 0, 1, 2, ...")
    if y.ndim != 1:
        raise InputError(f"{what} has shape {list(y.shape)}: labels are [n]")
    y = y.to(torch.int64)
    if len(y) and int(y.min()) < 0:
        raise InputError(f"{what} has a negative label, {int(y.min())}: labels are 0, 1, 2, ...")
    return y
