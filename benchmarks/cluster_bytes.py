#!/usr/bin/env python3
"""Bytes between the nodes of a Ray cluster in a round of Algorithm 1, against the number of nodes.

    python benchmarks/cluster_bytes.py --out DIR [--measure 2 4]

Computed: for 1 to 100 nodes of 8 actors and 50 clients each, by the functions of fedmom that give blocks to nodes and
cut them into the sums that travel; beside it what one mean per block and one answer per client would be.
Measured, with --measure, as root on Linux: clusters of so many nodes in namespaces of this machine, each with an
interface of its own, whose counters say what a round adds. DIR gets cluster_bytes.json and cluster-bytes.png. The unit
is x and u in float32, the model twice.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ACTORS, CLIENTS = 8, 50  # of a node
FEATURES = 20_000  # of the measured model: below the size from which an actor has one block alone
SHORT, LONG = 2, 12  # rounds


def computed(num_nodes: int) -> dict[str, float]:
    """Models that travel in a round; the driver's node is the first, and sends nothing to itself."""
    from fedmom.actors.nodes import neighbours
    from fedmom.method.partial_sums import aligned

    homes = neighbours({str(node): ACTORS for node in range(num_nodes)}, ACTORS * num_nodes)
    sums = []
    for node in range(1, num_nodes):
        ranges = aligned(place for place, home in enumerate(homes) if home == str(node))
        sums.append(sum(2 if length > 1 else 1 for _, length in ranges))  # sums are float64, a block alone float32
    others = num_nodes - 1
    return {
        "nodes": num_nodes,
        "received by a node": min(others, 1),
        "sent by a node": max(sums, default=0),
        "in all": others + sum(sums),
        "in all, one mean per block": others + others * ACTORS,
        "in all, one answer per client": 2 * others * CLIENTS,
    }


def measured(num_nodes: int) -> dict[str, Any]:
    """Of a run of so many rounds more: what the last node received and sent for each, and the driver's node."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import numpy as np
    from machines import Cluster

    with tempfile.TemporaryDirectory() as name, Cluster(Path(name)) as cluster:
        for _ in range(num_nodes - 1):
            cluster.join()
        rng, num_clients = np.random.default_rng(0), CLIENTS * num_nodes
        x, y = (
            rng.normal(size=(2 * num_clients + 20, FEATURES)).astype(np.float32),
            np.arange(2 * num_clients + 20) % 10,
        )
        np.savez(Path(name) / "wide.npz", x_train=x[20:], y_train=y[20:], x_test=x[:20], y_test=y[:20])
        sets = {
            "data.dataset": str(Path(name) / "wide.npz"),
            "data.num-clients": num_clients,
            "data.partition": "iid",
            "data.batch-size": 1,
            "model.name": "logistic",
            "algorithm.num-local-steps": 1,
            "run.eval-every": 100,
            "engine.path": "loop",
            "engine.workers": num_nodes,
            "simulation.ray-address": cluster.address,
        }
        found = []
        for rounds in (SHORT, LONG):
            before = [machine.wire_bytes() for machine in (cluster.head, cluster.others[-1])]
            given = json.dumps({"config": {}, "sets": {**sets, "run.num-rounds": rounds}})
            words = cluster.head.words(sys.executable, str(ROOT / "tests" / "cluster" / "drive.py"))
            done = subprocess.run(words, input=given, text=True, capture_output=True, env=cluster.head.environment())
            assert '["done"' in done.stdout, done.stdout + done.stderr
            after = [machine.wire_bytes() for machine in (cluster.head, cluster.others[-1])]
            found.append([b - a for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True)])
    model = 2 * 4 * (FEATURES * 10 + 10)
    head_in, head_out, received, sent = ((b - a) / (LONG - SHORT) / model for a, b in zip(*found, strict=True))
    return {
        "nodes": num_nodes,
        "received by a node": received,
        "sent by a node": sent,
        "received by the driver's": head_in,
        "sent by the driver's": head_out,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Lines are computed, circles measured."""
    from fedmom.results.pictures.style import new_figure, plain_axes, save_picture

    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    rows = [row for row in results["computed"] if row["nodes"] > 1]
    nodes = [row["nodes"] for row in rows]
    for key, said in (
        ("in all, one answer per client", "one answer per client"),
        ("in all, one mean per block", "one mean per actor"),
        ("in all", "sums on the nodes: all"),
        ("sent by a node", "sums on the nodes: sent by one"),
    ):
        axes.plot(nodes, [row[key] for row in rows], label=said)
    for row in results["measured"]:
        axes.plot(row["nodes"], row["sent by a node"], "o", color="black", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="nodes of 8 actors and 50 clients", ylabel="models per round")
    axes.set_xticks([2, 5, 10, 20, 50, 100], labels=["2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    plain_axes(axes)
    axes.legend(frameon=False)
    save_picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", type=int, nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cluster_bytes.json"
    before = json.loads(path.read_text())["measured"] if path.exists() else []
    new = [measured(number) for number in options.measure]
    kept = [row for row in before if row["nodes"] not in options.measure]
    results = {
        "computed": [computed(number) for number in range(1, 101)],
        "measured": sorted(kept + new, key=lambda row: row["nodes"]),
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "cluster-bytes.png")
    for row in [*(results["computed"][number - 1] for number in (2, 4, 10, 100)), *results["measured"]]:
        print(row)


if __name__ == "__main__":
    main()
