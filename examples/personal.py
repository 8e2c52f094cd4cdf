"""What stays with each client: FedBN, FedPer, FedRep and Ditto.

    python examples/personal.py

FedBN (Li, Jiang, Zhang, Kamp, Dou, ICLR 2021) is the key algorithm.personal = "norm", and FedPer (Arivazhagan et al.,
2019) is "head". FedRep and Ditto are the classes and functions below.
"""

import copy
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedmom

Tree = dict[str, Tensor]
HEAD_STEPS = 4  # of a round, of FedRep
LAMBDA = 0.5  # of Ditto
CONFIG = {
    "data": {"num-clients": 10, "alpha": 0.1},  # real digits, very skewed
    "model": {"name": "personal:small"},
    "algorithm": {"lr": 0.05, "num-local-steps": 8},
    "run": {"num-rounds": 15, "eval-every": 15},
    "engine": {"path": "vmap", "threads": 1},
}
ALGORITHMS: dict[str, dict[str, str]] = {
    "nothing": {},
    "FedBN": {"algorithm.personal": "norm"},
    "FedPer": {"algorithm.personal": "head"},
    "FedRep": {"algorithm.personal": "head", "algorithm.correction": "personal:FedRep"},
    "Ditto, of both models": {
        "model.name": "personal:two",
        "data.task": "personal:Ditto",
        "algorithm.personal": "own",
        "algorithm.correction": "personal:towards_shared",
    },
}


def small(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A body with BatchNorm, and a head."""
    body = [nn.Flatten(), nn.Linear(math.prod(input_shape), 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(32, num_classes)))


class FedRep(fedmom.Correction):
    """HEAD_STEPS steps of a round for the head, the rest for the body.

    Collins, Hassani, Mokhtari, Shakkottai (ICML 2021). What does not take part in a step has the gradient 0. With β = 0
    it stands still, as published; with β > 0 it goes on by its momentum.
    """

    def start(self, params: Tree) -> tuple[Tree, Tree]:
        return {"step": torch.zeros((), dtype=torch.int64)}, {}  # local steps of this round so far

    def gradient(self, g: Tree, x: Tree, x_start: Tree, client: Tree, server: Tree) -> tuple[Tree, Tree]:
        heads = client["step"] < HEAD_STEPS
        moves = {name: heads if name.startswith("head.") else ~heads for name in g}
        return {n: torch.where(moves[n], g[n], 0) for n in g}, {"step": client["step"] + 1}

    def finish(
        self, x: Tree, x_start: Tree, client: Tree, server: Tree, num_steps: Tensor, total_lr: Tensor
    ) -> tuple[Tree, Tree]:
        return {"step": 0 * client["step"]}, {}


class Two(nn.Module):
    """The model that everybody trains together, and the client's own, which begins as a copy of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = model, copy.deepcopy(model)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared(x), self.own(x)


def two(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Two(small(input_shape, num_classes))


class Ditto(fedmom.Task):
    """Both models' cross-entropies, added: neither's gradient knows of the other. The own one is judged."""

    targets = "labels"
    metrics = ("accuracy",)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Logits [B, classes] twice, and labels [B] -> the sum of two means over the minibatch."""
        shared, own = outputs
        return cross_entropy(shared, targets) + cross_entropy(own, targets)

    def measure(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> dict[str, tuple[Tensor, int]]:
        """How many labels the own model finds, and of how many."""
        return {"accuracy": ((outputs[1].argmax(1) == targets).sum(), len(targets))}


def towards_shared(g: Tree, x: Tree, x_start: Tree) -> Tree:
    """Ditto (Li, Hu, Beirami, Smith, ICML 2021): g + λ (v − w) for the own model v, where the round began at w."""
    w = {name.replace("shared.", "own.", 1): value for name, value in x_start.items() if name.startswith("shared.")}
    return {name: g[name] + LAMBDA * (x[name] - w[name]) if name in w else g[name] for name in g}


def main() -> float:
    losses = {}
    for name, keys in ALGORITHMS.items():
        last = fedmom.run(CONFIG, sets=keys).rounds[-1]
        losses[name] = last["train_loss"]
        print(f"{name:21} training loss {losses[name]:.3f}, {last['bytes_sent']:,} bytes sent")
    return losses["nothing"] - losses["FedPer"]


if __name__ == "__main__":
    main()
