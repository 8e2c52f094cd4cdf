"""`fedmom sweep`: many runs of one configuration, as ordinary run folders, side by side, resumable as a whole."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedmom.config import Scalar, load, parse_sets
from fedmom.cores import usable_cores
from fedmom.errors import InputError, unknown
from fedmom.imports import one_line
from fedmom.progress import Quiet
from fedmom.records import CONFIG, read_rounds, write_text
from fedmom.resolve import resolve, resume_config
from fedmom.runner import run
from fedmom.tables import MISSING
from fedmom.trackers import Tracking

MANIFEST = "sweep.json"
ENDED = ("done", "diverged")  # runs that another try would not change


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    sets: dict[str, Scalar]  # what it changes, run.seed included
    group: str  # the name without the seed


class Ended(NamedTuple):
    """How a cell ended, now or in an earlier call."""

    cell: Cell
    status: str
    message: str
    seconds: float  # 0 if nothing had to be run


def parse_grid(words: Sequence[str]) -> dict[str, list[Scalar]]:
    """["algorithm.lr=0.1,0.3"] -> {"algorithm.lr": [0.1, 0.3]}. InputError for a wrong key, value or form."""
    grid: dict[str, list[Scalar]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise InputError(f"--grid {word!r}: write SECTION.KEY=VALUE,VALUE,…")
        if name in grid:
            raise InputError(f"--grid {word!r}: {name} is given twice")
        grid[name] = [parse_sets([f"{name}={value}"])[name] for value in values.split(",")]
        doubled = [value for value in grid[name] if grid[name].count(value) > 1]
        if doubled:
            raise InputError(f"--grid {word!r}: {doubled[0]!r} is given twice")
    return grid


def full(grid: Mapping[str, Sequence[Scalar]]) -> list[dict[str, Scalar]]:
    """Every combination, the last key varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def drawn(grid: Mapping[str, Sequence[Scalar]], number: int, seed: int) -> list[dict[str, Scalar]]:
    """`number` different combinations at random, by the seed alone. InputError for more than there are."""
    every = full(grid)
    if number > len(every):
        raise InputError(f"--random {number}: the grid has {len(every)} combinations")
    return random.Random(seed).sample(every, number)


def listed(path: Path) -> list[dict[str, Scalar]]:
    """Combinations from a TOML file with a table [[run]] for each: "section.key" = value. InputError by name."""
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"--list {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--list {path}: not TOML ({error})") from None
    runs = tables.get("run")
    if not isinstance(runs, list) or not all(isinstance(one, dict) for one in runs) or set(tables) != {"run"}:
        raise InputError(f'--list {path}: write a table [[run]] for each run, with lines such as "algorithm.lr" = 0.1')
    return [parse_sets(one) for one in runs]


def cells_of(combinations: Sequence[Mapping[str, Scalar]], seeds: Sequence[int]) -> list[Cell]:
    """Every combination with every seed. Folder names say what differs."""
    keys = list(dict.fromkeys(key for one in combinations for key in one))
    short = {key: key.rpartition(".")[2] for key in keys}
    for key in keys:  # two sections may have a key of one name
        if [*short.values()].count(short[key]) > 1:
            short[key] = key
    cells = []
    for one in combinations:
        group = ",".join(f"{short[key]}={_word(value)}" for key, value in one.items()) or "base"
        for seed in seeds:
            cells.append(Cell(f"{group},seed={seed}", {**one, "run.seed": seed}, group))
    names = [cell.name for cell in cells]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise InputError(f"two runs of the sweep are the same: {doubled}")
    return cells


def _word(value: Scalar) -> str:
    """A value as part of a folder's name."""
    return str(value).replace(os.sep, "_").replace(" ", "")


def check(config: Path, cells: Sequence[Cell], out: Path, sets: Sequence[str]) -> None:
    """Every run's configuration, before the first one starts. InputError by the run's name.

    A run that is there already may only have become longer, as with any resume.
    """
    for cell in cells:
        changes = {**parse_sets(sets), **cell.sets}
        try:
            if (out / cell.name / CONFIG).exists():
                resume_config(out / cell.name, config, changes)
            else:
                resolve(load(config, changes))
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from None


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
    than it was goes on from its end. out/sweep.json says how each ended. A run that is interrupted ends the sweep.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = _read(out)
    waiting = []
    for cell in cells:
        before = known.get(cell.name, {})
        if before.get("status") in ENDED and not _longer(config, cell, out, sets):
            yield Ended(cell, before["status"], before.get("message", ""), 0.0)
        else:
            waiting.append(cell)
    work = Work(str(config.resolve()), str(out.resolve()), tuple(sets), tuple(track))
    spread = _on_ray(work, waiting, workers, ray) if ray and waiting else None
    for ended in spread or _side_by_side(work, waiting, workers):
        known[ended.cell.name] = {"status": ended.status, "message": ended.message, "sets": ended.cell.sets}
        write_text(out / MANIFEST, json.dumps(known, indent=1) + "\n")
        yield ended
        if ended.status == "interrupted":
            return


def _longer(config: Path, cell: Cell, out: Path, sets: Sequence[str]) -> bool:
    """Whether a run that ended is asked for more rounds than its folder was made for, or its folder is gone."""
    folder = out / cell.name
    if not (folder / CONFIG).exists():
        return True
    asked = resume_config(folder, config, {**parse_sets(sets), **cell.sets}).config
    return asked.run.num_rounds > load(folder / CONFIG).config.run.num_rounds


class Work(NamedTuple):
    """What every run of a sweep has in common; it travels to other processes."""

    config: str
    out: str
    sets: tuple[str, ...]
    track: tuple[str, ...]
    threads: int = 0  # of torch; 0: as the configuration says


def _side_by_side(work: Work, cells: Sequence[Cell], workers: int) -> Iterator[Ended]:
    if workers <= 1 or len(cells) <= 1:
        for cell in cells:
            yield _run_one(work, cell)
        return
    work = work._replace(threads=max(1, usable_cores() // workers))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(cells)), context, _die_with_parent, (os.getpid(),)) as pool:
        futures: dict[Future[Ended], Cell] = {pool.submit(_run_one, work, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except Exception as error:  # its process died
                    yield Ended(futures[future], "failed", f"{type(error).__name__}: {error}".split("\n")[0], 0.0)
        except BaseException:  # Ctrl-C, SIGTERM, a reader that went away: the runs leave their checkpoints too
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(work: Work, cells: Sequence[Cell], workers: int, address: str) -> Iterator[Ended]:
    from fedmom.executors import Failure, Pool, PoolOptions

    here = os.getcwd()
    work = work._replace(threads=max(1, usable_cores() // workers))

    def make_worker() -> Callable[[Cell], Ended]:
        if os.path.isdir(here):  # data.data-dir and module:function are looked for where the sweep was started
            os.chdir(here)
        return lambda cell: _run_one(work, cell)

    options = PoolOptions(num_workers=min(workers, len(cells)), ray_address="" if address == "local" else address)
    with Pool(make_worker, options) as pool:
        cell_of = {cell.name: cell for cell in cells}
        for cell in cells:
            pool.submit(cell.name, cell)
        for _ in cells:
            taken = pool.take()
            assert taken is not None
            name, answer = taken
            yield Ended(cell_of[str(name)], "failed", answer.reason, 0.0) if isinstance(answer, Failure) else answer


def _run_one(work: Work, cell: Cell) -> Ended:
    """One cell, new or from where it was."""
    begin, folder = time.monotonic(), Path(work.out) / cell.name
    changes = {**parse_sets(work.sets), **cell.sets}
    followers = [Quiet(), Tracking(work.track)] if work.track else [Quiet()]
    try:
        if (folder / CONFIG).exists():
            result = run(work.config, sets=changes, resume=folder, callbacks=followers)
        else:
            if work.threads:
                changes.setdefault("engine.threads", work.threads)
            result = run(work.config, sets=changes, out=folder, callbacks=followers)
    except InputError as error:
        return Ended(cell, "failed", str(error), time.monotonic() - begin)
    except Exception as error:  # of the user's own model, say: the other runs go on
        return Ended(cell, "failed", one_line(error), time.monotonic() - begin)
    return Ended(cell, result.status, result.message, time.monotonic() - begin)


def _die_with_parent(parent: int) -> None:
    """A sweep that was killed leaves no runs behind, which would hold their folders against the next call.

    One that is asked to end asks them, as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(out: Path) -> dict[str, dict[str, Any]]:
    path = out / MANIFEST
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        assert isinstance(known, dict)
        return known
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError):
        raise InputError(f"{path}: is not what a sweep writes; remove it, and unfinished runs go on") from None


# --- what came out --------------------------------------------------------------------------------------------


def metric_of(folder: Path, metric: str = "") -> str:
    """What to rank by, from a run that is done: as asked, else accuracy or loss. InputError for another name."""
    records = read_rounds(folder)
    numbers = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
    if metric and metric not in numbers:
        raise unknown("--metric", metric, sorted(numbers))
    return metric or next((name for name in ("test_accuracy", "test_loss", "loss") if name in numbers), "train_loss")


def best_table(ended: Sequence[Ended], out: Path, metric: str) -> tuple[list[str], list[list[str]]]:
    """(header, a row per group, the best first): the metric's last value, mean ± deviation over seeds.

    Accuracies are better when larger, everything else when smaller. Groups with a run that is not done come last.
    """
    groups: dict[str, list[float]] = {}
    trouble: dict[str, str] = {}
    for one in ended:
        groups.setdefault(one.cell.group, [])
        if one.status != "done":
            trouble[one.cell.group] = f"seed {one.cell.sets['run.seed']}: {one.status}"
            continue
        values = [record[metric] for record in read_rounds(out / one.cell.name) if metric in record]
        groups[one.cell.group] += values[-1:]
    sign = -1 if "accuracy" in metric else 1

    def key(group: str) -> tuple[bool, float]:
        values = groups[group]
        return (group in trouble or not values, sign * mean(values) if values else 0.0)

    rows = []
    for group in sorted(groups, key=key):
        values = groups[group]
        cell = f"{mean(values):.4g}" if values else MISSING
        cell += f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        rows.append([group, cell, str(len(values)), trouble.get(group, "")])
    return ["run", f"{metric}, mean ± deviation", "seeds", "not done"], rows
