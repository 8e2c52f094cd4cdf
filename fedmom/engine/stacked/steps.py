"""Rounds of many stacked clients through a folded model: the fast path of the engine.

Every tensor of x and u is [K, ...]; activations are [K·B, ...]. Nothing is copied at the start of a round: in the first
step all clients share x̂, so the forward pass is one over K·B examples, and the first update writes the clients' own
rows. Later updates read g once and read and write u and x once (torch's fused SGD). Dense layers may have no rows at
all (factors.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedmom.data.inputs import called_with, folded, num_examples, rows_of_inputs
from fedmom.engine.stacked.factors import Factors, Numbers, coefficients, numbers, pays
from fedmom.engine.stacked.folded.clients import FoldError
from fedmom.engine.stacked.folded.dense import FoldedLinear
from fedmom.engine.stacked.folded.fold import fold
from fedmom.engine.stacked.fusing.patterns import fuse
from fedmom.engine.stacked.means import RowsEnded
from fedmom.engine.stacked.updates import others
from fedmom.engine.stacked.updates.sgd import Number, first_update, update
from fedmom.method.algorithms import Method
from fedmom.method.named.fedprox import FedProx
from fedmom.method.state import ClientState, Tree, rows_of
from fedmom.rounds.round import Job, Progress, part_of
from fedmom.tasks.supervised import Batch, Draws, Supervised

F64 = torch.float64


class Orders(NamedTuple):
    """What the steps of K clients read besides their start: drawn in main memory, and sent in one copy.

    A CUDA graph reads all of it from one place, so that it can be replayed with other minibatches, γ and weights.
    """

    draws: Draws
    weights: Tensor  # [K] float64, of the means
    lrs: Tensor  # [I] float64, γ of each step
    numbers: Numbers  # of dense layers in factors

    def words(self) -> Tensor:
        """[n] int64: one after the other, bit for bit."""
        return torch.cat([leaf.reshape(-1).view(torch.int64) for leaf in tree_leaves(self)])

    def read(self, words: Tensor) -> "Orders":
        """Others of the same shapes, from their `words`: views, where those are."""
        leaves, shape = tree_flatten(self)
        parts = words.split([leaf.numel() for leaf in leaves])
        found = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        read: Orders = tree_unflatten(found, shape)
        return read


class Stack:
    """A problem's model, folded, and the local steps of K clients through it.

    Raises FoldError, with the reason, for a problem or model that must take another path.
    """

    def __init__(self, problem: Any, method: Method, *, factors: bool | None = False, convolution: str = "") -> None:
        """factors: dense layers without rows, where that takes less work; None: everywhere.

        convolution: one of convolutions.CONVOLUTIONS; left out, by layer.
        """
        if not isinstance(problem, Supervised):
            raise FoldError(f"{type(problem).__name__} has no layers")
        self.pull = method.correction if isinstance(method.correction, FedProx) else None
        if method.correction is not None and self.pull is None:
            named = type(method.correction).__module__.startswith(FedProx.__module__.rpartition(".")[0])
            whose = "the correction of algorithm.name" if named else "algorithm.correction"
            raise FoldError(f"{whose} is written for one client")
        if factors is not False and self.pull is not None:
            raise FoldError("dense layers in factors have no rows that could be held to the round's start")
        if factors is not False and not method.by.linear:
            raise FoldError(f"dense layers in factors need algorithm.optimizer = 'sgd', not {method.optimizer!r}")
        self.problem: Supervised = problem
        self.method, self.factors = method, factors
        self.model, self.clients = fold(problem.model, problem.few_examples(3))
        self.model.train()
        # A trace would keep a parameter that stands in a module's own place.
        self.model = fuse(self.model) if problem.device.type == "cuda" and not self.clients.held else self.model
        self.clients.convolution = convolution
        self.numbers: tuple[tuple[float, ...], Numbers] | None = None  # of the γ that came last
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
            momentum = None if momentum is None else {n: u[order.to(u.device)] for n, u in momentum.items()}
        most = int(job.num_steps[0])
        counts = [int((job.num_steps > s).sum()) for s in range(most)]
        weights = job.weights.to(self.problem.device)
        if rows is not None:
            x, u, buffers = (
                {n: v.clone(memory_format=torch.contiguous_format) for n, v in t.items()} for t in rows[:3]
            )
            state = _Rows(x, u, buffers, {}, shared=False)
            state.began = rows.params
        else:
            factored = even and momentum is None and self.factors is not False
            of = self._numbers(tuple(job.lrs)) if factored else None
            state = self._begin(start, job, weights, of, fixed=True)
            state.momentum = dict(momentum or {})
        batches = self.problem.round_batches(job.clients, job.first_steps, most)
        losses = self._all_steps(start, state, batches, job.lrs, counts, progress)
        losses = losses / (most if same else job.num_steps.to(losses.device))
        ended = RowsEnded(state.params, state.momentum, state.buffers, state.factors, losses, weights)
        return ended if same else _in_order(ended, torch.argsort(order))

    def orders(self, job: Job) -> Orders:
        """What `run_straight` needs for clients that all take as many steps as there are in job.lrs."""
        draws = self.problem.draws(job.clients, job.first_steps, len(job.lrs))
        return Orders(draws, job.weights, torch.tensor(job.lrs, dtype=F64), self._numbers(tuple(job.lrs)))

    def run_straight(self, start: ClientState, job: Job, orders: Orders) -> RowsEnded:
        """All steps of the job's clients by `orders`, which are where `start` is.

        Nothing in it waits for the device or is sent there, and of `job` no number is read but how many clients and
        steps there are, so that it can be recorded as a CUDA graph.
        """
        K, count = len(job.clients), len(job.lrs)
        factored = self.factors is not False
        state = self._begin(start, job, orders.weights, orders.numbers if factored else None, fixed=False)
        batches = (self.problem.batch(orders.draws, s) for s in range(count))
        losses = self._all_steps(start, state, batches, orders.lrs.unbind(), [K] * count, None) / count
        return RowsEnded(state.params, state.momentum, state.buffers, state.factors, losses, orders.weights)

    def _all_steps(
        self,
        start: ClientState,
        state: "_Rows",
        batches: Iterable[Batch],
        lrs: Sequence[Number],
        counts: Sequence[int],
        progress: Progress | None,
    ) -> Tensor:
        """One step after the other, of the first counts[s] clients; the sums of their losses [K]."""
        losses = torch.zeros(counts[0], dtype=F64, device=self.problem.device)
        for s, batch in enumerate(batches):
            losses[: counts[s]] += self._step(start, state, batch, counts[s], lrs[s], first=s == 0)
            if progress:
                progress(counts[s])
        self.clients.clear()
        return losses

    def _begin(self, start: ClientState, job: Job, weights: Tensor, of: Numbers | None, *, fixed: bool) -> "_Rows":
        """K clients at `start`; `of`: the numbers of dense layers in factors, None without such."""
        K, made = len(job.clients), dict[str, Factors]()
        buffers = {n: v.expand(K, *v.shape).clone() for n, v in start.buffers.items()}
        if of is not None and (names := self.in_factors(start, job)):
            by = coefficients(of, start.params[names[0]], fixed=fixed)
            made = {n: Factors(start.params[n], start.momentum[n], by, weights) for n in names}
        return _Rows({}, {}, buffers, made, shared=True)

    def _numbers(self, lrs: tuple[float, ...]) -> Numbers:
        """Of a round with these γ; nothing where no dense layer may be in factors."""
        if self.factors is False:
            return Numbers(torch.empty(0, dtype=F64), torch.empty(0, dtype=F64))
        if self.numbers is None or self.numbers[0] != lrs:
            m = self.method
            self.numbers = lrs, numbers(list(lrs), beta=m.beta, nesterov=m.nesterov, weight_decay=m.weight_decay)
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
            if name not in start.params:  # one product for all clients
                return
            out, size_in = start.params[name].shape
            seen.setdefault(name, []).append((size_in, out, x.numel() // size_in))
            if y.requires_grad:  # a detached branch has no backward pass, a checkpointed one runs forward twice
                y.register_hook(lambda d: back.append(name))

        layers = [layer for layer in self.model.modules() if isinstance(layer, FoldedLinear)]
        hooks = [layer.register_forward_hook(look) for layer in layers]
        one = job.clients[:1]
        batch = next(iter(self.problem.round_batches(one, job.first_steps[:1], 1)))
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
        names += [*self.clients.sliced, *(name for _, _, name in self.clients.held)]
        return {n: calls[0] for n, calls in seen.items() if len(calls) == back.count(n) == names.count(n) == 1}

    def _losses(
        self, params: Tree, buffers: Tree, factors: dict[str, Factors], batch: Batch, K: int, *, shared: bool
    ) -> Tensor:
        """[K] mean losses of the minibatches of K clients."""
        c = self.clients
        c.num, c.shared, c.params, c.buffers, c.factors = K, shared, params, buffers, factors
        c.dropout_keys = batch.dropout_key[:K]
        x, y = folded(rows_of_inputs(batch.x, slice(K))), batch.y[:K]
        c.examples = num_examples(x)
        c.place()
        outputs = called_with(self.model, x)
        for one in tree_leaves(outputs):
            if not isinstance(one, Tensor) or one.ndim == 0 or len(one) != num_examples(x):
                form = f"of shape {list(one.shape)}" if isinstance(one, Tensor) else f"with a {type(one).__name__}"
                raise FoldError(f"outputs {form}, of {num_examples(x)} examples")
        return self.problem.task.client_losses(outputs, y, K)

    def _step(self, start: ClientState, state: "_Rows", batch: Batch, K: int, lr: Number, *, first: bool) -> Tensor:
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
            if self.pull is not None and not shared:  # in the first step everybody stands where the round began
                self._held(start, state, dict(zip(names, grads, strict=True)), K)
            if not self.method.by.linear:
                self._move(start, state, dict(zip(names, grads, strict=True)), K, lr, shared=shared)
            elif shared:
                for n, g in zip(names, grads, strict=True):
                    before = state.momentum.get(n, start.momentum[n])
                    state.params[n], state.momentum[n] = first_update(self.method, start.params[n], before, g, lr)
            else:
                xs, us = ([tree[n][:K] for n in names] for tree in (state.params, state.momentum))
                update(self.method, xs, us, grads, lr)
        for factors in state.factors.values():
            factors.advance()
        return losses.detach().to(F64)

    def _held(self, start: ClientState, state: "_Rows", grads: Tree, K: int) -> None:
        """Adds FedProx's μ (x − x_start) to the gradients [K, ...] of the first K clients."""
        assert self.pull is not None
        for name, g in grads.items():
            began = start.params[name] if state.began is None else state.began[name][:K]
            g.add_(state.params[name][:K] - began, alpha=self.pull.mu)

    def _move(self, start: ClientState, state: "_Rows", grads: Tree, K: int, lr: Number, *, shared: bool) -> None:
        """The step of another optimizer than SGD."""
        if shared:
            x, states = others.first_step(self.method, start.params, start.momentum, state.momentum, grads, lr)
            state.params |= x
            state.momentum |= states
        else:
            x, states = ({n: v[:K] for n, v in tree.items()} for tree in (state.params, state.momentum))
            others.step(self.method, x, states, grads, lr)


class _Rows:
    """What K clients hold during their steps; written in place."""

    def __init__(
        self, params: Tree, momentum: Tree, buffers: Tree, factors: dict[str, Factors], *, shared: bool
    ) -> None:
        self.params, self.momentum, self.buffers, self.factors, self.shared = params, momentum, buffers, factors, shared
        self.began: Tree | None = None  # [K, ...] x at the start of the round, where it is each client's own


def _in_order(ended: RowsEnded, order: Tensor) -> RowsEnded:
    order = order.to(ended.losses.device)
    params, momentum, buffers = ({n: v[order] for n, v in tree.items()} for tree in ended[:3])
    return RowsEnded(params, momentum, buffers, ended.factors, ended.losses[order], ended.weights[order])
