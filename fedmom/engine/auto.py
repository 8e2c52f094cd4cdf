"""Which path and how many clients at once: settled by memory and by timing the run's own first steps.

What was chosen is remembered on disk (stacked/timings.py), so that the next such run need not time it; what is
remembered is compared with plain torch all the same.
"""

import time
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fedmom.data.inputs import rows_of_inputs
from fedmom.engine.calls import mixes_by
from fedmom.engine.look import look, look_at_any
from fedmom.engine.paths import AUTO, FACTORS, LOOP, PATHS, STACK, VMAP, is_plain, is_settled
from fedmom.engine.plain.yardstick import Yardstick
from fedmom.engine.rates import Rates, Way, rate, replayable, seconds
from fedmom.engine.stacked.folded.clients import FoldError
from fedmom.engine.stacked.kernels import registry
from fedmom.engine.stacked.steps import Stack
from fedmom.engine.stacked.timings import KnownWays, Remembered
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes
from fedmom.method.algorithms import Method
from fedmom.method.state import ClientState, num_bytes
from fedmom.rounds.correction import start_of
from fedmom.rounds.round import Job
from fedmom.tasks.problem import Problem
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import one_line

# Free memory changes a little from one run to the next, and half of it is left: what fitted once may be taken again.
_SLACK = 1.25


def bytes_per_client(problem: Problem, start: ClientState) -> int:
    """Memory of one stacked client in a step: x, g, the optimizer's states, the new x and states, backward's own."""
    # Twice the activations: backward adds a gradient to most of them.
    own = 2 * num_bytes(start.buffers) + 4 * num_bytes(start.correction)
    return 4 * num_bytes(start.params) + 2 * num_bytes(start.momentum) + own + 2 * problem.activation_bytes(start)


class Said(NamedTuple):
    """What a person is told of a choice."""

    short: str = ""  # in one line what was taken
    details: str = ""  # in another how fast every way was


class Choice(NamedTuple):
    """How the engine runs a problem, and client-steps per second of every way that was tried."""

    path: str
    chunk_size: int
    measured: dict[str, float]
    trouble: str = ""  # why stacking was ruled out, if it was
    note: str = ""  # what else should be known
    seconds: float = 0.0  # that timing took
    kept: str = ""  # "now" where it is remembered from now on, or the day from which it was

    @property
    def said(self) -> Said:
        """What was taken and what that took; empty where nothing was chosen by timing."""
        if not self.measured:
            return Said()
        own = f"{self.path} × {self.chunk_size}"
        how = f"timed in {self.seconds:.1f} s" + (" and remembered" if self.kept else "")
        if self.kept not in ("", "now"):
            how = f"remembered, timed on {self.kept}"
        of = f"the fastest of {len(self.measured)} ways, " if len(self.measured) > 1 else ""
        each = sorted(self.measured.items(), key=lambda pair: -pair[1])
        return Said(f"{own} ({of}{how})", "client-steps/s: " + ", ".join(f"{way} {rate:,.0f}" for way, rate in each))


def choose(
    problem: Problem,
    method: Method,
    start: ClientState,
    job: Job,
    *,
    path: str,
    chunk_size: int,
    own_rows: bool = False,
    remember: bool = False,
    compared: bool = False,
) -> Choice:
    """Settle path = "auto" and chunk_size = 0 by memory and by timing a few steps of `job` in each way.

    Every way is compared with plain torch before it may be chosen, the loop too (yardstick.py), but for a run that was
    `compared` when it began. own_rows: clients start from rows of their own (Algorithm 2). Raises InputError where the
    model cannot be trained, or not by the path asked for. `remember`: take what was chosen in such a situation before,
    if it is right and runs; else keep what is found.

    "auto" tries the loop and one way of stacking: the folded model if it can be had and is right, else torch.vmap.
    Chunks are tried in several sizes because on a CPU a smaller one may fit into the cache. The timed steps are
    thrown away (rates.py).
    """
    cohort = len(job.clients)
    if compared and is_settled(path, chunk_size):
        return Choice(path, min(chunk_size or 1, cohort), {})
    yardstick = _look(problem, method, start, job, own_rows)
    note = yardstick.note if yardstick else ""
    wide, trouble = (LOOP, "") if is_plain(path) else _way_to_stack(problem, method, start, job, path, yardstick)
    if is_plain(wide):
        return Choice(LOOP, 1, {}, trouble, note)
    if is_settled(path, chunk_size):
        return Choice(path, min(chunk_size, cohort), {}, note=note)
    own_rows |= bool(problem.personal)  # a round has no common start then, in which it could be timed
    replays = replayable(method, job, own_rows)
    sizes = [min(chunk_size, cohort)] if chunk_size else _chunk_sizes(problem, start, wide, cohort)
    # How far memory goes changes a little all the time: by powers of 4 it does not.
    asked = [path, chunk_size, wide, own_rows, replays, len(sizes), sizes[-1] == cohort, registry.wanted]
    ways = KnownWays(problem, method, start, job, asked, on=remember)
    known, most = ways.get(), _SLACK * sizes[-1]
    if known and known.chunk_size <= most and _still_good(known, problem, method, start, job, path, wide, yardstick):
        return Choice(known.path, known.chunk_size, known.measured, trouble, note, kept=known.day)
    begin = time.monotonic()
    rates = Rates(partial(rate, problem, method, start, job, replays=replays), path, trouble)
    _time_all(rates, problem, method, start, job, path, [(wide, size) for size in sizes], yardstick)
    found = Choice(*rates.best, rates.named(), rates.trouble, note, time.monotonic() - begin)
    # A way that failed is tried again by the next run.
    kept = rates.trouble == trouble and ways.put(found.path, found.chunk_size, found.measured)
    return found._replace(kept="now") if kept else found


def _time_all(
    rates: Rates,
    problem: Problem,
    method: Method,
    start: ClientState,
    job: Job,
    path: str,
    stacked: list[Way],
    yardstick: Yardstick | None,
) -> None:
    """Time the ways to stack that were found right; for "auto" the loop and the rivals too."""
    rates.try_all([*([(LOOP, 1)] if path == AUTO else []), *stacked])
    if not rates.found:
        few = stacked[0][1]
        raise InputError(f"engine.path = {path!r}: the memory of {problem.device} is too small for {few} clients")
    if path == AUTO and rates.best[0] == STACK and (rivals := _rivals(problem, method, start, job, rates, yardstick)):
        rates.try_rivals(rivals)


def _still_good(
    known: Remembered,
    problem: Problem,
    method: Method,
    start: ClientState,
    job: Job,
    path: str,
    wide: str,
    yardstick: Yardstick | None,
) -> bool:
    """Whether a way that was the fastest before may be chosen now: it is right, and runs. `wide` was compared."""
    if known.path != wide:
        if path != AUTO:
            return False
        if is_plain(known.path):  # which was compared, and has run
            return True
        if wide != STACK or (yardstick and yardstick.differs(known.path)):  # else no rival of it
            return False
    try:
        seconds(problem, method, start, job, known.path, known.chunk_size, steps=2)
    except Exception:  # memory does not suffice any more; what else it is shows where it is timed
        torch.cuda.empty_cache()
        return False
    return True


def _chunk_sizes(problem: Problem, start: ClientState, path: str, cohort: int) -> list[int]:
    """Ascending numbers of clients at once, as far as memory goes."""
    limit = max(1, min(cohort, int(0.5 * free_bytes(problem.device) / bytes_per_client(problem, start))))
    smallest = 0 if PATHS[path].folds else 1
    return sorted({min(4**k, limit) for k in range(smallest, 8)})


def _look(problem: Problem, method: Method, start: ClientState, job: Job, own_rows: bool) -> Yardstick | None:
    """What the ways of running this problem are held to; None for a problem that has no model.

    Raises InputError where a step of one client fails, cannot be repeated, or is not plain torch's.
    """
    # On copies: what a step writes into the model itself, or into x, must not hide from the look.
    twin = problem.in_dtype(problem.dtype) if isinstance(problem, Supervised) else problem
    _try_path(twin, method, start_of(twin, method)[0]._replace(correction=start.correction), job, LOOP)
    if not isinstance(problem, Supervised):
        if method.correction is not None:
            gradients = {name: torch.ones_like(x) for name, x in start.params.items()}
            look_at_any(method.correction, gradients, start)
        return None
    look(problem, start, job, method.correction)
    try:
        yardstick = Yardstick(problem, method, job, own_rows=own_rows)
    except InputError:
        raise
    except Exception as error:  # a user's model may raise anything
        raise InputError(f"{problem.called}: plain steps of a copy of the model fail ({one_line(error)})") from error
    if why := yardstick.differs(LOOP):
        raise InputError(f"{problem.called}: fedmom cannot train this model: {why}")
    return yardstick


def _rivals(
    problem: Problem, method: Method, start: ClientState, job: Job, rates: Rates, yardstick: Yardstick | None
) -> list[Way]:
    """Ways that may beat the best stack: factors, which like larger chunks, and vmap's grouped convolutions."""
    sizes = dict.fromkeys([rates.best[1], max(size for _, size in rates.found)])
    ways: list[Way] = []
    if _may_factor(problem, method, start, job) and not (yardstick and yardstick.differs(FACTORS)):
        ways = [(FACTORS, size) for size in sizes]
    layers = problem.model.modules() if isinstance(problem, Supervised) else []
    if any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in layers):
        # Also its first step, which traces and is far slower than the others: timed, vmap would look half as fast.
        can = not _try_path(problem, method, start, job, VMAP, num_rows=max(sizes), fatal=False)
        can = can and not (yardstick and yardstick.differs(VMAP))
        ways += [(VMAP, size) for size in sizes if can and size > 1]
    return ways


def _way_to_stack(
    problem: Problem, method: Method, start: ClientState, job: Job, path: str, yardstick: Yardstick | None
) -> tuple[str, str]:
    """(path, note): the one that was asked for, or for "auto" the fastest that this model can take.

    Raises InputError where the path asked for is not to be had.
    """
    if path == VMAP:
        _try_path(problem, method, start, job, VMAP)
        if why := yardstick.differs(VMAP) if yardstick else "":
            raise InputError(f"engine.path = 'vmap': {why}; use loop")
        return VMAP, ""
    why = _cannot_fold(problem, method, job, STACK if path == AUTO else path, yardstick)
    if not why:
        return STACK if path == AUTO else path, ""
    if path != AUTO:
        raise InputError(f"engine.path = {path!r}: {why}; use auto, vmap or loop")
    if trouble := _try_path(problem, method, start, job, VMAP, fatal=False):
        return LOOP, trouble
    if wrong := yardstick.differs(VMAP) if yardstick else "":
        return LOOP, f"clients run one after another, for under torch.vmap {wrong}"
    return VMAP, f"clients are stacked by torch.vmap, for {why}" if isinstance(problem, Supervised) else ""


def _may_factor(problem: Problem, method: Method, start: ClientState, job: Job) -> bool:
    """Whether dense layers in factors would be used: clients share a start, and the layers are wide enough."""
    own = method.rules.has_rows or problem.personal or method.codecs
    shared = method.by.linear and not own and method.correction is None
    return shared and bool(Stack(problem, method, factors=True).in_factors(start, job))


def _cannot_fold(problem: Problem, method: Method, job: Job, path: str, yardstick: Yardstick | None) -> str:
    """ "" or why the folded model cannot be used: it cannot be had, or it does not come to what plain torch does."""
    try:
        stack = Stack(problem, method)
        assert yardstick is not None  # whatever can be folded has a model
        batch = next(iter(problem.round_batches(job.clients[:1], job.first_steps[:1], 1)))
        if why := mixes_by(stack.problem.model, rows_of_inputs(batch.x, 0), _sizes(len(job.clients))):
            return why
        return yardstick.differs(STACK) or (yardstick.differs(path) if path == FACTORS else "")
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
    problem: Problem, method: Method, start: ClientState, job: Job, path: str, *, num_rows: int = 1, fatal: bool = True
) -> str:
    """One step, of one client or more, thrown away: it loads code and kernels, and shows if the model can take it.

    Returns "" or why not, in one line; raises it as InputError if `fatal`.
    """
    try:
        seconds(problem, method, start, job, path, num_rows)
    except Exception as error:  # a user's model may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if is_plain(path) and isinstance(error, InputError):
            raise
        if is_plain(path):
            called = f"{problem.called}, or" if isinstance(problem, Supervised) else "model.name or"
            raise InputError(f"{called} data.batch-size: a training step of one client fails ({reason})") from None
        if fatal:
            raise InputError(f"engine.path = 'vmap': this model cannot be stacked; use loop ({reason})") from None
        return f"the model cannot be stacked, so clients run one after another ({reason})"
    return ""
