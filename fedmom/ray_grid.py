"""Flower apps on resident Ray actors: a Grid that any ServerApp accepts, and `simulate_app`, which runs a whole app.

A node is a number and the Context.state that its messages left behind; both live here, in the driver, so that any worker
serves any node, and a message whose worker died starts again from the state before it. flwr is imported when a function
here runs.
"""

import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from fedmom import ray_messages
from fedmom.errors import InputError, unknown
from fedmom.executors import Failure, Pool, PoolOptions, Shared
from fedmom.ray_messages import Answer, Content, State, Work

# flwr's classes, which may be absent
Context = Any
Message = Any

RUN_ID = 1
# Node ids are this plus the partition: the same in every run, easy to read in logs, and never the server's own id.
FIRST_NODE_ID = 1_000_000


@dataclass(eq=False)
class _Pending:
    """A message without a reply."""

    metadata: tuple[Any, ...]
    node_id: int
    content: Content
    shared: tuple[Shared, ...]
    used: list[Any]


class RayGrid:
    """A flwr.serverapp.Grid. For one thread; close it, or use it as a context manager.

    Messages to one node are handled one after the other. A client that raises, returns no message, takes its worker
    down again and again or is late is an error reply; InputError comes out of here only when no worker can be had or the
    ClientApp `client_app` ("module:attribute" in `app_dir`) does not load. `on_reply` sees every reply as it arrives.
    """

    def __init__(
        self,
        client_app: str,
        *,
        app_dir: str | Path,
        num_nodes: int,
        run_config: Mapping[str, Any],
        options: PoolOptions,
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.serverapp import Grid
        from flwr.supercore.run import Run

        Grid.register(RayGrid)  # rather than a subclass, which would need flwr to import this file
        self.run = Run.create_empty(RUN_ID)
        self._num_nodes = num_nodes
        self._on_reply = on_reply
        self._pending: dict[str, _Pending] = {}  # by message id; what is forgotten is gone at once
        self._queues: dict[int, deque[str]] = {}  # busy nodes: ids of messages that wait for the one under way
        self._states: dict[int, State] = {}  # of nodes that have one
        self._arrived: dict[str, Message] = {}  # replies that nobody has asked for yet
        self._num_streams = 0
        self._identity = ray_messages.identify(RUN_ID, SUPERLINK_NODE_ID, 0)
        make_worker = partial(
            ray_messages.serve_client, client_app, Path(app_dir).absolute(), num_nodes, dict(run_config)
        )
        try:
            self._pool = Pool(make_worker, options, wait=False)
        except BaseException:
            ray_messages.identify(*self._identity)
            raise
        self.num_workers = self._pool.num_workers
        self._data = ray_messages.SharedData(self._pool.share)

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. May be called again."""
        self._pool.close()
        ray_messages.identify(*self._identity)

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
        from flwr.proto.node_pb2 import NodeInfo

        return [NodeInfo(node_id=node_id) for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; does not wait."""
        while self._collect(0.0):
            pass
        return [self._arrived.pop(message_id) for message_id in list(message_ids) if message_id in self._arrived]

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
        newest = -1
        exhausted = False
        self._num_streams += 1

        def send() -> None:
            nonlocal newest, exhausted
            while not exhausted and newest + 1 - next(iter(missing.values()), newest + 1) < window:
                place, message = next(source, (newest, None))
                if message is None:
                    exhausted = True
                    return
                newest = place
                missing[self._push(message)] = place

        try:
            send()
            while missing:
                message_id = next((arrived for arrived in self._arrived if arrived in missing), None)
                if message_id is not None:
                    del missing[message_id]
                    reply = self._arrived.pop(message_id)
                    send()
                    yield reply
                elif not self._collect(None if deadline is None else deadline - time.monotonic()):
                    return
        finally:
            self._num_streams -= 1
            self._forget(missing)
            self._free()

    def _push(self, message: Message) -> str:
        """Send a message, or let it wait for its node; gives its id."""
        metadata = message.metadata
        if metadata.reply_to_message_id != "" or not metadata.ttl > 0:
            raise ValueError(f"Invalid message: {message}")
        message_id = str(uuid4())
        metadata.__dict__["_message_id"] = message_id  # as Flower's own Grids do it
        node_id = metadata.dst_node_id
        if not 0 <= node_id - FIRST_NODE_ID < self._num_nodes:
            from flwr.common.constant import ErrorCode

            reason = f"no node has the id {node_id}"
            values = ray_messages.metadata_values(message)
            self._arrived[message_id] = _error_reply(values, ErrorCode.NODE_UNAVAILABLE, reason)
            return message_id
        content, shared, used = self._data.pack(message.content)
        values = ray_messages.metadata_values(message)
        self._pending[message_id] = _Pending(values, node_id, content, shared, used)
        if node_id in self._queues:
            self._queues[node_id].append(message_id)
        else:
            self._queues[node_id] = deque()
            self._submit(message_id)
        return message_id

    def _submit(self, message_id: str) -> None:
        pending = self._pending[message_id]
        state = self._states.get(pending.node_id)
        work = Work(pending.metadata, pending.content, pending.node_id - FIRST_NODE_ID, state and state.for_pickle())
        self._pool.submit(message_id, work, pending.shared)

    def _collect(self, timeout: float | None) -> bool:
        """File one reply under its message's id; False if none comes within `timeout` seconds."""
        taken = self._pool.take(timeout)
        if taken is None:
            return False
        message_id, answer = taken
        pending = self._pending.get(str(message_id))
        if pending is None:
            return True  # forgotten
        self._drop(str(message_id))
        if isinstance(answer, Failure):
            reply = _error_reply(pending.metadata, _error_code(answer.kind), answer.reason)
        else:
            reply = self._accept(pending.node_id, answer)
        self._arrived[str(message_id)] = reply
        if self._on_reply:
            self._on_reply(reply)
        return True
