"""What the zoo's models are made of, and how they are listed."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

SHAPE, CLASSES, LENGTH, WORDS = (2, 8, 8), 3, 6, 11
SIZE = 2 * 8 * 8
PATHS = ("loop", "vmap", "stack", "factors")


class Model(NamedTuple):
    """One model and what must become of it."""

    build: Callable[[tuple[int, ...], int], nn.Module]
    group: str
    what: str  # in one line, for the table
    data: str  # a data set of data.py
    refused: dict[str, str]  # {path: a part of the reason}; other paths must be right
    digits: float  # how near plain torch must be, of the step's norm

    @property
    def spec(self) -> str:
        """Its name in a config."""
        return f"{self.build.__module__}:{self.build.__name__}"


ZOO: dict[str, Model] = {}
GROUPS = {
    "zoo.layers": "Layers",
    "zoo.norms": "Normalisation and parametrizations",
    "zoo.sequences": "Attention, recurrence, embeddings",
    "zoo.transformers": "Transformers, positions, weights frozen in part",
    "zoo.weights": "Weights",
    "zoo.gradients": "Autograd",
    "zoo.state": "Random numbers and state",
    "zoo.outputs": "What a batch is, and what comes out",
}


def model(what: str, *, data: str = "images", everywhere: str = "", digits: float = 1e-9, **refused: str) -> Any:
    """Put a function that builds a model into the zoo; `everywhere`: refused on every path, with these words.

    What is said of `stack` holds for `factors`, unless that is named too.
    """

    def put(build: Callable) -> Callable:
        where = dict.fromkeys(PATHS, everywhere) if everywhere else refused
        if "stack" in where:
            where = {"factors": where["stack"], **where}
        ZOO[build.__name__] = Model(build, GROUPS[build.__module__], what, data, where, digits)
        return build

    return put


class Fn(nn.Module):
    """A forward function with the layers, parameters and buffers that it uses."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def seq(*layers: Any) -> nn.Sequential:
    """Layers one after the other; plain functions too."""
    return nn.Sequential(*(layer if isinstance(layer, nn.Module) else Fn(_plain(layer)) for layer in layers))


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda _, x: function(x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def head(channels: int) -> nn.Sequential:
    """From a feature map to logits."""
    return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def flat(width: int) -> nn.Sequential:
    return seq(nn.Flatten(), nn.Linear(SIZE, width))


def embed(width: int = 4, **options: Any) -> nn.Sequential:
    """Token ids -> [B, 6, width]."""
    return seq(Tensor.long, nn.Embedding(WORDS, width, **options))


def pooled(width: int = 4) -> nn.Sequential:
    """[B, 6, width] -> logits."""
    return seq(lambda h: h.mean(1), nn.Linear(width, CLASSES))


def normed(norm: nn.Module, **options: Any) -> nn.Sequential:
    """A small CNN of four channels with the norm in its middle."""
    return seq(conv(2, 4, **options), norm, nn.ReLU(), head(4))
