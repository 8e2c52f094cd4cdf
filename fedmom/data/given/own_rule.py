"""A rule of the user's own, `data.partition = "module:function"`: who holds which training example."""

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from fedmom.data.given.natural import owned
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.user_code import load_object, one_line, place_of


def _is_number(part: object) -> bool:
    return isinstance(part, Integral) or getattr(part, "ndim", 1) == 0


def own_partition(
    spec: str, labels: np.ndarray, num_clients: int, *, seed: int = 0, min_size: int = 1, more: dict[str, Any]
) -> Partition:
    """What the user's function makes of labels [n], N and the seed; it gets of `more` what its parameters name.

    It returns owner [n], −1 for an example that nobody holds, or N arrays of example numbers.
    Raises InputError, one line, for what is neither, for an example of two clients, and for a client with fewer than
    `min_size` examples, or none.
    """
    key = f"data.partition = {spec!r}"
    function = load_object("data.partition", spec)
    try:
        known = inspect.signature(function).parameters
        result = function(labels.copy(), num_clients, seed, **{name: more[name] for name in more if name in known})
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{key}: the function raised {one_line(error)}{place_of(error)}") from error
    is_list = isinstance(result, list | tuple) and not all(
        isinstance(part, Integral) or getattr(part, "ndim", 1) == 0 for part in result
    )
    if is_list:
        owner = _owner_of_parts(
            key, [_whole(f"{key}: client {c}'s part", p) for c, p in enumerate(result)], len(labels)
        )
        given = len(result)
        if given != num_clients:
            raise InputError(f"{key}: returned {given} parts, data.num-clients = {num_clients}: give one for each")
    else:
        owner = _whole(f"{key}: what it returned", result)
        if len(owner) != len(labels):
            raise InputError(
                f"{key}: returned {len(owner)} numbers for {len(labels)} examples; give owner [n], the client of each "
                f"(−1: nobody), or {num_clients} arrays of example numbers"
            )
        if len(owner) and not -1 <= owner.min() <= owner.max() < num_clients:
            wrong = int(owner.min()) if owner.min() < -1 else int(owner.max())
            raise InputError(
                f"{key}: example {int((owner == wrong).argmax())} is of client {wrong}: clients are 0 to "
                f"{num_clients - 1}, and −1 is nobody"
            )
    partition = owned(owner, num_clients)
    small = int(partition.sizes.argmin())
    if partition.sizes[small] < max(1, min_size):
        raise InputError(
            f"{key}: client {small} gets {partition.sizes[small]} examples; every client needs at least "
            f"{max(1, min_size)} (data.min-size)"
        )
    return partition


def _whole(what: str, values: object) -> np.ndarray:
    """Whole numbers [k] as int64."""
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is no array: {one_line(error)}") from error
    if array.shape == (0,):
        return array.astype(np.int64)  # np.asarray([]) is of floats
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{what} has shape {list(array.shape)} and dtype {array.dtype}: must be whole numbers, [k]")
    return array.astype(np.int64)


def _owner_of_parts(key: str, parts: Sequence[np.ndarray], num_examples: int) -> np.ndarray:
    """N arrays of example numbers -> owner [n]."""
    owner = np.full(num_examples, -1, np.int64)
    for client, part in enumerate(parts):
        if len(part) and not 0 <= part.min() <= part.max() < num_examples:
            wrong = int(part.min()) if part.min() < 0 else int(part.max())
            raise InputError(f"{key}: client {client} gets example {wrong}: examples are 0 to {num_examples - 1}")
        taken = part[owner[part] >= 0]
        if len(taken):
            raise InputError(f"{key}: clients {owner[taken[0]]} and {client} both get example {taken[0]}")
        if len(np.unique(part)) < len(part):
            twice = int(np.flatnonzero(np.bincount(part) > 1)[0])
            raise InputError(f"{key}: client {client} gets example {twice} twice")
        owner[part] = client
    return owner
