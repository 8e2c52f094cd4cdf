"""What all peers but fedmom share: the workload's data and model, and local steps in plain PyTorch."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad


def data_of(load: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised examples [N, n, ...] of every client, in float32, and labels [N, n]."""
    with np.load(load["data"]) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
    mean, std = (torch.tensor(load[part]).reshape(-1, 1, 1) for part in ("mean", "std"))
    return (x.float() / 255 - mean) / std, y


def model_of(load: dict) -> nn.Module:
    """The workload's model: the same layers as fedmom's, plain modules."""
    torch.manual_seed(0)
    shape, classes = load["shape"], 10
    size = int(np.prod(shape))
    if load["model"] == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    if load["model"] == "mlp":
        h = load["hidden"]
        dense = [nn.Linear(size, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, classes)]
        return nn.Sequential(nn.Flatten(), *dense)
    if load["model"] == "cnn":
        side = (shape[1] - 4) // 2
        return nn.Sequential(
            nn.Conv2d(shape[0], 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * side * side, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, classes),
        )
    if load["model"] == "resnet20":
        widths = [16, *[w for w in (16, 32, 64) for _ in range(3)]]
        blocks = [Block(a, b) for a, b in pairwise(widths)]
        stem = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    raise ValueError(load["model"])


class Block(nn.Module):
    """A residual block of CIFAR's ResNets; the shortcut has no parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return torch.relu(y + x)


def optimizer_of(model: nn.Module, load: dict) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=load["lr"], momentum=load["momentum"])


def local_steps(model, optimizer, data, load: dict, client: int) -> float:
    """`steps` minibatches of one client's own examples, in a new random order; their mean loss."""
    total = torch.zeros((), device=data[0].device)
    x, y = data[0][client], data[1][client]
    order = torch.randperm(len(y))
    model.train()
    for s in range(load["steps"]):
        rows = order[(torch.arange(load["batch"]) + s * load["batch"]) % len(y)]
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / load["steps"]


def result(seconds: list[float], losses: list[float], parameters: int) -> dict:
    """What every peer writes: seconds and mean training loss of every round, and the size of its model."""
    return {"seconds": seconds, "losses": losses, "parameters": parameters}


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
