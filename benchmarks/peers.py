#!/usr/bin/env python3
"""fedmom beside its peers: the same data, model, minibatch sizes, steps and momentum, on one machine, in one run.

    python benchmarks/peers.py --out DIR [--cifar FILE.npz] [--environments DIR] [--workloads cnn mlp]

Systems, each in processes of its own, one after the other:

* `fedmom`: the engine, path and chunk as `auto` chooses them, all cores as torch threads (or on the GPU).
* `fedmom × P processes`: `engine.workers = P`, Ray actors of one thread each.
* `fedmom, Flower messages`: `--backend simulation`, P actors.
* `loop`, `loop × P processes`: one resident PyTorch model per process (channels-last, fused SGD), its clients one after
  another, means by the parent: what a good engineer writes by hand. The strongest rival.
* `Flower 1.41`: its Simulation Engine with P actors of one thread each, benchmarks/peers_app, stock FedAvg.
* `pfl 0.6`: its simulated FederatedAveraging, one process, and P by torch.distributed.
* `BlazeFL 2.0`: its FedAvg with P worker processes (shared memory), and with P threads.
* `FedJAX 0.0.17`: its federated averaging, compiled by XLA, which uses all cores.

pfl, BlazeFL and FedJAX are installed in environments of their own under --environments at first use
(peers_environments.py has the versions); `--environments none` leaves them out.

Workloads: `cnn` is pfl's CIFAR-10 benchmark (1,000 clients of 50 images, batch 10, 5 steps) in smaller cohorts, and
`cnn-plain` the same with momentum 0; `resnet20` has 16 clients of 50 images, all in every round, batch 10, 5 steps
(--cifar: a file with x_train and y_train; without it Fashion-MNIST, said so in the table). `logistic` and `mlp` (hidden
200) are Fashion-MNIST with 1,000 clients of 60, batch 10, 6 steps; `mlp-small` the same with hidden 32.
Client-steps/s: the median over rounds after the first two; no evaluation. All but fedmom start u from 0 in every round
and average x alone: their work is less.

A system that fails, or gives no rates, is a marked cell with its reason below the table; the others are measured.

That all do the same work is checked as far as it shows: as many parameters, and a training loss that is finite and
comes down; a system where it is not so is marked.

Writes DIR/peers.json, peers.md and peers.png; what DIR/peers.json has of other systems and workloads is kept, so that a
long run can be made of parts. `--gpu`: fedmom's engine, loop and pfl alone, on the GPU, with pfl's own cohorts of 50;
it needs torch and numpy, and an environment of pfl if it is to be there.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers_environments import python_of
from peers_systems import ROOT, fedmom, flower, loop, pfl, script

BASE = {"lr": 0.02, "momentum": 0.9, "batch": 10, "clients": 1000}
WORKLOADS: dict[str, dict[str, Any]] = {
    "logistic": {"model": "logistic", "source": "fashion-mnist", "steps": 6, "cohort": 100, "size": 60},
    "mlp-small": {"model": "mlp", "hidden": 32, "source": "fashion-mnist", "steps": 6, "cohort": 100, "size": 60},
    "mlp": {"model": "mlp", "hidden": 200, "source": "fashion-mnist", "steps": 6, "cohort": 100, "size": 60},
    "cnn": {"model": "cnn", "source": "cifar10", "steps": 5, "cohort": 16, "size": 50, "part": 0.5},
    "cnn-plain": {"model": "cnn", "source": "cifar10", "steps": 5, "cohort": 16, "size": 50, "part": 0.5},
    "resnet20": {"model": "resnet20", "source": "cifar10", "steps": 5, "cohort": 16, "size": 50, "part": 0.5},
}
WORKLOADS["cnn-plain"]["momentum"] = 0.0
WORKLOADS["resnet20"]["clients"] = 16


def prepare(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The workload with its data in DIR/NAME.npz: x uint8 [N, n, ...], y [N, n]."""
    load = {**BASE, **WORKLOADS[name]}
    if options.gpu and load["model"] == "cnn":
        load["cohort"] = 50
    if load["source"] == "cifar10" and options.cifar is not None:
        with np.load(options.cifar) as file:
            x, y = file["x_train"], file["y_train"]
    elif options.gpu:  # where no data set is at hand: speed does not depend on what images show
        shape = (3, 32, 32) if load["source"] == "cifar10" else (1, 28, 28)
        load["source"], draw = "random", np.random.default_rng(0)
        x, y = draw.integers(256, size=(60000, *shape), dtype=np.uint8), draw.integers(10, size=60000)
    else:
        from fedmom.data.datasets import load_dataset

        load["source"] = "fashion-mnist"
        data = load_dataset("fashion-mnist", "")
        x, y = data.x_train.numpy(), data.y_train.numpy()
    order = np.random.default_rng(0).permutation(len(y))[: load["clients"] * load["size"]]
    x, y = x[order], y[order]
    np.savez(folder / f"{name}-flat.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    apart = (load["clients"], load["size"])
    np.savez(folder / f"{name}.npz", x=x.reshape(*apart, *x.shape[1:]), y=y.reshape(apart))
    load |= {"name": name, "data": str(folder / f"{name}.npz"), "shape": list(x.shape[1:])}
    pixels = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1) / 255  # of each channel, as fedmom takes them
    load |= {"mean": pixels.mean(1).tolist(), "std": pixels.std(1).tolist()}
    (folder / f"{name}.json").write_text(json.dumps(load))
    return load


def systems(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """{name: function of (workload, rounds)}."""
    cores, place = os.cpu_count() or 1, options.environments

    def python(name: str) -> Path:
        return python_of(name, place)

    if options.gpu:
        found = {
            "fedmom": lambda load, r: script(load, folder, r, [sys.executable], "peers_engine", "cuda"),
            "loop": lambda load, r: loop(load, r, 1, "cuda"),
            "pfl 0.6": lambda load, r: pfl(load, folder, r, python("pfl"), 1),
        }
    else:
        found = {
            "fedmom": lambda load, r: fedmom(load, folder, r, engine__device="cpu"),
            f"fedmom × {cores} processes": lambda load, r: fedmom(load, folder, r, engine__workers=cores),
            "fedmom, Flower messages": lambda load, r: fedmom(
                load, folder, r, run__backend="simulation", simulation__num_actors=cores
            ),
            f"loop × {cores} processes": lambda load, r: loop(load, r, cores),
            "loop": lambda load, r: loop(load, r, 1),
            "Flower 1.41": lambda load, r: flower(load, folder, max(4, r // 2), cores),
            "pfl 0.6": lambda load, r: pfl(load, folder, r, python("pfl"), 1),
            f"pfl 0.6 × {cores} processes": lambda load, r: pfl(load, folder, r, python("pfl"), cores),
            f"BlazeFL 2.0 × {cores} processes": lambda load, r: blazefl(load, folder, r, python, cores, "processes"),
            f"BlazeFL 2.0 × {cores} threads": lambda load, r: blazefl(load, folder, r, python, cores, "threads"),
            "FedJAX 0.0.17": lambda load, r: script(load, folder, r, [str(python("fedjax"))], "peers_fedjax"),
        }
    if str(place) == "none":
        found = {name: way for name, way in found.items() if not name.startswith(("pfl", "BlazeFL", "FedJAX"))}
    return {name: way for name, way in found.items() if not options.systems or name.split()[0] in options.systems}


def blazefl(load: dict[str, Any], folder: Path, rounds: int, python: Any, workers: int, way: str) -> dict[str, Any]:
    return script(load, folder, rounds, [str(python("blazefl"))], "peers_blazefl", str(workers), way)


def measured(load: dict[str, Any], system: str, way: Any, rounds: int) -> dict[str, Any]:
    """One cell of the table; whatever one system does, the others are measured."""
    row: dict[str, Any] = {"workload": load["name"], "system": system, "source": load["source"]}
    row |= {"load": os.getloadavg()[0]}  # of the machine, before
    try:
        found = way(load, max(4, round(rounds * load.get("part", 1))))
        for key, least in (("seconds", 3), ("losses", 2)):
            if len(found[key]) < least:
                raise RuntimeError(f"its run gave {len(found[key])} {key}")
        rates = [load["cohort"] * load["steps"] / seconds for seconds in found["seconds"][2:]]
        row |= {"rate": statistics.median(rates), "all": rates}
        row |= {"parameters": found["parameters"], "losses": [found["losses"][0], found["losses"][-1]]}
        return row | ({"doubt": doubt} if (doubt := doubts(load, row)) else {})
    except (Exception, SystemExit) as error:  # the last is how flower_overhead's `call` says it
        kept = {key: value for key, value in row.items() if key not in ("rate", "all")}
        return kept | {"failed": "failed", "why": f"{type(error).__name__}: {error}"}


def doubts(load: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a system may not have done the same work, or ""."""
    from peers_app import common

    want = common.num_parameters(common.model_of(load))
    first, last = row["losses"]
    if row["parameters"] != want:
        return f"{row['parameters']} parameters instead of {want}"
    # Labels drawn at random can be learned by heart alone.
    if not (np.isfinite(last) and (last < first or load["source"] == "random")):
        return f"training loss from {first:.4g} to {last:.4g}"
    return ""


# --- tables and pictures --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["workload"] for row in rows))
    lines = ["| client-steps/s | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = []
        for name in names:
            row = next((r for r in rows if (r["system"], r["workload"]) == (system, name)), None)
            cells.append("–" if row is None else row.get("failed") or f"{row['rate']:,.0f}{'?' * ('doubt' in row)}")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    data = ", ".join(f"{row['workload']}: {row['source']}" for row in {r["workload"]: r for r in rows}.values())
    doubtful = [(r, r.get("doubt") or r.get("why", "").strip().rpartition("\n")[2]) for r in rows]
    notes = [f"{r['system']}, {r['workload']}: {why}" for r, why in doubtful if why]
    return "\n".join([*lines, "", f"Data: {data}.", *notes]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(2.2 + 2.1 * len(names), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    systems = list(dict.fromkeys(row["system"] for row in rows))[::-1]
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names, strict=True):
        mine = [row for row in rows if row["workload"] == name and "rate" in row]
        places = [systems.index(row["system"]) for row in mine]
        colours = ["#0072B2" if row["system"].startswith("fedmom") else "#999999" for row in mine]
        axes.barh(places, [row["rate"] for row in mine], color=colours)
        for place, row in zip(places, mine, strict=True):
            axes.text(row["rate"], place, f" {row['rate']:,.0f}", va="center", fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlim(0, 1.35 * max((row["rate"] for row in mine), default=1))
        axes.set_yticks(range(len(systems)), systems, fontsize=8)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel("client-steps/s", fontsize=9)
    figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--systems", nargs="+", help="first words of their names")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers", help="of the peers, or none")
    parser.add_argument("--rounds", type=int, default=12, help="half of them for convolutions")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "peers.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in options.workloads:
        load = prepare(name, options, options.out)
        for system, way in systems(options, options.out).items():
            row = measured(load, system, way, options.rounds)
            print(
                name, system, {k: v for k, v in row.items() if k not in ("all", "system")}, file=sys.stderr, flush=True
            )
            rows = [old for old in rows if (old["workload"], old["system"]) != (name, system)] + [row]
            row["chosen"] = load.pop("chosen", None)
            report = {"machine": platform.platform(), "cores": os.cpu_count(), "rows": rows}
            path.write_text(json.dumps(report, indent=1))
            (options.out / "peers.md").write_text(table(rows))
    print(table(rows))
    try:
        draw(rows, options.out / "peers.png")
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
