"""A model's tensors as the yardstick begins with them and holds them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmom.method.corrections import Correct, Correction
from fedmom.method.randomness import uniform
from fedmom.method.state import Tree


def off(tree: Tree, which: int, by: float) -> Tree:
    """A correction's real tensors, moved a little, so that no part of its formula is 0."""
    moved = {}
    for number, (name, value) in enumerate(tree.items()):
        places = torch.arange(value.numel(), device=value.device).reshape(value.shape)
        away = by * (2 * uniform(7, which, number, places) - 1)
        moved[name] = value + away.to(value.dtype) if value.is_floating_point() else value.clone()
    return moved


def as_held(parameter: Tensor, value: Tensor) -> Tensor:
    """A value of x or u as the parameter itself holds it: complex ones travel as real numbers."""
    return torch.view_as_complex(value) if parameter.is_complex() else value


def real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def held(parameter: Tensor, value: Tensor) -> Tensor:
    """A state as the parameter itself would hold it; a clock is a number of its own."""
    return value.clone() if value.ndim == 0 and parameter.ndim else as_held(parameter, value).clone()


def remembered(correction: Correct | Correction | None, kept: Tree, begun: Mapping[str, Tensor]) -> Tree:
    """A client's state of the correction as it begins a round at x = `begun`."""
    if not isinstance(correction, Correction):
        return kept
    return {n: kept.get(n, value) for n, value in correction.start({n: real(x) for n, x in begun.items()})[0].items()}
