"""What Flower's processes in the image do about their connections; each change by name, where Flower still has it.

A TLS handshake that is cut is tried again, like any other connection that was lost: Flower gives up for good on every
error whose text has "ssl" in it. What was heard last leaves a mark for the health check, and a process whose loop has
ended ends, so that Docker starts it anew.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any

HEARD = "/tmp/heard"  # its time of change: when the other side answered last; health.py looks at it
SECONDS_TO_END = 300.0
_BETWEEN_MARKS = 1.0
_marked = 0.0


def try_cut_handshakes_again(invokers: ModuleType) -> list[str]:
    """Change flwr.supercore.retry.retry_invoker's RetryInvoker; gives what could not be changed."""
    invoker = getattr(invokers, "RetryInvoker", None)
    if invoker is None:
        return ["a TLS handshake that is cut may end it"]
    begin = invoker.__init__

    def changed(self: Any, *words: Any, **named: Any) -> None:
        begin(self, *words, **named)
        gives_up = self.should_giveup
        if gives_up is not None:
            self.should_giveup = lambda error: not is_cut(error) and gives_up(error)

    invoker.__init__ = changed
    return []


def is_cut(error: BaseException) -> bool:
    """Whether a connection was lost, in its TLS handshake or later; a certificate that does not fit is no such loss."""
    import httpx

    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()


def leave_marks(clients: ModuleType) -> list[str]:
    """Change flwr.supercore.protobuf.client's ProtobufClient; gives what could not be changed."""
    client = getattr(clients, "ProtobufClient", None)
    ask = getattr(client, "_send", None)
    if client is None or ask is None:
        return ["nobody sees whether it still hears of the other side"]

    def changed(self: Any, *words: Any, **named: Any) -> Any:
        answer = ask(self, *words, **named)
        if answer.status_code < 400:
            mark()
        elif answer.status_code == 401:
            print(refused(answer.headers.get("date", ""), time.time()), file=sys.stderr, flush=True)
        return answer

    client._send = changed
    return []


def mark(path: str = HEARD) -> None:
    """The other side has answered."""
    global _marked
    if time.monotonic() - _marked < _BETWEEN_MARKS:
        return
    _marked = time.monotonic()
    with open(path, "w"):
        pass
    os.utime(path)


def refused(date: str, now: float) -> str:
    """What to say of a 401, whose Date: header is the server's clock: one that is off is taken for an intruder's."""
    text = (
        "refused (401): the server no longer knows this key, or this machine's clock differs from the server's by more"
    )
    text += " than 5 s ahead or 300 s behind"
    try:
        ahead = now - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return text
    where = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    return f"{text}; it is {where}{'' if -300 < ahead < 4 else ': set it'}"


def end_where_heartbeats_end(hearts: ModuleType) -> list[str]:
    """Change flwr.supercore.heartbeat's HeartbeatSender: its thread dies of an answer that it does not expect."""
    sender = getattr(hearts, "HeartbeatSender", None)
    beat = getattr(sender, "_run", None)
    if sender is None or beat is None:
        return ["it may go on without heartbeats"]
    sender._run = lambda self: or_end(beat, self)
    return []


def or_end(beat: Callable[[Any], None], sender: Any) -> None:
    """Send heartbeats, and end the process where they end with an error: the SuperLink would call the node offline."""
    try:
        beat(sender)
    except BaseException:
        traceback.print_exc()
        print("no more heartbeats: ending, to be started anew", file=sys.stderr, flush=True)
        os._exit(1)


def let_apps_end(ends: ModuleType) -> list[str]:
    """Change flwr.supercore.exit.exit: an app hands over what it keeps (Context.state) as it ends, within 5 seconds.

    Then it would be gone, and with it what a large model's clients have of their own.
    """
    if not hasattr(ends, "FORCE_EXIT_TIMEOUT_SECONDS"):
        return ["an app may have too little time to hand over what it keeps"]
    ends.FORCE_EXIT_TIMEOUT_SECONDS = SECONDS_TO_END  # type: ignore[attr-defined]
    return []


def run_to_the_end(command: Callable[[], Any]) -> None:
    """Run it, and end the process with it, whatever threads are left; a loop that returns has lost its connection."""
    code = 1
    try:
        command()
        print("its loop has ended: ending, to be started anew", file=sys.stderr, flush=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def mend(*changes: tuple[Callable[[ModuleType], list[str]], str]) -> None:
    """Make changes to Flower's modules by name, and say which could not be made."""
    import importlib

    for change, name in changes:
        try:
            left = change(importlib.import_module(name))
        except ImportError:
            left = [f"{name} is gone"]
        for what in left:
            print(f"{os.path.basename(sys.argv[0])}: Flower has changed, {what}", file=sys.stderr, flush=True)


RETRIES = (try_cut_handshakes_again, "flwr.supercore.retry.retry_invoker")
MARKS = (leave_marks, "flwr.supercore.protobuf.client")
HEARTBEATS = (end_where_heartbeats_end, "flwr.supercore.heartbeat")
ENDS = (let_apps_end, "flwr.supercore.exit.exit")
