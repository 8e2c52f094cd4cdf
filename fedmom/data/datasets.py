"""Data sets by name, file, folder or function, on the CPU, checked on the way in (arrays.py)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.arrays import checked_whole, kind_of, statistics
from fedmom.data.given.natural import names_of_ids, pick_ids
from fedmom.data.inputs import Inputs, Shapes, is_integer, shape_of
from fedmom.data.shipped import DATASETS, four_arrays, has_four, read_shipped
from fedmom.data.sources.array_files import ARRAYS, Source, read_npz
from fedmom.data.sources.folders import is_folder, read_folder
from fedmom.data.sources.hugging_face import read_hub
from fedmom.data.sources.pairs import call_user, is_map_style, read_pair
from fedmom.data.sources.small import RawArrays
from fedmom.data.sources.streams import is_stream, is_token_path, read_token_files, windows_of
from fedmom.data.targets import TARGETS, num_outputs
from fedmom.errors import InputError, unknown
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
    # {NAME: [n], NAME_test: [m]}: whose each example is, integers or strings, for data.clients = NAME.
    ids: Mapping[str, np.ndarray] | None = None

    @property
    def input_shape(self) -> Shapes:
        return shape_of(self.x_train)


class Asking(NamedTuple):
    """What the keys say of a data set besides its name."""

    targets: str  # a kind of TARGETS
    context: int = 0  # T, of the windows into which a stream of tokens is cut
    clients: str = ""  # the array of ids that the Dataset is to have


def load_dataset(
    name: str,
    data_dir: str = "data",
    clients: str = "",
    classes: str = "",
    *,
    targets: str = "labels",
    context: int = 0,
    columns: str = "",
) -> Dataset:
    """One of DATASETS, a file's or folder's examples, or what the user's "module:function" gives.

    `clients`: the array of ids that the Dataset is to have. `classes`: labels of a folder of images, by commas.
    `targets`: the kind of TARGETS that the task asks for. `context`: T, of the windows of a stream of tokens.
    `columns`: inputs and the target of a table hf:NAME, by commas.
    """
    key, asked = f"data.dataset = {name!r}", Asking(targets, context, clients)
    if name.startswith(HUB):
        arrays = read_hub(key, name, columns)
        return _of_source(key, Source(arrays, [*arrays]), asked)
    if columns:
        raise InputError(f"data.columns = {columns!r}: are those of hf:NAME, and {key} has none; leave it ''")
    if name.lower().endswith(".npz"):
        path = at_home(name)
        return _of_source(key, read_npz(key, path, (*ARRAYS, *names_of_ids(clients))), asked, f": {path}")
    if is_spec(name):
        return _of_user(key, call_user(name, data_dir), asked)
    if is_token_path(name) or (context and is_folder(name)):
        arrays = read_token_files(key, at_home(name))
        return _of_source(key, Source(arrays, [*arrays]), asked)
    if is_folder(name):
        _check_no_context(key, asked)
        return _user_dataset(key, read_folder(key, at_home(name), classes), asked)
    if name not in DATASETS:
        raise unknown(
            "data.dataset", name, [*DATASETS, "FILE.npz", "FILE.bin", "FOLDER/", "hf:NAME", '"module:function"']
        )
    entry = DATASETS[name]
    if targets not in (entry.targets, "anything"):
        raise InputError(f"{key}: its targets are {entry.targets}, and data.task asks for {targets}")
    if entry.text is not None:
        return _of_text(key, entry.text(key, context), entry.num_classes, clients)
    _check_no_context(key, asked)
    return _named_dataset(name, read_shipped(name, at_home(data_dir), clients), clients)


def _named_dataset(name: str, source: Source, clients: str) -> Dataset:
    entry = DATASETS[name]
    key = f"data.dataset = {name!r}"
    x_train, y_train, x_test, y_test = checked_whole(key, _raw(source), targets=entry.targets)
    assert isinstance(x_train, Tensor)
    if (x_train.dtype == torch.uint8) != bool(entry.mean) or x_train.shape[1:] != entry.shape:
        expected = f"{'uint8' if entry.mean else 'float'} {list(entry.shape)}"
        raise InputError(f"{key}: examples of x_train are {kind_of(x_train)}, expected {expected}")
    top = num_outputs(key, entry.targets, (y_train, y_test)) - 1
    if top >= entry.num_classes:
        raise InputError(f"{key}: has a label {top}, expected 0 to {entry.num_classes - 1}")
    ids = pick_ids(key, clients, source.arrays, source.names, (len(y_train), len(y_test)))
    return Dataset(x_train, y_train, x_test, y_test, entry.num_classes, entry.mean, entry.std, entry.augment, ids)


def _of_text(key: str, arrays: Mapping[str, np.ndarray], num_classes: int, clients: str) -> Dataset:
    """Windows of tokens, as narrow as they came."""
    x_train, y_train, x_test, y_test = (torch.from_numpy(arrays[name]) for name in ARRAYS)
    ids = pick_ids(key, clients, arrays, [*arrays], (len(y_train), len(y_test)))
    return Dataset(x_train, y_train, x_test, y_test, num_classes, (), (), "none", ids)


def _raw(source: Source) -> RawArrays:
    x_train, y_train, x_test, y_test = (source.arrays[name] for name in ARRAYS)
    return x_train, y_train, x_test, y_test


def _check_no_context(key: str, asked: Asking) -> None:
    if asked.context:
        raise InputError(
            f"data.context = {asked.context}: cuts a stream of tokens (x_train of one axis of whole numbers, no "
            f"y_train), and {key} has examples; leave it 0"
        )


def _of_source(key: str, source: Source, asked: Asking, where: str = "") -> Dataset:
    """Examples with targets, or a stream of tokens, whose windows they are."""
    if not is_stream(source.arrays):
        _check_no_context(key, asked)
        return _user_dataset(key, has_four(key + where, source), asked)
    *parts, num_classes = windows_of(key, source.arrays, asked.context, asked.targets)
    x_train, y_train, x_test, y_test = parts
    ids = pick_ids(key, asked.clients, source.arrays, source.names, (len(y_train), len(y_test)))
    return Dataset(x_train, y_train, x_test, y_test, num_classes, (), (), "none", ids)


def _user_dataset(key: str, source: Source, asked: Asking) -> Dataset:
    targets = asked.targets
    x_train, y_train, x_test, y_test = checked_whole(key, _raw(source), targets=targets)
    known = source.num_classes if TARGETS[targets].grows else 0
    num_classes = known or num_outputs(key, targets, (y_train, y_test))
    if isinstance(x_train, dict) and (images := [n for n, one in x_train.items() if one.dtype == torch.uint8]):
        raise InputError(f"{key}: x_train[{images[0]!r}] is uint8: among several inputs give images as float features")
    ids = pick_ids(key, asked.clients, source.arrays, source.names, (len(y_train), len(y_test)))
    mean, std = statistics(x_train) if isinstance(x_train, Tensor) and x_train.dtype == torch.uint8 else ((), ())
    return Dataset(x_train, y_train, x_test, y_test, num_classes, mean, std, "none", ids)


# Where the arrays come from.


def _of_user(key: str, result: object, asked: Asking) -> Dataset:
    """What the user's function returned: a Dataset, four arrays, or two streams or data sets of torch's kind."""
    if isinstance(result, Dataset):
        _check_no_context(key, asked)
        return _checked_dataset(key, result, asked.clients, asked.targets)
    if isinstance(result, Mapping):
        return _of_source(key, Source(result, [*result]), asked)
    if isinstance(result, tuple | list) and len(result) == 4:
        return _of_source(key, four_arrays(result), asked)
    if isinstance(result, tuple | list) and len(result) == 2:
        if is_stream(streams := dict(zip(("x_train", "x_test"), result, strict=True))):
            return _of_source(key, Source(streams, [*streams]), asked)
        if all(map(is_map_style, result)):
            arrays = read_pair(key, *result)
            return _of_source(key, Source(arrays, [*arrays]), asked)
    got = type(result).__name__ + (f" of {len(result)}" if isinstance(result, tuple | list) else "")
    wanted = f"a Dataset, {', '.join(ARRAYS)} as a dict or tuple, or two data sets of (x, y) by number"
    raise InputError(f"{key}: must return {wanted}; returned {got}")


# What is checked of a Dataset that the user made.


def _checked_dataset(key: str, dataset: Dataset, clients: str, targets: str) -> Dataset:
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
    exact = not how.grows and targets != "anything"  # what is predicted is there, number by number
    if type(num_classes) is not int or num_classes < max(1, least) or (exact and num_classes != least):
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
    given = dataset.ids or {}
    ids = pick_ids(key, clients, given, [*given], (len(y_train), len(y_test)))
    return Dataset(x_train, y_train, x_test, y_test, num_classes, mean, std, dataset.augment, ids)
