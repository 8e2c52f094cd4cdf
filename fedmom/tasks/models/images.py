"""Models of images and of rows of numbers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedmom.errors import InputError
from fedmom.tasks.models.options import ModelOptions, Shape


def batch_norm(channels: int) -> nn.Module:
    """BatchNorm: running statistics are averaged with the model (algorithm.running-var)."""
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    """Two groups, as Reddi et al. (ICLR 2021) for their CIFAR ResNets: two divides 16, 32 and 64.

    Hsieh et al. (ICML 2020) propose it where clients' labels are skewed: BatchNorm's statistics then differ
    between clients and those of the averaged model fit none; GroupNorm (Wu, He, ECCV 2018) keeps none.
    """
    return nn.GroupNorm(2, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": batch_norm, "group": group_norm}


def logistic(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(input_shape), num_classes))


def mlp(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    """The 2NN of McMahan et al. (AISTATS 2017) at hidden = 200."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(_size(input_shape), options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, num_classes),
    )


def cnn(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    """pfl-research's CNN for CIFAR-10 (Granqvist et al., NeurIPS 2024), with its Glorot initialisation."""
    channels, height, width = _image("cnn", input_shape, smallest=6)
    # Two 3x3 convolutions without padding take 4 off each side, the pooling halves the rest.
    features = 64 * ((height - 4) // 2) * ((width - 4) // 2)
    model = nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


class ResidualBlock(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x)))))), x' being x subsampled and padded with zero channels.

    That is the shortcut without parameters, option A of He et al. (CVPR 2016), section 4.2.
    """

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(x + branch)


class GlobalAveragePool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C]."""
        return x.mean(dim=(2, 3))


def resnet(name: str, blocks_per_stage: int, input_shape: Shape, num_classes: int, norm: str) -> nn.Module:
    """He et al. (CVPR 2016), section 4.2: 6n + 2 layers, n blocks each of 16, 32 and 64 channels."""
    channels, _, _ = _image(name, input_shape, smallest=1)
    make_norm = NORMS[norm]
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), make_norm(16), nn.ReLU()]
    width = 16
    for stage_width in (16, 32, 64):
        for _ in range(blocks_per_stage):
            layers.append(ResidualBlock(width, stage_width, make_norm))
            width = stage_width
    model = nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(width, num_classes))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # He et al. (ICCV 2015), equation 10
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def resnet20(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return resnet("resnet20", 3, input_shape, num_classes, options.norm)


def resnet56(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return resnet("resnet56", 9, input_shape, num_classes, options.norm)


def _size(input_shape: Shape) -> int:
    return torch.Size(input_shape).numel()


def _image(name: str, input_shape: Shape, smallest: int) -> tuple[int, int, int]:
    """(C, H, W), or an error when the model cannot take examples of this shape."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        needs = f"images [C, H, W] of at least {smallest}x{smallest}"
        have = f"the examples have shape {list(input_shape)}; use mlp or logistic"
        raise InputError(f"model.name = {name!r}: needs {needs}, {have}")
    channels, height, width = input_shape
    return channels, height, width
