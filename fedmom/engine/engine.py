"""Many clients on one device: chunks of stacked clients, or a loop over one client at a time.

`loop` and `vmap` call the same `local_step`, written for one client; `stack` and `factors` take the folded model of
stacked/. All see the same addressed minibatches, and tests hold them equal. auto.py says which is taken.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmom.engine.paths import PATHS
from fedmom.engine.stacked.cuda_graphs import Replays
from fedmom.engine.stacked.means import Distances, RoundSums, distances
from fedmom.engine.stacked.steps import Stack
from fedmom.method.algorithms import MOMENTUM_POLICIES, Method, local_step, takes_key
from fedmom.method.averaging import WeightedMean
from fedmom.method.randomness import random_bits
from fedmom.method.state import (
    ClientState,
    Tree,
    concatenated,
    expand,
    like,
    row_of,
    stacked,
    where,
)
from fedmom.rounds.round import Backend, Job, Outcome, Progress, part_of
from fedmom.tasks.task import Task


def vmap_step(
    state: ClientState, batch: Any, start: Tree, key: Tensor | None, **method: Any
) -> tuple[ClientState, Tensor]:
    """One local step of K stacked clients at once."""
    if method.get("correction") is None:
        return torch.vmap(partial(local_step, **method))(state, batch)

    def step(state: ClientState, batch: Any, start: Tree, *key: Tensor) -> tuple[ClientState, Tensor]:
        return local_step(state, batch, start=start, key=key[0] if key else None, **method)

    return torch.vmap(step)(state, batch, start, *([] if key is None else [key]))


def loop_step(
    state: ClientState, batch: Any, start: Tree, key: Tensor | None, **method: Any
) -> tuple[ClientState, Tensor]:
    """One local step of a stack of one client, in the plain way."""
    state, batch, start = tree_map(lambda t: t[0], (state, batch, start))
    own = None if key is None else key[0]
    return tree_map(lambda t: t[None], local_step(state, batch, start=start, key=own, **method))


class Engine(Backend):
    """Runs rounds of one task by one method; `path` (of PATHS) and `chunk_size` change the result by rounding alone.

    `convolution`: one of convolutions.CONVOLUTIONS for the folded paths; left out, by layer.
    Raises FoldError for "stack" and "factors" with a model or task that cannot take them.
    """

    def __init__(self, task: Task, method: Method, *, path: str, chunk_size: int, convolution: str = "") -> None:
        self.task, self.method = task, method
        self.stack: Stack | None = None
        way = PATHS[path]
        if way.folds:
            self.stack = Stack(task, method, factors=way.factors, convolution=convolution)
        self.replays = Replays(self.stack) if self.stack is not None and task.device.type == "cuda" else None
        self.step, self.gradient = (vmap_step, task.gradient) if way.stacks else (loop_step, task.gradient_alone)
        self.keyed = method.correction is not None and takes_key(method.correction)
        # The loop keeps one client resident: a larger chunk would only hold finished rows for longer.
        self.chunk_size = chunk_size if way.stacks else 1

    def run_round(self, start: ClientState, job: Job, progress: Progress | None = None) -> Outcome:
        """I local steps of every client of the cohort from `start`, and the averages. Changes nothing in place."""
        if self.stack is not None:
            return self._run_stacked(self.stack, start, job, progress)
        policy = MOMENTUM_POLICIES[self.method.momentum_policy]
        mean = WeightedMean(self.method.running_var)
        losses: list[Tensor] = []
        path = [torch.zeros((), dtype=torch.float64)] * (len(job.lrs) if self.task.small else 0)
        own: list[Tree] = []
        for rows in torch.arange(len(job.clients)).split(self.chunk_size):
            part = part_of(job, rows)
            state = stacked(start, len(rows))
            momentum = expand(start.momentum, len(rows))
            state = state._replace(momentum=policy.start(momentum, part.momentum))
            state, loss, points = self._run_chunk(state, part, progress)
            mean.add(state, part.weights)
            losses.append(loss)
            path = [a + b for a, b in zip(path, points, strict=True)]
            if policy.keeps_rows and job.momentum is not None:
                own.append({name: u.to(job.momentum[name].device) for name, u in state.momentum.items()})
        total, every = float(job.weights.sum()), torch.cat(losses)
        return Outcome(
            mean=mean.mean(),
            train_loss=float(job.weights @ every) / total,
            consensus_distance=mean.spread("params"),
            momentum_spread=mean.spread("momentum"),
            trajectory=[point / total for point in path],
            momentum={name: torch.cat([u[name] for u in own]) for name in own[0]} if own else None,
            losses=every,
        )

    def _run_stacked(self, stack: Stack, start: ClientState, job: Job, progress: Progress | None) -> Outcome:
        policy = MOMENTUM_POLICIES[self.method.momentum_policy]
        begin = start if policy.keeps_rows else start._replace(momentum=policy.start(start.momentum, None))
        went, losses, own = RoundSums(start, self.method.running_var), list[Tensor](), list[Tree]()
        chunks = torch.arange(len(job.clients)).split(self.chunk_size)
        weights = [float(part.sum()) for part in job.weights.cpu().split(self.chunk_size)]
        for found, weight in zip(self._distances(stack, begin, job, chunks, own, progress), weights, strict=True):
            went.add(found, weight)
            losses.append(found.losses.clone())
        every = torch.cat(losses)
        return Outcome(
            mean=went.mean(),
            train_loss=float(job.weights @ every) / float(job.weights.sum()),
            consensus_distance=went.spread("params"),
            momentum_spread=went.spread("momentum"),
            trajectory=[],
            momentum={name: torch.cat([u[name] for u in own]) for name in own[0]} if own else None,
            losses=every,
        )

    def _distances(
        self,
        stack: Stack,
        begin: ClientState,
        job: Job,
        chunks: Sequence[Tensor],
        own: list[Tree],
        progress: Progress | None,
    ) -> Iterator[Distances]:
        """How far each chunk's clients went; each to be used up before the next. Their own u goes into `own`."""
        policy = MOMENTUM_POLICIES[self.method.momentum_policy]
        even = bool((job.num_steps == len(job.lrs)).all())
        if even and not policy.keeps_rows and self.replays is not None and self.replays.fits(job, len(chunks[0])):
            yield from self.replays.run(begin, [part_of(job, places) for places in chunks], progress)
            return
        for places in chunks:
            part = part_of(job, places)
            momentum = policy.start(begin.momentum, part.momentum) if policy.keeps_rows else None
            ended = stack.run(begin, part, momentum=momentum, even=even, progress=progress)
            if policy.keeps_rows and job.momentum is not None:
                home = {name: u.device for name, u in job.momentum.items()}
                own.append({name: u.to(home[name], copy=True) for name, u in ended.momentum.items()})
            yield distances(begin, ended)

    def run_rows(
        self, rows: ClientState, job: Job, progress: Progress | None = None
    ) -> tuple[ClientState, Tensor, list[Tensor]]:
        """I local steps of every client from its own row, without an exchange.

        rows: [C, ...] of the job's clients. Returns rows like them, mean losses [C], and Σ w x after every step.
        """
        parts: list[ClientState] = []
        losses: list[Tensor] = []
        path = [torch.zeros((), dtype=torch.float64)] * (len(job.lrs) if self.task.small else 0)
        for places in torch.arange(len(job.clients)).split(self.chunk_size):
            part = part_of(job._replace(rows=rows), places)
            assert part.rows is not None
            if self.stack is not None:
                ended = self.stack.run(row_of(part.rows, 0), part, rows=part.rows, progress=progress)
                state, loss, points = ClientState(*ended[:3]), ended.losses, list[Tensor]()
            else:
                state, loss, points = self._run_chunk(part.rows, part, progress)
            parts.append(state)
            losses.append(loss)
            path = [a + b for a, b in zip(path, points, strict=True)]
        return like(concatenated(parts), rows), torch.cat(losses), path

    def _run_chunk(
        self, state: ClientState, job: Job, progress: Progress | None
    ) -> tuple[ClientState, Tensor, list[Tensor]]:
        """All local steps of K stacked clients -> state, mean loss [K], Σ w x after each step."""
        most, least = int(job.num_steps.max()), int(job.num_steps.min())
        losses = torch.zeros(len(job.clients), dtype=torch.float64, device=self.task.device)
        points: list[Tensor] = []
        start = state.params
        for s, batch in enumerate(self.task.round_batches(job.clients, job.first_steps, most)):
            key = random_bits(job.clients, job.first_steps + s) if self.keyed else None
            after, loss = self._one_step(state, batch, start, job.lrs[s], key)
            moved = len(job.clients)
            if s < least:
                state = after
                losses += loss
            else:
                active = s < job.num_steps
                state = where(active, after, state)
                losses += torch.where(active, loss, 0)
                moved = int(active.sum())
            if self.task.small:
                flat = torch.cat([x.flatten(1).to(torch.float64) for x in state.params.values()], dim=1)
                points.append(job.weights @ flat)
            if progress:
                progress(moved)
        points += [points[-1]] * (len(job.lrs) - most) if points else []
        return state, losses / job.num_steps, points

    def _one_step(
        self, state: ClientState, batch: Any, start: Tree, lr: float, key: Tensor | None
    ) -> tuple[ClientState, Tensor]:
        method = self.method
        try:
            return self.step(
                state,
                batch,
                start,
                key,
                gradient=self.gradient,
                lr=lr,
                beta=method.beta,
                nesterov=method.nesterov,
                weight_decay=method.weight_decay,
                correction=method.correction,
            )
        except RuntimeError as error:
            # Ctrl-C between two of torch.func's levels makes torch fail an assertion of its own on the way out.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
