"""The command that runs many: `fedmom sweep`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedmom.cli import supervise
from fedmom.cli.options import DONE, EXIT_STATUS, NeededConfig, Sets, Tracks, exit_status, heed_signals
from fedmom.errors import InputError
from fedmom.machine.files import at_home
from fedmom.machine.output import terminal_width

if TYPE_CHECKING:
    from fedmom.experiments.crew import Cell, CellEnded

Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="SECTION.KEY=V,V,…",
        help="Values of a key; lists in brackets: [0.5,0.75],[0.3]. Repeat it for all combinations.",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option("--seeds", help="Run every combination with seeds 0 … N − 1. Default: the seed in CONFIG.", min=1),
]
Folders = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the run folders. Default: run.out, else runs/NAME-sweep."),
]
OnRay = Annotated[
    str,
    typer.Option(
        "--ray",
        metavar="local|HOST:PORT",
        help="Run on Ray actors, here or on a cluster, whose machines must see DIR and the current folder.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Runs at a time, each in its process. Default: 1; on a cluster one per node, of runs without actors of "
        "their own.",
        min=1,
    ),
]
Some = Annotated[
    int, typer.Option("--random", metavar="N", help="Draw N combinations at random instead of running all.", min=0)
]
Chosen = Annotated[
    int,
    typer.Option(
        "--optuna",
        metavar="N",
        help="So many combinations, chosen by an Optuna study; --grid then takes ranges, KEY=LOW..HIGH.",
        min=0,
    ),
]
Listed = Annotated[
    Path | None,
    typer.Option("--list", metavar="FILE.toml", help="Take the combinations from the tables [[run]] of this file."),
]
Metric = Annotated[
    str, typer.Option("--metric", help="Key of rounds.jsonl to rank by. Default: test accuracy, else loss.")
]


def sweep(
    config: NeededConfig,
    grid: Grid = None,
    seeds: Seeds = None,
    sets: Sets = None,
    out: Folders = None,
    workers: Workers = None,
    ray: OnRay = "",
    some: Some = 0,
    file: Listed = None,
    optuna: Chosen = 0,
    metric: Metric = "",
    track: Tracks = None,
) -> int:
    """Run a configuration with every combination of some keys and several seeds; rank the combinations.

    fedmom sweep quickstart --grid algorithm.num-local-steps=1,4,16 --grid data.alpha=0.1,1 --seeds 3

    fedmom sweep quickstart --optuna 20 --grid algorithm.lr=0.001..1 --grid algorithm.beta=0,0.5,0.9

    Every run is an ordinary run folder in DIR. The same command again goes on where the last one stopped: what is done
    is not run again.
    """
    from fedmom.config.load import load
    from fedmom.experiments import sweep as sweeps
    from fedmom.experiments.search.study import parse_search, study
    from fedmom.runs.trackers import make_trackers

    _check_asked(grid, file, seeds, some, optuna)
    cells = [] if optuna else _planned(config, grid or (), file, some, seeds, sets or ())
    total = optuna * (seeds or 1) if optuna else len(cells)
    own = load(config, sets or ()).config.run.out
    folder = out or (at_home(own) if own else Path("runs") / f"{config.stem}-sweep")
    make_trackers(track or ())  # one that is not installed is said before anything runs
    if not optuna:  # which checks its own
        sweeps.check(config, cells, folder, sets or (), here=not ray, metric=metric)
    if ray:
        supervise.stand_by(folder, f"the same command goes on from {folder}")
    heed_signals()
    how: Any = {"sets": sets or (), "workers": workers, "ray": ray, "track": track or ()}
    if optuna:
        search = parse_search(grid or ())
        under_way = study(config, search, optuna, folder, seeds=seeds, metric=metric, **how)
    else:
        under_way = sweeps.sweep(config, cells, folder, **how)
    return _end(*_followed(under_way, total, folder, metric, ray), total, folder)


def _check_asked(grid: list[str] | None, file: Path | None, seeds: int | None, some: int, optuna: int) -> None:
    """InputError where the options do not say what to run."""
    if optuna and not grid:
        raise InputError(f"--optuna {optuna}: needs --grid SECTION.KEY=LOW..HIGH for each key that it may choose")
    if (grid and file) or not (grid or file or seeds):
        raise InputError("give --grid SECTION.KEY=V,V,… (once or more), --list FILE.toml, or --seeds N alone")
    for name, number in (("--random", some), ("--optuna", optuna)):
        if number and (file or (some and optuna)):
            raise InputError(f"{name} {number}: goes with --grid alone")


def _end(ended: Sequence["CellEnded"], metric: str, total: int, folder: Path) -> int:
    """Say what came out; the exit status."""
    from fedmom.results.ranking import told

    if len(ended) < total or any(one.status == "interrupted" for one in ended):
        done = sum(one.status == "done" for one in ended)
        on = f"the same command goes on from {folder}"
        return exit_status("interrupted", f"interrupted, {done} of {total} runs are done; {on}")
    print("\n".join(told(ended, folder, metric, terminal_width())) if metric else folder)
    worst = [EXIT_STATUS[one.status] for one in ended if one.status != "done"]
    return max(worst, default=DONE)


def _planned(
    config: Path, grid: Sequence[str], file: Path | None, some: int, seeds: int | None, sets: Sequence[str]
) -> list["Cell"]:
    """The runs of a grid or a list."""
    from fedmom.experiments.grid import cells_of, drawn, full, listed, parse_grid, seeds_of

    values = parse_grid(grid)
    every = listed(file) if file else drawn(values, some, 0) if some else full(values)
    return cells_of(every, seeds_of(seeds, config, sets, every))


def _followed(
    under_way: Iterable["CellEnded"], total: int, folder: Path, metric: str, ray: str
) -> tuple[list["CellEnded"], str]:
    """(those that ended, up to an interruption; the metric to rank by, "" where none is done), with a bar over all."""
    from fedmom.experiments.ray_crew import RAY_HERE
    from fedmom.records.status import read_status
    from fedmom.results.ranking import metric_of
    from fedmom.runs.bars import over_runs

    ended = list["CellEnded"]()
    try:
        where = (lambda one: read_status(folder / one.cell.name).host) if ray not in ("", RAY_HERE) else None
        for one in over_runs(under_way, total, None, lines=True, where=where):
            ended.append(one)
            if one.status == "done" and not metric:
                metric = metric_of(folder / one.cell.name)
    except KeyboardInterrupt:
        pass
    before = sum(one.status == "done" and not one.seconds for one in ended)
    if before:
        console = Console(stderr=True, highlight=False)
        text = f"{before} of {total} were done before, and were not run again; --out DIR begins anew"
        console.print(text, soft_wrap=not console.is_terminal, markup=False)
    return ended, metric if any(one.status == "done" for one in ended) else ""
