"""Numbers in another format: float32, which is the run's own and today's bytes; bfloat16 and float16.

The nearest number, the even one of two. Relative error at most 2⁻⁸ and 2⁻¹¹ of normal numbers; 2 bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmom.method.state import Tree
from fedmom.travel.codec import Address, Codec, Payload, array_form


class Cast(Codec):
    """C(v): v in the format `to`; None: v itself, in the run's dtype."""

    alone = True

    def __init__(self, to: torch.dtype | None, *, fine: bool) -> None:
        self.to, self.fine = to, fine

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        return {"values": rows if self.to is None else rows.to(self.to)}, {}

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        return payload["values"].to(dtype)

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        return {"values": array_form(shape, self.to or dtype)}
