#!/usr/bin/env python3
"""What the local optimizers cost: client-steps/s of each on the path `stack`, and its part of SGD's.

    python benchmarks/optimizers.py [--seconds 60] [--out DIR]

The workloads `logistic` and `mlp` (hidden 200) of peers.py: 1,000 clients of 60 images of 28 × 28 pixels, cohorts of
100, batch 10, 6 steps; all states averaged in every round. Images are random: speed does not depend on what they show.
All runs of one workload live in one process and take a round each in turns, so that whatever else the machine does hits
all alike; --seconds is for one workload. A rate is the median over rounds after the first two, without evaluation; a
ratio is the median over turns of SGD's seconds by the optimizer's in the same turn.

Prints a table; --out keeps it, and every second that was measured, as DIR/optimizers.md and DIR/optimizers.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPTIMIZERS = {"sgd": 0.02, "adamw": 0.001, "adam": 0.001, "lion": 0.0001, "adagrad": 0.01}  # with their γ
COHORT, STEPS, CLIENTS, EXAMPLES = 100, 6, 1000, 60
WORKLOADS: dict[str, dict[str, Any]] = {
    "logistic": {"model.name": "logistic", "engine.chunk-size": 100},
    "mlp": {"model.name": "mlp", "model.hidden": 200, "engine.chunk-size": 16},
}
FIRST = 2  # turns that are not counted: memory is taken, kernels are loaded
Seconds = dict[str, list[float]]  # {optimizer: of its rounds}


def images(path: Path) -> None:
    """A file of random images of ten classes."""
    draw = np.random.default_rng(0)
    x = draw.integers(256, size=(CLIENTS * EXAMPLES, 1, 28, 28), dtype=np.uint8)
    y = draw.integers(10, size=len(x))
    np.savez(path, x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])


def rounds(data: Path, workload: dict[str, Any], optimizer: str) -> Iterator[None]:
    """One round after the other, without end."""
    from fedmom.backends.local import make_backend
    from fedmom.config.build import make_plan, make_problem
    from fedmom.config.load import load
    from fedmom.config.resolve import resolve
    from fedmom.rounds.loop import run_rounds
    from fedmom.rounds.plan import beginning

    keys = {
        "data.dataset": str(data),
        "data.num-clients": CLIENTS,
        "data.partition": "iid",
        "data.batch-size": 10,
        "algorithm.cohort-size": COHORT,
        "algorithm.num-local-steps": STEPS,
        "algorithm.optimizer": optimizer,
        "algorithm.lr": OPTIMIZERS[optimizer],
        "engine.path": "stack",
        "engine.device": "cpu",
        "engine.remember": False,
        "run.num-rounds": 1_000_000,
        "run.eval-every": 1_000_000,
        **workload,
    }
    config = resolve(load(keys)).config
    problem, plan = make_problem(config, "cpu"), make_plan(config)
    for _ in run_rounds(problem, plan, make_backend(config, problem, plan), beginning(problem, plan)):
        yield


def measure(runs: dict[str, Iterator[None]], seconds: float) -> Seconds:
    """A round of every run in turns, for about so long."""
    found: Seconds = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, found.values())) <= FIRST:
        for name, run in runs.items():
            begin = time.perf_counter()
            next(run)
            found[name].append(time.perf_counter() - begin)
    return {name: each[FIRST:] for name, each in found.items()}


def cell(each: Sequence[float], sgd: Sequence[float]) -> str:
    """A rate, and its part of SGD's."""
    rate = COHORT * STEPS / statistics.median(each)
    return f"{rate:,.0f} ({statistics.median(b / a for a, b in zip(each, sgd, strict=True)):.2f})"


def table(found: dict[str, Seconds]) -> str:
    """Optimizers by workloads."""
    lines = [f"| client-steps/s (of SGD's) | {' | '.join(found)} |", "|" + "---|" * (len(found) + 1)]
    for name in OPTIMIZERS:
        cells = [cell(seconds[name], seconds["sgd"]) for seconds in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = dict[str, Seconds]()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.npz"
        images(data)
        for name, workload in WORKLOADS.items():
            found[name] = measure({o: rounds(data, workload, o) for o in OPTIMIZERS}, options.seconds)
    text = table(found)
    print(text, end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "optimizers.md").write_text(text, encoding="utf-8")
        (options.out / "optimizers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
