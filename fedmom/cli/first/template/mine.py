"""The project's own data set and model: the functions that config.toml names as "mine:data" and "mine:model"."""

import numpy as np
from torch import nn


def data() -> tuple[np.ndarray, ...]:
    """x_train [n, 16], y_train [n], x_test, y_test: ten classes that no straight line separates.

    Return your own four arrays: float32 features, uint8 images [n, channels, height, width] or int64 token ids.
    """
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(10, 3, 16))  # each class is three clouds of points
    y = rng.integers(10, size=5000)
    x = centers[y, rng.integers(3, size=5000)] + 0.6 * rng.normal(size=(5000, 16))
    x, y = x.astype(np.float32), y.astype(np.int64)
    return x[:4000], y[:4000], x[4000:], y[4000:]


def model(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A torch.nn.Module that turns examples [B, *input_shape] into logits [B, num_classes]."""
    (features,) = input_shape
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, num_classes))
