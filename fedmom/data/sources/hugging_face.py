"""Data sets of Hugging Face's `datasets`: hf:NAME, hf:NAME:CONFIGURATION or hf:FOLDER of save_to_disk.

One that is cached or in a folder needs no network. The package is imported when a data set is read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmom.data.sources.pairs import stacked
from fedmom.errors import InputError, missing_package
from fedmom.machine.files import at_home
from fedmom.user_code import HUB, one_line

_TARGETS = ("label", "labels", "target", "y")  # columns that are the target where data.columns says nothing
_TESTS = ("test", "validation")


def read_hub(key: str, name: str, columns: str) -> dict[str, object]:
    """x_train, y_train, x_test and y_test of the splits train and test, or validation.

    columns: inputs and, last, the target, by commas; several inputs become a dict. Raises InputError.
    """
    splits = _opened(key, name.removeprefix(HUB))
    test = next((split for split in _TESTS if split in splits), "")
    if "train" not in splits or not test:
        raise InputError(
            f"{key}: has the splits {', '.join(map(str, splits))}; it needs train and test (or validation)"
        )
    found: dict[str, object] = {}
    for split, part in (("train", splits["train"]), ("test", splits[test])):
        *inputs, target = _chosen(key, part.features, columns)
        for column in filter(lambda column: _is_words(part.features[column]), inputs):
            raise InputError(f"{key}: {column} is text: {_TOKENISE}")
        x = {column: _values_of(f"{key}: {column}", part, column) for column in inputs}
        found[f"x_{split}"] = x if len(x) > 1 else x[inputs[0]]
        found[f"y_{split}"] = _values_of(f"{key}: {target}", part, target)
    return found


def _opened(key: str, name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_package(key, str(error.name), "hf") from error
    place, (path, _, configuration) = at_home(name), name.partition(":")
    try:
        on_disk = place.is_dir()
        found = datasets.load_from_disk(str(place)) if on_disk else datasets.load_dataset(path, configuration or None)
    except Exception as error:  # it lets through whatever the network, the disk and its readers raise
        raise InputError(f"{key}: cannot be loaded: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{key}: is one split; save a DatasetDict with train and test")
    return found


def _chosen(key: str, features: Any, columns: str) -> Sequence[str]:
    """The columns of inputs and, last, of the target."""
    named = [column.strip() for column in columns.split(",")] if columns else []
    there = ", ".join(features)
    if wrong := [column for column in named if column not in features]:
        raise InputError(f"data.columns = {columns!r}: {key} has no column {wrong[0]!r}; it has {there}")
    if len(named) == 1 or len(set(named)) < len(named):
        raise InputError(f"data.columns = {columns!r}: must be inputs and, last, the target, as in 'image,label'")
    if named:
        return named
    targets = [column for column in _TARGETS if column in features]
    inputs = [column for column in features if column not in targets and _is_input(features[column])]
    if len(targets) != 1 or len(inputs) != 1:
        raise InputError(
            f"{key}: has the columns {there}; say which are inputs and, last, the target: "
            f"data.columns = 'image,label'{_advice(key, features, targets)}"
        )
    return [*inputs, *targets]


def _advice(key: str, features: Any, targets: Sequence[str]) -> str:
    words = [column for column in features if _is_words(features[column]) and column not in targets]
    return f" ({words[0]} is text: {_TOKENISE})" if words else ""


_TOKENISE = 'tokenise it (dataset.map) and save it, or give "module:function"'


def _is_words(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string")


def _is_input(feature: Any) -> bool:
    """Whether a column is an image, or a list or array of numbers."""
    kind = type(feature).__name__
    return kind == "Image" or kind.startswith("Array") or kind in ("List", "LargeList", "Sequence")


def _values_of(what: str, part: Any, column: str) -> object:
    feature = part.features[column]
    leaf = feature
    while hasattr(leaf, "feature"):
        leaf = leaf.feature
    dtype = str(getattr(leaf, "dtype", ""))
    numeric = dtype.startswith(("int", "uint", "float", "bool"))
    try:
        # Without a dtype it would round float64 to float32.
        values = part.with_format(*(("numpy",) if numeric else ()), **({"dtype": dtype} if numeric else {}))[column][:]
    except Exception as error:  # of its decoders
        raise InputError(f"{what} cannot be read: {one_line(error)}") from error
    return values if isinstance(values, np.ndarray) and values.dtype.kind != "O" else stacked(what, [*values])
