"""fedmom's own models by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fedmom.tasks.models.gpt import gpt
from fedmom.tasks.models.images import cnn, logistic, mlp, resnet20, resnet56
from fedmom.tasks.models.options import ModelOptions, Shape


class ModelEntry(NamedTuple):
    build: Callable[[Shape, int, ModelOptions], nn.Module]
    summary: str  # one line; parameters counted for 3x32x32 images and 10 classes
    images: bool = False  # whether it looks at neighbouring pixels, so that [C, H, W] must be that
    tokens: bool = False  # whether it takes integers, token ids [T], and gives [T, V]: for per-token tasks


MODELS: dict[str, ModelEntry] = {
    "logistic": ModelEntry(logistic, "multinomial logistic regression, 30,730 parameters on CIFAR-10"),
    "mlp": ModelEntry(mlp, "two hidden layers of 200 (model.hidden), 656,810 parameters on CIFAR-10"),
    "cnn": ModelEntry(cnn, "two convolutions, dropout, two dense layers; 1,626,442 parameters on CIFAR-10", True),
    "resnet20": ModelEntry(resnet20, "CIFAR ResNet of 20 layers, normalised by model.norm, 269,722 parameters", True),
    "resnet56": ModelEntry(resnet56, "CIFAR ResNet of 56 layers, normalised by model.norm, 853,018 parameters", True),
    "gpt": ModelEntry(gpt, "GPT of token ids: layers, heads and width of model.layers, heads and hidden", tokens=True),
}
