"""Which path and how many clients at once: settled by memory and by timing the run's own first steps."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fedmom.engine.apart import mixes_by
from fedmom.engine.engine import FOLDED_PATHS, Engine
from fedmom.engine.look import look, look_at_correction
from fedmom.engine.stacked.cuda_graphs import COMINGS
from fedmom.engine.stacked.layers import FoldError
from fedmom.engine.stacked.steps import Stack
from fedmom.engine.stacked.timings import now
from fedmom.engine.yardstick import Yardstick
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes
from fedmom.method.algorithms import MOMENTUM_POLICIES, Method
from fedmom.method.state import ClientState, num_bytes
from fedmom.rounds.round import Round, part_of
from fedmom.tasks.classification import Classification, Task
from fedmom.user_code import one_line


def bytes_per_client(task: Task, start: ClientState) -> int:
    """Memory that one stacked client takes during a step: x, u, g, the new x and u, and what backward keeps."""
    # Twice the activations: backward adds a gradient to most of them.
    return 6 * num_bytes(start.params) + 2 * num_bytes(start.buffers) + 2 * task.activation_bytes(start)


class Choice(NamedTuple):
    """How the engine runs a task, and client-steps per second of every way that was tried."""

    path: str
    chunk_size: int
    measured: dict[str, float]
    trouble: str = ""  # why stacking was ruled out, if it was
    note: str = ""  # what else should be known


def is_settled(path: str, chunk_size: int) -> bool:
    """Whether nothing is left to choose."""
    return path == "loop" or (path != "auto" and chunk_size > 0)


def choose(
    task: Task,
    method: Method,
    start: ClientState,
    job: Round,
    *,
    path: str,
    chunk_size: int,
    own_rows: bool = False,
    compared: bool = False,
    steady: bool = True,
) -> Choice:
    """Settle path = "auto" and chunk_size = 0 by memory and by timing a few steps of `job` in each way.

    Every way is compared with plain torch before it may be chosen, the loop too (yardstick.py), but for a run that was
    `compared` when it began. own_rows: clients start from rows of their own (Algorithm 2). Raises InputError where the
    model cannot be trained, or not by the path asked for.

    "auto" tries the loop and one way of stacking: the folded model if it can be had and is right, else torch.vmap.
    Chunks are tried in several sizes because on a CPU a smaller one may fit into the cache. The timed steps are
    thrown away: batches are addressed, so the run itself begins unchanged. `steady`: whether other rounds will have
    the same γ, so that a GPU may replay them.
    """
    cohort = len(job.clients)
    if compared and is_settled(path, chunk_size):
        return Choice(path, min(chunk_size or 1, cohort), {})
    yardstick = _look(task, method, start, job, own_rows)
    note = yardstick.note if yardstick else ""
    even = bool((job.num_steps == len(job.lrs)).all())
    replays = steady and even and not own_rows and not MOMENTUM_POLICIES[method.momentum_policy].keeps_rows
    rate = partial(_rate, task, method, start, job, replays=replays)
    if path == "loop":
        return Choice("loop", 1, {}, note=note)
    wide, trouble = _way_to_stack(task, method, start, job, path, yardstick)
    if wide == "loop":
        return Choice("loop", 1, {}, trouble, note)
    if is_settled(path, chunk_size):
        return Choice(path, min(chunk_size, cohort), {}, note=note)
    limit = max(1, min(cohort, int(0.5 * free_bytes(task.device) / bytes_per_client(task, start))))
    smallest = 0 if wide in FOLDED_PATHS else 1
    sizes = [min(chunk_size, cohort)] if chunk_size else sorted({min(4**k, limit) for k in range(smallest, 8)})
    rates: dict[tuple[str, int], float] = {}
    for way in ([("loop", 1)] if path == "auto" else []) + [(wide, size) for size in sizes]:
        if len(rates) > 1 and rates[list(rates)[-1]] < 0.5 * max(rates.values()):
            break  # larger stacks lose already (convolutions on a CPU), and take longer to say so
        try:
            rates[way] = rate(*way)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        except Exception as error:  # a user's model may raise anything, in the run's dtype alone too
            if path != "auto" or way[0] == "loop":
                raise InputError(f"engine.path = {path!r}: {way[0]} fails ({one_line(error)[:200]})") from error
            trouble = f"{way[0]} × {way[1]} fails ({one_line(error)[:200]})"
            break
    if not rates:
        raise InputError(f"engine.path = {path!r}: the memory of {task.device} is too small for {sizes[0]} clients")
    near = [way for way in rates if rates[way] > 0.6 * max(rates.values())]
    if len(near) > 1:  # one measurement beside a busy neighbour says little
        rates |= {way: max(rates[way], rate(*way)) for way in near}
    chosen = max(rates, key=lambda way: rates[way])
    if (
        path == "auto"
        and chosen[0] == "stack"
        and (rivals := _rivals(task, method, start, job, chosen, rates, yardstick))
    ):
        # Whether factors pay depends on the number of steps, so the comparison runs all of them.
        # The loop is timed again too: a lucky first measurement of the stack must not keep it out.
        for way in [("loop", 1), chosen, *rivals]:
            try:
                rates[way] = rate(*way, most=64)
            except torch.OutOfMemoryError:  # a rival in larger chunks than the stack's
                torch.cuda.empty_cache()
            except Exception as error:  # as above
                trouble = f"{way[0]} × {way[1]} fails ({one_line(error)[:200]})"
                rates.pop(way, None)
        chosen = max(rates, key=lambda way: rates[way])
    return Choice(*chosen, {f"{name} × {size}": rate for (name, size), rate in rates.items()}, trouble, note)


def _look(task: Task, method: Method, start: ClientState, job: Round, own_rows: bool) -> Yardstick | None:
    """What the ways of running this task are held to; None for a task that has no model.

    Raises InputError where a step of one client fails, cannot be repeated, or is not plain torch's.
    """
    # On copies: what a step writes into the model itself, or into x, must not hide from the look.
    twin = task.in_dtype(task.dtype) if isinstance(task, Classification) else task
    _try_path(twin, method, twin.start(), job, "loop")
    if not isinstance(task, Classification):
        if method.correction is not None:
            gradients = {name: torch.ones_like(x) for name, x in start.params.items()}
            look_at_correction(method.correction, gradients, start.params)
        return None
    look(task, start, job, method.correction)
    try:
        yardstick = Yardstick(task, method, job, own_rows=own_rows)
    except InputError:
        raise
    except Exception as error:  # a user's model may raise anything
        raise InputError(f"{task.called}: plain steps of a copy of the model fail ({one_line(error)})") from error
    if why := yardstick.differs("loop"):
        raise InputError(f"{task.called}: fedmom cannot train this model: {why}")
    return yardstick


def _rivals(
    task: Task,
    method: Method,
    start: ClientState,
    job: Round,
    chosen: tuple[str, int],
    rates: Mapping[tuple[str, int], float],
    yardstick: Yardstick | None,
) -> list[tuple[str, int]]:
    """Ways that may beat the best stack: factors, which like larger chunks, and vmap's grouped convolutions."""
    sizes = dict.fromkeys([chosen[1], max(size for _, size in rates)])
    ways = []
    if _may_factor(task, method, start, job) and not (yardstick and yardstick.differs("factors")):
        ways = [("factors", size) for size in sizes]
    layers = task.model.modules() if isinstance(task, Classification) else []
    if any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in layers):
        # Also its first step, which traces and is far slower than the others: timed, vmap would look half as fast.
        can = not _try_path(task, method, start, job, "vmap", num_rows=max(sizes), fatal=False)
        can = can and not (yardstick and yardstick.differs("vmap"))
        ways += [("vmap", size) for size in sizes if can and size > 1]
    return ways


def _way_to_stack(
    task: Task, method: Method, start: ClientState, job: Round, path: str, yardstick: Yardstick | None
) -> tuple[str, str]:
    """(path, note): the one that was asked for, or for "auto" the fastest that this model can take.

    Raises InputError where the path asked for is not to be had.
    """
    if path == "vmap":
        _try_path(task, method, start, job, "vmap")
        if why := yardstick.differs("vmap") if yardstick else "":
            raise InputError(f"engine.path = 'vmap': {why}; use loop")
        return "vmap", ""
    why = _cannot_fold(task, method, job, "stack" if path == "auto" else path, yardstick)
    if not why:
        return "stack" if path == "auto" else path, ""
    if path != "auto":
        raise InputError(f"engine.path = {path!r}: {why}; use auto, vmap or loop")
    if trouble := _try_path(task, method, start, job, "vmap", fatal=False):
        return "loop", trouble
    if wrong := yardstick.differs("vmap") if yardstick else "":
        return "loop", f"clients run one after another, for under torch.vmap {wrong}"
    return "vmap", f"clients are stacked by torch.vmap, for {why}" if isinstance(task, Classification) else ""


def _may_factor(task: Task, method: Method, start: ClientState, job: Round) -> bool:
    """Whether dense layers in factors would be used: clients share a start, and the layers are wide enough."""
    shared = not MOMENTUM_POLICIES[method.momentum_policy].keeps_rows
    return shared and bool(Stack(task, method, factors=True).in_factors(start, job))


def _cannot_fold(task: Task, method: Method, job: Round, path: str, yardstick: Yardstick | None) -> str:
    """ "" or why the folded model cannot be used: it cannot be had, or it does not come to what plain torch does."""
    try:
        stack = Stack(task, method)
        assert yardstick is not None  # whatever can be folded has a model
        batch = next(iter(task.round_batches(job.clients[:1], job.first_steps[:1], 1)))
        if why := mixes_by(stack.task.model, batch.x[0], _sizes(len(job.clients))):
            return why
        return yardstick.differs("stack") or (yardstick.differs(path) if path == "factors" else "")
    except FoldError as reason:
        return str(reason)
    except Exception as error:  # a user's model may raise anything
        return "folding fails: " + one_line(error)[:200]


def _sizes(cohort: int) -> set[int]:
    """Numbers of clients by which forward passes are looked at: those that are tried, what remains, and a few more.

    Another node, which takes over what was chosen here, may hold one client more.
    """
    tried = {2**k for k in range(16) if 2**k <= cohort}
    return (
        {min(few, cohort) for few in (1, 2, 3, 5, 7)}
        | tried
        | {cohort % size or size for size in tried}
        | {cohort, cohort + 1}
    )


def _try_path(
    task: Task, method: Method, start: ClientState, job: Round, path: str, *, num_rows: int = 1, fatal: bool = True
) -> str:
    """One step, of one client or more, thrown away: it loads code and kernels, and shows if the model can take it.

    Returns "" or why not, in one line; raises it as InputError if `fatal`.
    """
    try:
        _seconds(task, method, start, job, path, num_rows)
    except Exception as error:  # a user's model may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if path == "loop" and isinstance(error, InputError):
            raise
        if path == "loop":
            raise InputError(f"model.name or data.batch-size: a training step of one client fails ({reason})") from None
        if fatal:
            raise InputError(f"engine.path = 'vmap': this model cannot be stacked; use loop ({reason})") from None
        return f"the model cannot be stacked, so clients run one after another ({reason})"
    return ""


def _rate(
    task: Task,
    method: Method,
    start: ClientState,
    job: Round,
    path: str,
    num_rows: int,
    *,
    most: int = 4,
    replays: bool = True,
) -> float:
    """Client-steps per second of one way, in a short round in which nothing is done for the first time.

    Whatever is loaded, compiled or measured per shape comes in a round's first step (all clients at one point) or in
    its second (each at its own); on a GPU the minibatches of another number of steps are another shape too.
    replays: on a GPU, rounds as they are when they are replayed.
    """
    engine = _engine(task, method, path, num_rows)
    engine.replays = engine.replays if replays else None
    steps = min(len(job.lrs), most)  # as in the run, several steps share one exchange
    on_cpu = task.device.type == "cpu"
    untimed = min(steps, 2) if on_cpu else steps
    each = _seconds_of(engine, start, job, num_rows, untimed) / untimed
    for _ in range(COMINGS):
        if engine.replays is not None and not engine.replays.num_replayed and not engine.replays.trouble:
            _seconds_of(engine, start, job, num_rows, steps)
    if on_cpu and each > _VERY_LONG:
        return num_rows / each
    steps = 1 if on_cpu and each > _LONG else steps
    return num_rows * steps / _seconds_of(engine, start, job, num_rows, steps)


_LONG = 0.5  # seconds of a step: one is enough to measure
_VERY_LONG = 2.0  # what a CPU does for the first time is little beside it, and another would be long to wait for


def _seconds(task: Task, method: Method, start: ClientState, job: Round, path: str, num_rows: int) -> float:
    """Time of a step of the first `num_rows` clients of `job`, with all that is done for the first time."""
    return _seconds_of(_engine(task, method, path, num_rows), start, job, num_rows, 1)


def _engine(task: Task, method: Method, path: str, num_rows: int) -> Engine:
    return Engine(task, method._replace(momentum_policy="average"), path=path, chunk_size=num_rows)


def _seconds_of(engine: Engine, start: ClientState, job: Round, num_rows: int, steps: int) -> float:
    """Time of a round of `steps` local steps of the first `num_rows` clients of `job`."""
    part = part_of(job._replace(momentum=None), torch.arange(num_rows))
    short = part._replace(num_steps=torch.full_like(part.num_steps, steps), lrs=job.lrs[:steps])
    begin = now(engine.task.device)
    engine.run_round(start, short)
    return now(engine.task.device) - begin
