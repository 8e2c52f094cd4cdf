"""The thread that owns a pool's state: which worker has which messages, what died, what is late, what goes where.

It reads one queue of events (a message, a batch that is done, a worker that is up, stop); nothing polls. Each worker
has up to two batches under way, so that it never waits for the next one. A batch ends after some 30 ms or some MB of
answers, whatever it was sent, and what it did not begin goes elsewhere: one Ray call costs 0.5 to 1 ms, too dear for
one small message, and a long batch would leave the other workers idle at the end. What turns out to wait behind a long
message is taken back.
"""

import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

from fedmom.actors.actor import BATCH_BYTES, BATCH_SECONDS, Failure, Packed, ProgressFile, Started
from fedmom.actors.cluster import PoolOptions, count_workers, first_line
from fedmom.actors.watch import Watch
from fedmom.actors.work import MessageBatch, Submitted, Worker
from fedmom.actors.worker_output import printed
from fedmom.errors import InputError, RayEndedError
from fedmom.machine.scratch import ScratchFolder
from fedmom.user_code import one_line

LONG_SECONDS = 0.15  # a batch that takes longer is at a long message: those behind it go elsewhere
MAX_FAILED_STARTS = 3  # in a row: then the pool gives up
SECONDS_WITHOUT_WORKERS = 20.0  # then it is looked whether the cluster still has room for one


class Dispatcher:
    """All but `__init__` runs in its thread, or says otherwise."""

    def __init__(self, options: PoolOptions, on_output: Callable[[Hashable, str], None] | None = None) -> None:
        self._options, self._on_output = options, on_output
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[Hashable, Packed | Failure] | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        self._first_up = threading.Event()
        self._waiting: deque[Submitted] = deque()
        self._suspects: deque[Submitted] = deque()  # were under way when a worker died: tried again one by one
        self._workers: list[Worker] = []
        self._forgotten: set[Hashable] = set()
        self._failed_starts = self._num_starts = self._num_batches = 0
        self._workerless_since = time.monotonic()
        self._seconds_per_message = math.inf  # a running mean
        self._folder = ScratchFolder()  # of the workers' progress
        self._thread = threading.Thread(target=self._dispatch, name="fedmom-pool", daemon=True)
        self.num_workers = 0
        self._ray: Any = None
        self._make_worker = b""  # cloudpickled
        self._actor_class: Any = None
        self._watch: Watch | None = None

    def give_up(self, error: Exception) -> None:
        """Whoever takes, or will, gets `error`. In any thread, also in a signal's handler."""
        self._broken = self._broken or error
        self._finished.put(None)

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
                if self._broken:
                    continue  # nothing is asked of a Ray that is gone
                self._look_for_long_messages()
                self._look_for_workers()
                self._fill()
            except Exception as error:
                self._break(RuntimeError(f"Ray failed: {one_line(error)}"))

    def _break(self, error: Exception) -> None:
        """No message will be answered any more: `take` raises `error`."""
        self.give_up(error)
        self._first_up.set()

    def _start_worker(self) -> None:
        self._num_starts += 1
        path = os.path.join(self._folder.path, str(self._num_starts))
        worker = Worker(self._actor_class.remote(), ProgressFile(path, create=True))
        self._workers.append(worker)
        self._call(
            worker.actor.start.remote(sys.path, self._make_worker, path, self._on_output is not None),
            self._on_start,
            worker,
        )

    def _call(self, ref: Any, handle: Callable[..., None], *arguments: Any) -> None:
        """When `ref` is there, `handle(*arguments, result or exception)` becomes an event."""

        def done(future: Any) -> None:
            self._events.put((handle, *arguments, future.exception() or future.result()))

        ref.future().add_done_callback(done)

    def _on_start(self, worker: Worker, result: Started | Exception) -> None:
        if not isinstance(result, Exception) and not result.trouble:
            worker.pid, worker.told, worker.files = result.pid, result.told, result.files
            self._failed_starts = 0
            self._first_up.set()
            return
        self._workers.remove(worker)
        worker.progress.close()
        self._failed_starts += 1
        self._ray.kill(worker.actor)
        if not isinstance(result, Exception) and not self._first_up.is_set():
            self._break(InputError(result.trouble))  # make_worker raised, and would do so again
        elif self._failed_starts >= MAX_FAILED_STARTS:
            why = first_line(result) if isinstance(result, Exception) else result.trouble
            kind = RayEndedError if self._first_up.is_set() else InputError  # in mid-run it is no bad input
            self._break(kind(f"{self._failed_starts} Ray actors in a row did not start: {why}"))
        else:
            self._start_worker()

    def _look_for_workers(self) -> None:
        """Give up where a cluster has lost the machines that the workers ran on, and has none for new ones."""
        now = time.monotonic()
        if any(worker.pid for worker in self._workers):
            self._workerless_since = now
        elif self._first_up.is_set() and now - self._workerless_since > SECONDS_WITHOUT_WORKERS:
            self._workerless_since = now
            try:
                count_workers(self._ray, replace(self._options, num_workers=0))
            except InputError as error:
                self._break(RayEndedError(f"all Ray actors are gone, and there is no room for new ones: {error}"))

    def _on_submit(self, message: Submitted) -> None:
        self._forgotten.discard(message.key)
        self._waiting.append(message)

    def _on_forget(self, keys: set[Hashable]) -> None:
        self._waiting = deque(message for message in self._waiting if message.key not in keys)
        self._suspects = deque(message for message in self._suspects if message.key not in keys)
        under_way = {m.key for worker in self._workers for batch in worker.batches for m in batch.messages}
        self._forgotten |= keys & under_way

    def _on_batch(self, worker: Worker, batch: MessageBatch, result: Any) -> None:
        if worker not in self._workers or batch not in worker.batches:
            return  # an earlier event told that it died, or was too late
        if isinstance(result, Exception):
            self._retire(worker, None)
            return
        seconds, answers, texts = result
        for message, text in zip(batch.messages, texts, strict=False):
            if text and self._on_output:
                self._on_output(message.key, text)
        worker.batches.remove(batch)
        worker.since, worker.alone, worker.warm = time.monotonic(), False, True
        for message, answer in zip(batch.messages, answers, strict=False):
            self._finish(message, answer)
        self._requeue(batch.messages[len(answers) :])
        if answers:
            now = seconds / len(answers)
            before = now if math.isinf(self._seconds_per_message) else self._seconds_per_message
            self._seconds_per_message = (before + now) / 2

    def _finish(self, message: Submitted, answer: Packed | Failure) -> None:
        if message.key in self._forgotten:
            self._forgotten.remove(message.key)
        else:
            self._finished.put((message.key, answer))

    def _requeue(self, messages: Iterable[Submitted], *, alone: bool = False) -> None:
        """Messages that are not under way any more go first; not those that were forgotten meanwhile."""
        messages = list(messages)
        gone = {message.key for message in messages} & self._forgotten
        self._forgotten -= gone
        (self._suspects if alone else self._waiting).extendleft(m for m in reversed(messages) if m.key not in gone)

    def _retire(self, worker: Worker, late: str | None) -> None:
        """Replace a worker that died, or whose message is too `late`, and care for its messages.

        A message that was being worked on has used up one of its tries, and is tried again alone. On another machine
        nobody knows which one of a batch that was: then they all are tried alone, and only that counts. Where Ray
        itself has ended nothing is tried.
        """
        if not late and self._watch is not None and (gone := self._watch.look(error_seen=True)):
            self._break(RayEndedError(gone))
            return
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
                    into = printed(worker.files)
                    told = f"; it printed into {into}" if into else ""
                    self._finish(message, Failure("died", f"its Ray actor died {count}{told}"))
                else:
                    self._requeue([message], alone=True)
        self._ray.kill(worker.actor)  # also where only the call failed, such as on a lost object: a fresh start
        worker.progress.close()
        self._start_worker()

    def _seconds_to_look(self) -> float | None:
        """Until a batch will have taken too long; None if there is no such time."""
        times = []
        if self._first_up.is_set() and not any(worker.pid for worker in self._workers):
            times.append(self._workerless_since + SECONDS_WITHOUT_WORKERS + 0.1)
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

    def _next_batch(self) -> list[Submitted]:
        # An equal share of what is left, so that all workers end together; the first batch of all is one message.
        share = math.ceil(len(self._waiting) / (2 * self.num_workers))
        size = max(1, min(share, int(BATCH_SECONDS / max(self._seconds_per_message, 1e-6))))
        messages: list[Submitted] = []
        num_bytes = 0
        while self._waiting and len(messages) < size and num_bytes < BATCH_BYTES:
            messages.append(self._waiting.popleft())
            num_bytes += messages[-1].payload.nbytes()
        return messages

    def _send(self, worker: Worker, messages: list[Submitted]) -> None:
        refs = {shared.ref: None for message in messages for shared in message.shared}
        places = {ref: place for place, ref in enumerate(refs)}
        calls = [(*message.payload, [places[shared.ref] for shared in message.shared]) for message in messages]
        if not worker.batches:
            worker.since = time.monotonic()
        self._num_batches += 1
        batch = MessageBatch(self._num_batches, messages)
        worker.batches.append(batch)
        self._call(worker.actor.run.remote(batch.number, calls, *refs), self._on_batch, worker, batch)
