"""Flower messages as plain values for Ray's store and back, in the driver and in the workers.

What one message alone carries is pickled with it. Array data that a second message under way carries too is put into
the store once, and every further message only names it. On the other side an array is a view of the store until someone
asks for its bytes: `.numpy()` is one copy.

flwr is imported when a function here runs.
"""

import functools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from uuid import uuid4

import numpy as np

from fedmom.actors.work import Shared
from fedmom.flower.npy import npy_header
from fedmom.flower.private import build_message, error_codes, set_message_id

# flwr.app's classes, which may be absent
Array = Any
Context = Any
Message = Any
RecordDict = Any

# Shorter data stays where it is: a buffer of its own costs some microseconds and 64 bytes.
MIN_BUFFER = 1024


class Content(NamedTuple):
    """The content of a RecordDict. An array's data is bytes, or a place: in `buffers`, or (which shared, where)."""

    records: list[tuple[str, str, Any]]  # name; class; {key: value}, of arrays [(key, dtype, shape, stype, data)]
    buffers: list[Any]  # pickle.PickleBuffer before the store, views after it


class State(NamedTuple):
    """A node's Context.state between two messages: pickled records, and their buffers."""

    head: bytes
    buffers: list[Any]


class AppCall(NamedTuple):
    """What a worker gets for one message."""

    metadata: tuple[Any, ...]
    content: Content
    partition_id: int
    state: State | None


class AppReply(NamedTuple):
    """What a worker gives back."""

    metadata: tuple[Any, ...]
    content: Content | None
    error: tuple[int, str | None] | None
    state: State | None  # None: as before


@dataclass(eq=False)
class Pending:
    """A message of the Grid without a reply."""

    metadata: tuple[Any, ...]
    node_id: int
    content: Content
    shared: tuple[Shared, ...]
    used: list[Any]
    inbox: deque[Message] | None  # of whoever waits for the reply; None: it will be pulled


@dataclass(eq=False)
class _Known:
    data: Any  # held, so that no other object gets its id
    users: int = 0  # messages under way
    shared: Shared | None = None
    place: int = 0  # in the shared value


class SharedData:
    """Which array data is in Ray's store. `share` puts a list of buffers there; `num_puts` counts how often."""

    def __init__(self, share: Callable[[Any], Shared]) -> None:
        self._share = share
        self._known: dict[int, _Known] = {}  # by id of the data
        self.num_puts = 0

    def pack(self, content: RecordDict) -> tuple[Content, tuple[Shared, ...], list[_Known]]:
        """(content, the shared values it names, what to `release` when the message is no longer under way)."""
        used: list[_Known] = []
        again: list[_Known] = []
        for data in _large_data(content):
            known = self._known.get(id(data))
            if known is None:
                known = self._known[id(data)] = _Known(data)
            elif known.shared is None and known not in again:
                again.append(known)
            known.users += 1
            used.append(known)
        if again:
            shared = self._share([pickle.PickleBuffer(known.data) for known in again])
            self.num_puts += 1
            for place, known in enumerate(again):
                known.shared, known.place = shared, place
            self.free_unused()  # most likely those of the round before
        shares = {known.shared: None for known in used if known.shared}
        numbers = {shared: number for number, shared in enumerate(shares)}
        places = {id(known.data): (numbers[known.shared], known.place) for known in used if known.shared}
        return pack(content, places), tuple(shares), used

    def release(self, used: Iterable[_Known]) -> None:
        for known in used:
            known.users -= 1
            if not known.users and known.shared is None:
                self._known.pop(id(known.data), None)

    def free_unused(self) -> None:
        """Forget the data that no message under way carries; the store then frees it."""
        self._known = {key: known for key, known in self._known.items() if known.users}

    def __len__(self) -> int:
        return len(self._known)


def _raw(array: Array) -> Any:
    """The array's data: its view where it is one, else its bytes."""
    view = array.__dict__.get("_view")
    return array.data if view is None else view


def _large_data(content: RecordDict) -> list[Any]:
    from flwr.app import ArrayRecord

    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return [data for record in records for array in record.values() if len(data := _raw(array)) >= MIN_BUFFER]


def pack(content: RecordDict, places: Mapping[int, tuple[int, int]] | None = None) -> Content:
    """A RecordDict as plain values. `places` says by id which data is in the store, and where."""
    from flwr.app import ArrayRecord, ConfigRecord

    records: list[tuple[str, str, Any]] = []
    buffers: list[Any] = []
    places = places or {}
    for name, record in content.items():
        if not isinstance(record, ArrayRecord):
            records.append((name, "config" if isinstance(record, ConfigRecord) else "metric", dict(record)))
            continue
        arrays = []
        for key, array in record.items():
            data = _raw(array)
            if id(data) in places:
                data = places[id(data)]
            elif len(data) >= MIN_BUFFER:
                buffers.append(pickle.PickleBuffer(data))
                data = len(buffers) - 1
            arrays.append((key, array.dtype, array.shape, array.stype, data))
        records.append((name, "array", arrays))
    return Content(records, buffers)


def unpack(content: Content, shared: Sequence[Sequence[Any]] = ()) -> RecordDict:
    """A RecordDict of its own for each caller; its large arrays are views of the store."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    stored_array = stored_array_class()
    records = RecordDict()
    for name, kind, values in content.records:
        if kind != "array":
            records[name] = (ConfigRecord if kind == "config" else MetricRecord)(values)
            continue
        record = records[name] = ArrayRecord()
        for key, dtype, shape, stype, data in values:
            if isinstance(data, bytes):
                record[key] = Array(dtype, shape, stype, data)
            else:
                view = content.buffers[data] if isinstance(data, int) else shared[data[0]][data[1]]
                record[key] = stored_array(dtype, shape, stype, memoryview(view))
    return records


@functools.cache
def stored_array_class() -> Any:
    """A flwr.app.Array whose data is a read-only view of Ray's store until somebody reads or sets `data`."""
    from flwr.app import Array

    class StoredArray(Array):
        def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, view: memoryview) -> None:
            self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _view=view, _bytes=None)

        @property
        def view(self) -> memoryview | None:
            """The bytes without a copy, for whoever knows of it; None once they have been replaced."""
            return cast("memoryview | None", self.__dict__["_view"])

        @property
        def data(self) -> bytes:
            if self.__dict__["_bytes"] is None:
                self.__dict__["_bytes"] = bytes(self.__dict__["_view"])
            return cast(bytes, self.__dict__["_bytes"])

        @data.setter
        def data(self, value: bytes) -> None:
            self.__dict__.update(_view=None, _bytes=value)

        def numpy(self) -> Any:
            view = self.__dict__["_view"]
            header = None if view is None or self.stype != "numpy.ndarray" else npy_header(view)
            if header is None:
                return super().numpy()
            flat = np.frombuffer(view, header.dtype, int(np.prod(header.shape)), header.num_bytes).copy()
            return flat.reshape(header.shape, order="F" if header.fortran else "C")

        def __eq__(self, other: object) -> bool:
            fields = ("dtype", "shape", "stype", "data")
            if not all(hasattr(other, name) for name in fields):
                return NotImplemented
            return all(getattr(self, name) == getattr(other, name) for name in fields)

        __hash__ = None  # type: ignore[assignment]

        def __reduce__(self) -> Any:  # pickled or copied it is a plain Array, with bytes of its own
            return Array, (self.dtype, self.shape, self.stype, self.data)

    StoredArray.__qualname__ = Array.__qualname__  # part of what Flower hashes for object_id
    return StoredArray


def metadata_values(message: Message) -> tuple[Any, ...]:
    """What flwr.app.Metadata is made of, in the order of its arguments."""
    m = message.metadata
    return (
        *(m.run_id, m.message_id, m.src_node_id, m.dst_node_id, m.reply_to_message_id, m.group_id),
        *(m.created_at, m.ttl, m.message_type, m.src_task_id, m.dst_task_id),
    )


def message_of(
    metadata: tuple[Any, ...], content: RecordDict | None = None, error: tuple[int, str | None] | None = None
) -> Message:
    from flwr.app import Error, Metadata

    return cast(Message, build_message(Metadata(*metadata), content, None if error is None else Error(*error)))


def _error_code(kind: str) -> int:
    """Flower's number for the kind of a Failure, or for an "unknown" node."""
    codes = error_codes()
    known: dict[str, int] = {
        "raised": codes.CLIENT_APP_RAISED_EXCEPTION,
        "died": codes.CLIENT_APP_CRASHED,
        "unknown": codes.NODE_UNAVAILABLE,
    }
    return known.get(kind, codes.REPLY_MESSAGE_UNAVAILABLE)


def error_reply(metadata: tuple[Any, ...], kind: str, reason: str) -> Message:
    """The reply to a message that got none; `kind` as of a Failure, or "unknown" for its node."""
    from flwr.app import Error, Message, RecordDict

    return with_id(Message(Error(_error_code(kind), reason), reply_to=message_of(metadata, RecordDict())))


def with_id(reply: Message) -> Message:
    """The reply, with an id of its own, as Flower's own engine gives it."""
    set_message_id(reply, str(uuid4()))
    return reply
