"""Resident, supervised Ray actors that answer messages: a dead one is replaced, and its messages are tried again."""

import queue
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

from fedmom.actors.actor import Actor, Failure, Packed
from fedmom.actors.cluster import PoolOptions, join_ray
from fedmom.actors.dispatcher import Dispatcher
from fedmom.actors.nodes import neighbours
from fedmom.actors.watch import Watch, leave_ray
from fedmom.actors.work import Kept, Shared, Submitted
from fedmom.errors import RayEndedError
from fedmom.user_code import one_line

_SECONDS_TO_END = 5.0  # for what killed workers leave unanswered, which Ray tells within moments


class Pool(Dispatcher):
    """Workers that answer messages. `make_worker` runs once in each and gives `handler(payload, *shared) -> answer`.

    Payloads and answers are pickled, `make_worker` cloudpickled. Every message that was submitted and not forgotten is
    taken exactly once, as an answer or as a `Failure`. Any thread may submit and take. InputError when no worker can be
    had, or a node does not hold what it must: from here, or from `take` under `wait = False`, which returns before a
    worker is up where nodes need not agree. RayEndedError from `take` when there were workers and there will be none
    any more. `on_output(key, text)` hears, in another thread, what a message's handler printed.
    """

    def __init__(
        self,
        make_worker: Callable[[], Callable[..., Any]],
        options: PoolOptions,
        *,
        wait: bool = True,
        on_output: Callable[[Hashable, str], None] | None = None,
    ) -> None:
        super().__init__(options, on_output)
        self._closed = False
        try:
            joined = join_ray(options)
        except BaseException:
            self._folder.close()
            raise
        self._ray, self._started_ray, self._placement = joined.ray, joined.started, joined.placement
        self._joined, self._options, self.num_workers = joined.is_cluster, joined.options, joined.num_workers
        self.options = self._options
        self._known = set(self._placement.nodes)
        self._here = self._ray.get_runtime_context().get_node_id()
        options = self._options
        self._watch = Watch(self._ray, lambda what: self._break(RayEndedError(what)))
        try:
            self._make_worker = self._ray.cloudpickle.dumps(make_worker)
            self._actor_class = self._ray.remote(
                num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_restarts=0, max_task_retries=0
            )(Actor)
            if self._joined and options.agreement:
                self._held = self._ray.cloudpickle.dumps(options.agreement.held)
            self._start_workers()
            if self._held and options.agreement:
                self._expected = options.agreement.expected()  # while they start
            self._thread.start()
            if wait or self._held:
                self._opened.wait()
                self.check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self, value: Any) -> Shared:
        """Put a value into Ray's object store; workers see its arrays and buffers there, read-only, without a copy."""
        self.check()  # Ray ends the process that calls it when it is gone itself
        return Shared(self._ray.put(value))

    def submit(
        self, key: Hashable, payload: Any, shared: tuple[Shared, ...] = (), *, near: str = "", keep: bool = False
    ) -> None:
        """Does not wait. Arrays and buffers in `payload` must not change until the answer is there.

        near: the node (of `homes`) whose workers should answer, if they have time. keep: the handler gives a `Split`,
        and `take` a `Kept`.
        """
        self._events.put((self._on_submit, Submitted(key, Packed.of(payload), shared, near, keep)))

    def submit_near(self, key: Hashable, payload: Any, parts: Sequence[Kept]) -> None:
        """A message about what is kept on one node, whose workers see it without a copy.

        Its answer is a Failure "lost" where something of it is gone.
        """
        shared = tuple({part.shared: None for part in parts})
        self._events.put((self._on_submit, Submitted(key, Packed.of(payload), shared, parts[0].node, False, True)))

    def homes(self, count: int) -> list[str]:
        """Nodes for `count` messages, neighbours side by side and by the nodes' workers; [] where all are on this one.

        May be asked for in any thread.
        """
        workers = Counter(worker.node for worker in list(self._workers))
        nodes = [node for node in list(self._placement.nodes) if workers[node]]
        if len(nodes) < 2 and nodes[:1] in ([], [self._here]):
            return []
        return neighbours({node: workers[node] for node in nodes}, count)

    def is_here(self, kept: Kept) -> bool:
        """Whether it lies on this process's own node."""
        return kept.node == self._here

    def fetch(self, kept: Kept) -> Any:
        """The large part, brought to this process's node: its arrays are views of the store. LookupError if lost."""
        self.check()
        try:
            return self._ray.get(kept.shared.ref)[kept.place].value()
        except self._ray.exceptions.ObjectLostError as error:
            raise LookupError(one_line(error)) from error

    def take(self, timeout: float | None = None) -> tuple[Hashable, Any] | None:
        """(key, answer or Failure) of the next finished message, in order of arrival; None after `timeout` seconds."""
        self.check()
        try:
            finished = self._finished.get(timeout=None if timeout is None else max(timeout, 0.0))
        except queue.Empty:
            return None
        if finished is None:
            self._finished.put(None)  # for whoever else waits
            raise self._broken or RuntimeError("the pool is closed")
        key, answer = finished
        if isinstance(answer, Failure):
            return key, answer
        try:
            if isinstance(answer, Kept):
                return key, replace(answer, value=answer.value.value())
            return key, answer.value()
        except Exception as error:  # of a class that the driver cannot import
            return key, Failure("raised", f"the answer cannot be unpickled: {one_line(error)}")

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Nobody will take these: those not under way are dropped, the answers of the others are thrown away."""
        self._events.put((self._on_forget, set(keys)))

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in list(self._workers) if worker.pid]

    def check(self) -> None:
        """Raises what broke the pool, if anything did."""
        if self._broken:
            raise self._broken

    def close(self) -> None:
        """End the workers, and Ray if this pool started it."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        self._events.put((None,))
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        gone = isinstance(self._broken, RayEndedError)
        if self._ray.is_initialized() and not gone:
            for worker in self._workers:
                self._ray.kill(worker.actor)
            # Ray may abort the whole process where an answer arrives while it shuts down.
            wait(set(self._calls), timeout=_SECONDS_TO_END)
        if self._started_ray:
            leave_ray(self._ray, gone=gone)
        for worker in self._workers:
            worker.progress.close()
        self._workers.clear()
        self._folder.close()
        self._finished.put(None)
