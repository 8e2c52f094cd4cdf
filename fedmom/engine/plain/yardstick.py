"""What every way of running clients is held to before it is trusted: plain torch, one client after another.

Deep copies of the model, `loss.backward()` and the steps of torch.optim, in float64, from an x and a u that are not
the model's own. A way that stacks clients, or puts their tensors in a module's places, must come to the same x, u,
buffers, losses and spreads after two steps, to rounding of the whole step.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmom.data.inputs import called_with
from fedmom.engine.calls import Precision
from fedmom.engine.engine import Engine
from fedmom.engine.paths import PATHS, is_plain
from fedmom.engine.plain.steps import PLAIN_STEPS
from fedmom.engine.plain.tensors import as_held, held, off, real, remembered
from fedmom.engine.stacked.agreement import Reached, distance, is_all_finite
from fedmom.engine.stacked.convolutions import CONVOLUTIONS, PLAIN
from fedmom.engine.stacked.cuda_graphs import COMINGS
from fedmom.errors import InputError
from fedmom.machine.precision import exactly
from fedmom.method.algorithms import Method
from fedmom.method.averaging import WeightedMean
from fedmom.method.corrections import Correction, lasting, takes_key
from fedmom.method.randomness import random_bits, uniform
from fedmom.method.state import CLOCK, ClientState, Tree, full_name, is_among, joined, row_of, to_device
from fedmom.rounds.correction import start_of
from fedmom.rounds.own import PARTS
from fedmom.rounds.round import Job
from fedmom.tasks.places import copied
from fedmom.tasks.supervised import Batch, Supervised, one_of_batch

F64 = torch.float64
_CLIENTS, _CHUNK = 3, 2  # so that the last chunk is shorter
_LRS = (0.02, 0.05)  # of the two steps: no run's own, which may be 0 at the start or far too large
_EXACT = 1e-9  # of the whole step's norm, in float64
_UNITS = 300  # of rounding, where a model computes in fewer digits than float64 itself; at most
_LOOSE = 0.02
_SECONDS, _WAYS = 20.0, 6  # that comparing so many ways may take before it is made smaller
_FEW_EXAMPLES = 8


class Yardstick:
    """A few clients' two steps in plain torch, and how far each way of running them is from that."""

    def __init__(self, problem: Supervised, method: Method, job: Job, *, own_rows: bool) -> None:
        """own_rows: clients start from x and u of their own (Algorithm 2). Raises what the model raises."""
        # What is encoded is not compared: codecs see rows of any way alike.
        self.method, self.own_rows, self.dtype = method._replace(codecs={}), own_rows, problem.dtype
        self.lrs: tuple[float, ...] = _LRS
        self.note = ""  # what was made smaller
        self.tolerance = _EXACT  # of the whole step
        self.found: dict[tuple[str, str], str] = {}  # {(path, convolution): how it differs}
        count = min(_CLIENTS, len(job.clients))
        with exactly(), torch.enable_grad():
            try:
                self._measure(problem.in_dtype(F64), job, count)
            except InputError:
                raise
            except Exception:  # a model of its own dtype (x.float(), torch.zeros(…)) trains in the run's alone
                self._measure(problem.in_dtype(problem.dtype), job, count)

    def _measure(self, problem: Supervised, job: Job, count: int) -> None:
        """What plain torch comes to, in as much time as there is, from a start at which it is finite."""
        self.problem, self.note, self.tolerance = problem, "", _EXACT
        self.problem.personal = frozenset()  # of the clients' own there is nothing here, and all is compared
        self.model = copied(problem.model)  # as it was before any step
        with Precision() as seen:
            self._try(job)
        if seen.autocast and problem.dtype != self.dtype:  # which leaves float64 as it is
            raise ValueError("autocast acts in the run's own dtype alone")
        begin = time.monotonic()
        self._try(job)
        if count * (time.monotonic() - begin) * _WAYS > _SECONDS:
            count = min(2, count)
            self.problem.sampler = copy.copy(self.problem.sampler)
            self.problem.sampler.batch_size = min(_FEW_EXAMPLES, self.problem.sampler.batch_size)
            self.note = f"compared with plain torch on {count} clients' two steps of {_FEW_EXAMPLES} examples"
        # Some parameters may not be moved from where the model has them, some models not be stepped so far.
        for by, lrs in ((0.01, _LRS), (0.0, _LRS), (0.0, tuple(1e-4 * lr for lr in _LRS))):
            self.lrs = lrs
            self.job = self._short(job, count)
            self.start, self.rows = self._begin(count, by)
            self.want = self._plain(0.0)
            if is_all_finite(self.want):
                break
        if seen.eps > torch.finfo(F64).eps and is_all_finite(self.want):
            # In fewer digits: as much as plain torch and itself are apart from starts that float32 cannot tell.
            natural = self._distance(self._plain(8 * torch.finfo(torch.float32).eps), self.want)[0]
            self.tolerance = min(max(_EXACT, 30 * natural), _UNITS * seen.eps, _LOOSE)

    def differs(self, path: str) -> str:
        """ "" or how the way `path` of PATHS differs from plain torch, in words."""
        if not is_all_finite(self.want):  # the run itself will say so; until then the plainest way is taken
            why = "plain torch's first two steps are not finite, so that nothing can be compared"
            return "" if is_plain(path) else why
        ways, way = [""], PATHS[path]
        convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in self.model.modules())
        if way.folds and not way.factors and convolves:
            ways = self._convolutions()
        for convolution in ways:
            if (path, convolution) not in self.found:
                with exactly(), torch.enable_grad():
                    self.found[path, convolution] = self._compare(path, convolution)
        return next((why for w in ways if (why := self.found[path, w])), "")

    def _convolutions(self) -> list[str]:
        """The ways to convolve that may be chosen here; what cannot run is never chosen."""
        cuda = self.problem.device.type == "cuda"
        return list(CONVOLUTIONS) if cuda else [PLAIN, "grouped"]

    def _compare(self, path: str, convolution: str) -> str:
        engine = Engine(self.problem, self.method, path=path, chunk_size=_CHUNK, convolution=convolution)
        try:
            for _ in range(COMINGS if engine.replays else 1):  # the last one is replayed
                got = self._by(engine)
        except Exception:
            if convolution in ("", PLAIN) or self.problem.device.type == "cpu":
                raise
            return ""  # one that cannot run here (no compiler for Triton, no kernel) is never chosen
        found = self._distance(got, self.want)
        if found[0] <= self.tolerance:
            return ""
        # Some models amplify rounding: as much as between plain torch and itself from a start that is rounded anew.
        natural = self._distance(self._plain(8 * torch.finfo(F64).eps), self.want)
        if found[0] <= 100 * natural[0] < _LOOSE:
            return ""
        return f"{found[1]} differs from plain torch's after two steps, by {found[0]:.1g} of the whole step"

    # --- the few clients -------------------------------------------------------------------------------------

    def _try(self, job: Job) -> None:
        """One client's two steps."""
        self.job = self._short(job, 1)
        self.start, self.rows = self._begin(1, 0.0)
        self._plain(0.0)

    def _short(self, job: Job, count: int) -> Job:
        uneven = not bool((job.num_steps == job.num_steps[0]).all())
        steps = torch.full((count,), len(self.lrs), dtype=torch.int64)
        if uneven:
            steps[1::2] = 1
        weights = torch.arange(1, count + 1, dtype=F64)
        return job._replace(
            clients=job.clients[:count],
            first_steps=job.first_steps[:count],
            num_steps=steps,
            scales=None if job.scales is None else 2 / weights,
            weights=weights,
            lrs=list(self.lrs),
            own=None,
            keeps=True,
            round_index=0,
            rows=None,
            correction=None,
            following=None,
        )

    def _begin(self, count: int, by: float) -> tuple[ClientState, ClientState]:
        """(the common start, every client's own start [C, ...]): x off the model's own, u not zero."""
        own, client = start_of(self.problem, self.method)
        common = self._moved(own, 0, by)
        has_rows = self.own_rows or self.method.rules.has_rows
        rows = [self._moved(own, 1 + i, by) if has_rows else common for i in range(count)]
        if not self.own_rows:  # as a round begins, which the engine does by itself
            begun = common._replace(momentum=self.method.rules.begun(common.momentum, 0))
            rows = [joined(begun, self._own(row), begun) for row in rows]
            rows = [row._replace(correction=off(client, i, by)) for i, row in enumerate(rows)]
        trees = zip(*rows, strict=True)
        return common, ClientState(*({n: torch.stack([t[n] for t in tree]) for n in tree[0]} for tree in trees))

    def _own(self, state: ClientState) -> ClientState:
        """Of a state, stacked or not, what a client goes on with by itself after a first round."""
        problem, keeps = self.problem, self.method.rules.keeps
        parts = [{n: v for n, v in t.items() if keeps(p, n, 1)} for p, t in zip(PARTS, state[:3], strict=True)]
        return ClientState(*({n: v for n, v in t.items() if not is_among(n, problem.personal)} for t in parts))

    def _moved(self, own: ClientState, which: int, by: float) -> ClientState:
        params, momentum = {}, {}
        for number, (name, x) in enumerate(own.params.items()):
            places = torch.arange(x.numel(), device=x.device).reshape(x.shape)
            away = [(2 * uniform(which, number, part, places) - 1).to(x.dtype) for part in (0, 1)]
            size = x.abs() + (x.square().mean().sqrt() if x.numel() else 0) + 1e-3
            params[name] = x + by * size * away[0]
            for state in self.method.by.kept():
                value = 0.1 * size * away[1]
                if state.endswith(CLOCK):  # far from 0 and from 1
                    value = x.new_full((), 0.5 + 0.1 * math.cos(which + number))
                momentum[full_name(state, name)] = value.square() if state == "v" else value
        return ClientState(params, momentum, {n: b.clone() for n, b in own.buffers.items()}, off(own.correction, 9, by))

    def _distance(self, got: Reached, want: Reached) -> tuple[float, str]:
        return distance(
            got, want, [row_of(self.rows, i) if self.own_rows else self.start for i in range(len(want.states))]
        )

    # --- plainly, and by an engine ---------------------------------------------------------------------------

    def _plain(self, rounding: float) -> Reached:
        """rounding: by how much x starts elsewhere, relatively."""
        batches = list(self.problem.round_batches(self.job.clients, self.job.first_steps, len(self.lrs)))
        ends, memories, losses = [], list[Tree](), []
        for i, steps in enumerate(self.job.num_steps.tolist()):
            own = [one_of_batch(batch, i) for batch in batches[:steps]]
            state, kept, loss = self._one_client(i, own, rounding)
            ends.append(state)
            memories.append(kept)
            losses.append(loss)
        every = torch.tensor(losses, dtype=F64)
        if self.own_rows:
            return Reached(ends, every, (0.0, 0.0))
        mean, kept_rows = WeightedMean(self.method.running_var), [self._own(state) for state in ends]
        if self.job.scales is not None:
            x = self.start.params
            for i, by in enumerate(self.job.scales.tolist()):
                ends[i] = ends[i]._replace(params={n: x[n] + by * (y - x[n]) for n, y in ends[i].params.items()})
        for state, weight in zip(ends, self.job.weights.split(1), strict=True):
            mean.add(ClientState(*({n: v[None] for n, v in tree.items()} for tree in state)), weight)
        averages = mean.mean()
        states = [averages]
        if any(kept_rows[0]):
            states += kept_rows
        if any(memories):
            states += [ClientState({}, {}, {}, kept) for kept in memories]
        return Reached(states, every, (mean.spread("params"), mean.spread("momentum")))

    def _one_client(self, i: int, batches: Sequence[Batch], rounding: float) -> tuple[ClientState, Tree, float]:
        """Client i of the few, from its start -> (its end with its message, a correction's state of it, its loss)."""
        model, m, start = copied(self.model), self.method, row_of(self.rows, i)
        here = {name: p for name, p in model.named_parameters() if p.requires_grad}
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for number, (name, x) in enumerate(start.params.items()):
                places = torch.arange(x.numel(), device=x.device).reshape(x.shape)
                x = x * (1 + rounding * (2 * uniform(9, number, places) - 1)).to(x.dtype) if rounding else x
                here[name].copy_(as_held(here[name], x))
            for name, b in start.buffers.items():
                buffers[name].copy_(b)
        begun = {name: p.detach().clone() for name, p in here.items()}
        kept, step = m.by.kept(), PLAIN_STEPS[m.optimizer]
        memory = {n: {s: held(p, start.momentum[full_name(s, n)]) for s in kept} for n, p in here.items()}
        own, total = remembered(m.correction, start.correction, begun), 0.0
        for s, (batch, lr) in enumerate(zip(batches, self.lrs, strict=False)):
            for name in self.problem.dropout_keys:
                buffers[name].copy_(batch.dropout_key)
            for p in here.values():
                p.grad = None
            model.train()
            loss = self.problem.task.loss(called_with(model, batch.x), batch.y)
            loss.backward()
            with torch.no_grad():
                grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in here.items()}
                decay = m.weight_decay if not m.by.decoupled else 0.0
                if m.correction is not None:
                    grads = {n: g + decay * here[n] for n, g in grads.items()}
                    grads, own = self._corrected(i, s, (grads, here, begun), own)
                    grads = {n: g - decay * here[n] for n, g in grads.items()}
                for n, p in here.items():
                    step(p, memory[n], grads[n], lr, m)
            total += float(loss.detach())
        params = {name: real(p.detach()) for name, p in here.items()}
        momentum = {full_name(s, n): real(memory[n][s]) for n in here for s in kept}
        after = dict(model.named_buffers())
        own, message = self._finished(params, begun, own, len(batches))
        own = lasting(m.correction, own) if isinstance(m.correction, Correction) else own
        end = ClientState(params, momentum, {n: after[n] for n in start.buffers}, message)
        return end, own, total / len(batches)

    def _corrected(self, i: int, s: int, trees: Sequence[Mapping[str, Tensor]], own: Tree) -> tuple[Tree, Tree]:
        """Client i's gradient in step s by the correction, and its state; trees: gradient, x and the round's start."""
        correction, more = self.method.correction, dict[str, Any]()
        assert correction is not None
        g, x, then = ({n: real(t.detach().clone()) for n, t in tree.items()} for tree in trees)
        if takes_key(correction):
            key = random_bits(self.job.clients[i], self.job.first_steps[i] + s)
            more["key"] = key.to(self.problem.device)
        if isinstance(correction, Correction):
            found = correction.gradient(g, x, then, own, self.start.correction, **more)
            sent, own = found if isinstance(found, tuple) else (found, own)
        else:
            sent = correction(g, x, then, **more)
        return {n: as_held(trees[1][n], g) for n, g in sent.items()}, own

    def _finished(self, params: Tree, begun: Tree, own: Tree, steps: int) -> tuple[Tree, Tree]:
        """A client's state of the correction, and its message, after so many steps."""
        correction, device = self.method.correction, self.problem.device
        if not isinstance(correction, Correction):
            return own, {}
        count = torch.tensor(steps, device=device)
        total_lr = torch.tensor(sum(self.lrs[:steps]), dtype=self.problem.dtype, device=device)
        before = {n: real(x) for n, x in begun.items()}
        return correction.finish(params, before, own, self.start.correction, count, total_lr)

    def _by(self, engine: Engine) -> Reached:
        if self.own_rows:
            rows, losses, _ = engine.run_rows(self.rows, self.job._replace(rows=None))
            return Reached([row_of(rows, i) for i in range(len(losses))], losses.cpu(), (0.0, 0.0))
        job = self.job
        if any(own := self._own(self.rows)):
            job = job._replace(own=to_device(own, "cpu"))
        if self.rows.correction:
            job = job._replace(correction={n: value.cpu() for n, value in self.rows.correction.items()})
        outcome = engine.run_round(self.start, job)
        states = [outcome.mean]
        if outcome.own is not None:
            ended = to_device(self._own(outcome.own), self.problem.device)
            states += [row_of(ended, i) for i in range(len(job.clients))]
        if outcome.correction is not None:
            memories = to_device(ClientState({}, {}, {}, outcome.correction), self.problem.device)
            states += [row_of(memories, i) for i in range(len(job.clients))]
        return Reached(states, outcome.losses.cpu(), (outcome.consensus_distance, outcome.momentum_spread))
