"""`fedmom.sweep`: what the command of that name does, with a list of results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmom.config.keys import Config
from fedmom.config.load import config_file, flat, load, parse_sets, toml_scalar
from fedmom.config.resolve import resolve
from fedmom.errors import InputError
from fedmom.experiments.grid import cells_of, drawn, full, seeds_of
from fedmom.experiments.search.study import search_of, study
from fedmom.experiments.sweep import check
from fedmom.experiments.sweep import sweep as run_cells
from fedmom.machine.files import at_home, write_text
from fedmom.records.files import CONFIG
from fedmom.records.status import Cell, CellEnded
from fedmom.runs.bars import over_runs
from fedmom.runs.result import Result
from fedmom.runs.result import load as load_result

BASE = "base.toml"  # in a sweep's folder: the configuration that Python gave it


def sweep(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    grid: Mapping[str, Iterable[Any]] | None = None,
    seeds: int | Iterable[int] | None = None,
    sets: Iterable[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    workers: int | None = None,
    ray: str = "",
    random: int = 0,
    optuna: int = 0,
    metric: str = "",
    track: Sequence[str] = (),
    progress: bool | None = None,
) -> list[Result]:
    """Run `config` with every combination of some keys' values and several seeds, as `fedmom sweep` does.

    grid: {"algorithm.lr": [0.1, 0.3]}; with `optuna` ranges too: {"algorithm.lr": "0.01..1"}. seeds: 3 for 0, 1, 2, or
    the seeds themselves; left out, the configuration's. sets: keys that all runs change. out: holds the run folders
    (left out: runs/NAME-sweep); the same call again goes on where the last one stopped. workers: runs at a time, each
    in a process of its own, so a script needs its `if __name__ == "__main__":`. ray: "local" or a cluster's address,
    for actors instead; a cluster runs one per node where `workers` is left out. random: so many combinations, drawn,
    instead of all. optuna: so many that an Optuna study chooses, by `metric` (left out: accuracy, else loss). progress:
    a bar over the runs; left out, on a terminal.

    A Result for every run, in the grid's order; of a run that was refused or failed it says why. Raises InputError for
    bad input before any run begins, and KeyboardInterrupt at Ctrl-C.
    """
    values, number = _asked(grid or {}, seeds, optuna)
    changes = [f"{key}={_text(value)}" for key, value in parse_sets([sets] if isinstance(sets, str) else sets).items()]
    source, folder = _placed(config, changes, out)
    how: dict[str, Any] = {"sets": changes, "workers": workers, "ray": ray, "track": track}
    if optuna:
        under_way = study(source, search_of(values), optuna, folder, seeds=number, metric=metric, **how)
        total, order = optuna * (number or 1), None
    else:
        cells = _cells(source, values, number, random, changes)
        check(source, cells, folder, changes, here=not ray, metric=metric)
        under_way, total, order = run_cells(source, cells, folder, **how), len(cells), [cell.name for cell in cells]
    found = {one.cell.name: one for one in over_runs(under_way, total, progress)}
    if len(found) < total or any(one.status == "interrupted" for one in found.values()):
        raise KeyboardInterrupt
    return [_result(source, found[name], folder, changes) for name in order or found]


def _asked(grid: Any, seeds: Any, optuna: int) -> tuple[dict[str, Any], int | None]:
    """({key: its values, a range as it is}, the number of seeds). InputError for what is no grid, and no seeds."""
    if not isinstance(grid, Mapping):
        raise InputError(f"grid = {grid!r}: must give each key its values, such as {{'algorithm.lr': [0.1, 0.3]}}")
    number = seeds if isinstance(seeds, int) else None
    if number is not None and number < 1:
        raise InputError(f"seeds = {number}: must be >= 1")
    if optuna and seeds is not None and number is None:
        raise InputError(f"seeds = {seeds!r}: must be a number of seeds with optuna")
    values: dict[str, Any] = {}
    for key, given in (grid if seeds is None or number else {**grid, "run.seed": seeds}).items():
        values[key] = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else given
        if not isinstance(given, str | Iterable) or not values[key]:
            raise InputError(f"grid: {key} = {given!r}: write a list of values, such as [0.1, 0.3]")
    return values, number


def _cells(
    source: Path, values: Mapping[str, Any], seeds: int | None, random: int, changes: Sequence[str]
) -> list[Cell]:
    """The runs of a grid; InputError for a range, which only a study takes."""
    if ranges := [key for key, value in values.items() if isinstance(value, str)]:
        raise InputError(f"grid: {ranges[0]} = {values[ranges[0]]!r}: write a list of values; ranges go with optuna")
    every = drawn(values, random, 0) if random else full(values)
    return cells_of(every, seeds_of(seeds, source, changes, every))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else toml_scalar(value)


def _placed(config: Any, changes: Sequence[str], out: str | Path | None) -> tuple[Path, Path]:
    """(a file with the configuration, the sweep's folder): its processes read the one, and write into the other."""
    given = isinstance(config, str | Path)
    loaded = load(config, changes)
    own = loaded.config.run.out
    name = f"{Path(config).stem}-sweep" if given else "sweep"
    folder = at_home(out) if out else at_home(own) if own else Path("runs") / name
    if given:
        return config_file(config), folder
    if (folder / CONFIG).exists():
        raise InputError(f"out = {str(folder)!r}: is a run folder; a sweep needs one of its own")
    # What was given, and no more: what else the file named would count as given too.
    told = load(config)
    lines = [f'"{name}" = {toml_scalar(value)}' for name, value in flat(told.config).items() if name in told.given]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / BASE, _sections(lines))
    return folder / BASE, folder


def _sections(lines: Sequence[str]) -> str:
    """Lines '"section.key" = value' as tables."""
    tables: dict[str, list[str]] = {}
    for line in lines:
        section, _, rest = line.removeprefix('"').partition(".")
        tables.setdefault(section, []).append(rest.replace('"', "", 1))
    return "\n\n".join("\n".join([f"[{section}]", *rows]) for section, rows in tables.items()) + "\n"


def _result(config: Path, ended: CellEnded, folder: Path, changes: Sequence[str]) -> Result:
    """Of its folder; of a run that has none how it ended."""
    own = folder / ended.cell.name
    if (own / CONFIG).is_file():
        return load_result(own)
    settled = resolve(load(config, {**parse_sets(changes), **ended.cell.sets})).config
    return Result(ended.status, [], {}, {}, settled, None, ended.message)
