"""Folders that somebody names -> runs: run folders themselves, or a sweep's, which hold them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config.keys import Scalar
from fedmom.config.load import flat, load
from fedmom.errors import InputError
from fedmom.records.files import CONFIG, ENVIRONMENT, MANIFEST, ROUNDS
from fedmom.records.history import read_rounds
from fedmom.records.status import Status, read_status
from fedmom.rounds.loop import Record


class Run(NamedTuple):
    """One run folder, as read."""

    name: str  # of its folder; its path where two folders have one name
    folder: Path
    rounds: list[Record]
    # The resolved configuration, {"section.key": value}; not needed where the rounds alone are shown.
    settings: dict[str, Scalar] = {}  # noqa: RUF012 - never changed
    status: Status = Status("unfinished")

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end: only then do its numbers stand beside others'.

        A folder that does not say how its run ended (an older version's, a copy without tensors) has all its rounds.
        One that says "done" and has lost some does not count either.
        """
        return self.is_whole and self.status.status in ("done", "unfinished")

    @property
    def is_whole(self) -> bool:
        """Whether every round is there."""
        stopped = self.status.is_done and self.status.reason  # at its target: it lacks none
        return len(self.rounds) >= (self.status.round if stopped else int(self.settings["run.num-rounds"]))

    @property
    def standing(self) -> str:
        """How it is, for a note: "interrupted, 4 of 9 rounds"."""
        rounds = f"{self.rounds[-1]['round'] if self.rounds else 0} of {self.settings['run.num-rounds']} rounds"
        if self.status.is_done and not self.is_whole:
            return f"damaged, {len(self.rounds)} of {self.settings['run.num-rounds']} rounds"
        return rounds if self.status.status == "unfinished" else f"{self.status.status}, {rounds}"


def collect(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """(every run of these folders, once each; what should be known of them).

    A folder with a config.toml is a run; one that holds such folders is a sweep's. Runs without a round yet (one that
    diverged in its first has none), and those that a sweep names and that have no folder, have no rounds.
    Raises InputError for a folder that is neither, or where no run has a round.
    """
    notes, found, absent = list[str](), dict[Path, list[Record]](), dict[Path, tuple[Path, Status, Scalar]]()
    for folder in folders:
        if is_run(folder):
            found[folder.resolve()] = read_rounds(folder)
            continue
        inside = {run.resolve(): read_rounds(run) for run in sweep_runs(folder)}
        if not any(inside.values()):
            raise InputError(f"{folder}: none of its {len(inside)} runs has finished a round yet")
        found |= inside
        missing, alone = _missing(folder.resolve())
        absent |= missing
        if alone:
            notes.append(f"{folder}: left out, without a folder: {', '.join(alone)}")
    if not any(found.values()):
        raise InputError(f"{', '.join(map(str, folders))}: no run has finished a round yet (no line in {ROUNDS})")
    shown = _names([*found, *absent])
    settings = {path: flat(load(path / CONFIG).config) for path in found}
    runs = [Run(shown[path], path, records, settings[path], read_status(path)) for path, records in found.items()]
    for path, (like, status, seed) in absent.items():
        runs.append(Run(shown[path], path, [], {**settings[like], "run.seed": seed}, status))
    return runs, notes


def _missing(folder: Path) -> tuple[dict[Path, tuple[Path, Status, Scalar]], list[str]]:
    """Runs that a sweep names and that have no folder: ({path: (a run of other seed, how it ended, seed)}, the others).

    Without them three seeds of which one was refused would look like two.
    """
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        cells = {folder / name: (one["sets"], Status(one["status"], one["message"])) for name, one in known.items()}
        groups = {path: json.dumps({**sets, "run.seed": 0}, sort_keys=True) for path, (sets, _) in cells.items()}
        seeds = {path: int(sets["run.seed"]) for path, (sets, _) in cells.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, []
    there = {groups[path]: path for path in cells if is_run(path)}
    missing = [path for path in cells if not is_run(path)]
    return (
        {path: (there[groups[path]], cells[path][1], seeds[path]) for path in missing if groups[path] in there},
        [f"{path.name} ({cells[path][1].status})" for path in missing if groups[path] not in there],
    )


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def sweep_runs(folder: Path) -> list[Path]:
    """The run folders that `folder` holds, by name. InputError where there are none."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a run folder, or a sweep's")
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise InputError(f"{folder}: is neither a run folder (no {CONFIG} in it) nor a sweep's (no run folder in it)")
    return inside


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Folder names; with as many of the folders above them as tell all of them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(paths, names, strict=True))


def environment_of(folder: Path) -> dict[str, Any]:
    """What environment.json says; {} where it is missing or broken."""
    try:
        found = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
