"""What the method asks for clients' weights, as Triton kernels: to write them first, or never to write them.

The first step of a round leads from the common x, and u, to the clients' own rows in one pass. Weights that stay in
factors (factors.py) need products of minibatches' rows instead: few rows of great length for every client.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmom.engine.stacked.kernels.tiles import gram_launch, product_precision
from fedmom.machine.precision import multiplies_in_tf32

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


@triton.jit(do_not_specialize=["M", "J", "STEPS"])
def _gram(
    a, b, parts, M, J, C, a_client, a_row, b_client, b_row, STEPS, PRECISION: tl.constexpr, BM: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts[s, k, i, j] = Σ_c a[k, i, c] b[k, j, c], the s-th part of the sum: STEPS times BK of C numbers."""
    client, part, K = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    tiles = tl.cdiv(M, BM)
    i = tl.program_id(2) % tiles * BM + tl.arange(0, BM)
    j = tl.program_id(2) // tiles * BJ + tl.arange(0, BJ)
    own = a + client * a_client + i.to(tl.int64) * a_row
    other = b + client * b_client + j.to(tl.int64) * b_row
    total = tl.zeros((BM, BJ), dtype=parts.dtype.element_ty)
    for step in range(part * STEPS, tl.minimum(tl.cdiv(C, BK), part * STEPS + STEPS)):
        c = step * BK + tl.arange(0, BK)
        x = tl.load(own[:, None] + c[None, :], mask=(i < M)[:, None] & (c < C)[None, :], other=0.0)
        y = tl.load(other[None, :] + c[:, None], mask=(j < J)[None, :] & (c < C)[:, None], other=0.0)
        x, y = x.to(total.dtype), y.to(total.dtype)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)
    at = ((part * K + client) * M + i)[:, None] * J + j[None, :]
    tl.store(parts + at, total, mask=(i < M)[:, None] & (j < J)[None, :])


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


def gram(a: Tensor, b: Tensor, out: Tensor) -> None:
    """factors.gram as one launch for parts of the sums and one that adds them: the same bits in every run."""
    plan = gram_launch(a, b, product_precision(a, tf32=multiplies_in_tf32(a)))
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    parts = torch.empty((plan.grid[1], *out.shape), dtype=wide, device=a.device)
    a, b = (t if t.stride(2) == 1 else t.contiguous() for t in (a, b))
    _gram[plan.grid](a, b, parts, *out.shape[1:], a.shape[2], *a.stride()[:2], *b.stride()[:2], **plan.options)
    if out.dtype == wide:
        torch.sum(parts, 0, out=out)
    else:
        out.copy_(parts.sum(0))
