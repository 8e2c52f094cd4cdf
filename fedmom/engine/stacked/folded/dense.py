"""nn.Linear for K clients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fedmom.engine.stacked.factors import factored
from fedmom.engine.stacked.folded.clients import Clients


class _Dense(torch.autograd.Function):
    """y = h Wᵀ per client: h [K, M, in], W [K, out, in] -> [K, M, out]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, shared: bool) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.shared = shared
        return h @ weight[0].T if shared else torch.bmm(h, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (d,), (h, weight) = grads, ctx.saved_tensors
        before = None
        if ctx.needs_input_grad[0]:
            before = d @ weight[0] if ctx.shared else torch.bmm(d, weight)
        return before, torch.bmm(d.transpose(1, 2), h), None


class FoldedLinear(nn.Module):
    """nn.Linear. A frozen weight is one product for all clients."""

    def __init__(self, clients: Clients, layer: nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self.clients, self.names = clients, names

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, by which it may be called
        x, c, name = input, self.clients, self.names["weight"]
        h = x.reshape(c.num, -1, x.shape[-1])
        if name in c.frozen:
            y = linear(h, c.frozen[name])
        elif name in c.factors:
            y = factored(h, c.factors[name])
        else:
            y = _Dense.apply(h, c.params[name], c.shared)
        if "bias" in self.names:
            y = y + c.param(self.names["bias"])[:, None]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def part(self, x: Tensor, which: int, parts: int) -> Tensor:
        """What one of several layers does, whose rows are a part of this one's."""
        c, name = self.clients, self.names["weight"]
        h = x.reshape(c.num, -1, x.shape[-1])
        if name in c.frozen:
            y = linear(h, c.frozen[name].chunk(parts)[which])
        else:
            c.sliced.add(name)
            y = _Dense.apply(h, c.params[name].chunk(parts, 1)[which], c.shared)
        if "bias" in self.names:
            y = y + c.param(self.names["bias"]).chunk(parts, 1)[which][:, None]
        return y.reshape(*x.shape[:-1], y.shape[-1])
