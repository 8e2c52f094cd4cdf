"""Resident, supervised Ray actors that answer messages: a dead one is replaced, and its messages are tried again.

One dispatcher thread owns all state and reads one queue of events (a message, a batch that is done, a worker that is
up, stop); nothing polls. Each worker has up to two batches under way, so that it never waits for the next one. A batch
ends after some 30 ms or some MB of answers, whatever it was sent, and what it did not begin goes elsewhere: one Ray
call costs 0.5 to 1 ms, too dear for one small message, and a long batch would leave the other workers idle at the end.
What turns out to wait behind a long message is taken back.

Ray is imported here and in peers.py alone, when it starts.
"""

import math
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedmom.actor import BATCH_BYTES, BATCH_SECONDS, Actor, Failure, Packed, Progress
from fedmom.errors import InputError
from fedmom.imports import one_line

WARM_UP_SECONDS = 60.0  # the straggler limit of a worker's first message, if longer: data are read, models built
LONG_SECONDS = 0.15  # a batch that takes longer is at a long message: those behind it go elsewhere
MAX_FAILED_STARTS = 3  # in a row: then the pool gives up


__all__ = ["Failure", "Pool", "PoolOptions", "Shared"]


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


@dataclass(frozen=True)
class Shared:
    """A value in Ray's object store. It is freed when this and all messages that use it are gone."""

    ref: Any


@dataclass(eq=False)
class _Message:
    key: Hashable
    payload: Packed
    shared: tuple[Shared, ...]
    deaths: int = 0  # of workers that were at it


@dataclass(eq=False)
class _Batch:
    number: int  # increasing
    messages: list[_Message]


@dataclass(eq=False)
class _Worker:
    actor: Any
    progress: Progress
    pid: int = 0  # 0 until it is up
    told: bool = False  # does it write its progress?
    batches: deque[_Batch] = field(default_factory=deque)  # under way; the first is being worked on
    since: float = 0.0  # when the first batch became the first
    alone: bool = False  # the batch under way must stay the only one
    warm: bool = False  # has it answered?

    def limit(self, seconds: float) -> float:
        """The straggler limit of what it is working on."""
        return seconds if self.warm else max(seconds, WARM_UP_SECONDS)


class Pool:
    """Workers that answer messages. `make_worker` runs once in each and gives `handler(payload, *shared) -> answer`.

    Payloads and answers are pickled, `make_worker` cloudpickled. Every message that was submitted and not forgotten is
    taken exactly once, as an answer or as a `Failure`. One thread submits and takes. InputError when no worker can be
    had: from here, or from `take` under `wait = False`, which returns before a worker is up.
    """

    def __init__(
        self, make_worker: Callable[[], Callable[..., Any]], options: PoolOptions, *, wait: bool = True
    ) -> None:
        self._options = options
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[Hashable, Packed | Failure] | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        self._first_up = threading.Event()
        self._waiting: deque[_Message] = deque()
        self._suspects: deque[_Message] = deque()  # were under way when a worker died: tried again one by one
        self._workers: list[_Worker] = []
        self._forgotten: set[Hashable] = set()
        self._failed_starts = self._num_starts = self._num_batches = 0
        self._folder = tempfile.TemporaryDirectory(prefix="fedmom-")  # of the workers' progress
        self._seconds_per_message = math.inf  # a running mean
        self._closed = False
        self._ray, self._started_ray = _start_ray(options.ray_address)
        self._dispatcher = threading.Thread(target=self._dispatch, name="fedmom-pool", daemon=True)
        try:
            self.num_workers = _num_workers(self._ray, options)
            self._make_worker = self._ray.cloudpickle.dumps(make_worker)
            self._actor_class = self._ray.remote(
                num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0, max_task_retries=0
            )(Actor)
            for _ in range(self.num_workers):
                self._start_worker()
            self._dispatcher.start()
            if wait:
                self._first_up.wait()
                if self._broken:
                    raise self._broken
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self, value: Any) -> Shared:
        """Put a value into Ray's object store; workers see its arrays and buffers there, read-only, without a copy."""
        return Shared(self._ray.put(value))

    def submit(self, key: Hashable, payload: Any, shared: tuple[Shared, ...] = ()) -> None:
        """Never blocks. Arrays and buffers in `payload` must not change until the answer is there."""
        self._events.put((self._on_submit, _Message(key, Packed.of(payload), shared)))

    def take(self, timeout: float | None = None) -> tuple[Hashable, Any] | None:
        """(key, answer or Failure) of the next finished message, in order of arrival; None after `timeout` seconds."""
        if self._broken:
            raise self._broken
        try:
            finished = self._finished.get(timeout=None if timeout is None else max(timeout, 0.0))
        except queue.Empty:
            return None
        if finished is None:
            raise self._broken or RuntimeError("the pool is closed")
        key, answer = finished
        if isinstance(answer, Failure):
            return key, answer
        try:
            return key, answer.value()
        except Exception as error:  # of a class that the driver cannot import
            return key, Failure("raised", f"the answer cannot be unpickled: {one_line(error)}")

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Nobody will take these: those not under way are dropped, the answers of the others are thrown away."""
        self._events.put((self._on_forget, set(keys)))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in list(self._workers) if worker.pid]

    def close(self) -> None:
        """End the workers, and Ray if this pool started it."""
        if self._closed:
            return
        self._closed = True
        self._events.put((None,))
        if self._dispatcher.is_alive():
            self._dispatcher.join(timeout=5)
        if self._started_ray:
            self._ray.shutdown()  # ends the actors too
        for worker in self._workers:
            if self._ray.is_initialized():
                self._ray.kill(worker.actor)
            worker.progress.close()
        self._workers.clear()
        self._folder.cleanup()
        self._finished.put(None)

    # Below, all runs in the dispatcher thread (but for __init__'s first _start_worker).

    def _dispatch(self) -> None:
        while True:
            event: tuple[Any, ...] | None
            try:
                event = self._events.get(timeout=self._seconds_to_look())
            except queue.Empty:
                event = None
            try:
                while event is not None:
                    handle, *arguments = event
                    if handle is None:
                        return
                    handle(*arguments)
                    event = None if self._events.empty() else self._events.get()
                self._look_for_long_messages()
                self._fill()
            except Exception as error:
                self._break(RuntimeError(f"Ray failed: {one_line(error)}"))

    def _break(self, error: Exception) -> None:
        """No message will be answered any more: `take` raises `error`."""
        self._broken = self._broken or error
        self._first_up.set()
        self._finished.put(None)

    def _start_worker(self) -> None:
        self._num_starts += 1
        path = os.path.join(self._folder.name, str(self._num_starts))
        worker = _Worker(self._actor_class.remote(), Progress(path, create=True))
        self._workers.append(worker)
        self._call(worker.actor.start.remote(sys.path, self._make_worker, path), self._on_start, worker)

    def _call(self, ref: Any, handle: Callable[..., None], *arguments: Any) -> None:
        """When `ref` is there, `handle(*arguments, result or exception)` becomes an event."""

        def done(future: Any) -> None:
            self._events.put((handle, *arguments, future.exception() or future.result()))

        ref.future().add_done_callback(done)

    def _on_start(self, worker: _Worker, result: tuple[int, bool, str] | Exception) -> None:
        if not isinstance(result, Exception) and not result[2]:
            worker.pid, worker.told, _ = result
            self._failed_starts = 0
            self._first_up.set()
            return
        self._workers.remove(worker)
        worker.progress.close()
        self._failed_starts += 1
        self._ray.kill(worker.actor)
        if not isinstance(result, Exception) and not self._first_up.is_set():
            self._break(InputError(result[2]))  # make_worker raised, and would do so again
        elif self._failed_starts >= MAX_FAILED_STARTS:
            why = _first_line(result) if isinstance(result, Exception) else result[2]
            self._break(InputError(f"{self._failed_starts} Ray actors in a row did not start: {why}"))
        else:
            self._start_worker()

    def _on_submit(self, message: _Message) -> None:
        self._forgotten.discard(message.key)
        self._waiting.append(message)

    def _on_forget(self, keys: set[Hashable]) -> None:
        self._waiting = deque(message for message in self._waiting if message.key not in keys)
        self._suspects = deque(message for message in self._suspects if message.key not in keys)
        under_way = {m.key for worker in self._workers for batch in worker.batches for m in batch.messages}
        self._forgotten |= keys & under_way

    def _on_batch(self, worker: _Worker, batch: _Batch, result: Any) -> None:
        if worker not in self._workers or batch not in worker.batches:
            return  # an earlier event told that it died, or was too late
        if isinstance(result, Exception):
            self._retire(worker, None)
            return
        seconds, answers = result
        worker.batches.remove(batch)
        worker.since, worker.alone, worker.warm = time.monotonic(), False, True
        for message, answer in zip(batch.messages, answers, strict=False):
            self._finish(message, answer)
        self._requeue(batch.messages[len(answers) :])
        if answers:
            now = seconds / len(answers)
            before = now if math.isinf(self._seconds_per_message) else self._seconds_per_message
            self._seconds_per_message = (before + now) / 2

    def _finish(self, message: _Message, answer: Packed | Failure) -> None:
        if message.key in self._forgotten:
            self._forgotten.remove(message.key)
        else:
            self._finished.put((message.key, answer))

    def _requeue(self, messages: Iterable[_Message], *, alone: bool = False) -> None:
        """Messages that are not under way any more go first; not those that were forgotten meanwhile."""
        messages = list(messages)
        gone = {message.key for message in messages} & self._forgotten
        self._forgotten -= gone
        (self._suspects if alone else self._waiting).extendleft(m for m in reversed(messages) if m.key not in gone)

    def _retire(self, worker: _Worker, late: str | None) -> None:
        """Replace a worker that died, or whose message is too `late`, and care for its messages.

        A message that was being worked on has used up one of its tries, and is tried again alone. On another machine
        nobody knows which one of a batch that was: then they all are tried alone, and only that counts.
        """
        self._workers.remove(worker)
        for batch in reversed(worker.batches):
            begun = worker.progress.begun(batch.number) if worker.told else len(batch.messages)
            if not worker.told and (len(batch.messages) > 1 or batch is not worker.batches[0]):
                self._requeue(batch.messages, alone=True)
                continue
            self._requeue(batch.messages[begun:])
            self._requeue(batch.messages[: max(begun - 1, 0)])  # done, but the answers died with the worker
            for message in batch.messages[max(begun - 1, 0) : begun]:
                message.deaths += 1
                if late:
                    self._finish(message, Failure("late", late))
                elif message.deaths > self._options.retries:
                    count = f"{message.deaths} times" if message.deaths > 1 else "once"
                    self._finish(message, Failure("died", f"its Ray actor died {count}"))
                else:
                    self._requeue([message], alone=True)
        self._ray.kill(worker.actor)  # also where only the call failed, such as on a lost object: a fresh start
        worker.progress.close()
        self._start_worker()

    def _seconds_to_look(self) -> float | None:
        """Until a batch will have taken too long; None if there is no such time."""
        times = []
        for worker in self._workers:
            if worker.batches and worker.told and sum(len(batch.messages) for batch in worker.batches) > 1:
                times.append(worker.since + LONG_SECONDS)
            if worker.batches and self._options.straggler_seconds > 0:
                times.append(worker.since + worker.limit(self._options.straggler_seconds))
        # Not at once, should the worker not have begun yet.
        return max(min(times) - time.monotonic(), 0.02) if times else None

    def _look_for_long_messages(self) -> None:
        """Take back what waits behind a long message; replace a worker that is at one for too long."""
        limit = self._options.straggler_seconds
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.batches or now - worker.since < LONG_SECONDS:
                continue
            first = worker.batches[0]
            if worker.told and worker.progress.begun(first.number):
                worker.progress.stop(worker.batches[-1].number)
                for batch in reversed(worker.batches):
                    begun = worker.progress.begun(batch.number)
                    self._requeue(batch.messages[begun:])
                    batch.messages = batch.messages[:begun]
            if (
                limit > 0
                and now - worker.since >= worker.limit(limit)
                and (not worker.told or worker.progress.begun(first.number))
            ):
                self._retire(worker, f"no reply within {worker.limit(limit):g} s")

    def _fill(self) -> None:
        """Give every worker that is up its next batches: suspects alone on their worker, the others two at a time."""
        for slots in (1, 2):
            for worker in self._workers:
                if worker.pid == 0 or worker.alone or len(worker.batches) >= slots:
                    continue
                if self._suspects:  # nobody gets a second batch, so that workers become free for suspects
                    if not worker.batches:
                        self._send(worker, [self._suspects.popleft()])
                        worker.alone = True
                elif self._waiting:
                    self._send(worker, self._next_batch())

    def _next_batch(self) -> list[_Message]:
        # An equal share of what is left, so that all workers end together; the first batch of all is one message.
        share = math.ceil(len(self._waiting) / (2 * self.num_workers))
        size = max(1, min(share, int(BATCH_SECONDS / max(self._seconds_per_message, 1e-6))))
        messages: list[_Message] = []
        num_bytes = 0
        while self._waiting and len(messages) < size and num_bytes < BATCH_BYTES:
            messages.append(self._waiting.popleft())
            num_bytes += messages[-1].payload.nbytes()
        return messages

    def _send(self, worker: _Worker, messages: list[_Message]) -> None:
        refs = {shared.ref: None for message in messages for shared in message.shared}
        places = {ref: place for place, ref in enumerate(refs)}
        calls = [(*message.payload, [places[shared.ref] for shared in message.shared]) for message in messages]
        if not worker.batches:
            worker.since = time.monotonic()
        self._num_batches += 1
        batch = _Batch(self._num_batches, messages)
        worker.batches.append(batch)
        self._call(worker.actor.run.remote(batch.number, calls, *refs), self._on_batch, worker, batch)


def _start_ray(address: str) -> tuple[Any, bool]:
    """(the ray module, whether Ray was started or joined here rather than before)."""
    import logging
    import warnings

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.cloudpickle
    except ImportError as error:
        raise InputError('the ray backend needs Ray: pip install "flwr[simulation]"') from error
    if ray.is_initialized():
        return ray, False
    _reachable(address)
    ray._private.worker._worker_logs_enabled = False  # else it prints eight lines for every worker that dies
    with warnings.catch_warnings(), _kept_handler(signal.SIGTERM):
        warnings.simplefilter("ignore", FutureWarning)  # a tip about CUDA_VISIBLE_DEVICES
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            key = f"simulation.ray-address = {address!r}: " if address else ""
            raise InputError(f"{key}Ray does not start: {_first_line(error)}") from error
    return ray, True


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
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"simulation.ray-address = {address!r}: nobody answers there ({one_line(error)})") from None


def join_ray(options: PoolOptions, num_workers: int) -> tuple[Any, bool, int]:
    """(the ray module, whether it was started here, how many workers fit); InputError where `num_workers` do not."""
    ray, started = _start_ray(options.ray_address)
    try:
        return ray, started, _num_workers(ray, replace(options, num_workers=num_workers))
    except BaseException:
        if started:
            ray.shutdown()
        raise


def _num_workers(ray: Any, options: PoolOptions) -> int:
    """As many as asked for, or as fit into the cluster at once, node by node; InputError for none or too many."""
    wanted = {"CPU": options.num_cpus, "GPU": options.num_gpus}
    keys = {"CPU": "num-cpus", "GPU": "num-gpus"}
    nodes: Sequence[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, key in keys.items():
        most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        if wanted[kind] > most:
            right = (
                f"Ray sees at most {most:g} {kind}s on one machine" if most else f"Ray sees no {kind} here; set it to 0"
            ) + (" and engine.device to cpu" if kind == "GPU" and not most else "")
            raise InputError(f"simulation.{key} = {wanted[kind]:g}: {right}")
    if not any(wanted.values()):  # nothing limits them
        return options.num_workers or sum(int(node.get("CPU", 0)) for node in nodes)
    # Fractions such as 0.1 are not exact: a hair more than the quotient.
    fits = [min(int(node.get(kind, 0.0) / each + 1e-6) for kind, each in wanted.items() if each) for node in nodes]
    fit, needs = sum(fits), " and ".join(f"{keys[kind]} = {each:g}" for kind, each in wanted.items() if each)
    if fit == 0:
        raise InputError(f"simulation.{needs}: no machine has both; ask for less")
    if options.num_workers > fit:
        raise InputError(f"{options.count_key} = {options.num_workers}: with {needs} each, {fit} fit")
    return options.num_workers or fit


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
