"""Dropout with addressed masks: the mask is a function of (seed, client, step, layer, position) alone.

torch's own dropout consumes a generator, so stacked and single clients, and CPU and GPU, would draw different
masks. `address_dropout` swaps the layers of any model; the objective then passes each client's key for the
step in as a buffer (torch.func.functional_call), which gains a client axis under torch.vmap like any other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmom.method.randomness import random_bits

KEY = "dropout_key"


class AddressedDropout(nn.Module):
    """nn.Dropout (or DropoutNd with `channels`: whole feature maps) whose mask comes from an address."""

    dropout_key: Tensor

    def __init__(self, p: float, layer: int, *, channels: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.channels = p, layer, channels
        self.register_buffer(KEY, torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> x * mask / (1 - p) in training, x itself in evaluation."""
        if not self.training or self.p == 0:
            return x
        return x * kept(self.dropout_key, self.layer, self.p, x.shape, channels=self.channels, dtype=x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def kept(
    keys: Tensor, layer: int, p: float, shape: Sequence[int], *, channels: bool = False, dtype: torch.dtype
) -> Tensor:
    """Masks [*keys.shape, *shape] of one layer's examples: 0, or 1/(1 − p) in `dtype`; [.., B, C, 1, …] by `channels`.

    p is taken to 32 bits, so that one hash serves two places: on a CPU it costs as much as a small convolution.
    """
    shape = (*shape[:2], *[1] * (len(shape) - 2)) if channels else tuple(shape)
    if p == 1:
        return torch.zeros(*keys.shape, *shape, dtype=dtype, device=keys.device)
    places = math.prod(shape)
    bits = random_bits(keys[..., None], layer, torch.arange(-(-places // 2), device=keys.device))
    words = torch.stack([bits & 0xFFFFFFFF, (bits >> 32) & 0xFFFFFFFF], -1).flatten(-2)[..., :places]
    return ((words >= round(p * 2**32)).to(dtype) * (1 / (1 - p))).reshape(*keys.shape, *shape)


def address_dropout(model: nn.Module) -> nn.Module:
    """Replace every nn.Dropout, Dropout1d, 2d and 3d inside `model` in place; returns the model.

    A layer that is called twice in one forward pass draws the same mask both times: use two layers.
    """
    if isinstance(model, _PLAIN):
        return _addressed(model, 0)
    # _modules, for named_children() leaves out a layer that is registered twice.
    places = [(parent, name) for parent in model.modules() for name in parent._modules]
    replaced: dict[nn.Module, AddressedDropout] = {}
    for number, (parent, name) in enumerate(places, 1):
        child = parent._modules[name]
        if isinstance(child, _PLAIN):
            parent._modules[name] = replaced.setdefault(child, _addressed(child, number))
    return model


_PLAIN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _addressed(layer: nn.Module, number: int) -> AddressedDropout:
    return AddressedDropout(float(layer.p), number, channels=not isinstance(layer, nn.Dropout))  # type: ignore[arg-type]
