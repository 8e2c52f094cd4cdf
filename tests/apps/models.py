"""Small models for tests, named in configs as tests.apps.models:NAME."""

import math

from torch import nn


def normed(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two layers with BatchNorm between: the smallest model with buffers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes)
    )


class _Mixing(nn.Module):
    """Subtracts the batch's mean: no model for folded batches, which hold several clients'."""

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, num_classes)

    def forward(self, x):
        h = self.layer(x.flatten(1))
        return h - h.mean(0)


def mixing(shape, num_classes):
    return _Mixing(math.prod(shape), num_classes)
