#!/usr/bin/env python3
"""Does `engine.path = "auto"` take the fastest path? Six models, every path by name, and what `auto` made of them.

    python benchmarks/auto.py --out DIR [--cifar FILE.npz] [--rounds 6]

Each run in a process of its own, on all cores: client-steps/s, the median over rounds after the first two, without
evaluation. The chunk is left to the engine in all of them. Batch 10; logistic and the mlps on Fashion-MNIST (cohort
100, 6 steps), the convolutional models on CIFAR-10 (cohort 16, 5 steps; --cifar: a file with x_train, y_train, x_test
and y_test). Prints a table and writes DIR/auto.json and auto.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

PATHS = ("loop", "vmap", "stack", "factors", "auto")
DENSE = {"data.dataset": "fashion-mnist", "algorithm.cohort-size": 100, "algorithm.num-local-steps": 6}
IMAGES = {"algorithm.cohort-size": 16, "algorithm.num-local-steps": 5}
MODELS: dict[str, dict[str, Any]] = {
    "logistic": {"model.name": "logistic", **DENSE},
    "mlp, width 32": {"model.name": "mlp", "model.hidden": 32, **DENSE},
    "mlp, width 200": {"model.name": "mlp", "model.hidden": 200, **DENSE},
    "cnn (Fashion-MNIST)": {"model.name": "cnn", **DENSE, "algorithm.cohort-size": 16},
    "cnn (CIFAR-10)": {"model.name": "cnn", **IMAGES},
    "resnet20": {"model.name": "resnet20", **IMAGES},
}
CHILD = """
import json, sys
import fedmom
result = fedmom.run(json.loads(sys.argv[1]), callbacks=[fedmom.Callback()])
engine = result.config.engine
seconds = [record["wall_seconds"] for record in result.rounds]
print(json.dumps({"path": engine.path, "chunk": engine.chunk_size, "seconds": seconds}))
"""


def measure(changes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """{"path", "chunk", "rate"}, or {"trouble"} where the model cannot take the path."""
    keys = {
        "data.num-clients": 1000,
        "data.partition": "iid",
        "engine.remember": False,
        "data.batch-size": 10,
        "algorithm.lr": 0.02,
        "run.num-rounds": rounds + 1,  # the last one is evaluated
        "run.eval-every": rounds + 1,
        **changes,
    }
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(keys)], capture_output=True, text=True)
    if done.returncode:
        return {"trouble": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    found = json.loads(done.stdout.splitlines()[-1])
    each = [b - a for a, b in pairwise(found.pop("seconds")[:-1])][1:]
    steps = keys["algorithm.cohort-size"] * keys["algorithm.num-local-steps"]
    return {**found, "rate": steps / statistics.median(each)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, keys in MODELS.items():
        if "data.dataset" not in keys:
            if options.cifar is None:
                continue
            keys = {**keys, "data.dataset": str(options.cifar)}
        rows[name] = {path: measure({**keys, "engine.path": path}, options.rounds) for path in PATHS}
        print(name, rows[name], file=sys.stderr, flush=True)
        (options.out / "auto.json").write_text(json.dumps(rows, indent=1))
    lines = [f"| client-steps/s | {' | '.join(PATHS)} | auto took |", "|---" * (len(PATHS) + 2) + "|"]
    for name, row in rows.items():
        rates = {path: found.get("rate") for path, found in row.items()}
        best = max((rate for path, rate in rates.items() if rate and path != "auto"), default=None)
        cells = [("–" if r is None else f"**{r:,.0f}**" if r == best else f"{r:,.0f}") for r in rates.values()]
        took = f"{row['auto']['path']} × {row['auto']['chunk']}" if "path" in row["auto"] else row["auto"]["trouble"]
        lines.append(f"| {name} | {' | '.join(cells)} | {took} |")
    (options.out / "auto.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
