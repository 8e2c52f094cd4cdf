"""Text, and a small transformer: from which package of Python's library are these lines of code?

    python examples/text_transformer.py

Integers [n, length] reach a model as they are, whatever run.dtype is; here they are numbers of words.
"""

import importlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fedmom

PACKAGES = ("json", "email", "unittest", "concurrent.futures")
LENGTH, WORDS = 16, 800  # words of an example; of the vocabulary


def lines() -> dict[str, np.ndarray]:
    """Real code, 16 words an example, as numbers [n, LENGTH] (0: not in the vocabulary), and its package."""
    found: list[tuple[list[str], int]] = []
    for label, name in enumerate(PACKAGES):
        folder = Path(str(importlib.import_module(name).__file__)).parent
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
        words = re.findall(r"[A-Za-z_]+", text)[: 600 * LENGTH]
        found += [(words[at : at + LENGTH], label) for at in range(0, len(words) - LENGTH + 1, LENGTH)]
    order = np.random.default_rng(0).permutation(len(found))
    examples = [found[place] for place in order]
    cut = len(examples) * 4 // 5
    counts = Counter(word for words, _ in examples[:cut] for word in words)
    number = {word: place for place, (word, _) in enumerate(counts.most_common(WORDS - 1), 1)}
    x = np.array([[number.get(word, 0) for word in words] for words, _ in examples])
    y = np.array([label for _, label in examples])
    return {"x_train": x[:cut], "y_train": y[:cut], "x_test": x[cut:], "y_test": y[cut:]}


class Transformer(nn.Module):
    """One layer of attention over words; their mean decides."""

    def __init__(self, length: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.attention = nn.MultiheadAttention(width, num_heads=2, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, length] -> [B, num_classes]
        h = self.words(x) + self.places
        n = self.first(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.wide(self.second(h))
        return self.head(h.mean(1))


def transformer(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Transformer(input_shape[0], num_classes)


def main() -> float:
    result = fedmom.run(
        {
            "data": {"dataset": "text_transformer:lines", "num-clients": 4, "alpha": 1.0, "batch-size": 16},
            "model": {"name": "text_transformer:transformer"},
            "algorithm": {"lr": 0.05, "num-local-steps": 8},
            "run": {"num-rounds": 20, "eval-every": 5},
            "engine": {"threads": 1},
        }
    )
    accuracy = result.rounds[-1]["test_accuracy"]
    print(f"test accuracy {100 * accuracy:.1f} % (guessing: {100 / len(PACKAGES):.0f} %)")
    return accuracy


if __name__ == "__main__":
    main()
