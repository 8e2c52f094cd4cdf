"""The thread that owns a pool's state: which worker has which messages, what died, what is late, what goes where.

It reads one queue of events (a message, a batch that is done, a worker that is up, stop); nothing polls. Each worker
has up to two batches under way, so that it never waits for the next one. A batch ends after some 30 ms or some MB of
answers, whatever it was sent, and what it did not begin goes elsewhere: one Ray call costs 0.5 to 1 ms, too dear for
one small message, and a long batch would leave the other workers idle at the end. What turns out to wait behind a long
message is taken back.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from fedmom.actors.actor import BATCH_BYTES, BATCH_SECONDS, Failure, Packed
from fedmom.actors.cluster import PoolOptions
from fedmom.actors.work import Kept, MessageBatch, Submitted, Waiting, Worker
from fedmom.actors.worker_output import printed
from fedmom.actors.workforce import SECONDS_BETWEEN_LOOKS, SECONDS_WITHOUT_WORKERS, Workforce
from fedmom.errors import RayEndedError

LONG_SECONDS = 0.15  # a batch that takes longer is at a long message: those behind it go elsewhere


class Dispatcher(Workforce):
    """All but `__init__` runs in its thread, or says otherwise."""

    def __init__(self, options: PoolOptions, on_output: Callable[[Hashable, str], None] | None = None) -> None:
        super().__init__(options)
        self._on_output, self._show = on_output, on_output is not None
        self._waiting = Waiting()
        self._suspects: deque[Submitted] = deque()  # were under way when a worker died: tried again one by one
        self._forgotten: set[Hashable] = set()
        self._num_batches = 0
        self._seconds_per_message = math.inf  # a running mean
        self._thread = threading.Thread(target=self._dispatch, name="fedmom-pool", daemon=True)

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
                self._failed(error)

    def _on_submit(self, message: Submitted) -> None:
        self._forgotten.discard(message.key)
        self._waiting.append(message)

    def _on_forget(self, keys: set[Hashable]) -> None:
        self._waiting.drop(keys)
        self._suspects = deque(message for message in self._suspects if message.key not in keys)
        under_way = {m.key for worker in self._workers for batch in worker.batches for m in batch.messages}
        self._forgotten |= keys & under_way

    def _on_batch(self, worker: Worker, batch: MessageBatch, result: Any) -> None:
        if worker not in self._workers or batch not in worker.batches:
            return  # an earlier event told that it died, or was too late
        if isinstance(result, Exception):
            if isinstance(result, self._ray.exceptions.ObjectLostError) and all(m.uses_kept for m in batch.messages):
                result = 0.0, [Failure("lost", "what other clients left on a node is gone with it")], []
            else:
                self._retire(worker, None)
                return
        seconds, answers, texts = result
        for message, text in zip(batch.messages, texts, strict=False):
            if text and self._on_output:
                self._on_output(message.key, text)
        worker.batches.remove(batch)
        worker.since, worker.alone, worker.warm = time.monotonic(), False, True
        for place, (message, answer) in enumerate(zip(batch.messages, answers, strict=False)):
            self._finish(message, batch.answer(place, answer, worker.node))
        self._requeue(batch.messages[len(answers) :])
        if answers:
            now = seconds / len(answers)
            before = now if math.isinf(self._seconds_per_message) else self._seconds_per_message
            self._seconds_per_message = (before + now) / 2

    def _finish(self, message: Submitted, answer: Packed | Failure | Kept) -> None:
        if message.key in self._forgotten:
            self._forgotten.remove(message.key)
        else:
            self._finished.put((message.key, answer))

    def _requeue(self, messages: Iterable[Submitted], *, alone: bool = False) -> None:
        """Messages that are not under way any more go first; not those that were forgotten meanwhile."""
        messages = list(messages)
        gone = {message.key for message in messages} & self._forgotten
        self._forgotten -= gone
        messages = [message for message in messages if message.key not in gone]
        if alone:
            self._suspects.extendleft(reversed(messages))
        else:
            self._waiting.put_back(messages)

    def _retire(self, worker: Worker, late: str | None) -> None:
        """See Workforce.

        A message that was being worked on has used up one of its tries, and is tried again alone. On another machine
        nobody knows which one of a batch that was: then they all are tried alone, and only that counts. Where Ray
        itself has ended nothing is tried.
        """
        if not late and self._watch is not None and (gone := self._watch.look(error_seen=True)):
            self._break(RayEndedError(gone))
            return
        place = self._place(worker)
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
                    self._finish(message, Failure("died", f"its Ray actor{place} died {count}{told}"))
                else:
                    self._requeue([message], alone=True)
        self._remove(worker)
        if self._joined:
            self._look_for_nodes()
        self._start_workers()

    def _seconds_to_look(self) -> float | None:
        """Until a batch will have taken too long; None if there is no such time."""
        if self._broken:
            return None
        times = []
        if not self._workers:
            times.append(self._workerless_since + SECONDS_WITHOUT_WORKERS + 0.1)
        if self._joined:
            times.append(self._looked_at + SECONDS_BETWEEN_LOOKS + 0.1)
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
            if worker not in self._workers or not worker.batches or now - worker.since < LONG_SECONDS:
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
        if not self._opened.is_set():
            return
        for slots in (1, 2):
            for worker in self._workers:
                if worker.pid == 0 or worker.alone or len(worker.batches) >= slots:
                    continue
                if self._suspects:  # nobody gets a second batch, so that workers become free for suspects
                    if not worker.batches:
                        self._send(worker, [self._suspects.popleft()])
                        worker.alone = True
                elif batch := self._next_batch(worker):
                    self._send(worker, batch)

    def _next_batch(self, worker: Worker) -> list[Submitted]:
        """What it gets next. What should go to another node comes to one that is idle, if nobody there has time."""
        homes = self._waiting.homes()
        busy = homes - self._nodes_with_time() if homes and not worker.batches else None
        waiting = self._waiting.of(worker.node, busy)
        if not waiting:
            return []
        near = waiting[0].near
        if near and near != worker.node:  # the last one, so that what stays there are neighbours
            return [waiting.pop()]
        there = sum(other.node == near for other in self._workers) if near else self.num_workers
        # An equal share of what is left, so that all workers end together; the first batch of all is one message.
        share = math.ceil(len(waiting) / (2 * there))
        size = max(1, min(share, int(BATCH_SECONDS / max(self._seconds_per_message, 1e-6))))
        messages: list[Submitted] = []
        num_bytes = 0
        while waiting and len(messages) < size and num_bytes < BATCH_BYTES and waiting[0].goes_with(messages):
            messages.append(waiting.popleft())
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
        if messages[0].keep:
            run = worker.actor.run_keeping.options(num_returns=2)
            answers, batch.kept = run.remote(batch.number, calls, *refs)
        else:
            answers = worker.actor.run.remote(batch.number, calls, *refs)
        self._call(answers, self._on_batch, worker, batch)
