"""Dense layers that never write a client's weights: x and u as a few numbers, and what the gradients are made of.

All clients of a round start at the same (x̂, û), everything that happens to them is linear, and a dense layer's gradient
is an outer product, g_j = δ_jᵀ h_j over the M rows of a minibatch. So after s local steps

    x = p x̂ + q û + Σ_j a_j g_j,    u = p' x̂ + q' û + Σ_j b_j g_j,

with numbers p, q, a, p', q', b that are the same for all clients and obey the method's own recursion: what sgd.py
makes of them. Then h xᵀ = h (p x̂ + q û)ᵀ + Σ_j a_j (h h_jᵀ) δ_j is one ordinary product with weights
that all clients share and small corrections; so is δ x in the backward pass; and the means of x and u over clients are
one product over all K·I·M rows. Memory is K·I·M·(in + out) instead of K·in·out, and work is less where I·M is below
about the layer's width. Exact: any lr schedule, option I or II, and weight decay only change the numbers.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmom.engine.stacked.kernels.registry import Fused, register
from fedmom.engine.stacked.updates.sgd import Number, times
from fedmom.method.optimizers import optimizer, sgd

_FEW, _LONG = 16, 1024  # rows of so many, of such a length: cuBLAS takes one program or two for a client


class Numbers(NamedTuple):
    """Coefficients of (x̂, û, g_1, …, g_I) in x and in u, before and after each step: [I + 1, 2 + I] float64."""

    params: Tensor
    momentum: Tensor


def numbers(lrs: list[float], *, beta: float, nesterov: bool, weight_decay: float) -> Numbers:
    """The method run on coefficients in the place of weights (Yu, Jin, Yang 2019, Algorithm 1)."""
    count = len(lrs)
    unit = torch.eye(2 + count, dtype=torch.float64)
    x, states, by = unit[0], {"u": unit[1]}, optimizer.Numbers(beta, nesterov=nesterov)
    found = [(x, states["u"])]
    for s, lr in enumerate(lrs):
        x, states = sgd.sgd(x, states, unit[2 + s] + weight_decay * x, lr, by)
        found.append((x, states["u"]))
    return Numbers(*(torch.stack(rows) for rows in zip(*found, strict=True)))


class Coefficients(NamedTuple):
    """The same numbers as the steps take them."""

    params: list[list[Number]]  # [I + 1][2 + I]
    momentum: list[list[Number]]
    steps: Tensor  # [I + 1, I] of g_1, …, g_I in x before and after each step, in the weights' device and dtype
    last: tuple[Tensor, Tensor]  # [I] float64, in x and in u at the end


def coefficients(of: Numbers, like: Tensor, *, fixed: bool) -> Coefficients:
    """`like`: a tensor of the weights' device and dtype.

    fixed: they are in main memory, and are written into the kernels' calls; else they are read where they are.
    """
    params, momentum = of
    read = (lambda row: row.tolist()) if fixed else (lambda row: list(row.unbind()))
    steps, last = params[:, 2:].to(like.device, like.dtype), (params[-1, 2:], momentum[-1, 2:])
    in_x, in_u = ([read(row) for row in part] for part in of)
    return Coefficients(in_x, in_u, steps, (last[0].to(like.device), last[1].to(like.device)))


def gram(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a bᵀ for every client, a [K, M, C], b [K, J, C] with rows that are dense, into out [K, M, J]."""
    few_and_long = a.shape[1] <= _FEW and a.shape[2] >= _LONG
    (torch.ops.fedmom.gram if a.is_cuda and few_and_long else _gram)(a, b, out)


def _gram(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.is_cuda:
        torch.bmm(a, b.transpose(1, 2), out=out)
    else:  # into rows that do not lie side by side MKL takes client after client
        out.copy_(torch.bmm(a, b.transpose(1, 2)))


register({"gram": Fused("(Tensor a, Tensor b, Tensor(a!) out) -> ()", "weights", _gram)})


class Factors:
    """One dense weight [out, in] of K clients during a round of I steps with M rows each."""

    def __init__(self, x: Tensor, u: Tensor, numbers: Coefficients, weights: Tensor) -> None:
        """x̂ and û [out, in]; the numbers of the round; w [K] of the means, where x is."""
        self.x, self.u, self.numbers, self.weights = x, u, numbers, weights
        self.num_steps = len(numbers.params) - 1
        self.step, self.calls, self.backs, self.rows = 0, 0, 0, 0

    def _begin(self, num_clients: int, rows: int) -> None:
        steps, (size_out, size_in) = self.num_steps, self.x.shape
        self.rows = rows
        self.h = self.x.new_empty(num_clients, steps * rows, size_in)
        self.d = self.x.new_empty(num_clients, steps * rows, size_out)
        # h_s h_jᵀ and δ_s δ_jᵀ for j ≤ s: the corrections need them, and so do the norms at the end.
        self.hh = self.x.new_zeros(num_clients, steps * rows, steps * rows)
        self.dd = self.x.new_zeros(num_clients, steps * rows, steps * rows)
        # Σ_i w_i E_i of x and of u at the end of the round, E_i being client i's distance from `base`.
        self.total_x, self.total_u = torch.zeros_like(self.x), torch.zeros_like(self.u)
        self._turn()

    def _turn(self) -> None:
        p, q, *_ = self.numbers.params[self.step]
        if isinstance(p, Tensor) or isinstance(q, Tensor):
            self.weight = times(self.x, p) + times(self.u, q) if self.step else self.x
        else:
            x = self.x if p == 1 else p * self.x
            self.weight = torch.add(x, self.u, alpha=q) if q else x
        self.past = self.step * self.rows
        # Every row of a step's minibatch by its step's number.
        self.scale = self.numbers.steps[self.step, : self.step].repeat_interleave(self.rows)

    def forward(self, h: Tensor) -> Tensor:
        """h xᵀ for every client: [K, M, in] -> [K, M, out]."""
        if self.calls != self.step:
            raise RuntimeError("a dense layer in factors runs once per step")
        if self.calls == 0:
            self._begin(len(h), h.shape[1])
        self.calls += 1
        self.now = h
        past, end = self.past, self.past + self.rows
        self.h[:, past:end] = h
        hh = self.hh[:, past:end, :end]
        gram(self.h[:, past:end], self.h[:, :end], hh)
        y = h @ self.weight.T
        if past:
            y = torch.baddbmm(y, hh[..., :past] * self.scale, self.d[:, :past])
        return y

    def backward(self, d: Tensor, wanted: bool) -> Tensor | None:
        """δ x for every client: [K, M, out] -> [K, M, in], if wanted; the step's δ is kept."""
        if self.backs != self.step:
            raise RuntimeError("a dense layer in factors runs backward once per step")
        self.backs += 1
        past, end = self.past, self.past + self.rows
        self.d[:, past:end] = d
        dd = self.dd[:, past:end, :end]
        gram(self.d[:, past:end], self.d[:, :end], dd)
        weighted = (d * self.weights.to(d.dtype)[:, None, None]).reshape(-1, d.shape[2])
        gradients = weighted.T @ self.now.reshape(-1, self.now.shape[2])  # Σ_i w_i δ_iᵀ h_i, of all clients at once
        for total, numbers in ((self.total_x, self.numbers.params), (self.total_u, self.numbers.momentum)):
            by = numbers[-1][2 + self.step]
            total.add_(times(gradients, by)) if isinstance(by, Tensor) else total.add_(gradients, alpha=by)
        if not wanted:
            return None
        before = d @ self.weight
        if past:
            before = torch.baddbmm(before, dd[..., :past] * self.scale, self.h[:, :past])
        return before

    def advance(self) -> None:
        """To the next step."""
        if self.calls != self.step + 1:
            raise RuntimeError("a dense layer in factors runs once per step")
        if self.backs != self.calls:  # what nobody wrote must not be read: no gradient came by, so δ = 0
            self.d[:, self.past : self.past + self.rows].zero_()
            self.backs = self.calls
        self.step += 1
        self._turn()

    def base(self) -> tuple[Tensor, Tensor]:
        """p x̂ + q û of x and of u at the end of the round, in float64."""
        x, u = self.x.double(), self.u.double()
        rows = (self.numbers.params[-1], self.numbers.momentum[-1])
        first, second = (p * x + q * u for p, q, *_ in rows)
        return first, second

    def sums(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((Σ_i w_i E_i, Σ_i w_i ‖E_i‖²) of x, the same of u) at the end of the round."""
        assert self.step == self.num_steps, "the round is not over"
        steps, rows = self.step, self.rows
        # ⟨g_j, g_k⟩ = Σ (δ_j δ_kᵀ)(h_j h_kᵀ) over both minibatches' rows; j ≥ k was kept.
        shape = (len(self.weights), steps, rows, steps, rows)
        hh, dd = (self.hh.double(), self.dd.double()) if self.hh.is_cuda else (self.hh, self.dd)
        inner = (hh * dd).reshape(shape).sum((2, 4)).to(torch.float64)  # [K, steps, steps]
        if not self.hh.is_cuda and not bool(torch.isfinite(inner).all()):  # products beyond 1e38
            inner = (self.hh.double() * self.dd.double()).reshape(shape).sum((2, 4))
        inner = inner.tril() + inner.tril(-1).transpose(1, 2)
        found = []
        for total, numbers in zip((self.total_x, self.total_u), self.numbers.last, strict=True):
            norms = torch.einsum("m,kmn,n->k", numbers, inner, numbers)
            found.append((total, self.weights.to(torch.float64) @ norms))
        return found[0], found[1]


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, anchor: Tensor, factors: Factors) -> Tensor:
        ctx.factors = factors
        return factors.forward(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.factors.backward(grads[0], ctx.needs_input_grad[0]), None, None


def pays(size_in: int, size_out: int, rows: int, steps: int) -> bool:
    """Whether factors are the faster form of a dense layer: M rows per step, I steps (measured: docs/log.md)."""
    corrections = rows**2 * (steps + 1) * (size_in + size_out)  # multiplications per step
    # The update passes five times over weights that factors do not have: as slow as this many multiplications.
    return corrections < 50 * size_in * size_out


def factored(h: Tensor, factors: Factors) -> Tensor:
    """y = h xᵀ of every client, [K, M, in] -> [K, M, out]; its backward pass records δ."""
    # Where h needs no gradient (the first layer) the anchor makes autograd come by all the same.
    return _Factored.apply(h, torch.zeros((), requires_grad=True), factors)
