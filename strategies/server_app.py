"""The ServerApp: a run config becomes a run of fedmom whose rounds are exchanges over Flower's Grid."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedmom.backends.stepper import stepper_here
from fedmom.backends.trainer import settled
from fedmom.config.keys import Config
from fedmom.config.load import replace, with_choices
from fedmom.config.numbers import counted
from fedmom.config.resolve import keeps_at_nodes
from fedmom.config.strategies import OURS
from fedmom.engine.paths import AUTO, is_plain
from fedmom.errors import InputError, RunStoppedError
from fedmom.machine.files import at_home, write_text
from fedmom.machine.output import steady_output
from fedmom.method.state import num_bytes
from fedmom.records.files import ENDED
from fedmom.results.report import finished
from fedmom.rounds.correction import message_form, start_of
from fedmom.rounds.plan import Plan
from fedmom.rounds.round import Backend
from fedmom.runs.callbacks import Callback
from fedmom.runs.execute import execute, opened
from fedmom.runs.progress import callbacks
from fedmom.tasks.models.start import digest_of
from fedmom.tasks.problem import Problem, data_kind

from .at_nodes.rounds import RoundsAtNodes, Sends
from .backends import AveragingRounds, StockRounds
from .dsgdm import DSGDM, RelayRounds
from .fleet import Fleet, ask
from .flower_strategies import make_stock
from .local_data import LocalSupervised, local_problem
from .prsgdm import PRSGDM
from .replies import shares_memory

app = ServerApp()


@app.main()
@steady_output()
def main(grid: Grid, context: Context) -> None:
    """Run as the run config says: records and checkpoints in `run.out`, or on with `run.resume`.

    Raises InputError for bad keys, RunStoppedError where the run did not get to its end (so Flower sees it fail).
    """
    resolved = settled(context.run_config)
    config, listener = resolved.config, getattr(grid, "listener", None)
    where = config.run
    if where.resume and config.server.strategy != OURS:
        raise InputError(
            f"run.resume = {where.resume!r}: Flower's {config.server.strategy} keeps state that a checkpoint does not "
            "hold; start a new run"
        )
    config = replace(config, "run", out="", resume="", backend="simulation" if listener else "flower")
    out, followers = where.out, list[Callback](listener.callbacks if listener else [])
    if not listener:  # under Flower's own command nobody has chosen a folder, nor follows the rounds
        # In full: this is the SuperLink's directory, which need not be the one of whoever reads the stream.
        out = out or ("" if where.resume else str(Path("runs").resolve() / f"flower-{datetime.now():%Y%m%d-%H%M%S}"))
        followers = callbacks(Console(highlight=False, width=160), quiet=False)
        (at_home(where.resume or out) / ENDED).unlink(missing_ok=True)
    known, make_problem = None, None
    if data_kind(config.data.dataset).own_data:
        known = _fleet(config)
        make_problem = partial(local_problem, grid, known)
    # Flower's own line for every round would tear the progress bar; its warnings stay.
    with (
        flower_logs(logging.WARNING if listener else logging.INFO),
        opened(
            resolved._replace(config=config),
            {},
            at_home(out) if out else None,
            at_home(where.resume) if where.resume else None,
        ) as begun,
    ):
        result = execute(begun, partial(make_backend, grid, known), followers, make_problem)
    if listener:
        listener.result = result
    elif result.folder:
        write_text(result.folder / ENDED, json.dumps({"status": result.status, "message": result.message}) + "\n")
        for line in finished(result.folder, result.rounds):
            print(line, flush=True)
    if result.status != "done":
        raise RunStoppedError(result.message)


@contextmanager
def flower_logs(level: int) -> Iterator[None]:
    """Within the block Flower logs from `level` on."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _fleet(config: Config) -> Fleet:
    """All clients, before anything is known of a run but its configuration."""
    keys = config.server
    return Fleet(
        config.data.num_clients, keys.on_failure, keys.min_clients, keys.retries, keys.window, keys.wait_seconds
    )


def make_backend(grid: Grid, known: Fleet | None, config: Config, problem: Problem, plan: Plan) -> Backend:
    """The rounds on this Grid, with what a node chose where the engine's path was left open.

    `known`: who holds which client, where the nodes have been asked before.
    """
    keys, num_clients, method = config.server, config.data.num_clients, plan.method
    if keys.min_clients > plan.cohort_size:
        raise InputError(
            f"server.min-clients = {keys.min_clients}: only {plan.cohort_size} clients take part in a round"
        )
    if plan.topology is not None:
        return _relay(grid, known, config, problem, plan)
    strategy = (Sends if keeps_at_nodes(config, leaves=not shares_memory(grid)) else PRSGDM)(
        num_clients,
        cohort_size=plan.cohort_size,
        seed=plan.seed,
        running_var=method.running_var,
        on_failure=keys.on_failure,
        min_clients=keys.min_clients,
        retries=keys.retries,
        window=keys.window,
        wait_seconds=keys.wait_seconds,
    )
    fleet = strategy.fleet
    facts = _learn(grid, fleet, known, problem)
    choices = _choices(grid, fleet, config, keys.timeout_seconds, facts)
    asked = _asked(config, choices, facts)
    blocks = max(len(holder.clients) for holder in fleet.holders)
    notes = [f"{counted(len(fleet.holders), 'Flower node')}, at most {counted(blocks, 'client')} each"]
    backend: Backend
    if keys.strategy == OURS:
        strategy.message = {name: value.cpu() for name, value in message_form(problem, method).items()}
        if isinstance(strategy, Sends):
            backend = RoundsAtNodes(strategy, grid, problem, plan, asked, keys.timeout_seconds)
        else:
            backend = AveragingRounds(strategy, grid, problem, plan, asked, keys.timeout_seconds)
        backend.settled, backend.notes = choices, notes
        return _with_results(backend, config, problem, plan)
    with flower_logs(logging.ERROR):  # FedAvg warns that clients do not evaluate: the server does
        stock = make_stock(config, problem.start(), fleet.holders)
    notes.append(f"{type(stock).__name__} keeps its own state in memory: this run cannot be resumed")
    backend = StockRounds(stock, fleet, grid, problem, asked, keys.timeout_seconds)
    backend.settled, backend.notes = choices, notes
    return _with_results(backend, config, problem, plan)


def _with_results(backend: Backend, config: Config, problem: Problem, plan: Plan) -> Backend:
    """The same, which can say what every client gets: by its own word where nobody else has its examples."""
    if isinstance(problem, LocalSupervised):
        backend.own_results = problem.own_results
    else:
        backend.make_stepper = stepper_here(config, problem, plan, backend.settled)
    return backend


def _learn(grid: Grid, fleet: Fleet, known: Fleet | None, problem: Problem) -> dict[str, Any]:
    """Who holds which client, unless that is known; and what every message to a client must say of the data."""
    if known is None:
        fleet.learn(grid)
    else:
        fleet.use(known.holders)
    return problem.facts if isinstance(problem, LocalSupervised) else {}


def _relay(grid: Grid, known: Fleet | None, config: Config, problem: Problem, plan: Plan) -> Backend:
    """Algorithm 2: this server holds the rows and relays them."""
    assert plan.topology is not None
    keys = config.server
    strategy = DSGDM(
        plan.topology,
        plan.method,
        on_failure=keys.on_failure,
        min_clients=keys.min_clients,
        retries=keys.retries,
        window=keys.window,
        wait_seconds=keys.wait_seconds,
    )
    facts = _learn(grid, strategy.fleet, known, problem)
    choices = _choices(grid, strategy.fleet, config, keys.timeout_seconds, facts)
    size = len(problem.sizes) * sum(map(num_bytes, start_of(problem, plan.method)[0])) / 1e6
    nodes = counted(len(strategy.fleet.holders), "Flower node")
    backend = RelayRounds(strategy, grid, problem, _asked(config, choices, facts), keys.timeout_seconds)
    backend.settled = choices
    backend.notes = [
        f"{nodes}; Flower has no links between them, so this server relays: it holds x and u of all "
        f"{len(problem.sizes)} clients, {size:,.1f} MB"
    ]
    return _with_results(backend, config, problem, plan)


def _choices(grid: Grid, fleet: Fleet, config: Config, timeout: float, facts: dict[str, Any]) -> dict[str, str | int]:
    """One node decides for all what was left open, so that a resumed run takes the same; it compares what was given."""
    keys = config.engine
    if is_plain(keys.path):
        return {}
    largest = max(fleet.holders, key=lambda holder: len(holder.clients))
    for node_id, answer, done in ask(grid, [largest.node_id], {"engine": True, **facts}, timeout=timeout):
        if answer is None or "path" not in answer:
            raise InputError(f"node {node_id}: {done.failure or 'it did not say how its engine runs'}")
        # A run that goes on keeps what it has; the node may have found another way the faster one this time.
        kept = answer["path"] if keys.path == AUTO else keys.path
        return {"engine.path": kept, "engine.chunk-size": keys.chunk_size or answer["chunk-size"]}
    return {}


def _asked(config: Config, choices: Mapping[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What every train message says besides the round and the clients."""
    engine = with_choices(config, choices).engine
    begun = {"model-start": digest_of(config.model.start)} if config.model.start else {}
    return {"path": engine.path, "chunk-size": engine.chunk_size, **begun, **facts}
