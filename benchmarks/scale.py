#!/usr/bin/env python3
"""Cost against the number of clients N, the cohort, I and the model: start-up, memory and time per round.

    python benchmarks/scale.py --out DIR

Logistic regression on synthetic data (20 features, 2 classes, 2 examples per client), I = 5, B = 2, N = 1,000, 100,000
and 1,000,000 at a cohort of 1,000, each in a process of its own; then cohorts of 250 to 4,000, I = 1 to 16, and an mlp
of two hidden layers of 64 to 512 instead, at N = 100,000. Prints a table, writes DIR/scale.json, scale.md
and scale.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = 2


def synthetic() -> Any:
    """The data set, as many examples as clients need: labels by a random hyperplane, one in ten turned."""
    import torch

    from fedmom.data.datasets import Dataset

    n = EXAMPLES * int(os.environ["SCALE_CLIENTS"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 20, generator=generator)
    y = (x @ torch.randn(20, generator=generator) > 0) ^ (torch.rand(n, generator=generator) < 0.1)
    return Dataset(x, y.long(), x[:1000], y[:1000].long(), 2, (), (), "none")


CHILD = """
import json, resource, sys, time
begin = time.perf_counter()
import fedmom
changes, out = json.loads(sys.argv[1]), sys.argv[2]
at = []
class Watch(fedmom.Callback):
    wants_state = False
    def on_start(self, start):
        at.append(time.perf_counter())
result = fedmom.run(changes, callbacks=[Watch()])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
seconds = [record["wall_seconds"] for record in result.rounds]
json.dump({"startup": at[0] - begin, "peak_mb": peak, "seconds": seconds}, open(out, "w"))
"""


def measure(num_clients: int, cohort: int, steps: int, width: int, rounds: int, folder: Path) -> dict[str, Any]:
    """`width` 0: logistic regression."""
    changes = {
        "data.dataset": "scale:synthetic",
        "data.num-clients": num_clients,
        "data.partition": "iid",
        "data.batch-size": EXAMPLES,
        **({"model.name": "mlp", "model.hidden": width} if width else {"model.name": "logistic"}),
        "algorithm.cohort-size": cohort,
        "algorithm.num-local-steps": steps,
        "run.num-rounds": rounds,
        "run.eval-every": rounds,
        "engine.path": "stack",
        "engine.chunk-size": 1000,
    }
    out = folder / "one.json"
    environment = {**os.environ, "SCALE_CLIENTS": str(num_clients), "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", CHILD, json.dumps(changes), str(out)], env=environment, check=True)
    found = json.loads(out.read_text())
    each = [b - a for a, b in pairwise(found["seconds"][:-1])][1:]
    return {
        "clients": num_clients,
        "cohort": cohort,
        "steps": steps,
        "size": width**2 + 24 * width + 2 if width else 42,  # two hidden layers
        "startup_s": found["startup"],
        "peak_mb": found["peak_mb"],
        "round_ms": 1000 * statistics.median(each),
        "rate": cohort * steps / statistics.median(each),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    looks = {"clients": "Clients N", "cohort": "Cohort C", "steps": "Local steps I", "size": "Parameters d"}
    for axes, (key, label) in zip(figure.subplots(1, 4), looks.items(), strict=True):
        mine = [row for row in rows if row["varied"] == key]
        axes.plot([row[key] for row in mine], [row["round_ms"] for row in mine], "o-", color="#0072B2")
        axes.set(xlabel=label, ylabel="ms per round" if key == "clients" else "", ylim=(0, None))
        if key == "clients":
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, None)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [("clients", n, 1000, 5, 0) for n in (1_000, 100_000, 1_000_000)]
    cases += [("cohort", 100_000, c, 5, 0) for c in (250, 500, 1000, 2000, 4000)]
    cases += [("steps", 100_000, 1000, i, 0) for i in (1, 2, 4, 8, 16)]
    cases += [("size", 100_000, 1000, 5, width) for width in (64, 128, 256, 512)]
    rows, failed = list[dict[str, Any]](), list[str]()
    for varied, *case in cases:
        begin = time.perf_counter()
        try:
            rows.append({"varied": varied, **measure(*case, options.rounds, options.out)})
        except Exception as error:  # out of memory, say: the others are measured
            failed.append(f"{varied}, {case}: failed ({type(error).__name__}: {str(error)[-200:]})")
        print((rows or [failed])[-1], f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        (options.out / "scale.json").write_text(json.dumps({"rows": rows, "failed": failed}, indent=1))
    lines = [
        "| N | cohort | I | d | start-up, s | peak memory, MB | ms per round | client-steps/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['clients']:,} | {r['cohort']:,} | {r['steps']} | {r['size']:,} | {r['startup_s']:.1f} | "
        f"{r['peak_mb']:,.0f} | {r['round_ms']:.1f} | {r['rate']:,.0f} |"
        for r in rows
    ]
    lines += ["", *failed] if failed else []
    (options.out / "scale.md").write_text("\n".join(lines) + "\n")
    draw(rows, options.out / "scale.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
