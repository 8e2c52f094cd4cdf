"""Flower apps on resident Ray actors: a Grid that any ServerApp accepts, and `simulate_app`, which runs a whole app.

A node is a number and the Context.state that its messages left behind; both live here, in the driver, so that any
worker serves any node, and a message whose worker died starts again from the state before it. flwr is imported when a
function here runs.
"""

import pickle
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
    down again and again or is late is an error reply; InputError comes out of here only when no worker can be had or
    the ClientApp `client_app` ("module:attribute" in `app_dir`) does not load. `on_reply` sees every reply as it comes.
    """

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

    def wait(self, timeout: float) -> None:
        """Come back as soon as there is a reply to pull, at the latest after `timeout` seconds."""
        if not self._arrived:
            self._collect(timeout)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody will pull the replies to these."""
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
        if state is not None:
            state = State(state.head, [pickle.PickleBuffer(buffer) for buffer in state.buffers])
        work = Work(pending.metadata, pending.content, pending.node_id - FIRST_NODE_ID, state)
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
        if isinstance(answer, Failure):
            reply = _error_reply(pending.metadata, _error_code(answer.kind), answer.reason)
        else:
            reply = self._accept(pending.node_id, answer)
        self._drop(str(message_id))
        self._free()
        self._arrived[str(message_id)] = reply
        if self._on_reply:
            self._on_reply(reply)
        return True

    def _accept(self, node_id: int, answer: Answer) -> Message:
        """Keep the node's new state; the reply."""
        if answer.state is not None:
            # Copies: a view would hold the whole batch of replies that it came with in the store.
            self._states[node_id] = State(answer.state.head, [bytes(buffer) for buffer in answer.state.buffers])
        content = None if answer.content is None else ray_messages.unpack(answer.content)
        return _with_id(ray_messages.message_of(answer.metadata, content, answer.error))

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


def _error_code(kind: str) -> int:
    from flwr.common.constant import ErrorCode

    codes = {"raised": ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "died": ErrorCode.CLIENT_APP_CRASHED}
    return codes.get(kind, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


def _error_reply(metadata: tuple[Any, ...], code: int, reason: str) -> Message:
    from flwr.app import Error, Message, RecordDict

    return _with_id(Message(Error(code, reason), reply_to=ray_messages.message_of(metadata, RecordDict())))


def _with_id(reply: Message) -> Message:
    reply.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's own engine does it
    return reply


class Components(NamedTuple):
    """What [tool.flwr.app] of a pyproject.toml says."""

    server_app: str  # "module:attribute"
    client_app: str
    config: dict[str, Any]  # [tool.flwr.app.config], flattened: {"run.seed": 0}


def load_components(app_dir: str | Path) -> Components:
    """The components and the default run config of the Flower app in `app_dir`; InputError where one is missing."""
    path = Path(app_dir) / "pyproject.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; a Flower app has a pyproject.toml") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    for key in ("tool", "flwr", "app"):
        table = _table(table, key)
    components = _table(table, "components")
    for key in ("serverapp", "clientapp"):
        if not isinstance(components.get(key), str):
            raise InputError(f'{path}: [tool.flwr.app.components] has no {key} = "module:attribute"')
    return Components(
        components["serverapp"], components["clientapp"], dict(_flattened(_table(table, "config"), "", path))
    )


def _table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What is there, if it is a table."""
    found = table.get(key, {})
    return found if isinstance(found, dict) else {}


def _flattened(table: Mapping[str, Any], prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.", path)
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            kind = type(value).__name__
            raise InputError(f"{path}: {prefix}{key} is a {kind}; a run config has strings, numbers and booleans")


def simulate_app(
    app_dir: str | Path,
    *,
    num_nodes: int,
    run_config: Mapping[str, Any],
    options: PoolOptions,
    grid_ready: Callable[[RayGrid], None] | None = None,
    on_reply: Callable[[Message], None] | None = None,
) -> Context:
    """Run the Flower app in `app_dir` with `num_nodes` clients, in this thread; gives the server's Context.

    `run_config` overrides keys of [tool.flwr.app.config], flattened with dots. `grid_ready` sees the Grid before the
    ServerApp starts, `on_reply` every reply as it arrives. What the ServerApp raises comes out as it is; the workers
    end in any case.
    """
    from flwr.app import Context, RecordDict
    from flwr.common.constant import SUPERLINK_NODE_ID

    components = load_components(app_dir)
    for key, value in run_config.items():
        if key not in components.config:
            raise unknown("run config", key, components.config)
        if not isinstance(value, bool | int | float | str):
            raise InputError(f"run config {key} = {value!r}: a string, a number or a boolean")
    config = {**components.config, **run_config}
    grid = RayGrid(
        components.client_app,
        app_dir=app_dir,
        num_nodes=num_nodes,
        run_config=config,
        options=options,
        on_reply=on_reply,
    )
    with grid, _restored_path():
        server_app = ray_messages.load_component("ServerApp", components.server_app, Path(app_dir).absolute())
        if grid_ready:
            grid_ready(grid)
        context = Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), config)
        server_app(grid, context)
    return context


@contextmanager
def _restored_path() -> Iterator[None]:
    """Flower's loader puts the app's folder on sys.path."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
