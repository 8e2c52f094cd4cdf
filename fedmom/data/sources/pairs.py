"""What the user's function gives: it is called here, and data sets in torch's map style are read.

Those are objects with __len__ and __getitem__ that give (x, y). They are read whole and stacked.
Each example is asked for once, so what a random transform makes of it stays the same for the whole run.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmom.data.sources.images import as_pixels
from fedmom.errors import InputError
from fedmom.user_code import load_object, one_line


def call_user(name: str, data_dir: str) -> object:
    """What it returns. The user's function; it gets `data_dir` if it has such a parameter or one without a default."""
    key = f"data.dataset = {name!r}"
    function = load_object("data.dataset", name)
    try:
        parameters = inspect.signature(function).parameters
        if "data_dir" in parameters:
            return function(data_dir=data_dir)
        if any(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
            return function(data_dir)
        return function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{key}: the function raised {one_line(error)}") from error


def is_map_style(found: object) -> bool:
    """Whether an object is a data set rather than an array or a list of something."""
    return hasattr(found, "__len__") and hasattr(found, "__getitem__") and not _is_array(found)


def _is_array(found: object) -> bool:
    return isinstance(found, np.ndarray | Tensor | list | tuple | dict | str)


def read_pair(key: str, train: Any, test: Any) -> dict[str, object]:
    """x_train, y_train, x_test and y_test of two data sets. InputError names the first example that does not fit."""
    found: dict[str, object] = {}
    for split, examples in (("train", train), ("test", test)):
        found[f"x_{split}"], found[f"y_{split}"] = _read(f"{key}: the {split} set", examples)
    return found


def _read(what: str, examples: Any) -> tuple[object, object]:
    x, y = list[Any](), list[Any]()
    try:
        count = len(examples)
    except Exception as error:  # torch's IterableDataset may have a __len__ that raises
        raise InputError(f"{what}: len() raised {one_line(error)}") from error
    if count == 0:
        raise InputError(f"{what} has no examples")
    for place in range(count):
        try:
            example = examples[place]
        except Exception as error:  # a user's own may raise anything
            raise InputError(f"{what}: example {place} raised {one_line(error)}") from error
        if not isinstance(example, tuple | list) or len(example) != 2:
            got = type(example).__name__ + (f" of {len(example)}" if isinstance(example, tuple | list) else "")
            raise InputError(f"{what}: example {place} is a {got}; it must be a pair (x, y)")
        x.append(example[0])
        y.append(example[1])
    return _inputs_of(f"{what}: x", x), stacked(f"{what}: y", y)


def _inputs_of(what: str, values: list[Any]) -> object:
    if not isinstance(values[0], Mapping):
        return stacked(what, values)
    names = [*values[0]]
    for place, one in enumerate(values):
        if not isinstance(one, Mapping) or set(one) != set(names):
            given = f"has {', '.join(map(str, one))}" if isinstance(one, Mapping) else f"is a {type(one).__name__}"
            raise InputError(f"{what} of example {place} {given}, example 0 has {', '.join(map(str, names))}")
    return {name: stacked(f"{what}[{name!r}]", [one[name] for one in values]) for name in names}


def stacked(what: str, values: list[Any]) -> np.ndarray | Tensor:
    """[n, ...] of n values of one shape and dtype: tensors, arrays, numbers, words or Pillow's images.

    Raises InputError naming the first that differs from the first of all.
    """
    plain = [_plain_value(f"{what} of example {place}", value) for place, value in enumerate(values)]
    first = plain[0]
    for place, value in enumerate(plain):
        words = isinstance(value, np.ndarray) and value.dtype.kind == "U"  # whose dtypes have the words' lengths
        alike = value.shape == first.shape and (value.dtype == first.dtype or (words and first.dtype.kind == "U"))
        if type(value) is not type(first) or not alike:
            raise InputError(
                f"{what} of example {place} is {_form(value)}, that of example 0 is {_form(first)}; all examples need "
                "one shape and one dtype"
            )
    return torch.stack(plain) if isinstance(first, Tensor) else np.stack(plain)


def _plain_value(what: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value).__module__.partition(".")[0] == "PIL":
        return as_pixels(what, value)
    if isinstance(value, np.ndarray | np.generic | bool | int | float | str):
        return np.asarray(value)
    raise InputError(f"{what} is a {type(value).__name__}: give a tensor, an array, a number or a word")


def _form(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
