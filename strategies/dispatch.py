"""Messages out, replies back in the order of the messages, with a bounded number of both in memory, on any Grid."""

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmom.flower.private import log, push_error

OVERDUE = "no reply in time"  # a failure's reason
_PUSHES = 3  # of the same messages, before it is an error
_SHORTEST_WAIT, _LONGEST_WAIT = 0.005, 0.5  # seconds between two looks at a Grid that cannot call back


@dataclass
class Exchange:
    """One message and what came of it: an answer, or the reason why there is none."""

    message: Message
    tries: int = 0
    ids: list[str] = field(default_factory=list)  # of the tries that nothing has come of, the newest last
    deadline: float = float("inf")
    answer: Any = None
    failure: str = ""
    code: int = 0  # Flower's, of an error reply

    @property
    def done(self) -> bool:
        return self.answer is not None or bool(self.failure)


# (message, its reply) -> what the caller makes of it; raises ValueError with the reason to refuse it. What a reply must
# be is known by the message that it answers: a node may come back under another id.
Accept = Callable[[Message, Message], Any]
# Asked after each failed try: the message to send instead (a new one: ids are not used twice), or None to give up.
Again = Callable[[Exchange], Message | None]


def anew(message: Message, node_id: int) -> Message:
    """The same message to a node: another one, because its id comes with it and is not taken twice."""
    old = message.metadata
    return Message(message.content, node_id, old.message_type, ttl=old.ttl, group_id=old.group_id)


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    window: int,
    timeout: float = 0.0,
    accept: Accept = lambda message, reply: reply,
    again: Again = lambda failed: None,
) -> Iterator[Exchange]:
    """Send `messages` and give each with its answer, in their order.

    At most `window` of them are between the oldest unanswered one and the newest sent, so memory does not grow with
    their number. No reply within `timeout` seconds (0: no limit) is a failure, like an error or a refused reply; on a
    Grid that says how many workers serve its nodes, so many seconds for every message that its worker has before it.
    The late answer to an earlier try of the same message is an answer.
    """
    source = iter(messages)
    slots: deque[Exchange] = deque()
    pending: dict[str, Exchange] = {}
    wait = getattr(grid, "wait", None)
    pause, exhausted = _SHORTEST_WAIT, False
    try:
        while slots or not exhausted:
            while not exhausted and len(slots) < window:
                fresh = [Exchange(message) for message in islice(source, window - len(slots))]
                exhausted = not fresh
                slots.extend(fresh)
                _push(grid, fresh, pending, timeout, again)
            if slots and not slots[0].done:
                arrived = _collect(grid, pending, accept)
                _push(grid, [slot for slot in arrived if slot.failure], pending, timeout, again)
                if arrived:
                    pause = _SHORTEST_WAIT
                elif wait is not None:
                    nearest = min(slot.deadline for slot in pending.values())
                    wait(min(_LONGEST_WAIT, max(0.0, nearest - time.monotonic())), pending)
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_WAIT)
            while slots and slots[0].done:
                yield slots.popleft()
    finally:  # given up in the middle: nobody will pull the rest
        _forget(grid, pending)


def _push(grid: Grid, slots: list[Exchange], pending: dict[str, Exchange], timeout: float, again: Again) -> None:
    """Send what is new, and what failed and shall be tried again."""
    while slots:
        sent = []
        for slot in slots:
            if slot.failure:
                message = again(slot)
                if message is None:
                    _drop(grid, slot, pending)
                    continue
                slot.message, slot.failure, slot.code = message, "", 0
            sent.append(slot)
        if not sent:
            return
        ids = _ids_of(grid, sent)
        ids += [None] * (len(sent) - len(ids))  # a Grid that refuses a whole request gives no ids
        workers = getattr(grid, "num_workers", 0)
        for slot, message_id in zip(sent, ids, strict=True):
            slot.tries += 1
            # Where few workers serve all nodes, a message waits in line for its turn: that is not its client's time.
            turns = 1 + len(pending) // workers if workers else 1
            slot.deadline = time.monotonic() + turns * timeout if timeout else float("inf")
            if message_id is None:
                slot.failure = "the message was not taken (is it too large?)"
            else:
                pending[message_id] = slot
                slot.ids.append(message_id)
        slots = [slot for slot in sent if slot.failure]


def _ids_of(grid: Grid, slots: list[Exchange]) -> list[str | None]:
    """Hand the messages over. A SuperLink that restarts in the middle forgets the half it has: they go out anew."""
    for left in reversed(range(_PUSHES)):
        try:
            return list(grid.push_messages([slot.message for slot in slots]))
        except push_error() as error:
            if not left:
                raise
            log(WARNING, "%s They are sent again.", error)
            for slot in slots:
                slot.message = anew(slot.message, slot.message.metadata.dst_node_id)
    raise AssertionError


def _collect(grid: Grid, pending: dict[str, Exchange], accept: Accept) -> list[Exchange]:
    """What has been answered, or is overdue, now."""
    arrived = []
    for reply in grid.pull_messages(list(pending)):
        message_id = reply.metadata.reply_to_message_id
        slot = pending.pop(message_id, None)
        if slot is None:
            continue
        is_newest = message_id == slot.ids[-1]
        slot.ids.remove(message_id)
        failure, code = "", 0
        if reply.has_error():
            failure, code = _reason(reply), reply.error.code
        else:
            try:
                slot.answer = accept(slot.message, reply)
            except ValueError as error:
                failure = str(error)
        if not failure:
            slot.failure, slot.code = "", 0  # of another try, a moment ago
            _drop(grid, slot, pending)
        elif not is_newest or slot.failure:  # the newest try decides
            continue
        else:
            slot.failure, slot.code = failure, code
        arrived.append(slot)
    now = time.monotonic()
    for slot in {slot.ids[-1]: slot for slot in pending.values()}.values():
        if now > slot.deadline and not slot.failure:
            slot.failure = OVERDUE
            arrived.append(slot)
    return arrived


def _drop(grid: Grid, slot: Exchange, pending: dict[str, Exchange]) -> None:
    """Nothing more is wanted of a message: neither of its tries' replies."""
    for message_id in slot.ids:
        pending.pop(message_id, None)
    _forget(grid, slot.ids)
    slot.ids = []


def _forget(grid: Grid, message_ids: Collection[str]) -> None:
    """Where a Grid can be told that nobody waits for these replies, tell it."""
    if message_ids and hasattr(grid, "forget"):
        grid.forget(list(message_ids))


def _reason(reply: Message) -> str:
    """One line: an error's reason is a traceback at times, of which the last line says what happened."""
    lines = [line.strip() for line in (reply.error.reason or "").splitlines() if line.strip()]
    last = lines[-1] if lines else f"error {reply.error.code}"
    raised = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", last)  # Flower's way to write what a ClientApp raised
    return last if raised is None else raised[2] if raised[1] == "InputError" else f"{raised[1]}: {raised[2]}"
