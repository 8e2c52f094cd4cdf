"""A folder that compares runs: the picture of their curves, and their tables."""

from collections.abc import Sequence
from pathlib import Path

from fedmom.pictures import draw_curves
from fedmom.records import write_text
from fedmom.tables import AXES, MISSING, RunHistory, as_markdown, equal_table, summary_table


def draw_report(runs: Sequence[RunHistory], out_dir: Path) -> dict[str, Path]:
    """Write curves.png and report.md (the tables, and the picture linked) into `out_dir`."""
    paths = {"curves": out_dir / "curves.png", "report": out_dir / "report.md"}
    draw_curves(runs, paths["curves"])
    parts = ["# Runs", "![Curves of the runs](curves.png)"]
    parts += ["## At the end", as_markdown(*summary_table(runs))]
    parts += ["Values of the last evaluation; client-steps/s is the median over the rounds."]
    for axis, name in AXES.items():
        header, rows = equal_table(runs, axis)
        if rows:
            parts += [f"## At equal {'rounds' if axis == 'round' else name}", as_markdown(header, rows)]
    parts += [
        "Equal tables: each run's last evaluation at or before the largest value that all runs reached, "
        f"and at or before half of it; {MISSING} where a run was not evaluated by then."
    ]
    write_text(paths["report"], "\n\n".join(parts) + "\n")
    return paths
