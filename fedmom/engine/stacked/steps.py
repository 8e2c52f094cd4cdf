"""Rounds of many stacked clients through a folded model: the fast path of the engine.

Every tensor of x and u is [K, ...]; activations are [K·B, ...]. Nothing is copied at the start of a round: in the first
step all clients share x̂, so the forward pass is one over K·B examples, and the first update writes the clients' own
rows. Later updates read g once and read and write u and x once (torch's fused SGD). Dense layers may have no rows at
all (factors.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmom.engine.stacked.factors import Factors, OnDevice, numbers, on_device, pays
from fedmom.engine.stacked.fusing import fuse
from fedmom.engine.stacked.layers import FoldedLinear, FoldError, fold
from fedmom.engine.stacked.means import RowsEnded
from fedmom.method.algorithms import Method
from fedmom.method.state import ClientState, Tree, rows_of
from fedmom.rounds.round import Job, Progress, part_of
from fedmom.tasks.classification import Batch, Classification

F64 = torch.float64


class Stack:
    """A task's model, folded, and the local steps of K clients through it.

    Raises FoldError, with the reason, for a task or model that must take another path.
    """

    def __init__(self, task: Any, method: Method, *, factors: bool | None = False, convolution: str = "") -> None:
        """factors: dense layers without rows, where that takes less work; None: everywhere.

        convolution: one of convolutions.CONVOLUTIONS; left out, by layer.
        """
        if not isinstance(task, Classification):
            raise FoldError(f"{type(task).__name__} has no layers")
        if method.correction is not None:
            raise FoldError("algorithm.correction is written for one client")
        self.task: Classification = task
        self.method, self.factors = method, factors
        self.model, self.clients = fold(task.model)
        self.model.train()
        self.model = fuse(self.model) if task.device.type == "cuda" else self.model
        self.clients.convolution = convolution
        self.numbers: tuple[tuple[float, ...], OnDevice] | None = None
        self.sizes: dict[str, tuple[int, int, int]] | None = None  # {dense weight: (in, out, M)} where seen once

    def run(
        self,
        start: ClientState,
        job: Job,
        *,
        rows: ClientState | None = None,
        momentum: Tree | None = None,
        even: bool = False,
        progress: Progress | None = None,
    ) -> RowsEnded:
        """All local steps of the job's clients from `start`; or from their own `rows` [K, ...], or own `momentum`.

        even: whether all clients, those of other chunks too, take as many steps as there are in job.lrs, so that dense
        layers in factors go the same way from one base.
        """
        order = torch.argsort(job.num_steps, descending=True, stable=True)
        same = bool((job.num_steps == job.num_steps[0]).all())
        if not same:  # whoever still has steps to take is a prefix
            job = part_of(job, order)
            rows = None if rows is None else rows_of(rows, order)
            momentum = None if momentum is None else {n: u[order] for n, u in momentum.items()}
        most = int(job.num_steps[0])
        counts = [int((job.num_steps > s).sum()) for s in range(most)]
        state = self._begin(start, job, rows, momentum, factors=even)
        batches = self.task.round_batches(job.clients, job.first_steps, most)
        ended = self._all_steps(start, job, state, batches, counts, progress)
        return ended if same else _in_order(ended, torch.argsort(order))

    def run_straight(self, start: ClientState, job: Job, batches: Sequence[Batch]) -> RowsEnded:
        """The same for clients that all take as many steps as there are in job.lrs, from batches that were drawn.

        Nothing in it waits for the device, so that it can be recorded as a CUDA graph.
        """
        state = self._begin(start, job, None, None, factors=True)
        return self._all_steps(start, job, state, batches, [len(job.clients)] * len(job.lrs), None)

    def _all_steps(
        self,
        start: ClientState,
        job: Job,
        state: "_Rows",
        batches: Iterable[Batch],
        counts: Sequence[int],
        progress: Progress | None,
    ) -> RowsEnded:
        """One step after the other, of the first counts[s] clients."""
        losses = torch.zeros(len(job.clients), dtype=F64, device=self.task.device)
        for s, batch in enumerate(batches):
            losses[: counts[s]] += self._step(start, state, batch, counts[s], job.lrs[s], first=s == 0)
            if progress:
                progress(counts[s])
        self.clients.params, self.clients.buffers, self.clients.factors = {}, {}, {}
        return RowsEnded(
            state.params, state.momentum, state.buffers, state.factors, losses / job.num_steps, job.weights
        )

    def _begin(
        self, start: ClientState, job: Job, rows: ClientState | None, momentum: Tree | None, *, factors: bool
    ) -> "_Rows":
        K = len(job.clients)
        if rows is not None:
            x, u, buffers = ({n: v.clone(memory_format=torch.contiguous_format) for n, v in t.items()} for t in rows)
            return _Rows(x, u, buffers, {}, shared=False)
        buffers = {n: v.expand(K, *v.shape).clone() for n, v in start.buffers.items()}
        made: dict[str, Factors] = {}
        if factors and momentum is None and self.factors is not False:
            for name in self.in_factors(start, job):
                first = start.params[name]
                of = self._numbers(tuple(job.lrs), first)
                made[name] = Factors(first, start.momentum[name], of, job.weights)
        return _Rows({}, dict(momentum or {}), buffers, made, shared=True)

    def _numbers(self, lrs: tuple[float, ...], like: Tensor) -> OnDevice:
        """Of a round with these γ; the last ones are kept."""
        if self.numbers is None or self.numbers[0] != lrs:
            m = self.method
            of = numbers(list(lrs), beta=m.beta, nesterov=m.nesterov, weight_decay=m.weight_decay)
            self.numbers = lrs, on_device(of, like)
        return self.numbers[1]

    def in_factors(self, start: ClientState, job: Job) -> list[str]:
        """The dense weights without rows in a round of `job`."""
        if self.sizes is None:
            self.sizes = self._seen(start, job)
        return [n for n, (i, o, m) in self.sizes.items() if self.factors is None or pays(i, o, m, len(job.lrs))]

    def _seen(self, start: ClientState, job: Job) -> dict[str, tuple[int, int, int]]:
        """{dense weight: (in, out, rows per step)} of the layers that run once in a step, forward and backward."""
        seen: dict[str, list[tuple[int, int, int]]] = {}
        back: list[str] = []

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            assert isinstance(layer, FoldedLinear)
            name, x = layer.names["weight"], inputs[0]
            out, size_in = start.params[name].shape
            seen.setdefault(name, []).append((size_in, out, x.numel() // size_in))
            if y.requires_grad:  # a detached branch has no backward pass, a checkpointed one runs forward twice
                y.register_hook(lambda d: back.append(name))

        layers = [layer for layer in self.model.modules() if isinstance(layer, FoldedLinear)]
        hooks = [layer.register_forward_hook(look) for layer in layers]
        one = job.clients[:1]
        batch = next(iter(self.task.round_batches(one, job.first_steps[:1], 1)))
        params, buffers = ({n: v[None].clone() for n, v in tree.items()} for tree in (start.params, start.buffers))
        try:
            with torch.enable_grad():
                leaves = {n: x.requires_grad_() for n, x in params.items()}
                self._losses(leaves, buffers, {}, batch, 1, shared=True).sum().backward()
        finally:
            for hook in hooks:
                hook.remove()
        # A weight that other layers use too is theirs as well: its gradient is no outer product.
        names = [name for layer in self.model.modules() for name in set(getattr(layer, "names", {}).values())]
        return {n: calls[0] for n, calls in seen.items() if len(calls) == back.count(n) == names.count(n) == 1}

    def _losses(
        self, params: Tree, buffers: Tree, factors: dict[str, Factors], batch: Batch, K: int, *, shared: bool
    ) -> Tensor:
        """[K] mean losses of the minibatches of K clients."""
        c = self.clients
        c.num, c.shared, c.params, c.buffers, c.factors = K, shared, params, buffers, factors
        c.dropout_keys = batch.dropout_key[:K]
        x, y = batch.x[:K], batch.y[:K]
        x = x.reshape(-1, *x.shape[2:])
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = self.model(x)
        if logits.ndim != 2 or y.ndim != 2:
            raise FoldError(f"logits of shape {list(logits.shape)}")
        return cross_entropy(logits, y.reshape(-1), reduction="none").reshape(K, -1).mean(1)

    def _step(self, start: ClientState, state: "_Rows", batch: Batch, K: int, lr: float, *, first: bool) -> Tensor:
        """One local step of the first K clients, written into `state`; their losses before it."""
        shared = first and state.shared
        names = [n for n in start.params if n not in state.factors]
        if shared:
            leaves = {n: start.params[n].expand(K, *start.params[n].shape).detach() for n in names}
        else:
            leaves = {n: state.params[n][:K].detach() for n in names}
        for leaf in leaves.values():
            leaf.requires_grad_()
        buffers = {n: v[:K] for n, v in state.buffers.items()}
        with torch.enable_grad():  # also for whoever calls us without gradients
            losses = self._losses(leaves, buffers, state.factors, batch, K, shared=shared)
            losses.sum().backward()
        with torch.no_grad():
            grads = [torch.zeros_like(x) if x.grad is None else x.grad.contiguous() for x in leaves.values()]
            if shared:
                self._first_update(start, state, names, grads, lr)
            else:
                self._update([state.params[n][:K] for n in names], [state.momentum[n][:K] for n in names], grads, lr)
        for factors in state.factors.values():
            factors.advance()
        return losses.detach().to(F64)

    def _first_update(
        self, start: ClientState, state: "_Rows", names: list[str], grads: list[Tensor], lr: float
    ) -> None:
        """From the common x̂ to rows."""
        beta = self.method.beta
        for name, g in zip(names, grads, strict=True):
            x = start.params[name]
            if self.method.weight_decay:
                g.add_(x, alpha=self.method.weight_decay)
            before = state.momentum.get(name, start.momentum[name])
            if self.method.nesterov:
                u = g + beta * before
                v = g.add_(u, alpha=beta)
            else:
                u = v = g.add_(before, alpha=beta)
            state.momentum[name], state.params[name] = u, torch.sub(x, v, alpha=lr)

    def _update(self, xs: list[Tensor], us: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """u ← βu + g, x ← x − γu or x − γ(βu + g), in place: g is read once, u and x are read and written once."""
        m = self.method
        if not xs:
            return
        if m.beta == 0:  # torch leaves u alone then; here u is g
            if m.weight_decay:
                torch._foreach_add_(grads, xs, alpha=m.weight_decay)
            torch._foreach_copy_(us, grads)
            torch._foreach_add_(xs, grads, alpha=-lr)
            return
        if not _fuses(xs[0]):
            if m.weight_decay:
                torch._foreach_add_(grads, xs, alpha=m.weight_decay)
            torch._foreach_mul_(us, m.beta)
            torch._foreach_add_(us, grads)
            if m.nesterov:
                torch._foreach_add_(grads, us, alpha=m.beta)
            torch._foreach_add_(xs, grads if m.nesterov else us, alpha=-lr)
            return
        torch._fused_sgd_(
            xs,
            grads,
            us,
            weight_decay=m.weight_decay,
            momentum=m.beta,
            lr=lr,
            dampening=0.0,
            nesterov=m.nesterov,
            maximize=False,
            is_first_step=False,
        )


def _fuses(x: Tensor) -> bool:
    """Whether torch's fused SGD is right for weights like x: on a CPU torch 2.11's is not in 16 bits."""
    return x.is_cuda or x.dtype.itemsize >= 4


class _Rows:
    """What K clients hold during their steps; written in place."""

    def __init__(
        self, params: Tree, momentum: Tree, buffers: Tree, factors: dict[str, Factors], *, shared: bool
    ) -> None:
        self.params, self.momentum, self.buffers, self.factors, self.shared = params, momentum, buffers, factors, shared


def _in_order(ended: RowsEnded, order: Tensor) -> RowsEnded:
    params, momentum, buffers = ({n: v[order] for n, v in tree.items()} for tree in ended[:3])
    return RowsEnded(params, momentum, buffers, ended.factors, ended.losses[order], ended.weights[order])
