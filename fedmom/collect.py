"""Folders that somebody names -> runs: run folders themselves, or a sweep's, which hold them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.config import Scalar, flat, load
from fedmom.errors import InputError
from fedmom.records import CONFIG, ENVIRONMENT, ROUNDS, read_rounds
from fedmom.tables import RunHistory
from fedmom.train import Record


class Run(NamedTuple):
    """One run folder, as read."""

    name: str  # of its folder; its path where two folders have one name
    folder: Path
    rounds: list[Record]
    settings: dict[str, Scalar]  # the resolved configuration, {"section.key": value}

    @property
    def history(self) -> RunHistory:
        return RunHistory(self.name, self.rounds)

    @property
    def is_cut(self) -> bool:
        """Whether it has fewer rounds than its configuration asks for."""
        return self.rounds[-1]["round"] < int(self.settings["run.num-rounds"])


def collect(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """(every run of these folders, once each; what should be known of them).

    A folder with a config.toml is a run; one that holds such folders is a sweep's. Runs of a sweep that have no round
    yet are left out with a note. Raises InputError for a folder that is neither, or a run without rounds.
    """
    notes, found = list[str](), dict[Path, list[Record]]()
    for folder in folders:
        if is_run(folder):
            found[folder.resolve()] = _rounds(folder)
            continue
        inside = sweep_runs(folder)
        begun = {run: records for run in inside if (records := read_rounds(run))}
        if not begun:
            raise InputError(f"{folder}: none of its {len(inside)} runs has finished a round yet")
        waiting = [run.name for run in inside if run not in begun]
        if waiting:
            notes.append(f"{folder}: left out, without a finished round: {', '.join(waiting)}")
        found |= {run.resolve(): records for run, records in begun.items()}
    shown = _names(list(found))
    runs = [Run(shown[path], path, records, flat(load(path / CONFIG).config)) for path, records in found.items()]
    for run in runs:
        if run.is_cut:
            done, wanted = run.rounds[-1]["round"], run.settings["run.num-rounds"]
            notes.append(f"{run.name}: has {done} of {wanted} rounds")
    return runs, notes


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


def _rounds(folder: Path) -> list[Record]:
    records = read_rounds(folder)
    if not records:
        raise InputError(f"{folder}: is not a run folder with finished rounds (no line in {ROUNDS})")
    return records


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
