#!/usr/bin/env python3
"""What the local optimizers cost: client-steps/s of each on the path `stack`, and its part of SGD's.

    python benchmarks/optimizers.py [--seconds 60] [--workloads logistic mlp] [--chunks 4 16] [--one-thread] [--out DIR]

The workloads `logistic` and `mlp` (hidden 200) of peers.py: 1,000 clients of 60 images of 28 × 28 pixels, cohorts of
100, batch 10, 6 steps; all states averaged in every round. Images are random: speed does not depend on what they show.
Each optimizer runs in chunks of 4, 16 and 100 clients (--chunks), and its fastest counts, as `auto` would take it.

All runs of one workload live in one process and take a round each in turns, so that whatever else the machine does hits
all alike; --seconds is for one workload. A rate is the median over rounds after the first two, without evaluation; a
ratio is the median over turns of SGD's seconds by the optimizer's in the same turn, each in its fastest chunks.

--one-thread: the process's own CPU seconds on one thread, for a machine that others use: two threads wait for each
other there, and the clock on the wall counts what others do.

Prints a table; --out keeps it, and every second that was measured, as DIR/optimizers.md and DIR/optimizers.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPTIMIZERS = {"sgd": 0.02, "adamw": 0.001, "adam": 0.001, "lion": 0.0001, "adagrad": 0.01}  # with their γ
COHORT, STEPS, CLIENTS, EXAMPLES = 100, 6, 1000, 60
CHUNKS = (4, 16, 100)
WORKLOADS: dict[str, dict[str, Any]] = {
    "logistic": {"model.name": "logistic"},
    "mlp": {"model.name": "mlp", "model.hidden": 200},
}
FIRST = 2  # turns that are not counted: memory is taken, kernels are loaded
Seconds = dict[str, list[float]]  # {optimizer × chunk size: of its rounds}


def images(path: Path) -> None:
    """A file of random images of ten classes."""
    draw = np.random.default_rng(0)
    x = draw.integers(256, size=(CLIENTS * EXAMPLES, 1, 28, 28), dtype=np.uint8)
    y = draw.integers(10, size=len(x))
    np.savez(path, x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])


def runs(data: Path, workload: dict[str, Any], chunks: Sequence[int] = CHUNKS) -> dict[str, Iterator[Any]]:
    """{optimizer × chunk size: one round after the other, without end} of one problem."""
    from fedmom.config.build import make_plan, make_problem
    from fedmom.config.load import load, replace
    from fedmom.config.resolve import resolve
    from fedmom.engine.engine import Engine
    from fedmom.rounds.loop import run_rounds
    from fedmom.rounds.plan import beginning

    keys = {
        "data.dataset": str(data),
        "data.num-clients": CLIENTS,
        "data.partition": "iid",
        "data.batch-size": 10,
        "algorithm.cohort-size": COHORT,
        "algorithm.num-local-steps": STEPS,
        "run.num-rounds": 1_000_000,
        "run.eval-every": 1_000_000,
        **workload,
    }
    problem, found = make_problem(resolve(load(keys)).config, "cpu"), dict[str, Iterator[Any]]()
    for optimizer, lr in OPTIMIZERS.items():
        config = resolve(load({**keys, "algorithm.optimizer": optimizer})).config
        plan = make_plan(replace(config, "algorithm", lr=lr))
        for size in chunks:
            engine = Engine(problem, plan.method, path="stack", chunk_size=size)
            found[f"{optimizer} × {size}"] = run_rounds(problem, plan, engine, beginning(problem, plan))
    return found


def measure(each: dict[str, Iterator[Any]], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """A round of every run in turns, for about so long by the wall; the rounds by `clock`."""
    found: Seconds = {name: [] for name in each}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, found.values())) <= FIRST:
        for name, run in each.items():
            begin = clock()
            next(run)
            found[name].append(clock() - begin)
    return {name: own[FIRST:] for name, own in found.items()}


def fastest(seconds: Seconds, optimizer: str) -> str:
    """The name of its fastest run."""
    return min(
        (name for name in seconds if name.split()[0] == optimizer), key=lambda name: statistics.median(seconds[name])
    )


def cell(seconds: Seconds, optimizer: str) -> str:
    """A rate, its part of SGD's and its chunks."""
    name = fastest(seconds, optimizer)
    rate = COHORT * STEPS / statistics.median(seconds[name])
    ratios = [b / a for a, b in zip(seconds[name], seconds[fastest(seconds, "sgd")], strict=True)]
    return f"{rate:,.0f} ({statistics.median(ratios):.2f}, × {name.split()[-1]})"


def table(found: dict[str, Seconds]) -> str:
    """Optimizers by workloads."""
    lines = [f"| client-steps/s (of SGD's, clients at once) | {' | '.join(found)} |"]
    lines.append("|" + "---|" * (len(found) + 1))
    for name in OPTIMIZERS:
        lines.append(f"| {name} | {' | '.join(cell(seconds, name) for seconds in found.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--one-thread", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clock, found = time.process_time if options.one_thread else time.perf_counter, dict[str, Seconds]()
    if options.one_thread:
        import torch

        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.npz"
        images(data)
        for name in options.workloads:
            found[name] = measure(runs(data, WORKLOADS[name], options.chunks), options.seconds, clock)
    text = table(found)
    print(text, end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "optimizers.md").write_text(text, encoding="utf-8")
        (options.out / "optimizers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
