"""Who hears of a run and what they are told; and how a run's own two steps stay together when a signal comes."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fedmom.config.keys import Config
from fedmom.method.state import ClientState
from fedmom.rounds.loop import Record
from fedmom.runs.result import Result

# Signals that ask a run to end.
STOPPING = tuple(int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Start(NamedTuple):
    """What a callback learns before the first round."""

    config: Config  # resolved
    folder: Path | None
    first_round: int  # 1, or the first after a checkpoint
    client_steps: int  # per round, of all clients together
    notes: tuple[str, ...]  # what was overruled, chosen or should be known
    details: tuple[str, ...] = ()  # of what was chosen, for whoever asks
    rounds: Sequence[Record] = ()  # those of a resumed run that are done


class Callback:
    """What happens along a run; override what you need."""

    # Whether `on_round` looks at the state. Where clients hold the rows (Algorithm 2 on Ray), it must be brought here.
    wants_state = True
    # Whether the notes of `on_start` are in its care; where they are in nobody's they become Python's warnings.
    takes_notes = True

    def on_prepare(self, what: str) -> None:
        """Before on_start, at the beginning of something that may take seconds: "reading the data"."""

    def on_start(self, start: Start) -> str | None:
        """Once, before the first round. A text ends a run that goes on there, as of on_round; a new one has a round."""

    def on_steps(self, client_steps: int) -> None:
        """Within a round: so many more client-steps are done."""

    def on_round(self, record: Record, state: ClientState) -> str | None:
        """After every round: its line of rounds.jsonl, and x̂, û and the buffers.

        A text ends the run after this round, as done, and is its reason ("the loss stays"); None goes on.
        """

    def on_output(self, node: int, text: str) -> None:
        """In another thread: what the client of a simulated node printed or logged (simulation.show-output)."""

    def on_end(self, result: Result) -> None:
        """Once, after the last round, an interruption, divergence or clients that failed."""

    def on_error(self) -> None:
        """Once, instead of on_end, when something else ended the run (a full disk): put the terminal in order."""


@dataclass
class Listener:
    """Who hears of the run that a ServerApp makes on a Grid of this process, as the Grid's attribute `listener`."""

    callbacks: list[Callback]
    result: Result | None = None


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP within the block take effect after it: a round's record and state stay together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    # One whose handler is not Python's cannot be put back, so it is left alone, as one that is ignored (nohup) is.
    numbers = [number for number in STOPPING if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    before = {number: signal.signal(number, lambda number, frame: held.append((number, frame))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            handler = before[held[0][0]]
            if callable(handler):
                handler(*held[0])
            elif handler == signal.SIG_DFL:
                signal.raise_signal(held[0][0])


class Interrupts:
    """Within the block one request to end a run is one: what comes within a second after it is the same, only louder.

    While `holding`, none is heard at all, so that what is done can be saved; but for what may take long (`waiting`),
    where one more means that nobody wants to wait.
    """

    SECONDS = 1.0

    def __init__(self) -> None:
        self.holding = False
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._last, self._more = -math.inf, False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if callable(handler := signal.getsignal(number)):
                    self._before[number] = handler
                    signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.holding or now - self._last < self.SECONDS:
            self._more = True
            return
        self._last = now
        self._before[number](number, frame)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """KeyboardInterrupt where there was one more, or is within the block."""
        if self._more:
            raise KeyboardInterrupt
        self.holding, self._last = False, -math.inf
        try:
            yield
        finally:
            self.holding = True
