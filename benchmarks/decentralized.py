#!/usr/bin/env python3
"""Does mixing the momentum help? Topologies × momentum policies × skew on real Fashion-MNIST, N = 16.

    python benchmarks/decentralized.py --out DIR [--seeds 3] [--rounds 300]

Every cell takes the best of five learning rates by seed 0 (mean accuracy of the clients' own models), then runs the
other seeds with it. Finished runs are kept in DIR and not run again. Prints tables, draws DIR/decentralized.png.
"""

import argparse
import sys
from math import isfinite, nan
from pathlib import Path
from statistics import mean, stdev

import fedmom
from fedmom.records.files import CONFIG
from fedmom.records.history import read_rounds
from fedmom.runs.progress import Quiet

CONFIGURATION = "configs/decentralized/fashion.toml"
TOPOLOGIES = ("ring", "torus", "exponential", "complete")
POLICIES = ("average", "local", "quasi-global")
ALPHAS = (10.0, 1.0, 0.1)
LRS = (0.003, 0.01, 0.03, 0.1, 0.3)
NAMES = {"average": "mixed (the paper)", "local": "kept local", "quasi-global": "quasi-global"}


def ensure(folder: Path, cell: tuple[str, str, float], lr: float, seed: int, rounds: int) -> dict:
    """The last record of one run; started, resumed or only read. {} where it diverged."""
    topology, policy, alpha = cell
    path = folder / f"{topology}-{policy}-alpha{alpha:g}-lr{lr:g}-seed{seed}"
    records = read_rounds(path)
    if not records or records[-1]["round"] < rounds:
        sets = {
            "algorithm.topology": topology,
            "algorithm.momentum-policy": policy,
            "data.alpha": alpha,
            "algorithm.lr": lr,
            "run.seed": seed,
            "run.num-rounds": rounds,
            "run.eval-every": rounds,
            "engine.path": "vmap",
            "engine.chunk-size": 16,
            "engine.threads": 1,
        }
        where = {"resume": path} if (path / CONFIG).exists() else {"out": path}
        result = fedmom.run(CONFIGURATION, sets=sets, callbacks=[Quiet()], **where)
        if result.status == "interrupted":
            raise KeyboardInterrupt
        records = result.rounds if result.status == "done" else []
        print(
            path.name,
            result.status,
            {k: round(v, 4) for k, v in (records or [{}])[-1].items() if "accuracy" in k},
            file=sys.stderr,
            flush=True,
        )
    return records[-1] if records else {}


def accuracy(record: dict, which: str) -> float:
    """In %; NaN for a run that diverged."""
    return 100 * record.get(which, nan)


def finite(values: list[float]) -> list[float]:
    return [value for value in values if isfinite(value)]


def shown(values: list[float]) -> str:
    found = finite(values)
    text = f"{mean(found):.1f}" if found else "–"
    text += f" ± {stdev(found):.1f}" if len(found) > 1 else ""
    return text if len(found) == len(values) else f"{text} [{len(found)} of {len(values)}]"


def draw(results: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(ALPHAS), sharex=True, sharey="row")
    looks = {"average": ("#0072B2", "o", "-"), "local": ("#D55E00", "s", "--"), "quasi-global": ("#009E73", "^", ":")}
    rows = {
        "mean_client_accuracy": "Clients' own models,\nmean accuracy (%)",
        "test_accuracy": "Mean model,\naccuracy (%)",
    }
    for place, (row, (which, label)) in enumerate(zip(panels, rows.items(), strict=True)):
        for axes, alpha in zip(row, ALPHAS, strict=True):
            for shift, policy in enumerate(POLICIES):
                colour, marker, line = looks[policy]
                values = [finite([accuracy(r, which) for r in results[t, policy, alpha][1]]) for t in TOPOLOGIES]
                x = [i + 0.1 * (shift - 1) for i in range(len(TOPOLOGIES))]
                y, error = [mean(v) if v else nan for v in values], [stdev(v) if len(v) > 1 else 0 for v in values]
                axes.errorbar(x, y, error, color=colour, marker=marker, linestyle=line, capsize=3, label=NAMES[policy])
            axes.set_title("" if place else f"α = {alpha:g}", fontsize=10)
            axes.set_xticks(range(len(TOPOLOGIES)), TOPOLOGIES, fontsize=9)
            axes.grid(color="#D9D9D9", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label, fontsize=9)
    lines, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    results = {}
    for alpha in (0.1, 1.0, 10.0):
        for topology in TOPOLOGIES:
            for policy in POLICIES:
                cell = (topology, policy, alpha)
                first = {lr: ensure(options.out, cell, lr, 0, options.rounds) for lr in LRS}
                best = max(LRS, key=lambda lr: first[lr].get("mean_client_accuracy", 0.0))
                others = [ensure(options.out, cell, best, seed, options.rounds) for seed in range(1, options.seeds)]
                results[cell] = (best, [first[best], *others])
    for which in ("mean_client_accuracy", "worst_client_accuracy", "test_accuracy"):
        print(f"\n{which}\n\n| α | momentum | " + " | ".join(TOPOLOGIES) + " |\n|---|---|" + "---|" * len(TOPOLOGIES))
        for alpha in ALPHAS:
            for policy in POLICIES:
                cells = []
                for topology in TOPOLOGIES:
                    best, records = results[topology, policy, alpha]
                    edge = "*" if best in (min(LRS), max(LRS)) else ""
                    cells.append(f"{shown([accuracy(r, which) for r in records])} ({best:g}{edge})")
                print(f"| {alpha:g} | {NAMES[policy]} | " + " | ".join(cells) + " |")
    draw(results, options.out / "decentralized.png")
    print(options.out / "decentralized.png")


if __name__ == "__main__":
    main()
