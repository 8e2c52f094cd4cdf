"""The README's pictures, from the runs of `make comparison`.

python docs/what_for.py runs/comparison runs/comparison-pooled
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from fedmom.results.groups import POOLED, Group, group_runs
from fedmom.results.pictures.curves import POOLED_LINE, curve, end_of
from fedmom.results.pictures.style import (
    COLOURS,
    DARK,
    DASHES,
    MARKERS,
    POLICY_COLOURS,
    new_figure,
    plain_axes,
    save_picture,
)
from fedmom.results.reading import collect
from fedmom.results.tables import MEASURES

PICTURES = Path(__file__).parent / "pictures"
POLICIES = {
    "average": "averaged with the model (the paper)",
    "local": "kept by each client",
    "reset": "reset every round (customary)",
}
ACCURACY = next(measure for measure in MEASURES if measure.key == "test_accuracy")
H, C = np.array([0.5, 1.0, 2.0]), np.array([3.0, -0.5, 1.2])  # f_i = h_i/2 (x − c_i)²
LR, BETA, INTERVAL, ROUNDS, START = 0.035, 0.9, 12, 3, -2.0


def paths(policy: str) -> np.ndarray:
    """[ROUNDS, INTERVAL + 1, 3]: x of three clients in each round, from the common start to just before the mean."""
    x, u, rounds = np.full(3, START), np.zeros(3), []
    for _ in range(ROUNDS):
        u = {"average": np.full(3, u.mean()), "local": u, "reset": np.zeros(3)}[policy]
        x = np.full(3, x.mean())
        steps = [x]
        for _ in range(INTERVAL):
            u = BETA * u + H * (x - C)
            x = x - LR * u
            steps.append(x)
        rounds.append(np.stack(steps))
    return np.stack(rounds)


def draw_paths(axes: object, policy: str) -> None:
    optimum = (H * C).sum() / H.sum()
    axes.axhline(optimum, color=DARK, linewidth=0.8, linestyle=(0, (1, 2)))
    for r, steps in enumerate(paths(policy)):
        time = r * INTERVAL + np.arange(INTERVAL + 1)
        for client in range(3):
            look = {"color": COLOURS[POLICY_COLOURS[policy]], "linestyle": DASHES[client], "linewidth": 1.5}
            axes.plot(time, steps[:, client], **look)
        axes.plot(time[0], steps[0, 0], "o", color=DARK, markersize=4, zorder=3)
        axes.axvline(time[-1], color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_title(f"Three clients, momentum {POLICIES[policy]}", fontsize=9, loc="left")
    axes.set_ylim(-2.6, 4.4)
    axes.set_yticks([])
    axes.set_xticks([r * INTERVAL for r in range(ROUNDS + 1)], [])
    plain_axes(axes, grid=None)


def draw_results(panels: object, groups: list[Group]) -> None:
    for policy in POLICIES:
        index = POLICY_COLOURS[policy]
        (group,) = [g for g in groups if list(g.differs.values()) == [4, policy]]
        look = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 3.5}
        for axes, key, factor in zip(panels, ("test_accuracy", "consensus_distance"), (100, 1), strict=True):
            drawn = curve(group, "joint_epochs", key)
            axes.plot(drawn.x, factor * drawn.y, **look, linewidth=1.5, markevery=0.1, label=f"momentum {policy}")
            low = np.maximum(factor * (drawn.y - drawn.sd), 0.5 * factor * drawn.y)
            axes.fill_between(
                drawn.x, low, factor * (drawn.y + drawn.sd), color=COLOURS[index], alpha=0.16, linewidth=0
            )
    for group in groups:
        if group.pooled:
            panels[0].axhline(100 * end_of(group, ACCURACY), **POOLED_LINE, zorder=1.8, label=POOLED)
    seeds = len(groups[0].runs)
    panels[0].set_title(f"Real digits, 20 clients, α = 0.1, I = 4, {seeds} seeds", fontsize=9, loc="left")
    panels[0].set_ylabel("Test accuracy at x̂ (%)")
    panels[0].legend(frameon=False, fontsize=8.5, loc="lower right")
    panels[1].set_yscale("log")
    panels[1].set_ylabel("Clients apart: Σ pᵢ‖xᵢ − x̂‖²")
    panels[1].set_xlabel("Joint epochs")
    for axes in panels:
        plain_axes(axes)


def main(folders: list[Path]) -> None:
    groups = group_runs(collect(folders)[0])
    figure = new_figure(9.6, 5.4)
    grid = figure.add_gridspec(6, 2, width_ratios=[1.0, 1.0])
    for place, policy in enumerate(POLICIES):
        axes = figure.add_subplot(grid[2 * place : 2 * place + 2, 0])
        draw_paths(axes, policy)
        if place == len(POLICIES) - 1:
            axes.set_xlabel("I local steps between two exchanges (dotted: the common optimum)")
    draw_results([figure.add_subplot(grid[:3, 1]), figure.add_subplot(grid[3:, 1])], groups)
    save_picture(figure, PICTURES / "what-for.png")
    shutil.copy(folders[0] / "comparison" / "curves.png", PICTURES / "comparison.png")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
