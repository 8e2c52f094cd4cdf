"""`fedmom sweep`: many runs of one configuration, as ordinary run folders, side by side, resumable as a whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmom.config.goals import measured_by
from fedmom.config.load import config_file, load, parse_sets
from fedmom.config.resolve import resolve
from fedmom.errors import InputError, require, unknown
from fedmom.experiments.crew import Cell, CellEnded, SweepWork, one_by_one
from fedmom.experiments.processes import side_by_side
from fedmom.experiments.ray_crew import on_ray
from fedmom.experiments.run import check_place
from fedmom.machine.files import write_text
from fedmom.records.files import CONFIG, FINAL, MANIFEST
from fedmom.records.folder import RunFolder
from fedmom.records.history import last_round
from fedmom.records.resume import resume_config
from fedmom.records.status import read_status

WAITING = "not begun"  # of a cell that waits for its turn
SETTLED = ("done", "diverged")  # runs that another try would not change


def check(
    config: Path, cells: Sequence[Cell], out: Path, sets: Sequence[str], *, here: bool = True, metric: str = ""
) -> None:
    """Every run's configuration, and what they are to be ranked by, before the first one starts. InputError by name.

    A run that is there already may only have become longer, as with any resume. here: on this machine's devices.
    """
    measured = set[str]()
    given = parse_sets(sets)
    if given.get("run.resume") or load(config, given).config.run.resume:
        raise InputError("run.resume: a sweep goes on by the same command; leave it out")
    for key in given:
        if key != "run.seed" and cells and all(key in cell.sets for cell in cells):
            raise InputError(f"{key}: is given by --set and for every run by --grid or --list; leave one of them out")
    if (out / CONFIG).exists() or (out.exists() and not out.is_dir()):
        raise InputError(
            f"--out {out}: is {'a run folder' if out.is_dir() else 'a file'}; a sweep needs one of its own"
        )
    for cell in cells:
        changes = {**given, **cell.sets, "run.out": "", "run.resume": ""}
        try:
            if (out / cell.name / CONFIG).exists():
                settled = resume_config(out / cell.name, config, changes).config
            else:
                settled = resolve(load(config, changes)).config
                RunFolder.check_new(out / cell.name)
            check_place(settled, here=here)
            measured |= measured_by(settled)
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None
    if metric and metric not in measured:
        raise unknown("--metric", metric, sorted(measured))


def sweep(
    config: Path,
    cells: Sequence[Cell],
    out: Path,
    *,
    sets: Sequence[str] = (),
    workers: int | None = None,
    ray: str = "",
    track: Sequence[str] = (),
) -> Iterator[CellEnded]:
    """Run what has not ended yet, `workers` at a time, and give every cell as it ends (those of earlier calls first).

    ray: "" for processes here, "local" for actors of a Ray that is started here, or the address of a Ray cluster, whose
    machines must see `out` and the current folder under the same paths. workers: None for one, or one per node of a
    cluster.

    Every run is an ordinary folder out/NAME; one that was cut off goes on from its checkpoint, one that is to be longer
    than it was goes on from its end. out/sweep.json says how each ended. Where a run is interrupted no other is begun;
    KeyboardInterrupt where the sweep was asked to end, by Ctrl-C or SIGTERM, and not a run of it alone.
    """
    if ray:
        require(f"--ray {ray}", "flower", "ray")
    out.mkdir(parents=True, exist_ok=True)
    mine = {cell.name for cell in cells}
    # What an earlier call planned and did not begin was given up, unless it is asked for again.
    known = {name: one for name, one in _read(out).items() if name in mine or one.get("status") != WAITING}
    waiting = []
    for cell in cells:
        before = known.get(cell.name, {})
        if before.get("status") in SETTLED and not _lacks_rounds(config, cell, out, sets, before["status"]):
            yield CellEnded(cell, before["status"], before.get("message", ""), 0.0)
        else:
            waiting.append(cell)
    planned = {cell.name: {"status": WAITING, "message": "", "sets": cell.sets} for cell in waiting}
    known = {**planned, **known}
    _write(out, known)
    work = SweepWork(str(config_file(config).resolve()), str(out.resolve()), tuple(sets), tuple(track))
    if ray and waiting:
        under_way = on_ray(work, waiting, workers, ray)
    elif workers and workers > 1 and len(waiting) > 1:
        under_way = side_by_side(work, waiting, workers)
    else:
        under_way = one_by_one(work, waiting)
    for ended in under_way:
        known[ended.cell.name] = {"status": ended.status, "message": ended.message, "sets": ended.cell.sets}
        _write(out, known)
        yield ended


def _lacks_rounds(config: Path, cell: Cell, out: Path, sets: Sequence[str], status: str) -> bool:
    """Whether a run that ended is asked for more rounds than its folder was made for, or has lost some, or all."""
    folder = out / cell.name
    if not (folder / CONFIG).exists():
        return True
    recorded = load(folder / CONFIG).config
    asked = resume_config(folder, config, {**parse_sets(sets), **cell.sets, "run.resume": ""}).config
    if status == "done" and last_round(folder) < recorded.run.num_rounds:
        # One that stopped at its target lacks none, unless it is asked for another one now.
        wants = [(c.run.stop_at, c.run.patience, c.run.min_delta, c.run.monitor) for c in (recorded, asked)]
        return not (folder / FINAL).exists() or not read_status(folder).reason or wants[0] != wants[1]
    return asked.run.num_rounds > recorded.run.num_rounds


def _write(out: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    write_text(out / MANIFEST, json.dumps(known, indent=1) + "\n")


def _read(out: Path) -> dict[str, dict[str, Any]]:
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
            raise ValueError("no table of runs")
        return known
    except ValueError:
        raise InputError(f"{path}: is not what a sweep writes; remove it, and unfinished runs go on") from None
