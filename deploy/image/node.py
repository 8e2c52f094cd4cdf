"""Five changes to Flower's SuperNode, each by name and only where Flower still has what it changes."""

import os
import time
from types import ModuleType, SimpleNamespace
from typing import Any

SECONDS_FOR_AN_OBJECT = 300.0
SECONDS_TO_END = 300.0
RUNS_KEPT = 4
LONGEST = float(os.environ.get("FEDMOM_POLL_SECONDS", "0.5"))


def mend(flower: ModuleType) -> list[str]:
    """Change flwr.supernode.start_client_internal; gives what could not be changed."""
    left = []
    if getattr(flower, "time", None) is time:
        flower.time = sooner()  # type: ignore[attr-defined]
    else:
        left.append("it looks for messages as often as it likes")
    pull, push = getattr(flower, "_pull_and_store_message", None), getattr(flower, "_push_messages", None)
    if pull and push:
        flower._pull_and_store_message = of_few_runs(prompt(pull))  # type: ignore[attr-defined]
        flower._push_messages = patient_for_a_while(once_the_app_has_ended(push))  # type: ignore[attr-defined]
    else:
        left.append("a reply may wait for the next message")
    return left


def sooner() -> SimpleNamespace:
    """The module `time`, whose sleep takes FEDMOM_POLL_SECONDS at most: Flower sleeps 3 s between two looks."""
    changed = SimpleNamespace(**vars(time))
    changed.sleep = lambda seconds: time.sleep(min(seconds, LONGEST))
    return changed


def prompt(pull: Any) -> Any:
    """Say that there is something to push where a reply is ready, although no message came.

    Flower pushes replies only after a message came, and then takes whatever reply is there: after one message with two
    (an app whose time was over, and that answered after all) each reply would wait for the message after its own.
    """

    def changed(**words: Any) -> int | None:
        run_id: int | None = pull(**words)
        return 0 if run_id is None and has_reply(words["state"]) else run_id

    return changed


def of_few_runs(pull: Any) -> Any:
    """Let go of what apps have kept (Context.state) but of the runs that messages came of last.

    Flower keeps it until the SuperNode ends: run after run, a large model's clients would fill its memory.
    """
    latest = dict[int, None]()  # series of runs, the last one at the end

    def changed(**words: Any) -> int | None:
        run_id: int | None = pull(**words)
        state = words["state"]
        series = getattr(state.get_run(run_id), "series_id", None) if run_id else None
        if series is not None:
            latest.pop(series, None)
            latest[series] = None
            for old in [*latest][:-RUNS_KEPT]:
                del latest[old]
                if (context := state.get_run_series_context(old)) is not None:
                    context.state = type(context.state)()
        return run_id

    return changed


def has_reply(state: Any) -> bool:
    """Whether a reply has not been sent yet."""
    state.get_messages_legacy(run_ids=[])  # none; an app whose time is over gets its error reply by it
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in entries)


def once_the_app_has_ended(push: Any) -> Any:
    """Send a reply when its app has ended, or after SECONDS_TO_END.

    An app hands over first its reply and then, as it ends, what it keeps for the next message (Context.state). Whoever
    has the reply may send that message at once, and its app would find what was there before, and give that back.
    """

    def changed(**words: Any) -> None:
        push(**{**words, "state": Ended(words["state"])})

    return changed


class Ended:
    """A node's state, whose replies are those of apps that have ended."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def get_messages_legacy(self, **words: Any) -> Any:
        """They wait here: Flower's loop has one message at a time."""
        messages = self._state.get_messages_legacy(**words)
        if not hasattr(self._state, "get_tasks"):  # Flower 1.41
            return messages
        deadline = time.monotonic() + SECONDS_TO_END
        for run_id in {message.metadata.run_id for message in messages}:
            # One that has stopped to say that it lives counts as ended: looking for tasks is what finds that out.
            while time.monotonic() < deadline and self._state.get_tasks(run_ids=[run_id], statuses=["running"]):
                time.sleep(0.05)
        return messages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def patient_for_a_while(push: Any) -> Any:
    """Give up on a reply whose content does not come: its app died while handing it over. Flower waits for ever."""

    def changed(**words: Any) -> None:
        push(**{**words, "object_store": Impatient(words["object_store"])})

    return changed


class Impatient:
    """An object store that waits SECONDS_FOR_AN_OBJECT, all in all, for what was announced and is not there yet."""

    def __init__(self, store: Any) -> None:
        self._store, self._since = store, 0.0

    def get(self, object_id: str) -> bytes | None:
        """Raises TimeoutError once they are over."""
        content: bytes | None = self._store.get(object_id)
        if content != b"":
            self._since = 0.0
            return content
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > SECONDS_FOR_AN_OBJECT:
            raise TimeoutError(f"object {object_id} did not come in {SECONDS_FOR_AN_OBJECT:g} s")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
