"""Small models of what people train, each with what must become of it on every path of the engine.

They take images [2, 8, 8], or 6 token ids below 11, and tell three classes apart. A model is right on a path where it
trains as plain torch does; elsewhere its entry has words of the reason why not.
"""

from torch import nn

from zoo import gradients, layers, norms, outputs, sequences, state, transformers, weights  # noqa: F401
from zoo.parts import CLASSES, GROUPS, LENGTH, PATHS, SHAPE, ZOO, Model

__all__ = ["GROUPS", "PATHS", "ZOO", "Model", "build"]


def build(name: str) -> nn.Module:
    """A model of the zoo as its function makes it, in float32."""
    made = ZOO[name]
    return made.build((LENGTH,) if made.data == "tokens" else SHAPE, CLASSES)
