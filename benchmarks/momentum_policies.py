#!/usr/bin/env python3
"""Does averaging the momentum pay? Policies average / local / reset × I = 1, 4, 16 on real images.

    python benchmarks/momentum_policies.py --out DIR [--config configs/fashion-mnist.toml] [--seeds 3]

Every cell gets three learning rates and the same number of local steps T = 640; a cell's value is the best of
its learning rates, by the mean over seeds. After 40 rounds all intervals have had equal rounds; at the end, equal
joint epochs. Finished runs are kept in DIR and not run again. Prints two Markdown tables.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import fedmom
from fedmom.records.files import CONFIG
from fedmom.records.history import read_rounds

POLICIES, INTERVALS = ("average", "local", "reset"), (1, 4, 16)
NUM_STEPS, EQUAL_ROUNDS = 640, 40
# Three learning rates around the best: longer rounds want smaller ones, and momentum that never builds up (reset
# at I = 1 is SGD without momentum) wants larger ones, by up to 1 / (1 − β) = 10.
LRS = {1: (0.03, 0.1, 0.3), 4: (0.03, 0.1, 0.3), 16: (0.01, 0.03, 0.1)}
LRS_WITHOUT_MOMENTUM = (0.1, 0.3, 1.0)


def lrs(policy: str, interval: int) -> tuple[float, ...]:
    return LRS_WITHOUT_MOMENTUM if (policy, interval) == ("reset", 1) else LRS[interval]


def ensure(config: str, folder: Path, policy: str, interval: int, lr: float, seed: int) -> dict[int, float]:
    """{round: test accuracy in %} of one run; started, resumed or only read."""
    path = folder / f"{policy}-I{interval}-lr{lr:g}-seed{seed}"
    rounds = NUM_STEPS // interval
    records = read_rounds(path)
    if not records or records[-1]["round"] < rounds:
        sets = {
            "algorithm.momentum-policy": policy,
            "algorithm.num-local-steps": interval,
            "algorithm.lr": lr,
            "run.num-rounds": rounds,
            "run.seed": seed,
            "run.eval-every": EQUAL_ROUNDS,
            "run.checkpoint-every": rounds,
            "engine.path": "vmap",
            "engine.chunk-size": 10,
            "engine.threads": 1,
        }
        where = {"resume": path} if (path / CONFIG).exists() else {"out": path}
        result = fedmom.run(config, sets=sets, callbacks=[fedmom.Callback()], **where)
        if result.status == "interrupted":
            raise KeyboardInterrupt
        records = result.rounds
        print(f"{path.name}: {result.status}, {value(records, rounds)}", file=sys.stderr, flush=True)
    return {r["round"]: 100 * r["test_accuracy"] for r in records if "test_accuracy" in r}


def value(records: list[dict], number: int) -> str:
    accuracy = next((r["test_accuracy"] for r in records if r["round"] == number), None)
    return "diverged" if accuracy is None else f"{100 * accuracy:.2f} %"


def cell(runs: dict[float, list[dict[int, float]]], number: int) -> str:
    """Best lr by mean accuracy at a round: `mean ± deviation (lr)`; * where that lr is at the edge of the tried.

    A seed that diverged speaks against its lr as 0 % would, and is no part of the mean: "[2 of 3]".
    """
    best = max(runs, key=lambda lr: mean(r.get(number, 0.0) for r in runs[lr]))
    found = [r[number] for r in runs[best] if number in r]
    edge = "*" if best in (min(runs), max(runs)) else ""
    text = f"{mean(found):.1f}" if found else "–"
    text += f" ± {stdev(found):.1f}" if len(found) > 1 else ""
    text += f" [{len(found)} of {len(runs[best])}]" if len(found) < len(runs[best]) else ""
    return f"{text} ({best:g}{edge})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion-mnist.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs: dict[tuple[str, int], dict[float, list[dict[int, float]]]] = {}
    for seed in range(options.seeds):
        for policy in POLICIES:
            for interval in INTERVALS:
                for lr in lrs(policy, interval):
                    # At I = 1 x̄ does not depend on whether u is averaged (docs/method.md): one run serves both.
                    run_as = "average" if (policy, interval) == ("local", 1) else policy
                    accuracies = ensure(options.config, options.out, run_as, interval, lr, seed)
                    runs.setdefault((policy, interval), {}).setdefault(lr, []).append(accuracies)
    titles = [f"at {EQUAL_ROUNDS} rounds", f"at {NUM_STEPS} local steps (equal joint epochs)"]
    for title, at_round in zip(titles, (lambda _: EQUAL_ROUNDS, lambda i: NUM_STEPS // i), strict=True):
        print(f"\nTest accuracy in % {title}\n")
        print("| momentum | " + " | ".join(f"I = {i}" for i in INTERVALS) + " |")
        print("|---" * (len(INTERVALS) + 1) + "|")
        for policy in POLICIES:
            print(f"| {policy} | " + " | ".join(cell(runs[policy, i], at_round(i)) for i in INTERVALS) + " |")


if __name__ == "__main__":
    main()
