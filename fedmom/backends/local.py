"""The backend `engine`: the rounds of this process, or of `engine.workers` Ray actors that it starts."""

import torch

from fedmom.config.build import resolve_device, set_up_torch
from fedmom.config.keys import Config
from fedmom.engine.auto import choose
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.machine.memory import free_bytes
from fedmom.method.state import ClientState, num_bytes
from fedmom.rounds.plan import Plan, beginning, round_job
from fedmom.rounds.round import Backend
from fedmom.tasks.problem import Problem


def make_backend(config: Config, problem: Problem, plan: Plan) -> Backend:
    """The rounds of a resolved configuration. Raises InputError where the actors cannot be had."""
    if not config.engine.workers:
        return make_local(config, problem, plan)
    if plan.topology is not None:
        from fedmom.backends.peers import make_peers  # which needs Ray

        return make_peers(config, problem, plan)
    from fedmom.backends.workers import make_workers  # which needs Ray, if not at once

    return make_workers(config, problem, plan)


def make_local(config: Config, problem: Problem, plan: Plan) -> Backend:
    """The engine on this process's device, with what `auto` chose."""
    wanted = config.engine
    set_up_torch(wanted)
    begin = beginning(problem, plan)
    choice = choose(
        problem,
        plan.method,
        begin.state,
        round_job(problem, plan, begin)._replace(rows=None, own=None),
        path=wanted.path,
        chunk_size=wanted.chunk_size,
        remember=wanted.remember,
        own_rows=plan.topology is not None,
        compared=plan.compared,
    )
    engine = Engine(problem, plan.method, path=choice.path, chunk_size=choice.chunk_size)
    notes = [f"engine: {choice.trouble}"] if choice.trouble else []
    notes += [f"engine: {said}" for said in (choice.said.short, choice.note) if said]
    backend: Engine | GossipRounds = engine
    if plan.topology is not None:
        home = rows_home(problem, begin.state)
        backend = GossipRounds(engine, plan.topology, home)
        if home != problem.device:
            notes.append("the clients' rows do not fit on the device: they stay in main memory and visit it by chunks")
    backend.settled = {
        "engine.device": resolve_device(config).engine.device,
        "engine.path": choice.path,
        # A size that was given stays in the record, though larger than needed: a resume compares the two.
        "engine.chunk-size": wanted.chunk_size or choice.chunk_size,
        "engine.threads": torch.get_num_threads(),
    }
    backend.notes = notes
    backend.details = [f"engine: {choice.said.details}"] if choice.said.details else []
    return backend


def rows_home(problem: Problem, start: ClientState) -> torch.device:
    """Where N rows are kept: on the device if they fit three times (before, after the steps, mixed), else in memory."""
    each = sum(map(num_bytes, start))
    fits = 3 * len(problem.sizes) * each < 0.6 * free_bytes(problem.device)
    return problem.device if fits else torch.device("cpu")
