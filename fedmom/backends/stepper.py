"""Local steps on this process's device, for a backend whose clients run elsewhere: they make a client's own model."""

from collections.abc import Callable, Mapping
from functools import cache

from fedmom.config.keys import Config, Scalar
from fedmom.config.load import with_choices
from fedmom.engine.engine import Engine
from fedmom.rounds.plan import Plan
from fedmom.tasks.problem import Problem


def stepper_here(config: Config, problem: Problem, plan: Plan, settled: Mapping[str, Scalar]) -> Callable[[], Engine]:
    """For a backend whose clients run elsewhere: an engine on this process's device, made when it is first needed.

    settled: the path and the size of a chunk that the clients' engines take.
    """
    keys = with_choices(config, settled).engine
    size = keys.chunk_size or len(problem.sizes)
    return cache(lambda: Engine(problem, plan.method, path=keys.path, chunk_size=size))
