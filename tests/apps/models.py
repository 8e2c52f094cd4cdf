"""Small models for tests, named in configs as tests.apps.models:NAME."""

import math

from torch import nn


def normed(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two layers with BatchNorm between: the smallest model with buffers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes)
    )
