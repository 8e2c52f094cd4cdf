"""What the layers of a folded model share: how many clients there are, and the weights of each."""

import torch
from torch import Tensor, nn

from fedmom.engine.stacked.convolutions import Ways
from fedmom.engine.stacked.factors import Factors
from fedmom.method.state import Tree


class FoldError(Exception):
    """Why a model must take a slower path."""


class Clients:
    """What the layers of a folded model share during a pass."""

    def __init__(self) -> None:
        self.num = 1  # K
        self.examples = 1  # K·B
        self.shared = False  # whether all rows of `params` are one point
        self.params: Tree = {}  # [K, ...]
        self.buffers: Tree = {}  # [K, ...], written by the pass
        self.dropout_keys: Tensor = torch.zeros(1, dtype=torch.int64)  # [K]
        self.factors: dict[str, Factors] = {}  # of dense weights that are nowhere written out, by name
        self.frozen: Tree = {}  # [...] what is not trained, of layers that are trained in part
        self.held: list[tuple[nn.Module, str, str]] = []  # (module, its own name of a parameter, the name in `params`)
        self.sliced: set[str] = set()  # dense weights of which a pass used parts
        self.convolution = ""  # one of CONVOLUTIONS; "": by layer, as `ways` finds
        self.ways = Ways()

    def param(self, name: str) -> Tensor:
        """[K, ...], also of a parameter that is not trained and the same for all."""
        frozen = self.frozen.get(name)
        return self.params[name] if frozen is None else frozen.expand(self.num, *frozen.shape).contiguous()

    def each(self, rows: Tensor) -> Tensor:
        """[K·B, ...] of [K, ...]: what one client's examples have in common, for every example."""
        per_client = self.examples // self.num
        return rows[:, None].expand(self.num, per_client, *rows.shape[1:]).reshape(self.examples, *rows.shape[1:])

    def place(self) -> None:
        """Put clients' tensors where modules hold parameters [1, ...] themselves, whose first axis is the batch's."""
        for module, own, name in self.held:
            module._parameters[own] = self.each(self.params[name].squeeze(1))  # type: ignore[assignment]

    def clear(self) -> None:
        """Let go of what a pass had."""
        self.params, self.buffers, self.factors = {}, {}, {}
        for module, own, _ in self.held:
            module._parameters[own] = None
