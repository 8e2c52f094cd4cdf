"""The momentum step of K clients in few passes: u <- βu + g;  x <- x − γu  or  x <- x − γ(βu + g) with the new u.

Algorithm 1 of Yu, Jin, Yang (ICML 2019), as method/optimizers/sgd.py has it. γ is a number, or a tensor where the
weights are: a CUDA graph that reads it there can be replayed with another γ.
"""

import torch
from torch import Tensor

from fedmom.engine.stacked.kernels.registry import Fused, register
from fedmom.method.algorithms import Method

Number = float | Tensor  # [] float64 where the weights are, if it may change between replays of a CUDA graph


def times(t: Tensor, by: Number) -> Tensor:
    """by · t in the dtype of t; 16 bits would not hold a number on the device."""
    if isinstance(by, Tensor) and t.dtype.itemsize < 4:
        return (by * t.float()).to(t.dtype)
    return by * t


def first_update(method: Method, x: Tensor, u: Tensor, g: Tensor, lr: Number) -> tuple[Tensor, Tensor]:
    """From the common x [...], and u [...] or [K, ...], to the clients' own rows (x, u); g [K, ...] is used up."""
    if isinstance(lr, Tensor):
        rows: Tensor = torch.ops.fedmom.first_step(g, x, u, lr, method.beta, method.weight_decay, method.nesterov)
        return rows, g
    if method.weight_decay:
        g.add_(x, alpha=method.weight_decay)
    if method.nesterov:
        u = g + method.beta * u
        v = g.add_(u, alpha=method.beta)
    else:
        u = v = g.add_(u, alpha=method.beta)
    return torch.sub(x, v, alpha=lr), u


def _first_step(g: Tensor, x: Tensor, u: Tensor, lr: Tensor, beta: float, decay: float, nesterov: bool) -> Tensor:
    """The same with γ where the weights are: x of all clients [K, ...]; u is written over g [K, ...]."""
    v = g + decay * x if decay else g.clone()
    g.copy_(v).add_(u, alpha=beta)
    v = v.add_(g, alpha=beta) if nesterov else g
    return x - times(v, lr)


register(
    {
        "first_step": Fused(
            "(Tensor(a!) g, Tensor x, Tensor u, Tensor lr, float beta, float decay, bool nesterov) -> Tensor",
            "weights",
            _first_step,
        )
    }
)


def update(method: Method, xs: list[Tensor], us: list[Tensor], grads: list[Tensor], lr: Number) -> None:
    """In place, for every tensor [K, ...]: g is read once, u and x are read and written once; g is used up."""
    if not xs:
        return
    if method.beta == 0 or not _fuses(xs[0], lr):
        _update_plainly(method, xs, us, grads, lr)
        return
    torch._fused_sgd_(
        xs,
        grads,
        us,
        weight_decay=method.weight_decay,
        momentum=method.beta,
        lr=lr.float() if isinstance(lr, Tensor) else lr,
        dampening=0.0,
        nesterov=method.nesterov,
        maximize=False,
        is_first_step=False,
    )


def _update_plainly(method: Method, xs: list[Tensor], us: list[Tensor], grads: list[Tensor], lr: Number) -> None:
    beta = method.beta
    if method.weight_decay:
        torch._foreach_add_(grads, xs, alpha=method.weight_decay)
    if beta == 0:  # torch's fused SGD leaves u alone then; here u is g
        torch._foreach_copy_(us, grads)
    else:
        torch._foreach_mul_(us, beta)
        torch._foreach_add_(us, grads)
    if method.nesterov and beta:
        torch._foreach_add_(grads, us, alpha=beta)
    steps = grads if method.nesterov or beta == 0 else us
    if isinstance(lr, Tensor):
        torch._foreach_sub_(xs, [times(v, lr) for v in steps])
    else:
        torch._foreach_add_(xs, steps, alpha=-lr)


def _fuses(x: Tensor, lr: Number) -> bool:
    """Whether torch's fused SGD is right for weights like x.

    On a CPU torch 2.11's is not in 16 bits; a γ on the device is read as float32, too few digits for float64.
    """
    return (x.is_cuda or x.dtype.itemsize >= 4) and not (isinstance(lr, Tensor) and x.dtype.itemsize > 4)
