"""LEAF's format (Caldas et al., arXiv:1812.01097, 2018): train/*.json and test/*.json, in which users are the clients.

A file is {"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}. Numbers in x become
float32 features [d], or FEMNIST's images [1, 28, 28] where d = 784; strings become numbers by LEAF's own alphabet.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmom.data.sources.array_files import Source
from fedmom.errors import InputError
from fedmom.user_code import one_line

USERS = "users"  # what data.clients calls them, as the files do
# models/utils/language_utils.py of LEAF: the characters of its Shakespeare, by whose places they are numbered.
ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_NUMBER = np.full(128, -1, np.int64)
_NUMBER[[ord(letter) for letter in ALPHABET]] = np.arange(len(ALPHABET))
_FEMNIST = 28 * 28
_HEAD = 2**26  # characters of a file that are looked through for the end of its list of users
_ADVICE = "read are lists of numbers with whole numbers for labels (FEMNIST), and strings with next characters"


def leaf_files(folder: Path, split: str) -> list[Path]:
    """The JSON files of one split, by name; none where the folder is not in LEAF's format."""
    place = folder / split
    return sorted(path for path in place.glob("*.json") if not path.name.startswith(".")) if place.is_dir() else []


def leaf_users(key: str, folder: Path) -> np.ndarray:
    """The users of the training files, unsorted, from what stands before the examples where it does."""
    users: list[str] = []
    for path in leaf_files(folder, "train"):
        users += _head(key, path)
    return np.array(users)


def read_leaf(key: str, folder: Path) -> Source:
    """All files, user by user in the files' order. Raises InputError naming file and user."""
    arrays: dict[str, object] = {}
    text = False
    for split, users in (("train", USERS), ("test", f"{USERS}_test")):
        files = leaf_files(folder, split)
        if not files:
            raise InputError(f"{key}: {folder / split}: has no .json file; LEAF's format has train/*.json, test/*.json")
        xs, ys, owners, seen = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), set[str]()
        for path in files:
            for user, x, y, is_text in _parts_of(key, path):
                if user in seen:
                    raise InputError(f"{key}: {path}: user {user!r} comes twice in {split}")
                seen.add(user)
                if xs and (x.shape[1:] != xs[0].shape[1:] or is_text != text):
                    kinds = f"examples of user {user!r} are {list(x.shape[1:])}, those before {list(xs[0].shape[1:])}"
                    raise InputError(f"{key}: {path}: {kinds}; all need one length and one kind")
                text = is_text
                xs.append(x)
                ys.append(y)
                owners.append(np.full(len(y), user))
        if not xs:
            raise InputError(f"{key}: {folder / split}: has no examples")
        arrays |= {f"x_{split}": np.concatenate(xs), f"y_{split}": np.concatenate(ys), users: np.concatenate(owners)}
    return Source(arrays, tuple(arrays), len(ALPHABET) if text else 0)


def _content(key: str, path: Path) -> Mapping[str, Any]:
    """The object of one file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: cannot read {path}: {one_line(error)}") from error
    right = isinstance(found, dict) and isinstance(found.get("users"), list)
    if not right or not isinstance(found.get("user_data"), dict):
        raise InputError(f"{key}: {path}: is not LEAF's format: an object with users, num_samples and user_data")
    return found


def _head(key: str, path: Path) -> list[str]:
    """The users of one file: LEAF writes them before the examples, which need not be read for it."""
    begin = ""
    try:
        with path.open(encoding="utf-8") as file:
            while '"user_data"' not in begin and len(begin) < _HEAD and (piece := file.read(2**20)):
                begin += piece
        found = json.loads(begin.partition('"user_data"')[0].rstrip().rstrip(",") + "}")
        return [str(user) for user in found["users"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [str(user) for user in _content(key, path)["users"]]


def _parts_of(key: str, path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray, bool]]:
    """(user, x [k, ...], y [k], whether x was text) of one file."""
    found = _content(key, path)
    users, told = found["users"], found.get("num_samples")
    if isinstance(told, list) and len(told) != len(users):
        raise InputError(f"{key}: {path}: has {len(users)} users and {len(told)} num_samples")
    for place, user in enumerate(users):
        where = f"{key}: {path}: user {user!r}"
        part = found["user_data"].get(str(user))
        if not isinstance(part, dict) or not all(isinstance(part.get(name), list) for name in ("x", "y")):
            raise InputError(f"{where}: has no lists x and y in user_data")
        x, y = part["x"], part["y"]
        if len(x) != len(y):
            raise InputError(f"{where}: x has {len(x)} examples, y has {len(y)}")
        if isinstance(told, list) and told[place] != len(y):
            raise InputError(f"{where}: num_samples says {told[place]}, and x has {len(x)} examples")
        if not y:
            raise InputError(f"{where}: has no examples; leave such users out of the file")
        yield str(user), *_examples(where, x, y)


def _examples(where: str, x: Sequence[Any], y: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, bool]:
    """One user's x [k, ...] and y [k] as arrays, and whether they are text."""
    if isinstance(x[0], str):
        if not all(isinstance(label, str) and len(label) == 1 for label in y):
            raise InputError(f"{where}: x are strings, y are no single characters: {_ADVICE}")
        return _numbers(where, x), _numbers(where, y)[:, 0], True
    try:
        features, labels = np.asarray(x), np.asarray(y)
    except ValueError:
        raise InputError(f"{where}: the examples of x differ in length") from None
    if features.dtype.kind not in "iuf" or features.ndim < 2 or labels.dtype.kind not in "iuf":
        raise InputError(f"{where}: x are no lists of numbers, or y are none: {_ADVICE}")
    features = features.astype(np.float32)
    return features.reshape(-1, 1, 28, 28) if features.shape[1:] == (_FEMNIST,) else features, labels, False


def _numbers(where: str, texts: Sequence[Any]) -> np.ndarray:
    """[k, length] int64, the characters' places in LEAF's alphabet."""
    if not all(isinstance(text, str) and len(text) == len(texts[0]) for text in texts) or not texts[0]:
        raise InputError(f"{where}: x are strings of different lengths; LEAF's are of 80 characters")
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")
    numbers = np.where(codes < len(_NUMBER), _NUMBER[np.minimum(codes, len(_NUMBER) - 1)], -1)
    if numbers.min() < 0:
        letter = chr(codes[int((numbers < 0).argmax())])
        raise InputError(f"{where}: has the character {letter!r}, which is not among LEAF's {len(ALPHABET)}")
    return numbers.reshape(len(texts), -1)
