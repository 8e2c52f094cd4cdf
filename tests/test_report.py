"""Tables against histories made by hand; pictures are decoded and looked at, colour by colour."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmom import report
from fedmom.errors import InputError
from fedmom.report import (
    AXES,
    COLOURS,
    MISSING,
    RunHistory,
    as_markdown,
    as_text,
    draw_curves,
    draw_partition,
    draw_report,
    equal_table,
    summary_table,
)


def classifier(name, num_rounds, *, eval_every=1, epochs=0.5, sent=1_000_000, accuracy=None):
    """Round r: r * epochs joint epochs, r * sent bytes, loss 1/r, accuracy r/100 unless given."""
    rounds = []
    for r in range(1, num_rounds + 1):
        entry = {"round": r, "steps": 8 * r, "joint_epochs": r * epochs, "bytes_sent": r * sent}
        entry |= {"lr": 0.05, "train_loss": 1.5 / r, "wall_seconds": 0.25 * r, "num_clients": 20}
        entry |= {"client_steps_per_second": 10.0 if r == 1 else 900.0 + r}
        if r % eval_every == 0:
            value = r / 100 if accuracy is None else accuracy[r - 1]
            entry |= {"test_loss": 1 / r, "test_accuracy": value}
        rounds.append(entry)
    return RunHistory(name, rounds)


def one_column(*args, **options):
    """A classifier's run whose picture has one column only, which is drawn three times faster."""
    run = classifier(*args, **options)
    for entry in run.rounds:
        del entry["joint_epochs"], entry["bytes_sent"]
    return run


def quadratic(name, num_rounds, rate=0.5):
    rounds = [
        {"round": r, "steps": r, "train_loss": rate**r, "loss": rate ** (2 * r), "distance": rate**r}
        for r in range(1, num_rounds + 1)
    ]
    return RunHistory(name, rounds)


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(report, "DPI", 90)  # time goes with the number of pixels


def pixels(path):
    """[H, W, 3] of a PNG that is whole."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(image, colour, at_least=20):
    """Whether an exact "#RRGGBB" covers some pixels."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image.astype(int) - rgb).max(axis=2) <= 2).sum() >= at_least


def num_colours(image):
    return len(np.unique(image.astype(np.int64) @ [65536, 256, 1]))


def columns(table):
    header, rows = table
    assert all(len(row) == len(header) for row in rows)
    return {title: [row[i] for row in rows] for i, title in enumerate(header)}


# --- tables ----------------------------------------------------------------------------------------------


def test_summary_says_where_each_run_ended():
    runs = [
        classifier("a", 10, eval_every=4),
        classifier("b", 3, accuracy=[0.2, 0.9, 0.5], sent=2_500_000),
    ]
    table = columns(summary_table(runs))
    assert table["run"] == ["a", "b"]
    assert table["rounds"] == ["10", "3"]
    assert table["steps"] == ["80", "24"]
    assert table["joint epochs"] == ["5.00", "1.50"]
    assert table["test loss"] == ["0.1250", "0.3333"]  # a was last evaluated in round 8
    assert table["test accuracy (%)"] == ["8.00", "50.00"]
    assert table["best (%)"] == ["8.00", "90.00"]
    assert table["MB sent"] == ["10", "7.5"]
    assert table["seconds"] == ["2.5", "0.8"]
    assert table["client-steps/s"] == ["906", "902"]  # the median: round 1 does not pull it down


def test_equal_rounds():
    runs = [
        classifier("long", 21, eval_every=4),
        classifier("short", 11),
        classifier("rare", 12, eval_every=6),
    ]
    table = columns(equal_table(runs, "round"))
    assert table["run"] == ["long", "short", "rare"] * 2
    assert table["at round"] == ["5"] * 3 + ["11"] * 3
    assert table["evaluated at"] == ["4", "5", MISSING, "8", "11", "6"]
    assert table["test loss"] == ["0.2500", "0.2000", MISSING, "0.1250", "0.0909", "0.1667"]
    assert table["test accuracy (%)"] == ["4.00", "5.00", MISSING, "8.00", "11.00", "6.00"]


def test_equal_joint_epochs():
    runs = [classifier("slow", 30, epochs=0.1), classifier("fast", 40, epochs=0.8, eval_every=2)]
    table = columns(equal_table(runs, "joint_epochs"))  # slow ends at 3.0, though 30 * 0.1 > 3 in floats
    assert table["at joint epochs"] == ["1.50", "1.50", "3.00", "3.00"]
    assert table["evaluated at"] == ["1.50", MISSING, "3.00", "1.60"]
    assert table["test accuracy (%)"] == ["15.00", MISSING, "30.00", "2.00"]


def test_joint_epochs_that_differ_by_rounding_are_equal():
    exact, summed = classifier("exact", 10, epochs=0.1), classifier("summed", 10, epochs=0.1)
    summed.rounds[-1]["joint_epochs"] = sum([0.1] * 10) + 1e-12
    assert columns(equal_table([exact, summed], "joint_epochs"))["test accuracy (%)"][-2:] == [
        "10.00",
        "10.00",
    ]


def test_equal_bytes():
    runs = [classifier("a", 8, sent=1_000_000), classifier("b", 8, sent=500_000, eval_every=3)]
    table = columns(equal_table(runs, "bytes_sent"))
    assert table["at bytes sent"] == ["2 MB", "2 MB", "4 MB", "4 MB"]
    assert table["evaluated at"] == ["2 MB", "1.5 MB", "4 MB", "3 MB"]
    assert table["test accuracy (%)"] == ["2.00", "3.00", "4.00", "6.00"]


def test_a_run_that_sends_nothing_does_not_hold_the_others_back():
    table = columns(equal_table([classifier("alone", 5, sent=0), classifier("many", 4)], "bytes_sent"))
    assert table["at bytes sent"] == ["2 MB", "2 MB", "4 MB", "4 MB"]
    assert table["evaluated at"] == ["0 B", "2 MB", "0 B", "4 MB"]
    assert equal_table([classifier("alone", 5, sent=0)], "bytes_sent")[1] == []


def test_one_round_has_no_half():
    assert columns(equal_table([classifier("a", 1), classifier("b", 9)], "round"))["at round"] == ["1", "1"]


def test_quadratics_report_loss_and_distance():
    runs = [quadratic("q", 4), quadratic("p", 20)]
    header, _ = summary_table(runs)
    assert "test loss" not in header
    assert "test accuracy (%)" not in header
    table = columns(equal_table(runs, "round"))
    assert table["loss"] == ["0.0625", "0.0625", "0.003906", "0.003906"]
    assert table["distance"] == ["0.25", "0.25", "0.0625", "0.0625"]


def test_mixed_tasks_leave_gaps():
    table = columns(summary_table([quadratic("q", 4), classifier("c", 4)]))
    assert table["distance"] == ["0.0625", MISSING]
    assert table["test accuracy (%)"] == [MISSING, "4.00"]
    assert table["MB sent"] == [MISSING, "4"]


def test_a_diverged_run_shows_that_it_did():
    run = classifier("nan", 3)
    run.rounds[-1]["test_loss"] = float("nan")
    run.rounds[-1]["test_accuracy"] = None
    table = columns(summary_table([run]))
    assert table["test loss"] == ["nan"]
    assert table["best (%)"] == ["2.00"]


def test_runs_that_were_never_evaluated():
    runs = [classifier("a", 3, eval_every=9)]
    assert columns(summary_table(runs))["test loss"] == [MISSING]
    assert columns(equal_table(runs, "round"))["evaluated at"] == [MISSING] * 2


def test_an_unknown_axis_names_the_right_ones():
    with pytest.raises(InputError, match="did you mean round"):
        equal_table([classifier("a", 3)], "rounds")


def test_text_is_aligned():
    text = as_text(["run", "loss"], [["a", "0.5"], ["longer", "10.25"]])
    assert text.splitlines() == ["run      loss", "------  -----", "a         0.5", "longer  10.25"]
    assert as_text(["run"], []) == "run\n---"


def test_markdown_escapes_bars_and_line_breaks():
    assert as_markdown(["run", "x"], [["a|b\nc", "1"]]).splitlines()[1:] == [
        "| --- | ---: |",
        "| a\\|b c | 1 |",
    ]


# --- curves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_runs", [2, 7])
def test_every_run_is_drawn_in_its_colour(tmp_path, num_runs):
    rates = [0.5 + 0.1 * k for k in range(num_runs)]
    runs = [
        one_column(f"run {k}", 40, accuracy=[0.9 * (1 - rate**r) for r in range(40)]) for k, rate in enumerate(rates)
    ]
    draw_curves(runs, tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    assert min(image.shape[:2]) > 400
    drawn = [has_colour(image, colour) for colour in COLOURS if colour != "#000000"]
    others = num_runs - 1 if num_runs > COLOURS.index("#000000") else num_runs  # text is black too
    assert drawn == [True] * others + [False] * (len(drawn) - others)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [classifier("one round", 1)],
        lambda: [quadratic("one round", 1)],
        lambda: [RunHistory("at the optimum", [{"round": 1, "loss": 0.0, "distance": 0.0}])],
        lambda: [quadratic("q", 30), classifier("c", 30, eval_every=7)],
        lambda: [classifier("seldom", 30, eval_every=29)],
        lambda: [classifier("thrifty", 4, sent=1), classifier("lavish", 400, sent=10**9)],
    ],
    ids=["single", "single-quadratic", "zero", "mixed", "one-evaluation", "log-axes"],
)
def test_something_shows(tmp_path, make):
    draw_curves(make(), tmp_path / "curves.png")
    assert has_colour(pixels(tmp_path / "curves.png"), COLOURS[0])


@pytest.mark.parametrize("num_runs", [13, 70])
def test_many_runs(tmp_path, num_runs):
    draw_curves([one_column(f"seed {k}", 3) for k in range(num_runs)], tmp_path / "curves.png")
    assert num_colours(pixels(tmp_path / "curves.png")) > 50


def test_what_is_not_a_finite_number_is_skipped(tmp_path):
    run, gap = one_column("a", 9), one_column("a", 9)
    for r, value in zip((1, 2, 4, 6, 8), (float("nan"), float("-inf"), None, "text", True), strict=True):
        for key in ("test_loss", "test_accuracy", "train_loss"):
            run.rounds[r][key] = value
            del gap.rounds[r][key]
    draw_curves([run], tmp_path / "run.png")
    draw_curves([gap], tmp_path / "gap.png")
    np.testing.assert_array_equal(pixels(tmp_path / "run.png"), pixels(tmp_path / "gap.png"))


def test_rounds_without_any_measure_still_give_a_picture(tmp_path):
    draw_curves([RunHistory("empty", [{"round": 1}])], tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")


def test_a_diverging_run_does_not_flatten_the_others(tmp_path):
    good, bad = one_column("good", 30), one_column("bad", 30)
    for entry in good.rounds:
        entry["test_loss"] = 2.0 - 0.06 * entry["round"]
    for entry in bad.rounds[1:]:
        entry |= {"test_loss": 1e30, "train_loss": 1e30}
    draw_curves([good, bad], tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    upper = image[: image.shape[0] * 2 // 5].astype(int)
    blue = (np.abs(upper - [0x00, 0x72, 0xB2]).max(axis=2) <= 2).any(axis=1)
    assert blue.sum() > 50  # rows of pixels that the good run's loss goes through; flat, it would have 3


def test_any_name_is_fit_for_a_legend(tmp_path):
    names = ["", "_hidden", "a$b$c_{", "two\nlines", "x" * 300]
    draw_curves([one_column(name, 3) for name in names], tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")
    assert all(0 < len(report._short_name(name)) <= report.MAX_NAME for name in names)
    assert not any(report._short_name(name).startswith("_") for name in names)


def test_long_names_lose_what_they_share():
    prefix = "runs/2024-01-01-digits-dirichlet-alpha-0.3-clients-20-"
    runs = [classifier(prefix + end, 1) for end in ("lr-0.1", "lr-0.05")]
    assert report._legend_names(runs) == ["…0.1", "…0.05"]
    same = [classifier(prefix, 1)] * 2
    assert len(set(report._legend_names(same))) == 1
    assert len(report._legend_names(same)[0]) == report.MAX_NAME


# --- partitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_clients", "num_classes"),
    [(1, 1), (1, 10), (20, 1), (20, 10), (1, 100), (100, 10), (101, 1), (1500, 100)],
)
def test_a_partition_is_drawn(tmp_path, num_clients, num_classes):
    counts = np.random.default_rng(0).integers(0, 50, size=(num_clients, num_classes))
    counts[0, 0] = 60
    draw_partition(counts, tmp_path / "partition.png", title="$ 1_{ a title")
    image = pixels(tmp_path / "partition.png")
    assert num_colours(image) > 20
    bubbles = max(num_clients, num_classes) <= report.MAX_BUBBLES
    assert has_colour(image, COLOURS[0], 500) or not bubbles


def test_100_000_clients_of_any_size(tmp_path):
    rng = np.random.default_rng(0)
    counts = (rng.pareto(0.8, size=(100_000, 1)) * rng.dirichlet([0.3] * 10, size=100_000)).astype(np.int64)
    draw_partition(counts, tmp_path / "partition.png", title="skewed", class_names=[f"c{i}" for i in range(10)])
    pixels(tmp_path / "partition.png")


@pytest.mark.parametrize("num_clients", [3, 200])
def test_clients_without_examples(tmp_path, num_clients):
    draw_partition(np.zeros((num_clients, 4), dtype=int), tmp_path / "partition.png", title="empty")
    pixels(tmp_path / "partition.png")


def test_a_bubbles_area_is_its_share_of_the_largest(tmp_path):
    draw_partition(np.array([[100, 0], [0, 25]]), tmp_path / "partition.png", title="")
    image = pixels(tmp_path / "partition.png").astype(int)
    blue = np.abs(image - [0x00, 0x72, 0xB2]).max(axis=2) <= 2
    middle = blue.shape[1] // 2
    large, small = blue[:, :middle].sum(), blue[:, middle:].sum()
    assert large / small == pytest.approx(4, rel=0.1)


def test_bad_counts_and_names_are_named(tmp_path):
    for counts in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
        with pytest.raises(InputError, match=r"counts of shape \["):
            draw_partition(counts, tmp_path / "x.png", title="")
    with pytest.raises(InputError, match="1 class names for 2 classes"):
        draw_partition(np.ones((3, 2)), tmp_path / "x.png", title="", class_names=["a"])


# --- the report and its files ----------------------------------------------------------------------------


def test_the_report_holds_every_table_and_links_the_picture(tmp_path):
    runs = [classifier("a", 8), classifier("b", 5, eval_every=2)]
    paths = draw_report(runs, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "curves.png",
        "report.md",
    ]
    text = paths["report"].read_text(encoding="utf-8")
    assert f"({paths['curves'].name})" in text
    for table in (summary_table(runs), *(equal_table(runs, axis) for axis in AXES)):
        assert as_markdown(*table) in text
    pixels(paths["curves"])


@pytest.mark.parametrize(
    "use",
    [
        summary_table,
        lambda runs: equal_table(runs, "round"),
        lambda runs: draw_curves(runs, Path("never.png")),
        lambda runs: draw_report(runs, Path("never")),
    ],
)
def test_no_runs_and_no_rounds_are_said_in_one_line(use):
    with pytest.raises(InputError, match="no runs"):
        use([])
    with pytest.raises(InputError, match="'hollow' has no rounds"):
        use([classifier("a", 2), RunHistory("hollow", [])])


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_text("old")

    def no_space(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        draw_curves([one_column("a", 2)], path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_matplotlib_comes_only_with_a_picture_and_never_pyplot(tmp_path):
    code = f"""
import sys
from pathlib import Path
from fedmom.report import *
runs = [RunHistory("a", [{{"round": 1, "test_loss": 1.0}}])]
summary_table(runs), equal_table(runs, "round")
assert "matplotlib" not in sys.modules
draw_report(runs, Path({str(tmp_path)!r}))
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_only_this_file_imports_matplotlib():
    for path in (Path(__file__).parents[1] / "fedmom").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path.name == "report.py" or not any(name.startswith("matplotlib") for name in names)
