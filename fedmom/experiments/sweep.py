"""`fedmom sweep`: many runs of one configuration, as ordinary run folders, side by side, resumable as a whole."""

import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedmom.config.keys import KEYS, Config, Scalar, as_held, load, parse_sets, read_tables, typed_value
from fedmom.config.numbers import as_list, pieces
from fedmom.config.resolve import resolve
from fedmom.errors import InputError, unknown
from fedmom.experiments.crew import Cell, Ended, Work, on_ray, one_by_one, side_by_side
from fedmom.machine.files import write_text
from fedmom.records.files import CONFIG, MANIFEST
from fedmom.records.folder import RunFolder
from fedmom.records.history import last_round, read_rounds
from fedmom.records.resume import resume_config
from fedmom.results.tables import MISSING, finite, number
from fedmom.rounds.loop import CLIENT_MEASURES
from fedmom.runs.execute import check_place
from fedmom.tasks.classification import Classification
from fedmom.tasks.quadratic import Quadratic

WAITING = "not begun"  # of a cell that waits for its turn
ENDED = ("done", "diverged")  # runs that another try would not change
MOST_RUNS = 100_000
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and some what they add to it


def parse_grid(words: Sequence[str]) -> dict[str, list[Scalar]]:
    """["algorithm.lr=0.1,0.3"] -> {"algorithm.lr": [0.1, 0.3]}. InputError for a wrong key, value or form.

    A value with commas stands in brackets or quotes: "algorithm.lr-milestones=[0.5,0.75],[0.3]".
    """
    grid: dict[str, list[Scalar]] = {}
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text:
            raise InputError(f"--grid {word!r}: write SECTION.KEY=VALUE,VALUE,…")
        if name in grid:
            raise InputError(f"--grid {word!r}: {name} is given twice")
        try:
            parts = pieces(text)
        except ValueError as error:
            raise InputError(f"--grid {word!r}: {error}") from None
        known = KEYS.get(name)
        bare = [part for part in parts if part[0] not in "[\"'"]
        if known and known.holds and bare and len(parts) > 1:
            raise InputError(
                f"--grid {word!r}: {name} holds commas itself: write each of its values in brackets, {name}=[{text}] "
                f"for one, {name}={','.join(f'[{part}]' for part in parts)} for {len(parts)}"
            )
        if known and not known.holds and len(bare) < len(parts) and any(part.startswith("[") for part in parts):
            raise InputError(f"--grid {word!r}: {name} holds no list: write its values without brackets")
        grid[name] = [typed_value(name, part) for part in parts]
        doubled = [value for value in grid[name] if grid[name].count(value) > 1]
        if doubled:
            raise InputError(f"--grid {word!r}: {doubled[0]!r} is given twice")
    return grid


def full(grid: Mapping[str, Sequence[Scalar]]) -> list[dict[str, Scalar]]:
    """Every combination, the last key varying fastest. InputError for more than anybody runs."""
    total = math.prod(map(len, grid.values()))
    if total > MOST_RUNS:
        raise InputError(f"--grid: has {total:,} combinations, at most {MOST_RUNS:,} can be run; --random N takes some")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def drawn(grid: Mapping[str, Sequence[Scalar]], number: int, seed: int) -> list[dict[str, Scalar]]:
    """`number` different combinations at random, by the seed alone. InputError for more than there are."""
    total = math.prod(map(len, grid.values()))
    if number > total:
        raise InputError(f"--random {number}: the grid has {total} combinations")
    found = []
    draw, places = random.Random(seed), dict[int, None]()  # places: the grid may be too large to write out
    if total <= sys.maxsize:
        places = dict.fromkeys(draw.sample(range(total), number))
    while len(places) < number:
        places[draw.randrange(total)] = None
    for place in places:
        one = dict[str, Scalar]()
        for key, values in reversed([*grid.items()]):
            place, at = divmod(place, len(values))
            one[key] = values[at]
        found.append({key: one[key] for key in grid})
    return found


def listed(path: Path) -> list[dict[str, Scalar]]:
    """Combinations from a TOML file with a table [[run]] for each: "section.key" = value. InputError by name."""
    try:
        tables = read_tables(path)
    except InputError as error:
        raise InputError(f"--list {error}") from None
    runs = tables.get("run")
    if not isinstance(runs, list) or not all(isinstance(one, dict) for one in runs) or set(tables) != {"run"}:
        raise InputError(f'--list {path}: write a table [[run]] for each run, with lines such as "algorithm.lr" = 0.1')
    return [
        {
            key: as_list(value, KEYS[key].holds) if key in KEYS and KEYS[key].holds else value
            for key, value in one.items()
        }
        for one in map(parse_sets, runs)
    ]


def seeds_of(
    number: int | None, config: Path, sets: Sequence[str], combinations: Sequence[Mapping[str, Scalar]]
) -> Sequence[int]:
    """The seeds of combinations that name none: 0 … number − 1, else the configuration's own (--set included)."""
    where = "--set" if "run.seed" in parse_sets(sets) else ""
    own = any("run.seed" in one for one in combinations)
    if own and (where or number is not None):
        raise InputError(f"run.seed: is given by {where or '--seeds'} and by --grid or --list; leave one of them out")
    if where and number is not None:
        raise InputError(f"--seeds {number}: --set gives run.seed too; for other seeds write --grid run.seed=7,8,9")
    return range(number) if number is not None else [load(config, sets).config.run.seed]


def cells_of(combinations: Sequence[Mapping[str, Scalar]], seeds: Sequence[int]) -> list[Cell]:
    """Every combination with every seed, or with its own. Folder names say what differs."""
    for key in ("run.out", "run.resume"):
        if any(key in one for one in combinations):
            raise InputError(f"{key}: every run of a sweep has a folder of its own, in --out; leave it out")
    keys = list(dict.fromkeys(key for one in combinations for key in one))
    short = {key: key.rpartition(".")[2] for key in keys}
    for key in keys:  # two sections may have a key of one name
        if [*short.values()].count(short[key]) > 1:
            short[key] = key
    cells, seen = list[Cell](), dict[str, str]()
    for one in combinations:
        others = {key: value for key, value in one.items() if key != "run.seed"}
        group = ",".join(f"{short[key]}={_word(value)}" for key, value in others.items()) or "base"
        for seed in [one["run.seed"]] if "run.seed" in one else seeds:
            # In the form that counts: 1 and 1.0 are one lr. Wrong values are for `check` to name.
            sets = {**others, "run.seed": seed}
            same = json.dumps({key: as_held(key, value) for key, value in sets.items()}, sort_keys=True)
            name = _folder_name(group, seed, same, taken={cell.name for cell in cells} if same not in seen else set())
            if same in seen:
                raise InputError(f"two runs of the sweep are the same: {seen[same]} and {name}")
            seen[same] = name
            cells.append(Cell(name, sets, group))
    return cells


def _word(value: Scalar) -> str:
    """A value as part of a folder's name."""
    return str(value).replace(os.sep, "_").replace(" ", "")


def _folder_name(group: str, seed: Scalar, same: str, taken: Collection[str]) -> str:
    """What a run's folder is called; with a hash where that is too long, or another run's already."""
    name = f"{group},seed={seed}"
    if len(name.encode()) <= LONGEST_NAME and name not in taken:
        return name
    start = group.encode()[: LONGEST_NAME - 40].decode(errors="ignore")
    return f"{start},{hashlib.sha256(same.encode()).hexdigest()[:8]},seed={seed}"


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


# The numbers that every record has, and those of Algorithm 2 (docs/method.md).
_ALWAYS = (
    *("round", "steps", "joint_epochs", "lr", "train_loss", "consensus_distance", "momentum_spread"),
    *("bytes_sent", "wall_seconds", "client_steps_per_second", "num_clients", "num_failed"),
)
_MIXED = ("consensus_distance_after", "momentum_spread_after")


def measured_by(config: Config) -> set[str]:
    """The names of all numbers that such a run may record."""
    kind = Quadratic if config.data.dataset == "quadratic" else Classification
    mixes = config.algorithm.name == "d-sgd-m"
    return {*_ALWAYS, *kind.measures, *((*_MIXED, *CLIENT_MEASURES) if mixes else ())} - {"optimum"}


def sweep(
    config: Path,
    cells: Sequence[Cell],
    out: Path,
    *,
    sets: Sequence[str] = (),
    workers: int = 1,
    ray: str = "",
    track: Sequence[str] = (),
) -> Iterator[Ended]:
    """Run what has not ended yet, `workers` at a time, and give every cell as it ends (those of earlier calls first).

    ray: "" for processes here, "local" for actors of a Ray that is started here, or the address of a Ray cluster, whose
    machines must see `out` under the same path.

    Every run is an ordinary folder out/NAME; one that was cut off goes on from its checkpoint, one that is to be longer
    than it was goes on from its end. out/sweep.json says how each ended. Where a run is interrupted no other is begun;
    KeyboardInterrupt where the sweep was asked to end, by Ctrl-C or SIGTERM, and not a run of it alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    mine = {cell.name for cell in cells}
    # What an earlier call planned and did not begin was given up, unless it is asked for again.
    known = {name: one for name, one in _read(out).items() if name in mine or one.get("status") != WAITING}
    waiting = []
    for cell in cells:
        before = known.get(cell.name, {})
        if before.get("status") in ENDED and not _lacks_rounds(config, cell, out, sets, before["status"]):
            yield Ended(cell, before["status"], before.get("message", ""), 0.0)
        else:
            waiting.append(cell)
    planned = {cell.name: {"status": WAITING, "message": "", "sets": cell.sets} for cell in waiting}
    known = {**planned, **known}
    _write(out, known)
    work = Work(str(config.resolve()), str(out.resolve()), tuple(sets), tuple(track))
    if ray and waiting:
        under_way = on_ray(work, waiting, workers, ray)
    elif workers > 1 and len(waiting) > 1:
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
    if status == "done" and last_round(folder) < load(folder / CONFIG).config.run.num_rounds:
        return True
    asked = resume_config(folder, config, {**parse_sets(sets), **cell.sets, "run.resume": ""}).config
    return asked.run.num_rounds > load(folder / CONFIG).config.run.num_rounds


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


# --- what came out --------------------------------------------------------------------------------------------


def metric_of(folder: Path) -> str:
    """What to rank by where nothing was asked for, from a run that is done: accuracy, or loss."""
    numbers = {name for record in read_rounds(folder) for name in record if number(record, name) is not None}
    return next((name for name in ("test_accuracy", "test_loss", "loss") if name in numbers), "train_loss")


def best_table(ended: Sequence[Ended], out: Path, metric: str) -> tuple[list[str], list[list[str]]]:
    """(header, a row per group, the best first): the metric's last value, mean ± deviation over seeds that are done.

    Accuracies and speeds are better when larger, everything else when smaller. Groups with a run that is not done, or
    that has no such number, come last.
    """
    groups: dict[str, list[float]] = {}
    trouble: dict[str, list[str]] = {}
    for one in ended:
        values, seed = groups.setdefault(one.cell.group, []), one.cell.sets["run.seed"]
        found = finite(read_rounds(out / one.cell.name), metric)[-1:] if one.status == "done" else []
        values += found
        if not found:
            why = f"no {metric}" if one.status == "done" else one.status
            trouble.setdefault(one.cell.group, []).append(f"seed {seed}: {why}")
    sign = -1 if "accuracy" in metric or "per_second" in metric else 1

    def key(group: str) -> tuple[bool, float]:
        values = groups[group]
        return (group in trouble or not values, sign * mean(values) if values else 0.0)

    rows = []
    for group in sorted(groups, key=key):
        values, missing = groups[group], trouble.get(group, [])
        cell = f"{mean(values):.4g}" if values else MISSING
        cell += f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        of = f"{len(values)} of {len(values) + len(missing)}" if missing else f"{len(values)}"
        rows.append([group, cell, of, "; ".join(missing)])
    return ["run", f"{metric}, mean ± deviation", "seeds", "not done"], rows
