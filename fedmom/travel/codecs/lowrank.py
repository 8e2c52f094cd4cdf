"""A matrix by its nearest of rank r, or close to it: P = orth(MQ), Q <- MᵀP, C(M) = PQᵀ, and the client keeps Q.

PowerSGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019). ‖M‖² = ‖C‖² + ‖M − C‖²; a matrix of rank r or less comes back
exactly, and on a fixed M the error falls to that of the SVD. A tensor is the matrix [its first axis, the others].
Vectors, and matrices that would not become smaller, travel as they are. Bytes: those of r(n + m) numbers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmom.method.randomness import CODEC, normal
from fedmom.method.state import Tree
from fedmom.travel.codec import SERVER, Address, Codec, Payload, array_form, working


class LowRank(Codec):
    """C(M) = PQᵀ."""

    fills = keeps = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def encode(self, rows: Tensor, address: Address, state: Tree) -> tuple[Payload, Tree]:
        if not self._pays(rows.shape[1:]):
            return {"values": rows}, {}
        matrices = rows.flatten(2).to(working(rows.dtype))
        kept = state["Q"].to(matrices.dtype)
        if not bool((there := kept.any(1, keepdim=True)).all()):  # a column of zeros would stay one: it is drawn again
            kept = torch.where(there, kept, self._drawn(matrices.shape[2], address, rows.device).to(kept.dtype))
        # Client by client: a product of many matrices may round otherwise than that of one.
        left = torch.stack([torch.linalg.qr(m @ q).Q for m, q in zip(matrices, kept, strict=True)])
        right = torch.stack([m.T @ p for m, p in zip(matrices, left, strict=True)])
        return {"P": left.to(rows.dtype), "Q": right.to(rows.dtype)}, {"Q": right.to(rows.dtype)}

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tensor:
        if "values" in payload:
            return payload["values"].to(dtype)
        left, right = (payload[name].to(working(dtype)) for name in ("P", "Q"))
        found = torch.stack([p @ q.T for p, q in zip(left, right, strict=True)])
        return found.to(dtype).reshape(-1, *shape)

    def form(self, shape: Sequence[int], dtype: torch.dtype) -> Payload:
        if not self._pays(shape):
            return {"values": array_form(shape, dtype)}
        rows = {"P": shape[0], "Q": math.prod(shape[1:])}
        return {name: array_form((count, self.rank), dtype) for name, count in rows.items()}

    def start(self, shape: Sequence[int], dtype: torch.dtype, address: Address) -> Tree:
        if not self._pays(shape):
            return {}
        count, device = math.prod(shape[1:]), address.clients.device
        drawn = self._drawn(count, address._replace(clients=torch.tensor([SERVER], device=device)), device)
        return {"Q": drawn.to(dtype).expand(len(address.clients), -1, -1)}

    def _pays(self, shape: Sequence[int]) -> bool:
        """Whether r(n + m) < nm, so that also r < n, m."""
        return len(shape) > 1 and self.rank * (shape[0] + math.prod(shape[1:])) < math.prod(shape)

    def _drawn(self, count: int, address: Address, device: torch.device) -> Tensor:
        """[K, m, r] standard normal."""
        places = torch.arange(count * self.rank, device=device)
        words = (CODEC, address.seed, address.clients.to(device)[:, None], address.round_index, address.tensor)
        return normal(*words, places).unflatten(1, (count, self.rank))
