"""Tiny data sets for the zoo, of float64 numbers so that nothing is rounded on the way in."""

import numpy as np
import torch
from torch import Tensor

from fedmom.data.datasets import Dataset
from zoo.parts import CLASSES, LENGTH, SHAPE, WORDS


def images() -> Dataset:
    """Learnable images of three classes."""
    rng = np.random.default_rng(5)
    y = torch.from_numpy(np.arange(40) % CLASSES)
    x = rng.normal(size=(CLASSES, *SHAPE))[y] + rng.normal(size=(40, *SHAPE))
    return _split(torch.from_numpy(x), y)


def tokens() -> Dataset:
    """Sentences whose class is the sum of their words."""
    x = torch.from_numpy(np.random.default_rng(6).integers(WORDS, size=(40, LENGTH)))
    return _split(x.double(), x.sum(1) % CLASSES)


def many_tests() -> Dataset:
    """Images, 501 of them for the test: one more than are judged at once."""
    data = images()
    places = torch.arange(501) % len(data.x_test)
    return data._replace(x_test=data.x_test[places], y_test=data.y_test[places])


def _split(x: Tensor, y: Tensor) -> Dataset:
    return Dataset(x[:30], y[:30], x[30:], y[30:], CLASSES, (), (), "none")
