"""top-k of a tensor: the k numbers that are largest in magnitude, of two equal ones that with the lower index.

Contractive: ‖C(v) − v‖² <= (1 − k/d) ‖v‖². Bytes: the number itself, and 4 for its index: 8k in float32.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedmom.method.state import Tree
from fedmom.travel.codec import Address, Codec, Payload, array_form, count_of, flat_rows


class TopK(Codec):
    """C(v): v at k places, 0 elsewhere."""

    def __init__(self, share: float) -> None:
        """share: k/d of every tensor."""
        self.share = share

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        flat = flat_rows(rows)
        size = flat.abs().nan_to_num_(nan=math.inf)  # what is no number must be seen by the other end
        k = count_of(self.share, flat.shape[1])
        least = size.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        chosen, equal = size > least, size == least
        missing = k - chosen.sum(1, keepdim=True)
        if bool((equal.sum(1, keepdim=True) > missing).any()):  # ties go to the lower index
            equal &= equal.cumsum(1) <= missing
        indices = (chosen | equal).nonzero()[:, 1].reshape(len(rows), k)
        return {"values": flat.gather(1, indices), "indices": indices.to(torch.int32)}, {}

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        values = payload["values"].to(dtype)
        flat = values.new_zeros(len(values), math.prod(shape))
        return flat.scatter_(1, payload["indices"].long(), values).reshape(-1, *shape)

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        k = count_of(self.share, math.prod(shape))
        return {"values": array_form((k,), dtype), "indices": array_form((k,), torch.int32)}

    def faults(self, payload: Payload, shape: Sequence[int]) -> Iterator[tuple[str, str]]:
        indices, count = payload["indices"][0], math.prod(shape)
        if bool(((indices < 0) | (indices >= count)).any()):
            yield "indices", f"indices beyond {count - 1}"
        if bool((indices[1:] <= indices[:-1]).any()):
            yield "indices", "indices that repeat or do not ascend"
