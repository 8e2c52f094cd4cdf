"""When a run may end before its last round: at a target, or when nothing improves; and which evaluation was the best.

All of it is a function of the records so far, so that a resumed run stops where an uninterrupted one would.
"""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from fedmom.config.goals import ALIASES, monitored, parse_goal
from fedmom.config.keys import Config
from fedmom.errors import InputError
from fedmom.method.state import ClientState
from fedmom.rounds.loop import Record
from fedmom.runs.callbacks import Callback, Start
from fedmom.tasks.metrics import rises


class Best(NamedTuple):
    """The best evaluation so far."""

    round: int
    value: float


class Watcher:
    """What the evaluations of a run have come to in one measure."""

    def __init__(self, monitor: str, *, goal: float | None = None, patience: int = 0, min_delta: float = 0.0) -> None:
        """monitor: a name of rounds.jsonl. goal: stop there. patience: stop after so many evaluations without progress.

        min_delta: what an evaluation must be better by, to count as progress.
        """
        self.monitor, self.goal, self.patience, self.min_delta = monitor, goal, patience, min_delta
        self.sign = 1 if rises(monitor) else -1
        self.best: Best | None = None
        self.reason = ""  # why the run may end
        self._mark: Best | None = None  # the last evaluation that was progress
        self._waited = 0

    def add(self, record: Record) -> bool:
        """Look at one more record; whether it is the best so far."""
        value = record.get(self.monitor)
        if not isinstance(value, int | float) or not isfinite(value):
            return False
        found = Best(record["round"], float(value))
        if self._mark is None or self.sign * (found.value - self._mark.value) > self.min_delta:
            self._mark, self._waited = found, 0
        else:
            self._waited += 1
        if not self.reason:
            self.reason = self._why(found)
        if self.best is None or self.sign * (found.value - self.best.value) > 0:
            self.best = found
            return True
        return False

    def _why(self, found: Best) -> str:
        if self.goal is not None and self.sign * (found.value - self.goal) >= 0:
            return f"{self.monitor} {found.value:.4g} reached {self.goal:g}"
        if self.patience and self._waited >= self.patience:
            assert self._mark is not None
            over = f"{self._mark.value:.4g} of round {self._mark.round}"
            return f"{self.monitor} did not improve on {over} in {self.patience} evaluations"
        return ""


class EarlyStopping(Callback):
    """Ends a run at a target, or when nothing improves; the keys run.stop-at and run.patience do the same.

    monitor: a number of rounds.jsonl; "" for the test accuracy, or the loss where there is none. target: stop where it
    is reached. patience: stop after so many evaluations that are not better by more than min_delta; 0: never.
    An accuracy and a speed are the better the larger, everything else the smaller. A resumed run counts its earlier
    rounds too. Raises InputError for a number that no target can be.
    """

    wants_state = takes_notes = False

    def __init__(
        self, monitor: str = "", *, target: float | None = None, patience: int = 0, min_delta: float = 0.0
    ) -> None:
        if target is None and patience < 1:
            raise InputError("EarlyStopping: give a target (0.9), a patience (10), or both")
        if patience < 0 or min_delta < 0 or not isfinite(min_delta):
            raise InputError(f"EarlyStopping: patience = {patience}, min_delta = {min_delta}: must be >= 0")
        self.monitor = ALIASES.get(monitor, monitor)
        self.target, self.patience, self.min_delta = target, patience, min_delta

    def on_start(self, start: Start) -> str | None:
        monitor = self.monitor or monitored(start.config)
        self.progress = Watcher(monitor, goal=self.target, patience=self.patience, min_delta=self.min_delta)
        for record in start.rounds:
            self.progress.add(record)
        return self.progress.reason or None

    def on_round(self, record: Record, state: ClientState) -> str | None:
        self.progress.add(record)
        return self.progress.reason or None


class Watchers:
    """What the keys run.patience, run.keep-best and run.stop-at ask for."""

    def __init__(self, config: Config) -> None:
        run, goal = config.run, parse_goal(config.run.stop_at)
        self.monitor = monitored(config, run.monitor)
        self._first = Watcher(self.monitor, patience=run.patience, min_delta=run.min_delta)
        self._all = [self._first, Watcher(goal[0], goal=goal[1])] if goal else [self._first]

    @property
    def best(self) -> Best | None:
        return self._first.best

    @property
    def reason(self) -> str:
        """Why the run may end by now, the target before the patience; or ""."""
        return next((one.reason for one in reversed(self._all) if one.reason), "")

    def add(self, record: Record) -> bool:
        """Look at one more record; whether it is the best so far."""
        is_best, *_ = [one.add(record) for one in self._all]
        return is_best

    def again(self, rounds: Sequence[Record], there: int) -> bool:
        """Look at the rounds of a run that goes on; whether the last of them is the best, and not kept.

        there: the round of the best that is kept, 0 for none; where it is an older one, the best is found anew from
        here on.
        """
        for record in rounds:
            self.add(record)
        if self.best is None or there >= self.best.round:
            return False
        if self.best.round == rounds[-1]["round"]:
            return True
        self._first.best = None
        return False


def reason_of(asked: Sequence[object]) -> str:
    """The first reason that callbacks gave, of which some may have said no more than True; or ""."""
    found = (
        why if isinstance(why, str) else "a callback asked for it"
        for why in asked
        if why is True or isinstance(why, str)
    )
    return next(filter(None, found), "")
