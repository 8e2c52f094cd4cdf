"""How many natural clients a data set has, for those who must know it before anything is read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmom.data.datasets import load_dataset
from fedmom.data.given.natural import pick_ids
from fedmom.data.sources.array_files import read_npz
from fedmom.data.sources.folders import clients_of_folder, is_folder
from fedmom.machine.files import at_home
from fedmom.user_code import is_spec


def all_clients(name: str, data_dir: str, clients: str, classes: str = "", **asked: Any) -> np.ndarray:
    """[all] the ids of the natural clients that a data set has, ascending; of its examples as little is read as can be.

    `asked`: what else `load_dataset` is to know.

    Raises InputError as `load_dataset` does, naming what the data set has where it has no such ids.
    """
    key = f"data.dataset = {name!r}"
    if name.lower().endswith(".npz"):
        source = read_npz(key, at_home(name), (clients,))
        ids: Mapping[str, np.ndarray] | None = pick_ids(key, clients, source.arrays, source.names, None)
    elif is_folder(name) and not is_spec(name):
        return clients_of_folder(key, at_home(name), clients)
    else:
        ids = load_dataset(name, data_dir, clients, classes, **asked).ids
    assert ids is not None
    return np.unique(ids[clients])
