"""What people's targets may be, by what a task asks of them: a table of kinds, each with its check and its size.

Labels [n], tokens [n, T], numbers [n] or [n, d], sets of labels [n, L]; and anything, for a task of the user's own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmom.data.inputs import ends, pieces
from fedmom.errors import InputError

IGNORED = -100  # a token's target that counts nowhere, as in torch's cross_entropy
_MANY = 1000  # classes that no data set is too small for


class TargetKind(NamedTuple):
    """One kind of target: what is taken, and how many outputs a model has for it."""

    summary: str
    check: Callable[[str, Tensor], Tensor]  # (what it is, as messages name it; y as it came) -> y as it is kept
    size: Callable[[Tensor], int]  # how many outputs this y needs
    grows: bool  # whether the outputs of two parts are the larger number; else both must need the same
    classes: Callable[[np.ndarray], np.ndarray | None]  # y -> [n] labels by which clients can be skewed, if any
    # (shape of an example, outputs) -> the y of no example
    none: Callable[[tuple[int, ...], int], Tensor] = lambda shape, size: torch.zeros(0, dtype=torch.int64)


def _labels(what: str, y: Tensor) -> Tensor:
    shape = list(y.shape)
    if y.is_floating_point() or y.dtype == torch.bool:
        advice = "(astype(np.int64)); of real numbers data.task = 'regression'"
        raise InputError(f"{what} has dtype {_name(y)}: labels are integers 0, 1, 2, … {advice}")
    if y.ndim != 1:
        advice = "y.reshape(-1)" if shape[1:] and set(shape[1:]) == {1} else "of one-hot rows y.argmax(1)"
        other = "; of several labels each data.task = 'multi-label', of a label for each token 'per-token'"
        raise InputError(
            f"{what} has shape {shape}: labels are [n], one number for each example; {advice}"
            + (other if y.ndim == 2 and shape[1] > 1 else "")
        )
    y = y.to(torch.int64)
    if len(y) and int(y.min()) < 0:
        raise InputError(f"{what} has a negative label, {int(y.min())}: labels are 0, 1, 2, …; drop or renumber it")
    return y


def _tokens(what: str, y: Tensor) -> Tensor:
    if y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(f"{what} has dtype {_name(y)}: tokens' labels are integers (astype(np.int64))")
    if y.ndim < 2:
        raise InputError(f"{what} has shape {list(y.shape)}: tokens' labels are [n, T], one for each token")
    low = ends(y)[0]
    if low < 0 and any(bool(((part < 0) & (part != IGNORED)).any()) for part in pieces(y)):
        raise InputError(f"{what} has a negative label, {low}: labels are 0, 1, 2, …, and {IGNORED} where none counts")
    return y


def _numbers(what: str, y: Tensor) -> Tensor:
    """[n] -> [n, 1]; whole numbers become real ones."""
    if y.ndim == 1:
        y = y[:, None]
    if y.ndim != 2:
        raise InputError(f"{what} has shape {list(y.shape)}: numbers to predict are [n] or [n, d]; y.reshape(n, -1)")
    if not y.is_floating_point():
        return y.to(torch.float64)
    if not bool(torch.isfinite(y).all()):
        raise InputError(f"{what} has values that are NaN or infinite: fill them, or drop those examples")
    return y


def _sets(what: str, y: Tensor) -> Tensor:
    """uint8 [n, L] of 0 and 1."""
    if y.ndim != 2:
        raise InputError(f"{what} has shape {list(y.shape)}: several labels are [n, L], 1 for each that holds, else 0")
    if bool(((y != 0) & (y != 1)).any()):
        wrong = y[(y != 0) & (y != 1)][0].item()
        raise InputError(f"{what} has a value {wrong:g}: several labels are [n, L] of 0 and 1")
    return y.to(torch.uint8)


def _anything(what: str, y: Tensor) -> Tensor:
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise InputError(f"{what} has values that are NaN or infinite: fill them, or drop those examples")
    return y


def _name(y: Tensor) -> str:
    return str(y.dtype).removeprefix("torch.")


def _highest(y: Tensor) -> int:
    return max(0, ends(y)[1] + 1)


def _trailing(y: Tensor) -> int:
    return int(y.shape[1:].numel())


def _numbered(y: np.ndarray) -> np.ndarray:
    """[n, L] -> [n]: the number of each set among all that occur."""
    return np.unique(y, axis=0, return_inverse=True)[1].reshape(-1)


def _tenths(y: np.ndarray) -> np.ndarray | None:
    """[n, 1] -> [n]: in which tenth of all examples a number lies, by size."""
    if y.shape[1] != 1:
        return None
    return np.searchsorted(np.quantile(y[:, 0], np.arange(1, 10) / 10), y[:, 0], side="right")


def _none(y: np.ndarray) -> None:
    return None


def _no_tokens(shape: tuple[int, ...], size: int) -> Tensor:
    return torch.zeros(0, *shape[:1], dtype=torch.int64)


def _no_numbers(shape: tuple[int, ...], size: int) -> Tensor:
    return torch.zeros(0, size, dtype=torch.float64)


TARGETS = {
    "labels": TargetKind("[n] integers, a class each", _labels, _highest, True, lambda y: y),
    "tokens": TargetKind(f"[n, T] integers, a class each; {IGNORED}: none", _tokens, _highest, True, _none, _no_tokens),
    "numbers": TargetKind("[n] or [n, d] numbers", _numbers, _trailing, False, _tenths, _no_numbers),
    "sets": TargetKind("[n, L] of 0 and 1", _sets, _trailing, False, _numbered, _no_numbers),
    "anything": TargetKind("[n, ...] as they are", _anything, _trailing, False, _none),
}


def num_outputs(key: str, kind: str, targets: Sequence[Tensor]) -> int:
    """How many outputs a model has for all these parts of y; InputError where they disagree, or are ids."""
    how = TARGETS[kind]
    sizes = [how.size(y) for y in targets if len(y)]
    if not how.grows and len(set(sizes)) > 1:
        raise InputError(f"{key}: targets have {sizes[0]} numbers in one part and {max(sizes)} in another")
    if how.grows and not max(sizes, default=0):
        raise InputError(f"{key}: has no target that counts; a label is 0, 1, 2, …")
    return count_classes(key, max(sizes) - 1, sum(y.numel() for y in targets)) if how.grows else sizes[0]


def classes_of(kind: str, y: np.ndarray) -> np.ndarray | None:
    """[n] int64 labels by which a partition may skew clients, and by which they are drawn; None where there are none.

    Of numbers the tenths by size (one number each), of several labels the number of their set.
    """
    found = TARGETS[kind].classes(y)
    return None if found is None else found.astype(np.int64)


def count_classes(key: str, highest: int, num_labels: int) -> int:
    """One more than the highest label. InputError for labels that are ids: the model would have an output for each."""
    if highest >= max(_MANY, num_labels):
        raise InputError(
            f"{key}: has a label {highest} among {num_labels} examples, and a model has an output for each of 0 to "
            f"the highest: renumber them (np.unique(y, return_inverse=True)[1], over train and test together), or "
            'return a fedmom.Dataset, which says num_classes, from a "module:function"'
        )
    return highest + 1
