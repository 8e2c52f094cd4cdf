#!/usr/bin/env python3
"""What should travel, and how often? States averaged, rarely, kept or reset; SGD and AdamW; skewed and alike clients.

    python benchmarks/what_travels.py --out DIR [--cifar FILE.npz] [--parts NAME …] [--rows WORD …] [--seeds 3]

A cell is a row, an I and how clients differ. Its learning rate is the best of three, by the training loss of x̂ on the
first seed; then come the other seeds. Every run is a line of DIR/runs.jsonl as soon as it is finished, and the same
command does what is missing. One run of every kind is timed first, and the seconds of all are printed. At the end, or
by itself with --draw, come DIR/tables.md and, where matplotlib is there, the pictures.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from what_travels_parts import PARTS, write_data
from what_travels_tables import draw, last_quarter, tables, with_tables

import fedmom

Line = dict[str, Any]


class Cell(NamedTuple):
    """The runs that differ in learning rate and seed alone."""

    part: str
    interval: int
    data: str
    row: str


class Run(NamedTuple):
    """One run of a cell."""

    cell: Cell
    lr: float
    seed: int

    @property
    def kind(self) -> tuple[str, int, str]:
        """What decides how long it takes."""
        return self.cell.part, self.cell.interval, PARTS[self.cell.part].rows[self.cell.row].optimizer


# --- one run ------------------------------------------------------------------------------------------------------


def keys_of(run: Run, folder: Path) -> dict[str, Any]:
    """Its configuration."""
    part = PARTS[run.cell.part]
    row, interval = part.rows[run.cell.row], run.cell.interval
    file = {"data.dataset": str(folder / "data" / part.file)} if part.file else {}
    return {
        **part.keys,
        **part.data[run.cell.data],
        **file,
        "algorithm.optimizer": row.optimizer,
        "algorithm.states": row.states,
        "algorithm.codecs": row.codecs,
        "algorithm.lr": run.lr,
        "algorithm.num-local-steps": interval,
        "run.num-rounds": part.steps // interval,
        "run.eval-every": part.every // interval,
        "run.seed": run.seed,
    }


@functools.cache
def problem_of(part: str, folder: Path) -> Any:
    """All training examples of a part: which client holds which of them does not matter for their mean."""
    from fedmom.config.build import make_problem
    from fedmom.config.load import load
    from fedmom.config.resolve import resolve

    setting = PARTS[part]
    cell = Cell(part, setting.intervals[0], next(iter(setting.data)), next(iter(setting.rows)))
    keys = keys_of(Run(cell, 0.001, 0), folder)
    return make_problem(resolve(load(keys)).config, "cpu")


class Watch(fedmom.Callback):
    """f(x̂), the loss on all training examples, at the last quarter of a run's evaluations."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.part, self.folder, self.losses = run.cell.part, folder, list[float]()
        part = PARTS[self.part]
        late = last_quarter(part.steps // part.every) - 1
        self.measure, self.first = part.measure, (part.steps - late * part.every) // run.cell.interval

    def on_round(self, record: Any, state: Any) -> None:
        if record["round"] < self.first or self.measure not in record:
            return
        if self.measure == "test_loss":  # which is f without noise
            self.losses.append(record["test_loss"])
            return
        problem = problem_of(self.part, self.folder)
        self.losses.append(problem.evaluate_clients(state, torch.arange(len(problem.sizes)))["loss"])


def measured(run: Run, folder: Path) -> Line:
    """A line of runs.jsonl: the curve [steps, MB that all clients sent, measure], the loss of x̂, seconds."""
    part = PARTS[run.cell.part]
    watch, wall, cpu = Watch(run, folder), time.monotonic(), time.process_time()
    found = fedmom.run(keys_of(run, folder), callbacks=[watch if run.seed == 0 else fedmom.Callback()])
    if found.status == "interrupted":
        raise KeyboardInterrupt
    curve = [
        [r["steps"], round(r["bytes_sent"] / 1e6, 4), float(f"{part.scale * r[part.measure]:.5g}")]
        for r in found.rounds
        if part.measure in r
    ]
    done = found.status == "done" and all(map(math.isfinite, watch.losses))
    line = {**run.cell._asdict(), "lr": run.lr, "seed": run.seed, "status": "done" if done else "diverged"}
    line["loss"] = float(f"{fmean(watch.losses):.5g}") if done and watch.losses else None
    line["seconds"], line["cpu"] = round(time.monotonic() - wall, 2), round(time.process_time() - cpu, 2)
    return {**line, **where(), "curve": curve if done else []}


@functools.cache
def where() -> Line:
    """What the run ran on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "torch": importlib.metadata.version("torch"), "python": platform.python_version()}


# --- which runs ---------------------------------------------------------------------------------------------------


def cells_of(parts: Sequence[str], words: Sequence[str]) -> list[Cell]:
    """All cells of these parts, or those whose rows have one of the words in their names."""
    return [
        Cell(name, interval, data, row)
        for name in parts
        for interval in reversed(PARTS[name].intervals)  # few rounds are soon done
        for data in PARTS[name].data
        for row in PARTS[name].rows
        if not words or any(word in row for word in words)
    ]


def read(folder: Path) -> dict[Run, Line]:
    """The finished runs; a line that was cut off is none."""
    path, found = folder / "runs.jsonl", {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        cell = Cell(*(line[name] for name in Cell._fields))
        if cell.part in PARTS and cell.row in PARTS[cell.part].rows:
            found[Run(cell, line["lr"], line["seed"])] = line
    return found


def trials(cell: Cell) -> list[Run]:
    return [Run(cell, lr, 0) for lr in PARTS[cell.part].rates(cell.row, cell.interval)]


def chosen(cell: Cell, done: dict[Run, Line]) -> float | None:
    """The best learning rate, once all are tried; None before, and where all diverged."""
    found = {run.lr: done[run]["loss"] for run in trials(cell) if run in done and done[run]["status"] == "done"}
    tried = all(run in done for run in trials(cell))
    return min(found, key=found.__getitem__) if tried and found else None


def wanted(cell: Cell, done: dict[Run, Line], seeds: int) -> list[Run]:
    """The runs that can begin, first things first."""
    lr = chosen(cell, done)
    return [*trials(cell), *(Run(cell, lr, seed) for seed in range(1, seeds) if lr is not None)]


def missing(cells: Sequence[Cell], done: dict[Run, Line], seeds: int) -> Iterator[Run]:
    return (run for cell in cells for run in wanted(cell, done, seeds) if run not in done)


def one_of_each(cells: Sequence[Cell], done: dict[Run, Line]) -> list[Run]:
    """A first run of every kind of which none is done."""
    found = {run.kind: run for cell in reversed(cells) for run in trials(cell)[:1]}
    return [run for kind, run in reversed(found.items()) if kind not in {other.kind for other in done}]


def budget(cells: Sequence[Cell], done: dict[Run, Line], seeds: int, jobs: int) -> str:
    """How long it will take, by the runs of each kind that are done."""
    seconds: dict[tuple[str, int, str], list[float]] = {}
    for run, line in done.items():
        seconds.setdefault(run.kind, []).append(line["cpu"])
    costs = []
    for cell in cells:
        untried = sum(run not in done for run in trials(cell))
        count = untried + seeds - 1 if untried else sum(run not in done for run in wanted(cell, done, seeds))
        costs.append((count, fmean(seconds[trials(cell)[0].kind])))
    total = sum(count * each for count, each in costs)
    runs = sum(count for count, _ in costs)
    return f"{runs} runs, {total:.0f} CPU-seconds: {total / jobs:.0f} s of {jobs} cores that do nothing else"


# --- all of them --------------------------------------------------------------------------------------------------


def ready() -> None:
    """In a new process: what is loaded once is not part of the first run's time."""
    sys.path.insert(0, str(Path(__file__).parent))
    fedmom.run({"data.dataset": "quadratic", "run.num-rounds": 1}, callbacks=[fedmom.Callback()])


def work(runs: Iterable[Run] | None, cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Do these runs, or else all that are missing; each is written when it is done."""
    done, begin = read(options.out), time.monotonic()
    context = multiprocessing.get_context("spawn")
    flying: dict[Future[Line], Run] = {}
    with (
        (options.out / "runs.jsonl").open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(options.jobs, context, ready) as pool,
    ):
        while True:
            left = list(runs) if runs is not None else missing(cells, done, options.seeds)
            idle = (run for run in left if run not in done and run not in flying.values())
            while len(flying) < options.jobs and (run := next(idle, None)):
                flying[pool.submit(measured, run, options.out)] = run
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run, line = flying.pop(future), future.result()
                done[run] = line
                file.write(json.dumps(line) + "\n")
                file.flush()
                end = f"{line['curve'][-1][2]:g}" if line["curve"] else "diverged"
                said = (
                    f"{run.cell.part} I={run.cell.interval} {run.cell.data}: {run.cell.row}, lr {run.lr:g}, {run.seed}"
                )
                print(f"{time.monotonic() - begin:5.0f} s  {said}: {end}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--cifar", type=Path, metavar="FILE.npz", help="all of CIFAR-10; without it that part is left out"
    )
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), metavar="NAME")
    parser.add_argument("--rows", nargs="*", default=[], metavar="WORD", help="rows with one of these in their names")
    parser.add_argument("--intervals", nargs="*", type=int, default=[], metavar="I", help="cells with one of these I")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="run nothing: tables and pictures of what is there")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables between their marks there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out = options.out.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also ends the processes of the pool
    if not options.draw:
        there = options.cifar is not None or (options.out / "data" / PARTS["cifar"].file).exists()
        parts = [part for part in options.parts if part != "cifar" or there]
        try:
            for part in parts:
                write_data(part, options.out / "data" / PARTS[part].file, options.cifar)
        except fedmom.InputError as error:
            sys.exit(str(error))
        options.out.mkdir(parents=True, exist_ok=True)
        cells = [c for c in cells_of(parts, options.rows) if not options.intervals or c.interval in options.intervals]
        work(one_of_each(cells, read(options.out)), cells, options)
        print(budget(cells, read(options.out), options.seeds, options.jobs), file=sys.stderr, flush=True)
        work(None, cells, options)
    found = {cell: found_of(cell, done) for done in [read(options.out)] for cell in cells_of(list(PARTS), [])}
    texts = tables(PARTS, found)
    print("\n".join(texts.values()))
    (options.out / "tables.md").write_text("\n".join(texts.values()), encoding="utf-8")
    if options.page:
        options.page.write_text(with_tables(options.page.read_text(encoding="utf-8"), texts), encoding="utf-8")
    draw(PARTS, found, options.out)


def found_of(cell: Cell, done: dict[Run, Line]) -> list[Line]:
    """The runs of a cell at its best learning rate, one of each seed; none where all of them diverged."""
    lr = chosen(cell, done)
    return [line for run, line in sorted(done.items()) if run.cell == cell and run.lr == lr]


if __name__ == "__main__":
    main()
