"""Ray for this process: started here or joined, and how many workers fit.

Ray is imported here and in backends/peer.py alone, when it starts.
"""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedmom.actors.nodes import Agreement, Placement, RayNode, ray_nodes, surveyed
from fedmom.errors import InputError, missing_package
from fedmom.machine.cores import usable_cores
from fedmom.user_code import one_line

# Of a Unix socket's path, 107 bytes, Ray takes these: "/session_DATE_TIME_PID/sockets/plasma_store" and a number.
_SOCKET_BYTES = 66
_SECONDS_BETWEEN_POLLS = 0.1
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class PoolOptions:
    """Section `simulation` of a config: how many workers, with what each, and what becomes of a failing one."""

    num_workers: int = 0  # 0: as many as num_cpus and num_gpus let fit on all Ray nodes
    num_cpus: float = 1  # per worker; fractions allowed
    num_gpus: float = 0.0  # per worker; a fraction lets several share one GPU
    ray_address: str = ""  # "" starts a local Ray, else that cluster is joined
    retries: int = 2  # how often a message whose worker died is tried again
    straggler_seconds: float = 0.0  # > 0: a message under way for longer is a failure, and its worker is replaced
    count_key: str = "simulation.num-actors"  # the key that num_workers comes from
    share_gpus: bool = False  # num_gpus is what is found out when Ray is there: an equal share of the cluster's
    evenly: bool = False  # whether all nodes get as many workers, whatever their cores
    agreement: Agreement | None = None  # what the nodes of a cluster must hold

    @property
    def needs(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus}


def start_ray(address: str) -> tuple[Any, bool]:
    """(the ray module, whether Ray was started or joined here rather than before)."""
    import logging
    import warnings

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.cloudpickle
    except ImportError as error:
        raise missing_package("a pool of Ray actors", "ray", "flower") from error
    if ray.is_initialized():
        return ray, False
    _reachable(address)
    # Ray counts the machine's cores, whatever the process may use of them.
    own: dict[str, Any] = {} if address else {"num_cpus": usable_cores(), "_temp_dir": ray_folder()}
    ray._private.worker._worker_logs_enabled = False  # else it prints eight lines for every worker that dies
    with warnings.catch_warnings(), _kept_handler(signal.SIGTERM):
        warnings.simplefilter("ignore", FutureWarning)  # a tip about CUDA_VISIBLE_DEVICES
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
        except Exception as error:
            key = f"simulation.ray-address = {address!r}: " if address else ""
            raise InputError(f"{key}Ray does not start: {first_line(error)}") from error
    worker = ray._private.worker.global_worker
    if hasattr(worker, "gcs_error_subscriber"):
        worker.gcs_error_subscriber = _Errors(worker.gcs_error_subscriber)
    return ray, True


class _Errors:
    """Where a thread of Ray waits for its errors. Of a head that has ended it asks anew at once, with a whole core."""

    def __init__(self, subscriber: Any) -> None:
        self._subscriber = subscriber

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscriber, name)

    def poll(self) -> Any:
        found = self._subscriber.poll()
        if found[1] is None:
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return found


def ray_folder() -> str | None:
    """Where a Ray of our own keeps its sockets and logs; None: where it would by itself.

    A Unix socket's path has at most 107 bytes: under a longer TMPDIR another folder is taken. InputError without one.
    """
    given = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    most = 107 - _SOCKET_BYTES - len("/ray")
    if not given or len(os.fsencode(os.environ[given])) <= most:
        return None
    for folder in _SHORT_FOLDERS:
        # Others may have a folder "ray" there, into which we must not write.
        path = os.path.join(folder, f"ray-{os.getuid()}")
        with contextlib.suppress(OSError):
            os.makedirs(path, mode=0o700, exist_ok=True)
            if os.lstat(path).st_uid == os.getuid() and os.access(path, os.W_OK):
                return path
    raise InputError(
        f"{given} = {os.environ[given]!r}: too long for Ray's sockets; set RAY_TMPDIR to a folder whose path has at "
        f"most {most} bytes"
    )


@contextmanager
def _kept_handler(number: int) -> Iterator[None]:
    """Ray puts a handler of its own in the place of the one that leaves a checkpoint."""
    if threading.current_thread() is not threading.main_thread():  # there it leaves them alone
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _reachable(address: str) -> None:
    """InputError where nobody listens at HOST:PORT; Ray would say so in twenty lines, after a minute."""
    where = _host_and_port(address)
    if where is None:
        return
    try:
        socket.create_connection(where, timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"simulation.ray-address = {address!r}: nobody answers there ({one_line(error)})") from None


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    return None if "://" in address or not host or not port.isdigit() else (host, int(port))


class Joined(NamedTuple):
    """Ray, and the workers that fit into it."""

    ray: Any  # the module
    started: bool  # whether Ray was started or joined here rather than before
    is_cluster: bool  # whether other machines may be there
    placement: Placement
    options: PoolOptions  # with the share of the GPUs, where that was to be found out
    num_workers: int


def join_ray(options: PoolOptions) -> Joined:
    """Start or join Ray, look at its nodes, and see how many workers fit.

    Raises InputError where they do not, or where a node has other versions than this one.
    """
    ray, started = start_ray(options.ray_address)
    try:
        nodes = ray_nodes(ray)
        if options.share_gpus:
            options = replace(options, num_gpus=share_of_gpus(nodes, options.num_workers), share_gpus=False)
        check_fit(nodes, options)
        placement = Placement(options.needs, evenly=options.evenly)
        able = [node for node in nodes if placement.capacity(node)]
        is_cluster = len(nodes) > 1 or bool(options.ray_address)
        if is_cluster:
            able = surveyed(ray, able)
            check_fit(able, options)  # one may have ended meanwhile
        placement.nodes = {node.id: node for node in able}
        number = options.num_workers or placement.fit()
        if not number:
            raise InputError(f"{options.count_key} = 0: Ray has no CPU to count actors by; say how many")
        return Joined(ray, started, is_cluster, placement, options, number)
    except BaseException:
        if started:
            ray.shutdown()
        raise


def check_fit(nodes: Sequence[RayNode], options: PoolOptions) -> None:
    """Raises InputError where no worker fits, or not as many as asked for."""
    keys = {"CPU": "num-cpus", "GPU": "num-gpus"}
    for kind, key in keys.items():
        most = max((node.resources.get(kind, 0.0) for node in nodes), default=0.0)
        if options.needs[kind] > most:
            right = (
                f"Ray sees at most {most:g} {kind}{'s' * (most != 1)} on one machine"
                if most
                else f"Ray sees no {kind} here; set it to 0" + " and engine.device to cpu" * (kind == "GPU")
            )
            raise InputError(f"simulation.{key} = {options.needs[kind]:g}: {right}")
    fit = sum(map(Placement(options.needs).capacity, nodes))
    needs = " and ".join(f"{keys[kind]} = {each:g}" for kind, each in options.needs.items() if each)
    if fit == 0:
        raise InputError(f"simulation.{needs}: no machine has both; ask for less")
    if options.num_workers > fit:
        raise InputError(f"{options.count_key} = {options.num_workers}: with {needs} each, {fit} fit")


def share_of_gpus(nodes: Sequence[RayNode], num_workers: int) -> float:
    """GPUs per worker, as large as lets all have one, those of a node evenly; 0 workers: as many as there are GPUs."""
    there = sum(int(node.resources.get("GPU", 0)) for node in nodes)
    together = math.ceil(max(1, num_workers) / max(1, there))  # workers on one GPU
    return math.floor(1e4 / together) / 1e4  # Ray counts ten-thousandths


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
