"""What the user's code holds between two calls: attributes, and what stands on its classes, functions and files.

Copies of it before and after a step show whether the step leaves something behind that no client has of its own.
"""

import contextlib
import copy
import itertools
import math
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sized
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn

from fedmom.user_code import is_own_file

_KEPT = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def attributes(model: nn.Module) -> dict[str, Any]:
    """Copies of what modules hold besides parameters, buffers and modules; of what cannot be copied nothing."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _KEPT or key.endswith("_hooks") or isinstance(value, nn.Module):
                continue
            at = f"the attribute {key!r} of {type(module).__name__}" + (f" {name!r}" if name else "")
            with contextlib.suppress(Exception):  # a user's object may refuse
                found[at] = _copy(value)
    return found | shared_by(*{cls for module in model.modules() for cls in type(module).__mro__})


def held_by(thing: object) -> dict[str, Any]:
    """Copies of the attributes of an object of the user's own; of what cannot be copied nothing."""
    found = {}
    for key, value in vars(thing).items():
        with contextlib.suppress(Exception):  # a user's object may refuse
            found[f"the attribute {key!r} of {type(thing).__name__}"] = _copy(value)
    return found


def shared_by(*owners: type | Callable[..., Any]) -> dict[str, Any]:
    """Copies of what stands on the user's own classes and functions, and in global variables beside these.

    owners: a model's classes, or a correction. Of their files, and of the user's files that these name.
    """
    found = dict[str, Any]()
    for owner in owners:
        if _own_file(owner.__module__) is not None:
            _add(found, vars(owner), f"of the {'class' if isinstance(owner, type) else 'function'} {owner.__name__}")
    homes = {id(home): home for owner in owners if (home := _own_file(owner.__module__)) is not None}
    for home in [*homes.values()]:
        named = [value for value in vars(home).values() if isinstance(value, ModuleType | FunctionType | type)]
        names = {value.__name__ if isinstance(value, ModuleType) else value.__module__ for value in named}
        homes |= {id(own): own for name in names if (own := _own_file(name)) is not None}
    for home in homes.values():
        for value in vars(home).values():
            if isinstance(value, type | FunctionType) and value.__module__ == home.__name__:
                kind = "class" if isinstance(value, type) else "function"
                _add(found, vars(value), f"of the {kind} {value.__name__}")
        _add(found, vars(home), f"of {home.__name__}, a global variable")
    return found


def _own_file(name: str | None) -> ModuleType | None:
    home = sys.modules.get(name or "")
    return home if home is not None and is_own_file(getattr(home, "__file__", None) or "<") else None


def _add(found: dict[str, Any], values: Mapping[str, Any], of: str) -> None:
    for key, value in [*values.items()]:
        own = isinstance(value, _COUNTS) or _own_file(type(value).__module__) is not None
        if own and not key.startswith("__") and not isinstance(value, _NO_STATE):
            with contextlib.suppress(Exception):  # a user's object may refuse
                found[f"{key!r} {of}"] = _copy(value, most=_MANY)


# What a class or a file counts, collects and draws with, beside objects of the user's own classes. What holds more
# values than so many (the data, say) is passed over.
_COUNTS = (
    *(bool, int, float, complex, str, Tensor, np.ndarray, list, dict, deque, set, itertools.count),
    *(torch.Generator, np.random.Generator, random.Random),
)
_MANY = 10_000


def _size(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return math.prod(value.shape)
    return len(value) if isinstance(value, Sized) else 1


def _copy(value: Any, depth: int = 4, most: float = math.inf) -> Any:
    """What can be compared later: tensors, arrays, plain values, and what objects of the user's own hold of them.

    most: numbers of a tensor, or values of a container; None for what has more.
    """
    if _size(value) > most:
        return None
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return _copy(value.bit_generator.state, most=most)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, itertools.count):
        return repr(value)
    if depth == 0 or isinstance(value, _NO_STATE):
        return None
    if isinstance(value, dict):
        return {key: _copy(v, depth - 1, most) for key, v in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_copy(v, depth - 1, most) for v in value]
    if hasattr(value, "__dict__"):
        return _copy(vars(value), depth - 1, most)
    return copy.deepcopy(value)


# What holds nothing that a step could change, or is looked at by itself.
_NO_STATE = (
    nn.Module,
    ReferenceType,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    torch.dtype,
    torch.device,
)


def changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    return next((name for name, value in after.items() if not same(before.get(name), value)), "")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
            return False
        if one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        if one.is_quantized or not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        finite = one.abs()[torch.isfinite(one)]
        scale = float(finite.max()) if finite.numel() else 0.0
        return torch.allclose(one, other, 1e-6, 1e-6 * scale, equal_nan=True)  # a card may add in another order
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if type(one) is not type(other):
        return False
    compared = False
    for compare in (lambda: bool(one == other), lambda: pickle.dumps(one) == pickle.dumps(other)):
        try:
            if compare():
                return True
            compared = True
        except Exception:  # a user's object may refuse
            continue
    return not compared  # what cannot be compared is not said to differ
