"""A sweep's cells on Ray actors: of a Ray that is started here, or of a cluster, where every node has a run at a time.

All machines of a cluster see the sweep's folder, and the folder that it was started in; both are looked at before any
cell is begun. A file in the sweep's folder tells the actors to end, as signals do not reach other machines.
"""

import math
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmom.actors.actor import Failure
from fedmom.actors.cluster import PoolOptions, first_line, start_ray
from fedmom.actors.nodes import RayNode, answers_of, start_on, working_nodes
from fedmom.actors.pool import Pool
from fedmom.actors.watch import leave_ray
from fedmom.backends.premises import Premises, digest_of, trouble_with
from fedmom.config.build import share_of_gpus
from fedmom.config.load import load, parse_sets
from fedmom.errors import InputError, RayEndedError
from fedmom.experiments.crew import LOOK_SECONDS, Asked, Cell, CellEnded, Requests, SweepWork, run_cell
from fedmom.machine.cores import usable_cores
from fedmom.machine.files import at_home
from fedmom.method.decentralized.topology import FILES
from fedmom.records.status import SLOW_BEAT_SECONDS, read_status
from fedmom.user_code import HUB

RAY_HERE = "local"  # for an address: a Ray that is started for the sweep
_FILES = (".npz", ".bin", *FILES)  # how files end that a key names
_SECONDS_OF_SILENCE, _SECONDS_TO_LEAVE = 3 * SLOW_BEAT_SECONDS, 180.0


def premises_of(work: SweepWork, cells: Sequence[Cell]) -> Premises:
    """As this process sees them; the file with the token is not written yet."""
    token, here = uuid.uuid4().hex, os.getcwd()
    data: dict[str, str] = {}
    for cell in cells:
        loaded = load(work.config, {**parse_sets(work.sets), **cell.sets})
        config = loaded.config
        values = {"data.dataset": config.data.dataset, "algorithm.topology": config.algorithm.topology}
        named = {key: value for key, value in values.items() if value.endswith(_FILES) or "/" in value}
        named |= {"model.start": config.model.start} if config.model.start else {}
        if "data.data-dir" in loaded.given:
            named["data.data-dir"] = config.data.data_dir
        places = {f"{key} = {value!r}": value.removeprefix(HUB) for key, value in named.items()}
        data |= {said: place for said, place in places.items() if os.path.exists(at_home(place))}
    files = [work.config, *(str(path) for path in sorted(Path(here).glob("*.py")))]
    digests = {path: digest for path in files if (digest := digest_of(path))}
    return Premises(work.out, str(Path(work.out) / f".sweep-{token[:8]}"), token, here, digests, data)


@contextmanager
def _joined(address: str) -> Iterator[Any]:
    """The ray module, joined to the cluster at `address` or to one that is started here."""
    try:
        ray, started = start_ray("" if address == RAY_HERE else address)
    except InputError as error:
        raise InputError(str(error).replace(f"simulation.ray-address = {address!r}", f"--ray {address}")) from error
    gone = False
    try:
        yield ray
    except RayEndedError:
        gone = True
        raise
    finally:
        if started:
            leave_ray(ray, gone=gone)


def runs_at_a_time(workers: int | None, address: str) -> int:
    """`workers`; of None one, or as many as the cluster at `address` has nodes."""
    if workers or address in ("", RAY_HERE):
        return workers or 1
    with _joined(address) as ray:
        return len(working_nodes(ray))


def on_ray(work: SweepWork, cells: Sequence[Cell], workers: int | None, address: str) -> Iterator[CellEnded]:
    """On Ray actors, `workers` at a time (None: one, or one per node of a cluster), each with its share of the cores.

    A cell whose actor or node died goes on from its checkpoint, on another one where that is free first, as often as
    simulation.retries says. Raises InputError before any cell is begun where a machine does not see the folders,
    RayEndedError where no actor is left, and KeyboardInterrupt at its end where it was asked to end before.
    """
    premises = premises_of(work, cells)
    try:
        with _joined(address) as ray:
            Path(premises.note).write_text(premises.token, encoding="ascii")
            nodes = working_nodes(ray)
            if not nodes:
                raise InputError(f"--ray {address}: no machine of the cluster has a CPU for work; start one")
            if address != RAY_HERE:
                check_nodes(ray, nodes, premises)
            options, each = asked_of_ray(work, cells, workers, nodes, address)
            with Pool(_maker(ray, work, premises, each), options) as pool, Requests() as requests:
                yield from _answers(pool, cells, requests, premises)
    except RayEndedError as error:
        raise RayEndedError(f"{error}; the same command goes on from {work.out}") from None
    finally:
        premises.remove()
    if requests.asked:
        raise KeyboardInterrupt


def check_nodes(ray: Any, nodes: Sequence[RayNode], premises: Premises) -> None:
    """InputError that names the first machine that does not see what the sweep needs."""
    answers = answers_of(ray, [start_on(ray, node, trouble_with, premises) for node in nodes])
    alive = {node.id for node in working_nodes(ray)}  # Ray takes half a minute to notice that a machine is gone
    for node, trouble in zip(nodes, answers, strict=True):
        if trouble and node.id in alive:
            raise InputError(f"{node.name}: {first_line(trouble) if isinstance(trouble, Exception) else trouble}")


def asked_of_ray(
    work: SweepWork, cells: Sequence[Cell], workers: int | None, nodes: Sequence[RayNode], address: str
) -> tuple[PoolOptions, int]:
    """(what to ask of Ray, how many runs share a node).

    On a cluster an actor asks for its whole share of a node, so that Ray puts no more of them on one, and that a node
    that died leaves its actor waiting for another rather than on a node that has its run. Cells that start actors of
    their own need the rest of the CPUs for those.
    """
    settled = [load(work.config, {**parse_sets(work.sets), **cell.sets}).config for cell in cells]
    start_their_own = any(one.engine.workers or one.run.backend == "simulation" for one in settled)
    gpus = share_of_gpus(settled[0], 1)
    if gpus:  # a node without any takes no part
        nodes = [node for node in nodes if node.resources.get("GPU")] or nodes
    # Two cells that start actors may each get some of them, and wait for the other's for ever.
    workers = workers or (1 if address == RAY_HERE or start_their_own else len(nodes))
    each, count = math.ceil(workers / len(nodes)), min(workers, len(cells))
    cpus = 1.0
    if address != RAY_HERE and not start_their_own:
        cpus = min(node.resources["CPU"] for node in nodes) / each
        cpus = math.floor(cpus) if cpus >= 1 else math.floor(1e4 * cpus) / 1e4  # as Ray counts
    if gpus:  # of a node's own, not of this machine's
        there = min(node.resources.get("GPU", 0.0) for node in nodes)
        gpus = math.floor(1e4 * min(1.0, there / each)) / 1e4 if there else share_of_gpus(settled[0], min(count, each))
    options = PoolOptions(
        num_workers=count,
        num_cpus=cpus,
        num_gpus=gpus,
        ray_address="" if address == RAY_HERE else address,
        evenly=True,
        retries=settled[0].simulation.retries,
        count_key="--workers",
    )
    return options, each


def _maker(ray: Any, work: SweepWork, premises: Premises, each: int) -> Callable[[], Callable[[Cell], CellEnded]]:
    """What an actor is made by, which has a share of 1/each of its node's cores."""

    def make_worker() -> Callable[[Cell], CellEnded]:
        # On a machine that came later; modules that were edited since are nobody's mistake.
        if trouble := trouble_with(premises._replace(files={})):
            raise InputError(f"{socket.gethostname()} ({ray.util.get_node_ip_address()}): {trouble}")
        os.chdir(premises.here)  # data.data-dir and module:function are looked for where the sweep was started
        own = work._replace(threads=max(1, usable_cores() // each))

        def answer(cell: Cell) -> CellEnded:
            was_asked = premises.take_over(cell.name)
            still_run = wait_until_left(Path(work.out) / cell.name, was_asked)
            if was_asked():
                return CellEnded(cell, "", "", 0.0)
            if still_run:
                return CellEnded(cell, "refused", still_run, 0.0)
            return run_cell(own, cell, [Asked(was_asked)])

        return answer

    return make_worker


def wait_until_left(folder: Path, was_asked: Callable[[], bool]) -> str:
    """Wait until nobody writes into a run folder, or this process was asked to end; "" or who still does after minutes.

    A run whose node died says "running" for ever; of one that is at work, what it says changes every few seconds. Its
    lock tells nothing, as it is seen on one machine alone where the disk is a network's.
    """
    begun = changed = time.monotonic()
    last = read_status(folder)
    while last.is_running and time.monotonic() - changed < _SECONDS_OF_SILENCE and not was_asked():
        if time.monotonic() - begun > _SECONDS_TO_LEAVE:
            return f"{folder}: {last.host} is running it; end that run first"
        time.sleep(LOOK_SECONDS)
        if (now := read_status(folder)) != last:
            last, changed = now, time.monotonic()
    return ""


def _answers(pool: Pool, cells: Sequence[Cell], requests: Requests, premises: Premises) -> Iterator[CellEnded]:
    """Cells as they end. No more of them are handed out than there are actors: none waits behind another's."""
    waiting, busy, told = deque(cells), dict[str, Cell](), False
    while busy or (waiting and not told):
        if requests.asked and not told:
            told = True
            premises.ask_to_end()
        while waiting and not told and len(busy) < max(1, len(pool.worker_pids())):
            cell = waiting.popleft()
            busy[cell.name] = cell
            pool.submit(cell.name, cell)
        if (taken := pool.take(LOOK_SECONDS)) is None:
            continue
        cell, answer = busy.pop(str(taken[0])), taken[1]
        ended = CellEnded(cell, "failed", answer.reason, 0.0) if isinstance(answer, Failure) else answer
        if ended.status:  # else it was not begun
            yield ended
