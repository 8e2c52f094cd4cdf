"""The workers of a pool: where they are started, which are up, and what becomes of nodes that come and go.

Runs in the dispatcher's thread, or says otherwise.
"""

import math
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from fedmom.actors.actor import Failure, Packed, ProgressFile, Started
from fedmom.actors.cluster import PoolOptions, first_line
from fedmom.actors.nodes import Facts, Placement, RayNode, difference, disagreement, look_at, missing_on, on, ray_nodes
from fedmom.actors.watch import Watch
from fedmom.actors.work import Kept, Worker
from fedmom.errors import InputError, RayEndedError
from fedmom.machine.scratch import ScratchFolder
from fedmom.user_code import one_line

MAX_FAILED_STARTS = 3  # in a row: then the pool gives up
SECONDS_WITHOUT_WORKERS = 20.0  # then it is looked whether the cluster still has room for one
SECONDS_TO_OPEN = 60.0  # from the first worker to the first of the last node, which may have others' work to end first
SECONDS_BETWEEN_LOOKS = 5.0  # at the cluster's nodes: an idle worker that died with its machine says nothing


class Workforce:
    """As many workers as were asked for, each on the node that has the most room; those that die are replaced."""

    def __init__(self, options: PoolOptions) -> None:
        self._options = options
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[Hashable, Packed | Failure | Kept] | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        self._opened = threading.Event()  # messages are given to workers
        self._first_up = math.inf  # when the first worker was
        self._workers: list[Worker] = []
        self._calls: set[Any] = set()  # futures of what has not been answered yet
        self._failed_starts: Counter[str] = Counter()  # in a row, by node
        self._num_starts = 0
        self._workerless_since = self._looked_at = time.monotonic()
        self._folder = ScratchFolder()  # of the workers' progress
        self.num_workers = 0  # that there should be
        self._ray: Any = None
        self._make_worker = b""  # cloudpickled
        self._actor_class: Any = None
        self._placement = Placement(options.needs)
        self._known: set[str] = set()  # nodes that have been looked at, whatever came of it
        self._held = b""  # cloudpickled: what tells which of the things that nodes must hold are there
        self._expected: Mapping[str, str] = {}  # these, as they were when the pool began
        self._here = ""  # this process's node
        self._watch: Watch | None = None
        self._joined = False  # whether other nodes may be there, and come and go
        self._show = False  # whether answers bring along what was printed

    def give_up(self, error: Exception) -> None:
        """Whoever takes, or will, gets `error`. In any thread, also in a signal's handler."""
        self._broken = self._broken or error
        self._finished.put(None)

    def _break(self, error: Exception) -> None:
        """No message will be answered any more: `take` raises `error`."""
        self.give_up(error)
        self._opened.set()

    def _call(self, ref: Any, handle: Callable[..., None], *arguments: Any) -> None:
        """When `ref` is there, `handle(*arguments, result or exception)` becomes an event."""

        def done(future: Any) -> None:
            self._calls.discard(future)
            self._events.put((handle, *arguments, future.exception() or future.result()))

        future = ref.future()
        self._calls.add(future)
        future.add_done_callback(done)

    def _start_workers(self) -> None:
        """So many as there should be, as far as there is room."""
        while len(self._workers) < self.num_workers and self._start_worker():
            pass

    def _start_worker(self) -> bool:
        node = self._placement.next()
        if node is None:
            return False
        self._placement.load[node.id] += 1
        self._num_starts += 1
        path = os.path.join(self._folder.path, str(self._num_starts))
        # Of a Ray on one machine nothing is asked: there its own way is as good.
        where = {"scheduling_strategy": on(self._ray, node.id)} if self._joined else {}
        worker = Worker(self._actor_class.options(**where).remote(), ProgressFile(path, create=True), node.id)
        self._workers.append(worker)
        self._call(
            worker.actor.start.remote(sys.path, os.getcwd(), self._make_worker, path, self._show, self._held),
            self._on_start,
            worker,
        )
        return True

    def _remove(self, worker: Worker) -> None:
        """It is gone, or will be."""
        self._workers.remove(worker)
        worker.batches.clear()
        self._placement.load[worker.node] -= 1
        self._ray.kill(worker.actor)  # also where only the call failed: a fresh start
        worker.progress.close()

    def _on_start(self, worker: Worker, result: Started | Exception) -> None:
        if worker not in self._workers:
            return
        trouble = self._trouble(worker, result)
        if not isinstance(result, Exception) and not trouble:
            worker.pid, worker.told, worker.files = result.pid, result.told, result.files
            self._failed_starts[worker.node] = 0
            self._first_up = min(self._first_up, time.monotonic())
            return
        self._remove(worker)
        if self._joined:
            self._look_for_nodes()
            if worker.node not in self._placement.nodes:  # its machine ended, which is no failure of the worker
                self._start_workers()
                return
        self._failed_starts[worker.node] += 1
        if not isinstance(result, Exception) and not self._opened.is_set():
            self._break(InputError(trouble))  # what raised would do so again
            return
        if self._failed_starts[worker.node] >= MAX_FAILED_STARTS:
            said = f"{MAX_FAILED_STARTS} Ray actors in a row did not start{self._place(worker)}: {trouble}"
            self._placement.nodes.pop(worker.node, None)
            if not self._placement.nodes:
                kind = RayEndedError if self._opened.is_set() else InputError  # in mid-run it is no bad input
                self._break(kind(said))
                return
            print(f"fedmom: {said}; the other nodes go on", file=sys.stderr, flush=True)
        self._start_workers()

    def _place(self, worker: Worker) -> str:
        """Where it is, for messages; "" where there is one machine."""
        node = self._placement.nodes.get(worker.node) if self._joined else None
        return f" (on {node.name})" if node else ""

    def _trouble(self, worker: Worker, result: Started | Exception) -> str:
        """Why it did not start, or must not work; "" if it may. Names its node where that is another than this."""
        if isinstance(result, Exception):
            return first_line(result)
        node = self._placement.nodes.get(worker.node)
        name = node.name if node else worker.node
        if result.trouble:
            return result.trouble + (missing_on(name) if self._held and worker.node != self._here else "")
        return difference(name, result.held, self._expected)

    def _look_for_workers(self) -> None:
        """Start those that are missing; give up where a cluster has lost the machines for all of them."""
        now = time.monotonic()
        if self._joined and now - self._looked_at > SECONDS_BETWEEN_LOOKS:
            self._look_for_nodes()
        self._start_workers()
        # Where nodes must agree, no message is given before each has said what it holds.
        up = {worker.node for worker in self._workers if worker.pid}
        all_up = up == {worker.node for worker in self._workers}
        if up and (not self._held or all_up or now - self._first_up > SECONDS_TO_OPEN):
            self._opened.set()
        if self._workers:  # up, or about to be
            self._workerless_since = now
        elif now - self._workerless_since > SECONDS_WITHOUT_WORKERS:
            kind = RayEndedError if self._opened.is_set() else InputError
            self._break(kind("all Ray actors are gone, and no node of the cluster has room for new ones"))

    def _retire(self, worker: Worker, late: str | None) -> None:
        """Replace a worker that died, or whose message is too `late`, and care for its messages."""
        raise NotImplementedError

    def _look_for_nodes(self) -> None:
        """Replace the workers of those that have ended; look at new ones, which get workers once they agree."""
        self._looked_at = time.monotonic()
        if self._watch is not None and not self._watch.head_answers():
            return
        try:
            there = {node.id: node for node in ray_nodes(self._ray)}
        except Exception:  # the head is away, which may pass; whether it does, the watch tells
            return
        gone = self._placement.nodes.keys() - there.keys()
        for node_id in gone:
            del self._placement.nodes[node_id]
        for worker in [worker for worker in self._workers if worker.node in gone]:
            if worker in self._workers:  # retiring one looks for nodes, too
                self._retire(worker, None)
        for node_id in there.keys() - self._known:
            self._known.add(node_id)
            if self._placement.capacity(there[node_id]):
                self._call(look_at(self._ray, there[node_id]), self._on_facts, there[node_id])

    def _on_facts(self, node: RayNode, answer: Facts | Exception) -> None:
        """A node has joined the cluster in mid-run."""
        if why := disagreement(node, answer):
            print(f"fedmom: a node that joined is left alone: {why}", file=sys.stderr, flush=True)
            return
        assert isinstance(answer, Facts)
        self._placement.nodes[node.id] = node._replace(cores=answer.cores)
        if not self._options.num_workers:  # as many as fit
            self.num_workers = max(self.num_workers, self._placement.fit())
        self._start_workers()

    def _nodes_with_time(self) -> set[str]:
        """The nodes of which a worker is up and has room for a further batch."""
        return {w.node for w in self._workers if w.pid and len(w.batches) < 2 and not w.alone}

    def _failed(self, error: Exception) -> None:
        """What Ray itself raised in this thread ends the pool."""
        self._break(RayEndedError(f"Ray failed: {one_line(error)}"))
