#!/usr/bin/env python3
"""Algorithm 2 on sixteen quadratics: measured disagreement and contraction beside the closed forms of docs/method.md.

    python benchmarks/decentralized_quadratics.py --out DIR

f_i = (x − c_i)²/2, centers of configs/decentralized/quadratic.toml, β = 0.9, γ = 0.05, exact gradients, float64.
Prints two tables, draws DIR/decentralized-quadratics.png. Seconds on any computer.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import fedmom
from fedmom.engine.engine import Engine
from fedmom.engine.gossip import GossipRounds
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import Topology, make_topology
from fedmom.method.schedules import LearningRate
from fedmom.method.state import ClientState
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import Plan, beginning
from fedmom.tasks.quadratic import Quadratic, X

CONFIGURATION = "configs/decentralized/quadratic.toml"
TOPOLOGIES = ("ring", "torus", "hypercube", "star")
POLICIES = {"average": "u mixed (the paper)", "local": "u kept local"}
ROUNDS, N, BETA, LR = 400, 16, 0.9, 0.05
COLOURS = {"ring": "#0072B2", "torus": "#D55E00", "hypercube": "#009E73", "star": "#CC79A7"}
LINES = {"average": "-", "local": "--"}


def disagreement(topology: str, policy: str) -> np.ndarray:
    """[R] root mean square over clients of x_i − x̄ after each exchange, as `fedmom run` records it."""
    sets = {"algorithm.topology": topology, "algorithm.momentum-policy": policy, "run.num-rounds": ROUNDS}
    result = fedmom.run(CONFIGURATION, sets=sets, callbacks=[fedmom.Callback()])
    return np.sqrt([record["consensus_distance_after"] for record in result.rounds])


def centers() -> np.ndarray:
    import tomllib

    data = tomllib.loads(Path(CONFIGURATION).read_text())["data"]
    return np.array([float(c) for c in data["centers"].split(";")])


def closed_form(topology: Topology, policy: str) -> float:
    """The same where it settles: γλb/((1−λ)(1−λβ) + λγh) per mode, λβ → β where u is kept local; h = 1."""
    values, modes = np.linalg.eigh(topology.matrices[0].dense())
    c = centers()
    b = modes.T @ (c - c.mean())
    kept = values < 1 - 1e-9
    values, b = values[kept], b[kept]
    damped = 1 - (values if policy == "average" else 1.0) * BETA
    x = LR * values * b / ((1 - values) * damped + values * LR)
    return float(np.sqrt((x**2).sum() / N))


def contraction(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """[R + 1] ‖x_i − x̄‖ and ‖u_i − ū‖ from random rows without any gradient."""
    problem = Quadratic([[1e-300]] * N, [[0.0]] * N, [0.0])
    plan = Plan(Method(BETA), LearningRate(LR), 60, N, 1, num_local_steps=1, topology=topology)
    found = []
    for part in ("params", "momentum"):
        rows = torch.from_numpy(np.random.default_rng(0).normal(size=(N, 1)))
        zero = torch.zeros_like(rows)
        start = {"params": rows, "momentum": zero} if part == "params" else {"params": zero, "momentum": rows}
        done = beginning(problem, plan)._replace(rows=ClientState({X: start["params"]}, {X: start["momentum"]}, {}))
        states = [getattr(done.rows, part)[X].numpy()]
        rounds = GossipRounds(Engine(problem, plan.method, path="vmap", chunk_size=N), topology, "cpu")
        for new, _ in run_rounds(problem, plan, rounds, done):
            states.append(getattr(new.rows, part)[X].numpy())
        found.append(np.array([np.linalg.norm(s - s.mean()) for s in states]))
    return found[0], found[1]


def draw(measured: dict, predicted: dict, rates: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (topology, policy), values in measured.items():
        label = topology if policy == "average" else None
        left.plot(range(1, ROUNDS + 1), values, LINES[policy], color=COLOURS[topology], label=label)
        left.plot([ROUNDS * 1.02], [predicted[topology, policy]], "<", color=COLOURS[topology], clip_on=False)
    left.plot([], [], "-", color="#555555", label=POLICIES["average"])
    left.plot([], [], "--", color="#555555", label=POLICIES["local"])
    left.plot([], [], "<", color="#555555", label="closed form")
    left.set(xlabel="Step t", ylabel="Disagreement of x, root mean square", yscale="log", xlim=(1, ROUNDS))
    for topology, (x, u, value) in rates.items():
        t = np.arange(len(x))
        for series, line, rate in ((x, "-", value), (u, ":", BETA * value)):
            shown = series > 1e-12
            right.plot(t[shown], series[shown], line, color=COLOURS[topology], linewidth=2.2, alpha=0.55)
            late = np.flatnonzero(shown)[-1]
            right.plot(t, series[late] * rate ** (t - late), color="black", linewidth=0.6)
    right.plot([], [], "-", color="#555555", linewidth=2.2, alpha=0.55, label="x")
    right.plot([], [], ":", color="#555555", linewidth=2.2, alpha=0.55, label="u")
    right.plot([], [], "-", color="black", linewidth=0.6, label="slope |λ₂| (x), β|λ₂| (u)")
    right.set(xlabel="Step t", ylabel="Distance from the mean, no gradients", yscale="log", ylim=(1e-8, 20))
    for axes, columns in ((left, 2), (right, 1)):
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower right" if axes is left else "lower left")
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    measured, predicted, rates = {}, {}, {}
    print("| topology | u | disagreement of x after 400 steps | closed form | difference |\n|---|---|---|---|---|")
    for name in TOPOLOGIES:
        topology = make_topology(name, N)
        for policy, words in POLICIES.items():
            measured[name, policy] = disagreement(name, policy)
            predicted[name, policy] = closed_form(topology, policy)
            got, want = measured[name, policy][-1], predicted[name, policy]
            print(f"| {name} | {words} | {got:.6f} | {want:.6f} | {abs(got - want):.0e} |")
    print("\n| topology | abs(λ₂) | x per step | β abs(λ₂) | u per step |\n|---|---|---|---|---|")
    for name in TOPOLOGIES:
        topology = make_topology(name, N)
        x, u = contraction(topology)
        value = topology.second_eigenvalue
        rates[name] = (x, u, value)
        # Over late steps, where the slowest mode alone is left, and before rounding is.
        last = min(60, int(np.flatnonzero(u > 1e-12)[-1]))
        slope = [(series[last] / series[last - 10]) ** 0.1 for series in (x, u)]
        print(f"| {name} | {value:.4f} | {slope[0]:.4f} | {BETA * value:.4f} | {slope[1]:.4f} |")
    draw(measured, predicted, rates, out / "decentralized-quadratics.png")
    print(f"\n{out / 'decentralized-quadratics.png'}")


if __name__ == "__main__":
    main()
