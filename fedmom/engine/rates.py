"""How fast a way of running clients is: a few steps of the run itself, timed and thrown away.

Batches are addressed, so that the run begins unchanged.
"""

from collections.abc import Callable, Sequence

import torch

from fedmom.engine.engine import Engine
from fedmom.engine.paths import AUTO, LOOP, is_plain
from fedmom.engine.stacked.cuda_graphs import COMINGS
from fedmom.engine.stacked.timings import now
from fedmom.errors import InputError
from fedmom.method.algorithms import Method
from fedmom.method.state import ClientState
from fedmom.rounds.round import Job, part_of
from fedmom.tasks.problem import Problem
from fedmom.user_code import one_line

Way = tuple[str, int]  # path and chunk size
_LONG = 0.5  # seconds of a step: one is enough to measure
_REPEATS = 3  # of what is timed on a GPU, where it is not long
_VERY_LONG = 2.0  # what a CPU does for the first time is little beside it, and another would be long to wait for


class Rates:
    """Client-steps per second of the ways that were tried for one run."""

    def __init__(self, rate: Callable[..., float], path: str, trouble: str = "") -> None:
        """rate: (path, chunk size, most=…) -> client-steps per second. path: engine.path, "auto" or the one asked for.

        trouble: why stacking was ruled out before anything was timed, if it was.
        """
        self._rate, self._path, self.trouble = rate, path, trouble
        self.found: dict[Way, float] = {}

    @property
    def best(self) -> Way:
        """The fastest so far."""
        return max(self.found, key=lambda way: self.found[way])

    def named(self) -> dict[str, float]:
        """{"way × chunk size": client-steps per second}."""
        return {f"{path} × {size}": speed for (path, size), speed in self.found.items()}

    def try_all(self, ways: Sequence[Way]) -> None:
        """Time each once, and those near the fastest twice. Chunks ascend: what follows one without memory has none.

        Raises InputError where a way fails that was asked for, or the loop.
        """
        for way in ways:
            if len(self.found) > 1 and self.found[list(self.found)[-1]] < 0.5 * max(self.found.values()):
                break  # larger stacks lose already (convolutions on a CPU), and take longer to say so
            try:
                self.found[way] = self._rate(*way)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            except Exception as error:  # a user's model may raise anything, in the run's dtype alone too
                if self._path != AUTO or is_plain(way[0]):
                    failed = f"{way[0]} fails ({one_line(error)[:200]})"
                    raise InputError(f"engine.path = {self._path!r}: {failed}") from error
                self._note(way, error)
                break
        near = [way for way in self.found if self.found[way] > 0.6 * max(self.found.values())]
        if len(near) > 1:  # one measurement beside a busy neighbour says little
            self.found |= {way: max(self.found[way], self._rate(*way)) for way in near}

    def try_rivals(self, rivals: Sequence[Way]) -> None:
        """Time the best and its rivals over up to 64 steps, for whether factors pay depends on the number of steps.

        The loop is timed again too: a lucky first measurement of the stack must not keep it out.
        """
        for way in [(LOOP, 1), self.best, *rivals]:
            try:
                self.found[way] = self._rate(*way, most=64)
            except torch.OutOfMemoryError:  # a rival in larger chunks than the stack's
                torch.cuda.empty_cache()
            except Exception as error:  # as above
                self._note(way, error)
                self.found.pop(way, None)

    def _note(self, way: Way, error: Exception) -> None:
        self.trouble = f"{way[0]} × {way[1]} fails ({one_line(error)[:200]})"


def replayable(method: Method, job: Job, own_rows: bool) -> bool:
    """Whether a GPU may record a round's steps: all clients take equally many, from a common start."""
    even = bool((job.num_steps == len(job.lrs)).all())
    return even and not (own_rows or method.rules.has_rows or method.codecs)


def rate(
    problem: Problem,
    method: Method,
    start: ClientState,
    job: Job,
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
    engine = _engine(problem, method, path, num_rows)
    engine.replays = engine.replays if replays else None
    steps = min(len(job.lrs), most)  # as in the run, several steps share one exchange
    on_cpu = problem.device.type == "cpu"
    untimed = min(steps, 2) if on_cpu else steps
    each = _seconds_of(engine, start, job, num_rows, untimed) / untimed
    for _ in range(COMINGS):
        if engine.replays is not None and not engine.replays.num_replayed and not engine.replays.trouble:
            _seconds_of(engine, start, job, num_rows, steps)
    if on_cpu and each > _VERY_LONG:
        return num_rows / each
    steps = 1 if on_cpu and each > _LONG else steps
    found = [_seconds_of(engine, start, job, num_rows, steps)]
    # A replayed round may take a millisecond, in which whatever else the host does says more than the way.
    while not on_cpu and len(found) < _REPEATS and sum(found) < _LONG:
        found.append(_seconds_of(engine, start, job, num_rows, steps))
    return num_rows * steps / min(found)


def seconds(
    problem: Problem, method: Method, start: ClientState, job: Job, path: str, num_rows: int, steps: int = 1
) -> float:
    """Time of the first steps of the first `num_rows` clients of `job`, with all that is done for the first time."""
    return _seconds_of(_engine(problem, method, path, num_rows), start, job, num_rows, min(steps, len(job.lrs)))


def _engine(problem: Problem, method: Method, path: str, num_rows: int) -> Engine:
    return Engine(
        problem, method._replace(momentum_policy="average", states={}, codecs={}), path=path, chunk_size=num_rows
    )


def _seconds_of(engine: Engine, start: ClientState, job: Job, num_rows: int, steps: int) -> float:
    """Time of a round of `steps` local steps of the first `num_rows` clients of `job`."""
    part = part_of(job._replace(own=None, keeps=False), torch.arange(num_rows))
    short = part._replace(num_steps=torch.full_like(part.num_steps, steps), lrs=job.lrs[:steps])
    short = short._replace(following=lambda: short)  # as in a run, each round's minibatches are drawn during another
    begin = now(engine.problem.device)
    engine.run_round(start, short)
    return now(engine.problem.device) - begin
