#!/usr/bin/env python3
"""What should travel, and how often? States averaged, rarely, kept or reset; SGD and AdamW; skewed and alike clients.

    python benchmarks/what_travels.py [--seeds 3] [--rounds 60] [--rows WORD …] [--out FILE.json]

Real digits, 10 clients, an mlp, I = 20, equal steps for every row. A row's learning rate is the best of three, chosen
on the first seed by the training loss of the last rounds. Prints how long it will take, then a Markdown table: test
accuracy of x̂ after the last round (mean and deviation over seeds) and the megabytes that all clients sent.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import fedmom

COMMON = {
    "data.num-clients": 10,
    "data.batch-size": 16,
    "model.name": "mlp",
    "model.hidden": 64,
    "algorithm.num-local-steps": 20,
    "engine.path": "stack",
    "engine.chunk-size": 10,
    "engine.threads": 1,
}
DATA = {"skewed": {"data.alpha": 0.3}, "alike": {"data.partition": "iid"}}
LRS = {"sgd": (0.02, 0.05, 0.1), "adamw": (0.0007, 0.002, 0.005)}
ROWS = {  # (optimizer, states, codecs)
    "u average": ("sgd", "", ""),
    "u every 4": ("sgd", "u: average every 4", ""),
    "u local": ("sgd", "u: local", ""),
    "u reset": ("sgd", "u: reset", ""),
    "x every 2, u every 2": ("sgd", "x: average every 2; u: average every 2", ""),
    "u in bfloat16": ("sgd", "", "u: bfloat16"),
    "u in int8": ("sgd", "", "u: int8"),
    "u in int8 without feedback": ("sgd", "", "u: int8 plain"),
    "u in int4": ("sgd", "", "u: int4"),
    "u in topk 0.1": ("sgd", "", "u: topk 0.1"),
    "x and u in int8": ("sgd", "", "x: int8; u: int8"),
    "x and u in topk 0.1": ("sgd", "", "x: topk 0.1; u: topk 0.1"),
    "m, v average": ("adamw", "m: average; v: average", ""),
    "m every 3, v every 3": ("adamw", "m: average every 3; v: average every 3", ""),
    "m every 3, v every 6": ("adamw", "m: average every 3; v: average every 6", ""),
    "m every 6, v every 3": ("adamw", "m: average every 6; v: average every 3", ""),
    "m, v every 6": ("adamw", "m: average every 6; v: average every 6", ""),
    "m reset, v average": ("adamw", "m: reset; v: average", ""),
    "m average, v local": ("adamw", "m: average; v: local", ""),
    "m, v local": ("adamw", "m: local; v: local", ""),
    "m, v reset": ("adamw", "m: reset; v: reset", ""),
}


def one(row: str, data: str, lr: float, seed: int, rounds: int) -> dict[str, float]:
    """A run: its training loss over the last rounds, its accuracy and its bytes; infinite loss where it diverged."""
    optimizer, states, codecs = ROWS[row]
    keys = {"algorithm.optimizer": optimizer, "algorithm.states": states, "algorithm.codecs": codecs}
    keys |= {"algorithm.lr": lr, "run.seed": seed, "run.num-rounds": rounds, "run.eval-every": rounds}
    found = fedmom.run({**COMMON, **DATA[data], **keys}, callbacks=[fedmom.Callback()])
    if found.status == "interrupted":
        raise KeyboardInterrupt
    if found.status != "done":
        return {"loss": float("inf"), "accuracy": 0.0, "bytes": 0.0}
    last = found.rounds[-1]
    loss = mean(record["train_loss"] for record in found.rounds[-5:])
    return {"loss": loss, "accuracy": 100 * last["test_accuracy"], "bytes": last["bytes_sent"] / 1e6}


def measure(row: str, data: str, seeds: int, rounds: int) -> dict[str, object]:
    """The row at its best learning rate, over seeds."""
    tried = {lr: one(row, data, lr, 0, rounds) for lr in LRS[ROWS[row][0]]}
    lr = min(tried, key=lambda lr: tried[lr]["loss"])
    runs = [tried[lr], *(one(row, data, lr, seed, rounds) for seed in range(1, seeds))]
    return {"row": row, "data": data, "lr": lr, "runs": runs}


def cell(found: dict) -> str:
    """Accuracy over seeds; how many of them there are where some diverged."""
    right = [run["accuracy"] for run in found["runs"] if run["loss"] < float("inf")]
    if not right:
        return "diverged"
    text = f"{mean(right):.1f}" + (f" ± {stdev(right):.1f}" if len(right) > 1 else "")
    return text + (f" [{len(right)} of {len(found['runs'])}]" if len(right) < len(found["runs"]) else "")


def table(results: list[dict]) -> str:
    lines = ["| states | optimizer | MB sent | skewed (lr) | alike (lr) |", "|---|---|---|---|---|"]
    for row in dict.fromkeys(found["row"] for found in results):
        each = {found["data"]: found for found in results if found["row"] == row}
        sent = max(run["bytes"] for found in each.values() for run in found["runs"])
        cells = [f"{cell(each[data])} ({each[data]['lr']:g})" if data in each else "" for data in DATA]
        lines.append(f"| {row} | {ROWS[row][0]} | {sent:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    one(args.rows[0], "skewed", LRS[ROWS[args.rows[0]][0]][0], 0, args.rounds)
    count = len(args.rows) * len(DATA) * (len(LRS["sgd"]) + args.seeds - 1)
    each = time.monotonic() - begin
    print(f"{count} runs of some {each:.1f} s: about {count * each:.0f} s", file=sys.stderr, flush=True)
    results = []
    for row in args.rows:
        results += [measure(row, data, args.seeds, args.rounds) for data in DATA]
        print(f"{time.monotonic() - begin:5.0f} s  {row}", file=sys.stderr, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
