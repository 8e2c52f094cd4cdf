"""The first step of a round as a Triton kernel: from the common x, and u, to the clients' own rows, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _first_step(
    g, x, u, lr, rows, N, BLOCKS, apart, BETA: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of N numbers per client; those of u lie `apart` from one client's to the next, 0 where they share them."""
    program = tl.program_id(0)
    client = (program // BLOCKS).to(tl.int64)
    at = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    there = at < N
    beta = tl.full((BLOCK,), BETA, SUM)  # a bare constant would be float32
    decay = tl.full((BLOCK,), DECAY, SUM)
    before = tl.load(x + at, mask=there, other=0.0).to(SUM)
    gradient = tl.load(g + client * N + at, mask=there, other=0.0).to(SUM) + decay * before
    momentum = beta * tl.load(u + client * apart + at, mask=there, other=0.0).to(SUM) + gradient
    step = beta * momentum + gradient if NESTEROV else momentum
    tl.store(g + client * N + at, momentum, mask=there)
    tl.store(rows + client * N + at, before - tl.load(lr).to(SUM) * step, mask=there)


def first_step(g: Tensor, x: Tensor, u: Tensor, lr: Tensor, beta: float, decay: float, nesterov: bool) -> Tensor:
    """updates.first_step as one launch."""
    rows, numbers = torch.empty_like(g), x.numel()
    blocks = triton.cdiv(numbers, _BLOCK)
    total = tl.float64 if g.dtype == torch.float64 else tl.float32
    if numbers:
        _first_step[(len(g) * blocks,)](
            g, x.contiguous(), u.contiguous(), lr, rows, numbers, blocks, numbers if u.ndim > x.ndim else 0,
            beta, decay, nesterov, total, _BLOCK,
        )  # fmt: skip
    return rows
