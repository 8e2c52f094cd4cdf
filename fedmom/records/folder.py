"""The run folder: config.toml, environment.json, rounds.jsonl, checkpoint.safetensors, final.safetensors, status.json.

Every file appears whole or not at all (written aside, synced, renamed), so a run killed at any moment resumes from
its last checkpoint, and rounds.jsonl is cut back to it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmom.errors import InputError
from fedmom.method.state import ClientState, Tree, flatten, to_device, unflatten
from fedmom.records.files import (
    BEST,
    CHECKPOINT,
    CLIENTS,
    CONFIG,
    ENVIRONMENT,
    FINAL,
    FIXED,
    RESULTS,
    ROUNDS,
    STATUS,
    read_about,
    read_tensors,
    write_tensors,
)
from fedmom.records.history import ClientHistory, line_of
from fedmom.records.identity import Identity
from fedmom.rounds.loop import Record
from fedmom.rounds.plan import RunState
from fedmom.rounds.results import ClientResults

_PREVIOUS_CLIENTS = "clients.previous.safetensors"
_OUTER = "outer/"  # how the names of what the outer step remembers begin in a checkpoint: outer/SLOT/params/NAME
_FORMERLY = {  # what names were before: of SlowMo's tensors, and of algorithm.personal's in clients.safetensors
    f"{_OUTER}b/params/": "slow_momentum/",
    "": "personal/",
}
_REFERENCE = "reference/"  # likewise of what clients begin at: reference/params/NAME
_COUNTS = ("round", "steps", "examples", "bytes_sent")  # of a checkpoint
_RECEIVED = "bytes_received"  # likewise, where it is counted


def _leftovers(folder: Path) -> list[str]:
    """Files that `whole_file` began in `folder` and a kill left behind."""
    names = (CONFIG, ENVIRONMENT, ROUNDS, RESULTS, CHECKPOINT, CLIENTS, FINAL, BEST, FIXED, STATUS, "curves.png")
    return [p.name for p in folder.iterdir() if p.name.startswith(tuple(f".{name}." for name in names))]


def _checkpointed(done: RunState) -> Tree:
    """The tensors of checkpoint.safetensors: the mean state, and what the outer step remembers where there is one."""
    outer = (done.outer or {}).items()
    found = flatten(done.state) | {f"{_OUTER}{slot}/{name}": v for slot, tree in outer for name, v in tree.items()}
    return found | {f"{_REFERENCE}{name}": v for name, v in (done.reference or {}).items()}


def _rows(done: RunState) -> Tree:
    """The tensors of clients.safetensors: what every client has of its own."""
    own = done.rows or done.own or ClientState({}, {}, {})
    return flatten(own if done.rows else own._replace(correction=done.client_correction or {}))


def _memories(template: RunState, tensors: Tree, device: torch.device) -> dict[str, Any]:
    """What the server remembers besides the mean state, of a checkpoint's tensors; None for what there is not."""
    outer, reference = template.outer, template.reference
    if outer is not None:
        outer = {s: {n: tensors[f"{_OUTER}{s}/{n}"].to(device) for n in tree} for s, tree in outer.items()}
    if reference is not None:
        reference = {name: tensors[_REFERENCE + name].to(device) for name in reference}
    return {"outer": outer, "reference": reference}


def _by_names(found: Tree, expected: Tree) -> Tree:
    """What a file holds by the names that are expected of it, some of which were others before."""
    renamed = dict(found)
    for name in expected:
        for now, before in _FORMERLY.items():
            if name not in found and name.startswith(now) and (old := before + name.removeprefix(now)) in found:
                renamed[name] = renamed.pop(old)
    return renamed


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


class RunFolder:
    """One run on disk. `create` makes a new one, `open` one to resume; neither writes over another's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @staticmethod
    def check_new(path: Path) -> None:
        """InputError unless `create` may make a run folder here."""
        try:
            there = path.exists()
            names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        except (OSError, ValueError) as error:  # a name that is too long, a NUL, a folder that may not be read
            raise InputError(f"--out {str(path)!r}: cannot be a folder ({_why(error)})") from None
        if path.is_dir():
            # A run killed before its config was written has left nothing to resume: its folder is free.
            if names <= {ENVIRONMENT, STATUS, *_leftovers(path)}:
                return
            if CONFIG in names:
                raise InputError(f"--out {path}: exists already; use --resume {path} to go on, or another --out")
        if there:
            raise InputError(f"--out {path}: exists already and is no run folder; name another --out")

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path}: cannot be made ({_why(error)})") from None
        folder = cls(path)
        folder._acquire()
        try:
            cls.check_new(path)  # once more: another process may have come first
        except InputError:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        if not (path / CONFIG).is_file():
            raise InputError(f"--resume {path}: is not a run folder (it has no {CONFIG})")
        folder = cls(path)
        folder._acquire()
        return folder

    def _acquire(self) -> None:
        """Two processes in one folder would write over each other; the lock goes with the process, even killed."""
        try:
            import fcntl
        except ImportError:  # pragma: no cover - not a POSIX system
            return
        try:
            handle = os.open(self.path, os.O_RDONLY)  # the folder itself: there is no lock file to leave or to race for
        except OSError as error:
            raise InputError(f"{self.path}: cannot be opened ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise InputError(f"{self.path}: another process is running it") from None
        self._lock = handle
        for name in _leftovers(self.path):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(
        self, record: Record, results: ClientResults | None = None, clients: ClientHistory | None = None
    ) -> None:
        """One line of rounds.jsonl, readable at once by whoever watches the run; before it that of every client's own.

        clients: who they are, as the first line of clients.jsonl says it.
        """
        if results is not None and clients is not None:
            begins = not (self.path / RESULTS).exists()
            self._append(RESULTS, (clients.about() if begins else "") + line_of(results))
        self._append(ROUNDS, json.dumps(record) + "\n")

    def _append(self, name: str, lines: str) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise InputError(f"{self.path / name}: cannot be written ({error.strerror}); --resume continues") from None

    def save(self, done: RunState, stamp: dict[str, Any]) -> None:
        """A checkpoint; `stamp`: the run's own (see `fedmom.records.identity`).

        Rows of clients go first, and the older rows stay until the checkpoint itself is there.
        """
        for name in (RESULTS, ROUNDS):
            with contextlib.suppress(FileNotFoundError), open(self.path / name, "rb+") as file:
                os.fsync(file.fileno())
        about = self._about(done, stamp)
        checkpoint, clients, previous = (self.path / name for name in (CHECKPOINT, CLIENTS, _PREVIOUS_CLIENTS))
        if rows := _rows(done):
            # Rows of another round than the checkpoint's were left by a kill; the ones it needs are in `previous`.
            if clients.exists() and checkpoint.exists() and read_about(clients) == read_about(checkpoint):
                os.replace(clients, previous)
            write_tensors(clients, rows, about)
        write_tensors(checkpoint, _checkpointed(done), about)
        previous.unlink(missing_ok=True)
        if not rows:  # after an exchange of everything; older ones belong to no checkpoint any more
            clients.unlink(missing_ok=True)

    def save_final(self, done: RunState, stamp: dict[str, Any]) -> None:
        write_tensors(self.path / FINAL, flatten(done.state), self._about(done, stamp))

    def save_best(self, done: RunState, stamp: dict[str, Any], measure: str, value: float) -> None:
        """The model and momentum of the best evaluation so far, and its value."""
        write_tensors(self.path / BEST, flatten(done.state), {**self._about(done, stamp), measure: value})

    def best_round(self, measure: str) -> int:
        """The round of best.safetensors; 0 where none by this measure can be read."""
        with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
            about = read_about(self.path / BEST)
            return int(about["round"]) if measure in about else 0
        return 0

    @staticmethod
    def _about(done: RunState, stamp: dict[str, Any]) -> dict[str, Any]:
        """No times: the bytes of a resumed run are those of an uninterrupted one."""
        more = {"interval": done.interval} if done.interval else {}
        more |= {} if done.bytes_received is None else {_RECEIVED: done.bytes_received}
        return {**stamp, **{name: getattr(done, name) for name in _COUNTS}, **more}

    def load(
        self,
        identity: Identity,
        template: RunState,
        device: torch.device,
        own_after: Callable[[int], ClientState | None] = lambda number: None,
    ) -> tuple[RunState, dict[str, Any]]:
        """The last checkpoint, checked against this run, and its stamp; `template` (round 0) where there is none yet.

        own_after: the form of what clients have of their own after so many rounds.

        Raises InputError for a checkpoint that is truncated, of another run, or without its clients' rows.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return template, identity.stamp
        tensors, about = read_tensors(path)
        stamp = identity.agreed(about, path)
        template = template._replace(own=own_after(int(about["round"])))
        expected = _checkpointed(template)
        tensors = found = _by_names(tensors, expected)
        wrong = [n for n in {**expected, **found} if n not in found or n not in expected]
        wrong += [n for n in expected if n in found and found[n].shape != expected[n].shape]
        if wrong:
            raise InputError(f"{path}: does not fit this model (tensor {wrong[0]})")
        rows = self._load_rows(_rows(template), about)
        # In the model's order, which a file does not keep: sums over tensors must not depend on it.
        state = to_device(unflatten({name: tensors[name] for name in flatten(template.state)}), device)
        own = unflatten(rows)
        done = template._replace(
            state=state,
            own=own._replace(correction={}) if template.own is not None else None,
            rows=own if template.rows is not None else None,
            client_correction=own.correction if template.client_correction is not None else None,
            interval=int(about["interval"]) if template.interval else 0,
            **_memories(template, tensors, device),
            bytes_received=about.get(_RECEIVED),
            **{name: about[name] for name in _COUNTS},
        )
        return done, stamp

    def _load_rows(self, expected: Tree, about: Mapping[str, Any]) -> Tree:
        """What the clients of a checkpoint have of their own; about: what that file says of itself."""
        if not expected:
            return {}
        candidates = [self.path / name for name in (CLIENTS, _PREVIOUS_CLIENTS)]
        fitting = [c for c in candidates if c.exists() and read_about(c) == about]
        if not fitting:
            raise InputError(f"{candidates[0]}: the clients' own rows of round {about['round']} are missing")
        found = _by_names(read_tensors(fitting[0])[0], expected)
        for name, value in expected.items():
            if name not in found or found[name].shape != value.shape:
                raise InputError(f"{fitting[0]}: does not fit this run (tensor {name})")
        return {name: found[name] for name in expected}
