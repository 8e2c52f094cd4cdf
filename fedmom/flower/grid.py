"""A Flower Grid over resident Ray actors, which any ServerApp accepts.

A node is a number and the Context.state that its messages left behind; both live here, in the driver, so that any
worker serves any node, and a message whose worker died starts again from the state before it. flwr is imported when a
function here runs.
"""

import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedmom.actors.actor import Failure
from fedmom.actors.cluster import PoolOptions
from fedmom.actors.pool import Pool
from fedmom.flower import messages as ray_messages
from fedmom.flower import private
from fedmom.flower.client import serve_client
from fedmom.flower.messages import AppCall, AppReply, Pending, State

# flwr's classes, which may be absent
Context = Any
Message = Any

RUN_ID = 1
# Node ids are this plus the partition: the same in every run, easy to read in logs, and never the server's own id.
FIRST_NODE_ID = 1_000_000


class RayGrid:
    """A flwr.serverapp.Grid for any number of threads; close it, or use it as a context manager.

    Whoever waits first takes replies from the workers and files them, each in its caller's inbox; once it has its own,
    another goes on. One lock guards all state; nobody keeps it while waiting, or in others' code but `on_reply`.

    Messages to one node are handled one after the other. A client that raises, returns no message, takes its worker
    down again and again or is late is an error reply; InputError: no worker can be had, or the ClientApp `client_app`
    ("module:attribute" in `app_dir`) does not load. `on_reply` sees every reply as it comes; `on_output(partition,
    text)`, in another thread, what was printed or logged.
    """

    listener: Any = None  # who hears of the run that a ServerApp makes on this Grid: fedmom.runs.callbacks.Listener

    shares_memory = True  # arrays lie in Ray's store, where all workers read them: nothing to gain from bundles

    def __init__(
        self,
        client_app: str,
        *,
        app_dir: str | Path,
        num_nodes: int,
        run_config: Mapping[str, Any],
        options: PoolOptions,
        on_reply: Callable[[Message], None] | None = None,
        on_output: Callable[[int, str], None] | None = None,
    ) -> None:
        from flwr.serverapp import Grid

        Grid.register(RayGrid)  # rather than a subclass, which would need flwr to import this file
        self.run = private.empty_run(RUN_ID)
        self._num_nodes = num_nodes
        self._on_reply, self._show = on_reply, on_output
        self._pending: dict[str, Pending] = {}  # by message id; what is forgotten is gone at once
        self._queues: dict[int, deque[str]] = {}  # busy nodes: ids of messages that wait for the one under way
        self._states: dict[int, State] = {}  # of nodes that have one
        self._arrived: dict[str, Message] = {}  # replies to what was pushed that nobody has pulled yet
        self._num_streams = 0
        self._changed = threading.Condition(threading.RLock())  # holds all of the above; told when a reply is filed
        self._collecting = False  # whether some thread takes replies from the pool
        self._identity = private.identify(RUN_ID, private.server_node_id(), 0)
        make_worker = partial(serve_client, client_app, Path(app_dir).absolute(), num_nodes, dict(run_config))
        try:
            self._pool = Pool(make_worker, options, wait=False, on_output=self._on_output if on_output else None)
        except BaseException:
            private.identify(*self._identity)
            raise
        self.num_workers = self._pool.num_workers
        self._data = ray_messages.SharedData(self._pool.share)

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; threads that still wait are told. May be called again."""
        self._pool.close()
        private.identify(*self._identity)

    def set_run(self, run: Any) -> None:
        self.run = run

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        from flwr.app import Message

        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """In the order of partitions."""
        return [FIRST_NODE_ID + partition for partition in range(self._num_nodes)]

    def get_nodes(self) -> list[Any]:
        return [private.node_info(node_id) for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message, None) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; does not wait."""
        while self._collect(0.0):
            pass
        with self._changed:
            return [self._arrived.pop(message_id) for message_id in list(message_ids) if message_id in self._arrived]

    def wait(self, timeout: float, message_ids: Collection[str]) -> None:
        """Come back when a reply to one of these can be pulled, at the latest after `timeout` seconds."""
        self._await(lambda: any(message_id in self._arrived for message_id in message_ids) or None, timeout)

    def check(self) -> None:
        """Raises what ended the workers for good, if anything did."""
        self._pool.check()

    def give_up(self) -> None:
        """Every thread that waits for a reply gets an error instead. May be called in a signal's handler."""
        self._pool.give_up(RuntimeError("interrupted"))

    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody will pull the replies to these."""
        with self._changed:
            self._forget(list(message_ids))
            self._free()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """All replies, in order of arrival; those that are not there after `timeout` seconds are missing."""
        return list(self._stream(messages, sys.maxsize, timeout))

    def stream(self, messages: Iterable[Message], *, window: int, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, while `messages` is read only as far as `window` allows.

        The newest message sent is less than `window` messages after the oldest without a reply. After `timeout` seconds
        (from the first reply asked for) what is missing is given up, as it is when the iterator is closed.
        """
        if window < 1:
            raise ValueError(f"window = {window}: at least 1")
        return self._stream(messages, window, timeout)

    def _stream(self, messages: Iterable[Message], window: int, timeout: float | None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        source = enumerate(messages)
        missing: dict[str, int] = {}  # message id -> its place in `messages`, in that order
        inbox: deque[Message] = deque()
        newest = -1
        exhausted = False
        with self._changed:
            self._num_streams += 1

        def send() -> None:
            nonlocal newest, exhausted
            while not exhausted and newest + 1 - next(iter(missing.values()), newest + 1) < window:
                place, message = next(source, (newest, None))
                if message is None:
                    exhausted = True
                    return
                newest = place
                missing[self._push(message, inbox)] = place

        try:
            send()
            while missing:
                left = None if deadline is None else deadline - time.monotonic()
                reply = self._await(lambda: inbox.popleft() if inbox else None, left)
                if reply is None:
                    return
                del missing[reply.metadata.reply_to_message_id]
                send()
                yield reply
        finally:
            with self._changed:
                self._num_streams -= 1
                self._forget(list(missing))
                self._free()

    def _push(self, message: Message, inbox: deque[Message] | None) -> str:
        """Send a message, or let it wait for its node; gives its id."""
        metadata = message.metadata
        if metadata.reply_to_message_id != "" or not metadata.ttl > 0:
            raise ValueError(f"Invalid message: {message}")
        message_id = str(uuid4())
        private.set_message_id(message, message_id)
        node_id = metadata.dst_node_id
        with self._changed:
            values = ray_messages.metadata_values(message)
            if not 0 <= node_id - FIRST_NODE_ID < self._num_nodes:
                reply = ray_messages.error_reply(values, "unknown", f"no node has the id {node_id}")
                self._file(message_id, inbox, reply)
                return message_id
            content, shared, used = self._data.pack(message.content)
            self._pending[message_id] = Pending(values, node_id, content, shared, used, inbox)
            if node_id in self._queues:
                self._queues[node_id].append(message_id)
            else:
                self._queues[node_id] = deque()
                self._submit(message_id)
        return message_id

    def _await(self, found: Callable[[], Any], timeout: float | None) -> Any:
        """What `found`, called under the lock, gives as soon as it gives something; None after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                there = found()
                left = None if deadline is None else deadline - time.monotonic()
                if there is not None or (left is not None and left <= 0):
                    return there
                if self._collecting:
                    self._changed.wait(left)
                    continue
            self._collect(left)

    def _collect(self, timeout: float | None) -> bool:
        """File one reply for whoever asked; False if another thread does, or none comes within `timeout` seconds."""
        with self._changed:
            if self._collecting:
                return False
            self._collecting = True
        taken = None
        try:
            taken = self._pool.take(timeout)
        finally:
            with self._changed:
                self._collecting = False
                if taken is not None:
                    self._answered(str(taken[0]), taken[1])
                self._changed.notify_all()  # one of those that wait must collect now
        return taken is not None

    def _answered(self, message_id: str, answer: Any) -> None:
        pending = self._pending.get(message_id)
        if pending is None:
            return  # forgotten
        if isinstance(answer, Failure):
            reply = ray_messages.error_reply(pending.metadata, answer.kind, answer.reason)
        else:
            reply = self._accept(pending.node_id, answer)
        self._drop(message_id)
        self._free()
        self._file(message_id, pending.inbox, reply)
        if self._on_reply:
            self._on_reply(reply)

    def _on_output(self, message_id: Any, text: str) -> None:
        pending = self._pending.get(message_id)
        if pending and self._show:
            self._show(pending.node_id - FIRST_NODE_ID, text)

    def _file(self, message_id: str, inbox: deque[Message] | None, reply: Message) -> None:
        if inbox is None:
            self._arrived[message_id] = reply
        else:
            inbox.append(reply)

    def _submit(self, message_id: str) -> None:
        pending = self._pending[message_id]
        state = self._states.get(pending.node_id)
        if state is not None:
            state = State(state.head, [pickle.PickleBuffer(buffer) for buffer in state.buffers])
        work = AppCall(pending.metadata, pending.content, pending.node_id - FIRST_NODE_ID, state)
        self._pool.submit(message_id, work, pending.shared)

    def _accept(self, node_id: int, answer: AppReply) -> Message:
        """Keep the node's new state; the reply."""
        if answer.state is not None:
            # Copies: a view would hold the whole batch of replies that it came with in the store.
            self._states[node_id] = State(answer.state.head, [bytes(buffer) for buffer in answer.state.buffers])
        content = None if answer.content is None else ray_messages.unpack(answer.content)
        return ray_messages.with_id(ray_messages.message_of(answer.metadata, content, answer.error))

    def _drop(self, message_id: str) -> None:
        """A message is no longer under way: its node turns to the next one."""
        pending = self._pending.pop(message_id)
        self._data.release(pending.used)
        queue = self._queues[pending.node_id]
        if queue:
            self._submit(queue.popleft())
        else:
            del self._queues[pending.node_id]

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Give up messages. What one of them does to its node's state from now on is lost: it never was."""
        gone = [message_id for message_id in message_ids if message_id in self._pending]
        under_way = []
        for message_id in gone:
            queue = self._queues[self._pending[message_id].node_id]
            if message_id in queue:
                queue.remove(message_id)
                self._data.release(self._pending.pop(message_id).used)
            else:
                under_way.append(message_id)
        self._pool.forget(under_way)
        for message_id in under_way:
            self._drop(message_id)
        for message_id in message_ids:
            self._arrived.pop(message_id, None)

    def _free(self) -> None:
        """Free what is in the store for messages that are through, once there is no more to send."""
        if not self._pending and not self._num_streams:
            self._data.free_unused()
