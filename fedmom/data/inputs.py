"""A model's inputs: one tensor for each example, or several by name, such as token ids and a mask.

Several inputs are a dict; a model gets them by name, `model(**inputs)`, and one tensor as it is.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | dict[str, Tensor]  # [n, ...] each
Part = TypeVar("Part", bound=Tensor | dict[str, Tensor])  # of a data set: inputs, or targets
Shapes = tuple[int, ...] | dict[str, tuple[int, ...]]  # of one example


def num_examples(x: Inputs) -> int:
    return len(tree_leaves(x)[0])


def shape_of(x: Inputs) -> Shapes:
    """Of one example."""
    return {n: tuple(t.shape[1:]) for n, t in x.items()} if isinstance(x, dict) else tuple(x.shape[1:])


def numbers_in(x: Inputs) -> int:
    """How many numbers one example has."""
    return sum(t.shape[1:].numel() for t in tree_leaves(x))


def rows_of_inputs(x: Part, rows: Any) -> Part:
    """Some examples: by a slice, or by numbers."""
    found: Part = gathered(x, rows) if isinstance(rows, Tensor) else tree_map(lambda t: readable(t[rows]), x)
    return found


def gathered(x: Part, examples: Tensor) -> Part:
    """Examples by their numbers [...] -> [..., *shape]."""

    def one(source: Tensor) -> Tensor:
        # index_select copies whole examples; indexing by a matrix goes number by number.
        rows, shape = examples.reshape(-1), (*examples.shape, *source.shape[1:])
        if source.dtype in _UNSIGNED or _is_odd(source):
            return source[..., None].view(torch.uint8).index_select(0, rows).view(source.dtype).reshape(shape)
        return source.index_select(0, rows).reshape(shape)

    found: Part = tree_map(one, x)
    return found


def folded(x: Inputs) -> Inputs:
    """[K, B, ...] -> [K·B, ...]; images in the layout that convolutions like."""

    def one(t: Tensor) -> Tensor:
        t = t.reshape(-1, *t.shape[2:])
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    found: Inputs = tree_map(one, x)
    return found


# An .npz file has its numbers at any address, and torch reckons with whole multiples of their size; it also has few
# operators for unsigned integers of several bytes. Both are copied byte by byte.
_UNSIGNED = (torch.uint16, torch.uint32)
NARROW = (torch.int8, torch.int16, torch.int32, *_UNSIGNED)  # a model gets them as int64


def _is_odd(t: Tensor) -> bool:
    return t.element_size() > 1 and t.data_ptr() % t.element_size() != 0


def readable(t: Tensor) -> Tensor:
    """The same numbers, at an address that torch may compute with."""
    return t[..., None].view(torch.uint8).clone().view(t.dtype).squeeze(-1) if _is_odd(t) else t


def pieces(t: Tensor, numbers: int = 1 << 22) -> Iterator[Tensor]:
    """A tensor [n, ...] in slices of about so many numbers, so that nothing is as large as a file that stays on the
    disk; unsigned integers of several bytes as int64.
    """
    size = max(1, numbers // max(1, t.shape[1:].numel()))
    for first in range(0, len(t), size):
        piece = readable(t[first : first + size])
        yield piece.to(torch.int64) if t.dtype in _UNSIGNED else piece


def ends(t: Tensor) -> tuple[int, int]:
    """The smallest and the largest of whole numbers; 0 and -1 where there are none."""
    found = [(int(piece.min()), int(piece.max())) for piece in pieces(t) if piece.numel()]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (0, -1)


def is_integer(x: Tensor) -> bool:
    """Whether examples are ids: whole numbers that no model scales (uint8 are pixels)."""
    return not (x.is_floating_point() or x.dtype == torch.uint8)


def called_with(model: nn.Module, x: Inputs) -> Any:
    """What the model makes of a batch."""
    return model(**x) if isinstance(x, dict) else model(x)
