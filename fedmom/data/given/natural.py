"""Natural clients: every example came with the id of the client whose it is, a writer, a speaker, a device."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.partition import Partition
from fedmom.data.sources.array_files import ARRAYS
from fedmom.errors import InputError, unknown
from fedmom.method.randomness import CLIENTS, random_bits

# What data.partition calls them, and what it says of them.
NATURAL = {"natural": "the data's own clients: data.clients names their ids (LEAF: Caldas et al. 2018)"}
_TEST = "_test"


class Natural(NamedTuple):
    """Who holds which example; clients are numbered in the order of their sorted ids."""

    partition: Partition  # of the training examples: those of the N clients alone
    test_partition: Partition | None  # of the test examples that have ids; a client may hold none
    ids: np.ndarray  # [N] ascending, integers or strings


def is_natural(partition: str) -> bool:
    """Whether a value of data.partition leaves the clients to the data's ids."""
    return partition in NATURAL


def names_of_ids(clients: str) -> tuple[str, ...]:
    """The arrays that `data.clients` means: of the training examples, and of the test examples if it is there."""
    return (clients, clients + _TEST) if clients else ()


def pick_ids(
    key: str, clients: str, arrays: Mapping[str, object], names: Collection[str], sizes: tuple[int, int] | None
) -> dict[str, np.ndarray] | None:
    """{NAME: [n], NAME_test: [m]} of `arrays`, checked; None where `clients` names nothing.

    `names`: all that the data set has. `sizes`: (n, m), where they are known. Raises InputError.
    """
    if not clients:
        return None
    start = f"data.clients = {clients!r}"
    if clients not in arrays:
        others = [name for name in names if name not in ARRAYS and not name.endswith(_TEST)]
        if others:
            raise InputError(f"{key}: {unknown('data.clients', clients, others)}")
        raise InputError(f"{start}: {key} has no ids of clients beside its examples and labels")
    found: dict[str, np.ndarray] = {}
    for place, (name, split) in enumerate(zip(names_of_ids(clients), ("train", "test"), strict=True)):
        if arrays.get(name) is not None:
            found[name] = _checked(f"{start}: {key}: {name}", arrays[name])
            if sizes is not None and len(found[name]) != sizes[place]:
                raise InputError(
                    f"{start}: {key}: {name} has {len(found[name])} ids, x_{split} has {sizes[place]} examples"
                )
    kinds = {name: "strings" if ids.dtype.kind == "U" else "integers" for name, ids in found.items()}
    if len({*kinds.values()}) > 1:
        said = " and ".join(f"{name} has {kind}" for name, kind in kinds.items())
        raise InputError(f"{start}: {key}: {said}; give both in one kind")
    return found


def _checked(what: str, values: object) -> np.ndarray:
    """Ids [n] as int64 or as strings."""
    ids = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if ids.dtype.kind == "O" and ids.ndim == 1 and all(isinstance(one, str) for one in ids):
        ids = ids.astype(str)  # a column of a table
    if ids.dtype.kind not in "iuUST":
        raise InputError(f"{what} has dtype {ids.dtype}: ids are integers or strings (astype(np.int64), astype(str))")
    if ids.ndim != 1:
        raise InputError(f"{what} has shape {list(ids.shape)}: ids are [n], one for each example")
    if not len(ids):
        raise InputError(f"{what} is empty: every example needs the id of its client")
    if ids.dtype.kind in "iu":
        if int(ids.max()) > 2**63 - 1:
            raise InputError(f"{what} has ids of 2^63 and more: at most {2**63 - 1} fits")
        return ids.astype(np.int64)
    try:
        return np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids.astype(str)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} has bytes that are no UTF-8 ({error.reason}): give strings") from None


def drawn_clients(num_all: int, num_clients: int, seed: int) -> np.ndarray:
    """[N] ascending places of N of `num_all` clients: uniform without replacement, by the seed alone.

    A smaller N takes some of those that a larger one takes.
    """
    keys = random_bits(CLIENTS, seed, torch.arange(num_all)).numpy()
    return np.sort(np.argsort(keys, kind="stable")[:num_clients])


def natural_partition(
    ids: Mapping[str, np.ndarray], clients: str, num_clients: int, *, min_size: int = 1, seed: int = 0
) -> Natural:
    """The parts of N clients, drawn where there are more; `ids` as `pick_ids` gives them.

    Raises InputError where there are fewer than N, or one of the N holds fewer than `min_size` training examples.
    """
    train, test = (ids.get(name) for name in names_of_ids(clients))
    assert train is not None
    known = np.unique(train)
    if num_clients > len(known):
        raise InputError(
            f"data.num-clients = {num_clients}: data.clients = {clients!r} has {len(known)} clients; take at most "
            f"{len(known)}, or 0 for all"
        )
    chosen = known[drawn_clients(len(known), num_clients, seed)]
    partition = _parts(train, chosen)
    small = int(partition.sizes.argmin())
    if partition.sizes[small] < min_size:
        raise InputError(
            f"data.min-size = {min_size}: client {chosen[small]} of data.clients = {clients!r} has "
            f"{partition.sizes[small]} examples; lower it, or leave such clients out of the data"
        )
    return Natural(partition, None if test is None else _parts(test, chosen), chosen)


def _parts(ids: np.ndarray, chosen: np.ndarray) -> Partition:
    """The examples of each of the `chosen` [N], which ascend; those of nobody among them are left out."""
    place = np.minimum(np.searchsorted(chosen, ids), len(chosen) - 1)
    owner = np.where(chosen[place] == ids, place, -1)
    return owned(owner, len(chosen))


def owned(owner: np.ndarray, num_clients: int) -> Partition:
    """The partition in which client owner[e] holds example e, and nobody where it is −1."""
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner[owner >= 0], minlength=num_clients)
    return Partition(order[len(owner) - int(sizes.sum()) :], np.concatenate([[0], np.cumsum(sizes)]))
