"""random-k of a tensor: the numbers at k places that both ends draw by address, so that no index is sent.

As they are: contractive in the mean, E‖C(v) − v‖² = (1 − k/d) ‖v‖², for feedback. Times d/k: unbiased, for going
without; with feedback it would explode. Bytes: those of k numbers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmom.method.state import Tree
from fedmom.travel.codec import Address, Codec, Payload, array_form, count_of, flat_rows


class RandomK(Codec):
    """C(v): v, or (d/k) v where it is `scaled`, at k places, 0 elsewhere."""

    def __init__(self, share: float, *, scaled: bool) -> None:
        """share: k/d of every tensor."""
        self.share, self.scaled = share, scaled
        self.unbiased = self.alone = scaled

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        flat = flat_rows(rows)
        return {"values": flat.gather(1, self._places(flat.shape[1], address, rows.device))}, {}

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        values, count = payload["values"].to(dtype), math.prod(shape)
        values = values * (count / values.shape[1]) if self.scaled else values
        flat = values.new_zeros(len(values), count)
        return flat.scatter_(1, self._places(count, address, values.device), values).reshape(-1, *shape)

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        return {"values": array_form((count_of(self.share, math.prod(shape)),), dtype)}

    def _places(self, count: int, address: Address, device: torch.device) -> Tensor:
        """[K, k] ascending places: those of the k largest of `count` random keys."""
        keys = address.bits(count, device)
        return keys.topk(count_of(self.share, count), dim=1, sorted=False).indices.sort(1).values
