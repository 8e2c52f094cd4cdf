"""A data set that is a folder: LEAF's files, or images in train/CLIENT/LABEL/… and test/CLIENT/LABEL/…."""

import os
from pathlib import Path

import numpy as np
import torch

from fedmom.data.sources.array_files import Source
from fedmom.data.sources.images import entries, read_images
from fedmom.data.sources.leaf import USERS, leaf_files, leaf_users, read_leaf
from fedmom.errors import InputError, unknown

FOLDERS = "folders"  # what data.clients calls the folders CLIENT


def is_folder(name: str) -> bool:
    """Whether a value of data.dataset means a folder: it is written with a slash, "./faces" or "leaf/femnist/"."""
    return "/" in name or os.sep in name


def read_folder(key: str, folder: Path, classes: str) -> Source:
    """The examples of a folder, and whose they are: `users` of LEAF's files, else `folders`.

    `classes`: the names of labels, by commas, where their folders are not numbers. Raises InputError.
    """
    _check(key, folder)
    if leaf_files(folder, "train"):
        return read_leaf(key, folder)
    arrays: dict[str, object] = {}
    for split, ids in (("train", FOLDERS), ("test", f"{FOLDERS}_test")):
        if not (folder / split).is_dir():
            raise InputError(f"{key}: {folder}: has no folder {split}; images are in {split}/CLIENT/LABEL/")
        xs, ys, owners = list[torch.Tensor](), list[torch.Tensor](), list[str]()
        for place in _clients(key, folder, split):
            x, y = read_images(key, place, classes)
            if xs and x.shape[1:] != xs[0].shape[1:]:
                shapes = f"images of {place} are {list(x.shape[1:])}, those before {list(xs[0].shape[1:])}"
                raise InputError(f"{key}: {shapes}; all need the same channels, height and width")
            xs.append(x)
            ys.append(y)
            owners += [place.name] * len(y)
        arrays |= {f"x_{split}": torch.cat(xs), f"y_{split}": torch.cat(ys), ids: np.array(owners)}
    return Source(arrays, tuple(arrays))


def clients_of_folder(key: str, folder: Path, clients: str) -> np.ndarray:
    """The ids of all clients that a folder has, without its examples; `clients` is the name that they have there."""
    _check(key, folder)
    right, ids = USERS, leaf_users(key, folder)
    if not len(ids):
        right, ids = FOLDERS, np.array([place.name for place in _clients(key, folder, "train")])
    if clients != right:
        raise InputError(f"{key}: {unknown('data.clients', clients, [right])}")
    return np.unique(ids)


def _check(key: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{key}: there is no folder {folder}")
    if not (folder / "train").is_dir():
        raise InputError(
            f"{key}: {folder}: has no folder train; it needs LEAF's train/*.json and test/*.json, or images in "
            "train/CLIENT/LABEL/ and test/CLIENT/LABEL/"
        )


def _clients(key: str, folder: Path, split: str) -> list[Path]:
    """The folders CLIENT of one split, by name."""
    places = list(entries(folder / split))
    for place in places:
        if not place.is_dir():
            raise InputError(f"{key}: {place}: lies beside the folders of clients; it belongs into one of them")
    if not places:
        raise InputError(f"{key}: {folder / split}: has no folders of clients")
    return places
