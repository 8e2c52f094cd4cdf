"""What benchmarks/what_travels.py runs: its parts, their rows, their learning rates, and models and data of their own.

A part is one task with one table. A row says which optimizer, and what becomes of its states.
"""

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fedmom


class Row(NamedTuple):
    """What travels, and how often."""

    optimizer: str
    states: str
    codecs: str = ""


class Part(NamedTuple):
    """One task."""

    title: str
    keys: Mapping[str, Any]  # of the configuration, besides what a row says
    data: Mapping[str, Mapping[str, Any]]  # {how clients differ: keys}
    intervals: Sequence[int]  # I
    steps: int  # T, of every client in every row
    every: int  # steps between two evaluations
    rows: Mapping[str, Row]
    lrs: Mapping[str, Sequence[float]]  # {optimizer: those of which a row tries three}
    measure: str = "test_accuracy"
    scale: float = 100.0  # what the measure is multiplied by
    file: str = ""  # the data set's file in the folder of the results, where the part brings one

    def rates(self, row: str, interval: int) -> tuple[float, ...]:
        """The three that are tried, of a longer list: smaller ones where I is large.

        Larger ones where u is reset after a few steps, for it never grows to 1 / (1 − β) = 10 times g.
        """
        every = self.lrs[self.rows[row].optimizer]
        first = (interval < 64) + (row == "u reset" and interval <= 4)
        first = min(first, len(every) - 3)
        return tuple(every[first : first + 3])


SGD = {
    "u average": Row("sgd", ""),
    "u every 4": Row("sgd", "u: average every 4"),
    "u local": Row("sgd", "u: local"),
    "u reset": Row("sgd", "u: reset"),
}
ADAMW = {
    "m, v average": Row("adamw", "m: average; v: average"),
    "m, v every 4": Row("adamw", "m: average every 4; v: average every 4"),
    "m every 3, v every 6": Row("adamw", "m: average every 3; v: average every 6"),
    "m every 6, v every 3": Row("adamw", "m: average every 6; v: average every 3"),
    "m reset, v average": Row("adamw", "m: reset; v: average"),
    "m, v local": Row("adamw", "m: local; v: local"),
    "m, v reset": Row("adamw", "m: reset; v: reset"),
}
CODECS = {
    "u in int8": Row("sgd", "", "u: int8"),
    "u in topk 0.1": Row("sgd", "", "u: topk 0.1"),
    "x and u in int8": Row("sgd", "", "x: int8; u: int8"),
    "x, m in int8, v in bfloat16": Row("adamw", "m: average; v: average", "x: int8; m: int8; v: bfloat16"),
}
FEWER = ("u average", "u local", "u reset", "m, v average", "m every 3, v every 6", "m, v local", "m, v reset")
SUBSET = {name: row for name, row in {**SGD, **ADAMW}.items() if name in FEWER}
TOY = {  # in rounds of I = 4 steps: 48 rounds are 192 steps, 173 are 692
    "x, m, v every 4 steps": "x: average; m: average; v: average",
    "x, m, v every 192": "x: average every 48; m: average every 48; v: average every 48",
    "x, m every 192, v every 692": "x: average every 48; m: average every 48; v: average every 173",
    "x, v every 192, m every 692": "x: average every 48; m: average every 173; v: average every 48",
    "x every 192, m every 576, v every 1152": "x: average every 48; m: average every 144; v: average every 288",
    "x every 192, m, v local": "x: average every 48; m: local; v: local",
    "x every 192, m, v reset": "x: average every 48; m: reset every 48; v: reset every 48",
}
# Drawn with replacement, as in the theory: a permutation of every client's examples costs their number in every round.
COMMON = {"data.sampling": "replacement", "engine.path": "stack", "engine.threads": 1}
FASHION = {
    **COMMON,
    "data.num-clients": 10,
    "data.batch-size": 16,
    "model.name": "mlp",
    "model.hidden": 64,
    "engine.chunk-size": 10,
}
SKEWED, ALIKE = {"data.alpha": 0.3}, {"data.partition": "iid"}
LRS = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3), "adamw": (0.00015, 0.0005, 0.0015, 0.005)}
WORKERS, TOY_STEPS, SIGMA = 256, 3840, 1.5

PARTS = {
    "fashion": Part(
        "an mlp of 64 on Fashion-MNIST, 10 clients",
        *(FASHION, {"skewed": SKEWED, "alike": ALIKE}, (4, 16, 64), 768, 64, {**SGD, **ADAMW}, LRS),
        file="fashion.npz",
    ),
    "codecs": Part(
        "the same in fewer bits",
        *(FASHION, {"skewed": SKEWED, "alike": ALIKE}, (16,), 768, 64, CODECS, LRS),
        file="fashion.npz",
    ),
    "cifar": Part(
        "a CNN of 25,578 parameters on 10,000 photos of CIFAR-10, 10 clients",
        FASHION | {"model.name": "what_travels_parts:small_cnn", "data.augment": "none"},
        *({"skewed": SKEWED}, (16,), 288, 48, SUBSET, LRS),
        file="cifar.npz",
    ),
    "text": Part(
        "a GPT of two layers of 32 on the bytes of 8 packages of Python's standard library, each a client",
        {
            **COMMON,
            "data.task": "per-token",
            "data.partition": "natural",
            "data.clients": "package",
            "data.num-clients": 8,
            "data.batch-size": 8,
            "model.name": "gpt",
            "model.hidden": 32,
            "engine.chunk-size": 8,
        },
        *({"packages": {}}, (8,), 192, 24, SUBSET, {"sgd": (0.03, 0.1, 0.3), "adamw": (0.001, 0.003, 0.01)}),
        file="text.npz",
    ),
    "toy": Part(
        "Rosenbrock's function in two numbers, 256 workers, gradients with noise of deviation 1.5",
        {
            **COMMON,
            "data.task": "what_travels_parts:Rosenbrock",
            "data.partition": "iid",
            "data.num-clients": WORKERS,
            "data.batch-size": 1,
            "model.name": "what_travels_parts:Point",
            "engine.chunk-size": WORKERS,
        },
        *({"noise": {}}, (4,), TOY_STEPS, 192, {name: Row("adam", states) for name, states in TOY.items()}),
        {"adam": (0.01, 0.03, 0.1)},
        *("test_loss", 1.0),
        file="toy.npz",
    ),
}


# --- models and tasks of their own --------------------------------------------------------------------------------


def small_cnn(shape: Sequence[int], outputs: int) -> nn.Module:
    """Two convolutions with stride 2 and a dense layer."""
    channels, height, width = shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * -(-height // 4) * -(-width // 4), outputs)),
    )


class Point(nn.Module):
    """A model that is one point of the plane, whatever its input; it begins at (−1.2, 1)."""

    def __init__(self, shape: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[-1.2], [1.0]]))

    def forward(self, ones: Tensor) -> Tensor:
        """[B, 1] of ones -> [B, 2], the point B times."""
        found: Tensor = self.layer(ones)
        return found


class Rosenbrock(fedmom.Task):
    """f(a, b) = (1 − a)² + 100 (b − a²)², and targets that are added to its gradient."""

    targets = "numbers"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[B, 2] each -> f + ξ · x, whose gradient is that of f and ξ."""
        a, b = outputs.unbind(-1)
        return ((1 - a) ** 2 + 100 * (b - a**2) ** 2 + (targets * outputs).sum(-1)).mean()


# --- data of their own --------------------------------------------------------------------------------------------

PACKAGES = ("asyncio", "concurrent", "email", "encodings", "html", "importlib", "multiprocessing", "xml")
CONTEXT, WINDOWS = 32, 1000


def write_data(part: str, path: Path, cifar: Path | None) -> None:
    """The file of a part, where it has one."""
    if PARTS[part].file and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            **{"fashion.npz": clothes, "cifar.npz": photos, "text.npz": windows, "toy.npz": noise}[path.name](cifar),
        )


def clothes(_: Path | None) -> dict[str, np.ndarray]:
    """Fashion-MNIST as it is: unpacked once, and not in every run."""
    from fedmom.data.datasets import load_dataset

    found = load_dataset("fashion-mnist", "data")
    return {f"{a}_{split}": getattr(found, f"{a}_{split}").numpy() for split in ("train", "test") for a in "xy"}


def photos(cifar: Path | None) -> dict[str, np.ndarray]:
    """The first 10,000 and 2,000 photos of a file that has all."""
    with np.load(str(cifar)) as whole:
        return {
            f"{a}_{split}": whole[f"{a}_{split}"][:n] for split, n in (("train", 10000), ("test", 2000)) for a in "xy"
        }


def windows(_: Path | None) -> dict[str, np.ndarray]:
    """Of every package 1,000 windows of 32 bytes to train on, and 200 behind them for the test."""
    parts: dict[str, list[np.ndarray]] = {}
    for package in PACKAGES:
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        stream = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8).astype(np.int64)
        ends = {"train": (0, WINDOWS), "test": (WINDOWS, WINDOWS + WINDOWS // 5)}
        for split, (first, last) in ends.items():
            taken = [stream[CONTEXT * first + shift : CONTEXT * last + shift] for shift in (0, 1)]
            if len(taken[1]) < CONTEXT * (last - first):
                raise SystemExit(f"{package}: this Python has too little of it")
            for name, tokens in zip("xy", taken, strict=True):
                parts.setdefault(f"{name}_{split}", []).append(tokens.reshape(-1, CONTEXT))
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    return arrays | {"package": np.repeat(np.array(PACKAGES), WINDOWS)}


def noise(_: Path | None) -> dict[str, np.ndarray]:
    """As many draws for every worker as it has steps; the test has no noise."""
    draws = np.random.default_rng(0).normal(0, SIGMA, (WORKERS * TOY_STEPS, 2)).astype(np.float32)
    ones = np.ones((len(draws), 1), np.float32)
    return {"x_train": ones, "y_train": draws, "x_test": ones[:1], "y_test": np.zeros((1, 2), np.float32)}
