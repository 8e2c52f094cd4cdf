"""A model's inputs: one tensor for each example, or several by name, such as token ids and a mask.

Several inputs are a dict; a model gets them by name, `model(**inputs)`, and one tensor as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | dict[str, Tensor]  # [n, ...] each
Shapes = tuple[int, ...] | dict[str, tuple[int, ...]]  # of one example


def num_examples(x: Inputs) -> int:
    return len(tree_leaves(x)[0])


def shape_of(x: Inputs) -> Shapes:
    """Of one example."""
    return {n: tuple(t.shape[1:]) for n, t in x.items()} if isinstance(x, dict) else tuple(x.shape[1:])


def numbers_in(x: Inputs) -> int:
    """How many numbers one example has."""
    return sum(t.shape[1:].numel() for t in tree_leaves(x))


def rows_of_inputs(x: Inputs, rows: Any) -> Inputs:
    """Some examples: by a slice, or by numbers."""
    found: Inputs = tree_map(lambda t: t[rows], x)
    return found


def gathered(x: Inputs, examples: Tensor) -> Inputs:
    """Examples by their numbers [...] -> [..., *shape]."""

    def one(source: Tensor) -> Tensor:
        # index_select copies whole examples; indexing by a matrix goes number by number.
        return source.index_select(0, examples.reshape(-1)).reshape(*examples.shape, *source.shape[1:])

    found: Inputs = tree_map(one, x)
    return found


def folded(x: Inputs) -> Inputs:
    """[K, B, ...] -> [K·B, ...]; images in the layout that convolutions like."""

    def one(t: Tensor) -> Tensor:
        t = t.reshape(-1, *t.shape[2:])
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    found: Inputs = tree_map(one, x)
    return found


def is_integer(x: Tensor) -> bool:
    """Whether examples are ids: whole numbers that no model scales (uint8 are pixels)."""
    return not (x.is_floating_point() or x.dtype == torch.uint8)


def in_pieces(x: Inputs, size: int) -> list[Inputs]:
    count = num_examples(x)
    return [rows_of_inputs(x, slice(first, first + size)) for first in range(0, count, size)]


def called_with(model: nn.Module, x: Inputs) -> Any:
    """What the model makes of a batch."""
    return model(**x) if isinstance(x, dict) else model(x)
