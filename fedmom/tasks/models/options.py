"""What a model is built for."""

from typing import NamedTuple

Shape = tuple[int, ...]  # of one example: (C, H, W) for images


class ModelOptions(NamedTuple):
    """What a config says about a model besides its name."""

    norm: str = "batch"
    hidden: int = 200
    layers: int = 2
    heads: int = 4
