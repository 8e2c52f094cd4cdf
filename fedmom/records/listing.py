"""Many run folders at a glance: of each how it ended, how far it came and what it reached, from a few small reads."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.errors import InputError
from fedmom.records.files import CHECKPOINT, CONFIG, ENVIRONMENT, FINAL, MANIFEST, ROUNDS, STATUS
from fedmom.records.history import from_the_end
from fedmom.records.status import Status, read_status
from fedmom.rounds.loop import Record

BROKEN = "broken"  # beside those of STATUSES: what the folder holds is not to be read
NOT_BEGUN = "not begun"  # a sweep named it, and it has no folder yet
_LOOKED_AT = 1000  # lines from the end in which an evaluation is looked for
# The resolved configuration is ours: a line of it is found a hundred times as fast as TOML is read.
_NUM_ROUNDS = re.compile(r"^num-rounds = (\d+)$", re.MULTILINE)


class Row(NamedTuple):
    """One run, or all runs of a sweep."""

    name: str  # of its folder; "" for the folder that was asked for
    folder: Path
    status: str  # of STATUSES, BROKEN or NOT_BEGUN; of a sweep counts, "5 done, 1 diverged"
    reason: str
    round: int  # the last one that is done
    num_rounds: int  # R; 0 where that cannot be read
    measure: str  # "test_accuracy", "test_loss", "loss" or "train_loss"; "" without a round
    value: float  # of it, at the last evaluation; of a sweep the best
    seen: float  # Unix time of its last sign of life; 0: not known
    runs: Sequence["Row"] = ()  # of a sweep


def list_runs(folder: Path) -> list[Row]:
    """The runs and sweeps in `folder`, the newest first; of a run folder itself that one.

    Folders of anything else are left out. Raises InputError where `folder` is missing, a file, or may not be read.
    """
    if not folder.is_dir():
        what = "is a file; name a folder of runs" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}")
    if _looks_like_a_run(folder):
        return [_row(folder, "")]
    # A sweep's own folder is listed run by run.
    return _newest_first(_sweep_rows(folder) if (folder / MANIFEST).is_file() else _rows(folder))


def _newest_first(rows: Iterator[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row.seen, row.name))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None


def _looks_like_a_run(folder: Path) -> bool:
    # A config.toml alone is a project's, as `fedmom new` writes one; a run writes its environment before it.
    return any((folder / name).is_file() for name in (ENVIRONMENT, STATUS, ROUNDS, CHECKPOINT, FINAL))


def _rows(folder: Path) -> Iterator[Row]:
    for path in _folders(folder):
        try:
            if _looks_like_a_run(path):
                yield _row(path, path.name)
            elif runs := _newest_first(_sweep_rows(path)):
                yield _sweep(path, runs)
        except (InputError, OSError) as error:
            yield _broken(path, path.name, str(error))


def _sweep_rows(folder: Path) -> Iterator[Row]:
    """The runs of a sweep, those that it named and that have no folder yet too."""
    inside = [path for path in _folders(folder) if _looks_like_a_run(path)]
    for path in inside:
        yield _row(path, path.name)
    there = {path.name for path in inside}
    for name, one in _manifest(folder).items():
        if name not in there and isinstance(one, dict):
            status = str(one.get("status") or NOT_BEGUN)
            yield Row(name, folder / name, status, str(one.get("message", "")), 0, 0, "", 0.0, 0.0)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _sweep(folder: Path, runs: Sequence[Row]) -> Row:
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    said = ", ".join(f"{number} {status}" for status, number in sorted(counts.items(), key=lambda pair: -pair[1]))
    # Of the runs that have what most have: a loss does not stand beside an accuracy.
    measures = [run.measure for run in runs if run.measure]
    measure = max(measures, key=measures.count, default="")
    best = max if "accuracy" in measure else min
    value = best((run.value for run in runs if run.measure == measure and run.status == "done"), default=None)
    return Row(
        folder.name,
        folder,
        said,
        "",
        sum(run.round for run in runs),
        sum(run.num_rounds for run in runs),
        measure if value is not None else "",
        value or 0.0,
        max(run.seen for run in runs),
        runs,
    )


def _row(folder: Path, name: str) -> Row:
    status = read_status(folder)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""  # a run that is just beginning, or was cut off before
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        return _broken(folder, name, f"{CONFIG} cannot be read: {why}", status)
    wanted = _NUM_ROUNDS.search(text)
    measure, value, last = _reached(from_the_end(folder))
    if not wanted and status.status != "running":
        return _broken(folder, name, f"{CONFIG} {'says no run.num-rounds' if text else 'is missing'}", status)
    if not last and (folder / ROUNDS).is_file() and (folder / ROUNDS).stat().st_size:
        return _broken(folder, name, f"{ROUNDS} has no line of a round", status)
    number = int(wanted[1]) if wanted else 0
    seen = status.seen or _touched(folder)
    return Row(name, folder, status.status, status.reason, status.round, number, measure, value, seen)


def _broken(folder: Path, name: str, reason: str, status: Status | None = None) -> Row:
    seen = (status.seen if status else 0.0) or _touched(folder)
    return Row(name, folder, BROKEN, reason, status.round if status else 0, 0, "", 0.0, seen)


def _touched(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _reached(records: Iterator[Record]) -> tuple[str, float, int]:
    """(the measure, its last value, the last round's number); ("", 0, 0) without a round."""
    last: Record = {}
    for place, record in enumerate(records):
        last = last or record
        for measure in ("test_accuracy", "test_loss", "loss"):
            if isinstance(value := record.get(measure), int | float):
                return measure, float(value), int(last["round"])
        if place >= _LOOKED_AT:
            break
    number = int(last.get("round", 0))
    if isinstance(value := last.get("train_loss"), int | float):
        return "train_loss", float(value), number
    return "", 0.0, number
