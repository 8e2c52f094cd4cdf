"""Many clients on one device: chunks of stacked clients, or a loop over one client at a time.

Both paths call the same `local_step` of the same method on the same addressed minibatches; a test holds them equal.
Which one is faster depends on model and device (stacking wins for small dense models, the loop for convolutions
on a CPU), so `choose_path` measures both on the run's own first step.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedmom.algorithms import MOMENTUM_POLICIES, local_step
from fedmom.averaging import WeightedMean
from fedmom.errors import InputError
from fedmom.objective import Task
from fedmom.state import ClientState, Tree, expand, num_bytes, stacked, where


class Method(NamedTuple):
    """Plain numbers of Algorithm 1 that stay the same over a run."""

    beta: float
    nesterov: bool = False
    weight_decay: float = 0.0
    momentum_policy: str = "average"
    running_var: str = "pooled"


class Round(NamedTuple):
    """What one round asks of the engine."""

    clients: Tensor  # [C] int64, the cohort, in ascending order
    weights: Tensor  # [C] float64, of the means; they need not sum to 1
    first_steps: Tensor  # [C] int64, each client's global step at the start of the round
    num_steps: Tensor  # [C] int64, local steps of each client (all I, but for local-epochs)
    lrs: Sequence[float]  # γ of each local step, as many as the most steps
    momentum: Tree | None = None  # [C, ...] the clients' own u, in main memory, for policy "local"
    round_index: int = 0  # rounds before this one


class Outcome(NamedTuple):
    """What the clients of one round came to."""

    mean: ClientState  # x̂, û and the buffers, everybody's next start
    train_loss: float  # mean over clients (by weight) and their steps, each before the step
    consensus_distance: float  # Σ p_i ‖x_i − x̂‖² just before the exchange
    momentum_spread: float  # Σ p_i ‖u_i − û‖², likewise
    path: list[Tensor]  # x̄ after every local step, for small tasks; else empty
    momentum: Tree | None  # [C, ...] the clients' own u at the end, in main memory, for policy "local"
    losses: Tensor  # [C] float64, mean over each client's own steps
    answered: Tensor | None = None  # [C] bool: whose update is in the means; None: everybody's


Step = Callable[..., tuple[ClientState, Tensor]]
Progress = Callable[[int], None]  # client-steps done since the last call


def vmap_step(state: ClientState, batch: Any, **method: Any) -> tuple[ClientState, Tensor]:
    """One local step of K stacked clients at once."""
    return torch.vmap(partial(local_step, **method))(state, batch)


def loop_step(state: ClientState, batch: Any, **method: Any) -> tuple[ClientState, Tensor]:
    """One local step of a stack of one client, in the plain way."""
    after = local_step(*tree_map(lambda t: t[0], (state, batch)), **method)
    return tree_map(lambda t: t[None], after)


PATHS: dict[str, Step] = {"vmap": vmap_step, "loop": loop_step}


class Rounds(Protocol):
    """Whoever can run one round: the engine on this device, Ray actors, or Flower's clients."""

    def run_round(self, start: ClientState, job: Round, progress: Progress | None = None) -> Outcome:
        """I local steps of every client of the cohort from `start`, and the averages. Changes nothing in place."""


class Engine:
    """Runs rounds of one task by one method; `path` and `chunk_size` change the result by rounding alone."""

    def __init__(self, task: Task, method: Method, *, path: str, chunk_size: int) -> None:
        self.task, self.method = task, method
        self.step = PATHS[path]
        # The loop keeps one client resident: a larger chunk would only hold finished rows for longer.
        self.chunk_size = 1 if path == "loop" else chunk_size

    def run_round(self, start: ClientState, job: Round, progress: Progress | None = None) -> Outcome:
        """I local steps of every client of the cohort from `start`, and the averages. Changes nothing in place."""
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
            path=[point / total for point in path],
            momentum={name: torch.cat([u[name] for u in own]) for name in own[0]} if own else None,
            losses=every,
        )

    def _run_chunk(
        self, state: ClientState, job: Round, progress: Progress | None
    ) -> tuple[ClientState, Tensor, list[Tensor]]:
        """All local steps of K stacked clients -> state, mean loss [K], Σ w x after each step."""
        most, least = int(job.num_steps.max()), int(job.num_steps.min())
        losses = torch.zeros(len(job.clients), dtype=torch.float64, device=self.task.device)
        points: list[Tensor] = []
        for s, batch in enumerate(self.task.round_batches(job.clients, job.first_steps, most)):
            after, loss = self._one_step(state, batch, job.lrs[s])
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

    def _one_step(self, state: ClientState, batch: Any, lr: float) -> tuple[ClientState, Tensor]:
        method = self.method
        try:
            return self.step(
                state,
                batch,
                gradient=self.task.gradient,
                lr=lr,
                beta=method.beta,
                nesterov=method.nesterov,
                weight_decay=method.weight_decay,
            )
        except RuntimeError as error:
            # Ctrl-C between two of torch.func's levels makes torch fail an assertion of its own on the way out.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise


def part_of(job: Round, rows: Tensor) -> Round:
    """The job of some clients of the cohort, given as places in it; their own u is brought to the device."""
    rows = rows.to(job.clients.device)
    momentum = None
    if job.momentum is not None:
        momentum = {name: u[rows.to(u.device)].to(rows.device) for name, u in job.momentum.items()}
    return job._replace(
        clients=job.clients[rows],
        weights=job.weights[rows],
        first_steps=job.first_steps[rows],
        num_steps=job.num_steps[rows],
        momentum=momentum,
    )


def bytes_per_client(task: Task, start: ClientState) -> int:
    """Memory that one stacked client takes during a step: x, u, g, the new x and u, and what backward keeps."""
    # Twice the activations: backward adds a gradient to most of them.
    return 6 * num_bytes(start.params) + 2 * num_bytes(start.buffers) + 2 * task.activation_bytes(start)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now on `device`; in a container, of what the container may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30  # no Linux: a guess that any machine of today has
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


class Choice(NamedTuple):
    """How the engine runs a task, and client-steps per second of every way that was tried."""

    path: str
    chunk_size: int
    measured: dict[str, float]
    trouble: str = ""  # why stacking was ruled out, if it was


def choose(task: Task, method: Method, start: ClientState, job: Round, *, path: str, chunk_size: int) -> Choice:
    """Settle path = "auto" and chunk_size = 0 by memory and by timing one step of `job` in each way.

    Chunks are tried in several sizes because on a CPU a smaller one may fit into the cache. The timed steps are
    thrown away: batches are addressed, so the run itself begins unchanged.
    """
    cohort = len(job.clients)
    _try_path(task, method, start, job, "loop")
    trouble = "" if path == "loop" else _try_path(task, method, start, job, "vmap", fatal=path == "vmap")
    if path == "loop" or trouble:
        return Choice("loop", 1, {}, trouble)
    if path == "vmap" and chunk_size:
        return Choice("vmap", min(chunk_size, cohort), {})
    limit = max(1, min(cohort, int(0.5 * free_bytes(task.device) / bytes_per_client(task, start))))
    sizes = [min(chunk_size, cohort)] if chunk_size else sorted({min(4**k, limit) for k in range(1, 8)})
    ways = [("loop", 1)] if path == "auto" else []
    rates: dict[tuple[str, int], float] = {}
    for name, size in ways + [("vmap", size) for size in sizes]:
        best = max(rates.values(), default=0.0)
        if rates and rates[list(rates)[-1]] < 0.5 * best:
            break  # stacking loses already (convolutions on a CPU), and a larger stack takes longer to say so
        try:
            rates[name, size] = _rate(task, method, start, job, name, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    if not rates:
        raise InputError(f"engine.path = {path!r}: the memory of {task.device} is too small for {sizes[0]} clients")
    chosen = max(rates, key=lambda way: rates[way])
    return Choice(*chosen, {f"{name} × {size}": rate for (name, size), rate in rates.items()})


def _try_path(task: Task, method: Method, start: ClientState, job: Round, path: str, *, fatal: bool = True) -> str:
    """One step of one client, thrown away: it loads code and kernels, and shows whether the model can take it.

    Returns "" or why not, in one line; raises it as InputError if `fatal`.
    """
    try:
        _seconds(task, method, start, job, path, 1)
    except Exception as error:  # a user's model may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if path == "loop":
            raise InputError(f"model.name or data.batch-size: a training step of one client fails ({reason})") from None
        if fatal:
            raise InputError(f"engine.path = 'vmap': this model cannot be stacked; use loop ({reason})") from None
        return f"the model cannot be stacked, so clients run one after another ({reason})"
    return ""


def _rate(task: Task, method: Method, start: ClientState, job: Round, path: str, num_rows: int) -> float:
    """Client-steps per second of one way: of a short round, or of one step where that is long enough to measure."""
    seconds = _seconds(task, method, start, job, path, num_rows)
    if seconds > 0.5:
        return num_rows / seconds
    steps = min(len(job.lrs), 4)  # as in the run, several steps share one exchange
    return num_rows * steps / _seconds(task, method, start, job, path, num_rows, steps)


def _seconds(
    task: Task, method: Method, start: ClientState, job: Round, path: str, num_rows: int, steps: int = 1
) -> float:
    """Time of a round of `steps` local steps of the first `num_rows` clients of `job`."""
    part = part_of(job._replace(momentum=None), torch.arange(num_rows))
    short = part._replace(num_steps=torch.full_like(part.num_steps, steps), lrs=job.lrs[:steps])
    engine = Engine(task, method._replace(momentum_policy="average"), path=path, chunk_size=num_rows)
    begin = _now(task.device)
    engine.run_round(start, short)
    return _now(task.device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
