"""Your own model: torchvision's ResNet-18 from scratch, with GroupNorm, for small images.

    python examples/resnet18.py

`resnet18` is all that fedmom needs: model.name = "resnet18:resnet18". 11 million parameters want a GPU; here two
clients take a few steps on real digits, to show that it runs.
"""

from functools import partial

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18

import fedmom


def resnet18(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """For small images: a 3 x 3 stem without pooling. GroupNorm: batch statistics of few, skewed examples hurt."""
    model = torchvision_resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 8))
    model.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # clients are stacked, and nothing may be written in place
    return model


def digits() -> dict[str, np.ndarray]:
    """100 real digits, each pixel 2 x 2 times."""
    data = load_digits()
    x = (data.images[:100].repeat(2, 1).repeat(2, 2) * 15.9).astype(np.uint8)
    y = data.target[:100].astype(np.int64)
    return {"x_train": x[:80], "y_train": y[:80], "x_test": x[80:], "y_test": y[80:]}


def main() -> float:
    result = fedmom.run(
        {
            "data": {"dataset": "resnet18:digits", "num-clients": 2, "partition": "iid", "batch-size": 8},
            "model": {"name": "resnet18:resnet18"},
            "algorithm": {"lr": 0.005, "num-local-steps": 2},
            "run": {"num-rounds": 3},
            "engine": {"path": "loop"},
        }
    )
    loss = result.rounds[-1]["train_loss"]
    print(f"train loss {result.rounds[0]['train_loss']:.3f} -> {loss:.3f}")
    return result.rounds[0]["train_loss"] - loss


if __name__ == "__main__":
    main()
