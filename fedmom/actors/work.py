"""What a pool has to do, and who is at it: messages, batches of them, workers."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from fedmom.actors.actor import Packed, ProgressFile

WARM_UP_SECONDS = 60.0  # the straggler limit of a worker's first message, if longer: data are read, models built


@dataclass(frozen=True)
class Shared:
    """A value in Ray's object store. It is freed when this and all messages that use it are gone."""

    ref: Any


@dataclass(eq=False)
class Submitted:
    """A message to some worker, which is answered under its key."""

    key: Hashable
    payload: Packed
    shared: tuple[Shared, ...]
    deaths: int = 0  # of workers that were at it


@dataclass(eq=False)
class MessageBatch:
    """Messages that are sent to a worker in one call."""

    number: int  # increasing
    messages: list[Submitted]


@dataclass(eq=False)
class Worker:
    """A Ray actor, and what it has to do."""

    actor: Any
    progress: ProgressFile
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
