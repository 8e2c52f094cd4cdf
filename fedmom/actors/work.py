"""What a pool has to do, and who is at it: messages, batches of them, workers."""

from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fedmom.actors.actor import Failure, Packed, ProgressFile

WARM_UP_SECONDS = 60.0  # the straggler limit of a worker's first message, if longer: data are read, models built


@dataclass(frozen=True)
class Shared:
    """A value in Ray's object store. It is freed when this and all messages that use it are gone."""

    ref: Any


@dataclass(frozen=True)
class Kept:
    """An answer whose large part stays in the store of the node that made it, until nobody refers to it."""

    value: Any  # the small part
    shared: Shared  # a list of Packed, of which `place` is the large part
    place: int
    node: str  # Ray's id


@dataclass(eq=False)
class Submitted:
    """A message to some worker, which is answered under its key."""

    key: Hashable
    payload: Packed
    shared: tuple[Shared, ...]
    near: str = ""  # the node whose workers should answer it; "" for any
    keep: bool = False  # whether a large part of the answer stays where it is made
    uses_kept: bool = False  # whether `shared` is what stayed so
    deaths: int = 0  # of workers that were at it

    def goes_with(self, others: list["Submitted"]) -> bool:
        """Whether one call may ask for it and for the others."""
        return not others or (
            (self.keep, self.uses_kept) == (others[0].keep, others[0].uses_kept) == (self.keep, False)
        )


class Waiting:
    """Messages that no worker has, in order, by the node that they should go to."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Submitted]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def append(self, message: Submitted) -> None:
        self._queues.setdefault(message.near, deque()).append(message)

    def put_back(self, messages: Iterable[Submitted]) -> None:
        """Before all others, in their order."""
        for message in reversed(list(messages)):
            self._queues.setdefault(message.near, deque()).appendleft(message)

    def drop(self, keys: Collection[Hashable]) -> None:
        for near, queue in self._queues.items():
            self._queues[near] = deque(message for message in queue if message.key not in keys)

    def of(self, node: str, busy: Collection[str] | None) -> deque[Submitted] | None:
        """The queue that a worker of a node takes from; None if all that wait should go to other nodes.

        busy: nodes whose workers have no time for theirs, for a worker that has none of its own; None: it has.
        """
        for near in (node, ""):
            if self._queues.get(near):
                return self._queues[near]
        others = [near for near in busy or () if self._queues.get(near)]
        return self._queues[max(others, key=lambda near: len(self._queues[near]))] if others else None

    def homes(self) -> set[str]:
        """The nodes for which something waits."""
        return {near for near, queue in self._queues.items() if queue and near}


@dataclass(eq=False)
class MessageBatch:
    """Messages that are sent to a worker in one call."""

    number: int  # increasing
    messages: list[Submitted]
    kept: Any = None  # the reference of what stays at the worker's node

    def answer(self, place: int, answer: Packed | Failure, node: str) -> "Packed | Failure | Kept":
        """Of its message of that place, which a worker of that node gave."""
        stays = self.kept is not None and not isinstance(answer, Failure)
        return Kept(answer, Shared(self.kept), place, node) if stays else answer


@dataclass(eq=False)
class Worker:
    """A Ray actor, and what it has to do."""

    actor: Any
    progress: ProgressFile
    node: str  # Ray's id
    pid: int = 0  # 0 until it is up
    told: bool = False  # does it write its progress?
    files: list[str] = field(default_factory=list)  # into which it prints
    batches: deque[MessageBatch] = field(default_factory=deque)  # under way; the first is being worked on
    since: float = 0.0  # when the first batch became the first
    alone: bool = False  # the batch under way must stay the only one
    warm: bool = False  # has it answered?

    def limit(self, seconds: float) -> float:
        """The straggler limit of what it is working on."""
        return seconds if self.warm else max(seconds, WARM_UP_SECONDS)
