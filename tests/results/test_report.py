"""Pictures are decoded and looked at, colour by colour."""

import os
from pathlib import Path

import numpy as np
import pytest
from pictures import pixels, where

from fedmom.errors import InputError
from fedmom.method.decentralized.graphs import TOPOLOGIES
from fedmom.method.decentralized.topology import make_topology
from fedmom.results.comparison import run_sheets
from fedmom.results.pictures import curves, partition, style, topology
from fedmom.results.pictures.curves import draw_curves
from fedmom.results.pictures.partition import draw_partition
from fedmom.results.pictures.style import COLOURS
from fedmom.results.reading import Run
from fedmom.results.report import draw_or_say_why, draw_report
from fedmom.results.sheets import written_out
from fedmom.results.tables import as_markdown
from histories import classifier, one_column, quadratic
from laws import table


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(style, "DPI", 70)  # time goes with the number of pixels


def num_colours(image):
    return len(np.unique(image.astype(np.int64) @ [65536, 256, 1]))


# --- the report and its curves ---------------------------------------------------------------------------


def test_the_report_holds_every_table_and_a_picture_of_every_run(tmp_path):
    runs = [
        classifier("a", 40),
        classifier("b", 25, sent=1, eval_every=2, accuracy=[0.9 - 0.5 / r for r in range(1, 26)]),
    ]
    folder = tmp_path / "new" / "folder"
    paths = draw_report(runs, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "report.md"]
    text = paths["report"].read_text(encoding="utf-8")
    assert f"({paths['curves'].name})" in text
    sheets = run_sheets(runs)
    assert len(sheets) == 4
    for sheet in sheets:
        assert as_markdown(*written_out(sheet)) in text
    image = pixels(paths["curves"])
    colours = [colour for colour in COLOURS if colour != "#000000"]  # text is black too
    assert [where(image, colour).sum() >= 20 for colour in colours] == [True] * 2 + [False] * (len(colours) - 2)


@pytest.mark.slow
@table(
    "make",
    [
        lambda: [one_column("one round", 1)],
        lambda: [quadratic("one round", 1)],
        lambda: [Run("at the optimum", Path(), [{"round": 1, "loss": 0.0, "distance": 0.0}])],
        lambda: [Run("in the end", Path(), [{"round": 1, "distance": 1.0}, {"round": 2, "distance": 0.0}])],
        lambda: [quadratic("q", 30), one_column("c", 30, eval_every=7)],
        lambda: [one_column("short", 4), one_column("long", 400)],
        lambda: [one_column(f"seed {k}", 3) for k in range(15)],
    ],
)
def test_something_shows(tmp_path, make):
    draw_curves(make(), tmp_path / "curves.png")
    assert where(pixels(tmp_path / "curves.png"), COLOURS[0]).sum() >= 20


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
    draw_curves([Run("empty", Path(), [{"round": 1}])], tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")


def test_a_diverging_run_does_not_flatten_the_others_and_any_name_fits(tmp_path):
    good, *bad = (one_column(name, 30) for name in ("a$b$c_{", "", "_hidden", "two\nlines", "x" * 300))
    for entry in good.rounds:
        entry["test_loss"] = 2.0 - 0.06 * entry["round"]
    for entry in bad[0].rounds[1:]:
        entry |= {"test_loss": 1e30, "train_loss": 1e30}
    draw_curves([good, *bad], tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    upper = where(image, COLOURS[0])[: image.shape[0] * 2 // 5]
    assert upper.any(axis=1).sum() > 50  # rows of pixels that the good run's loss goes through; flat, it would have 3


def test_long_names_are_cut_and_lose_what_they_share():
    prefix = "runs/2024-01-01-digits-dirichlet-alpha-0.3-clients-20-"
    assert curves._legend_names([prefix + end for end in ("lr-0.1", "lr-0.05")]) == ["…0.1", "…0.05"]
    for names in ([prefix] * 2, ["x" * 300], ["x" * 300, "y" * 300]):
        assert [len(name) for name in curves._legend_names(names)] == [style.MAX_NAME] * len(names)
    assert curves._legend_names(["_a", "b\nc"]) == [" _a", "b c"]


@pytest.mark.slow
@table("name, places", [("ring", 8), ("star", 9), ("torus", 9), ("torus", 1), ("one-peer-exponential", 8)])
def test_a_topology_is_drawn_as_its_row_says(tmp_path, name, places):
    assert topology.PLACINGS.keys() == {rule.layout for rule in TOPOLOGIES.values()}
    graph = make_topology(name, places)
    at = topology.PLACINGS[graph.layout].places(places)
    assert len(np.unique(at.round(6), axis=0)) == places == len(at)
    assert (np.linalg.norm(at[0]) < 1e-9) == (name == "star")
    topology.draw_topology(graph, tmp_path / "graph.png")
    assert where(pixels(tmp_path / "graph.png"), COLOURS[0]).any()


# --- partitions ------------------------------------------------------------------------------------------


@pytest.mark.slow  # a fast one: cli/test_cli.py
@table("num_clients, num_classes", [(1, 1), (20, 10), (1, 100), (101, 1), (1500, 100)])
def test_a_partition_is_drawn(tmp_path, num_clients, num_classes):
    counts = np.random.default_rng(0).integers(0, 50, size=(num_clients, num_classes))
    counts[0, 0] = 60
    draw_partition(counts, tmp_path / "partition.png", title="$ 1_{ a title")
    image = pixels(tmp_path / "partition.png")
    assert num_colours(image) > 20
    if max(num_clients, num_classes) <= partition.MAX_BUBBLES:
        assert where(image, COLOURS[0]).sum() > 500


@pytest.mark.slow
def test_100_000_clients_of_any_size(tmp_path):
    rng = np.random.default_rng(0)
    counts = (rng.pareto(0.8, size=(100_000, 1)) * rng.dirichlet([0.3] * 10, size=100_000)).astype(np.int64)
    draw_partition(counts, tmp_path / "partition.png", title="skewed", class_names=[f"c{i}" for i in range(10)])
    pixels(tmp_path / "partition.png")


@table("num_clients", [3, 200])
def test_clients_without_examples(tmp_path, num_clients):
    draw_partition(np.zeros((num_clients, 4), dtype=int), tmp_path / "partition.png", title="empty")
    pixels(tmp_path / "partition.png")


def test_a_bubbles_area_is_its_share_of_the_largest(tmp_path):
    draw_partition(np.array([[100, 0], [0, 25]]), tmp_path / "partition.png", title="")
    blue = where(pixels(tmp_path / "partition.png"), COLOURS[0])
    middle = blue.shape[1] // 2
    assert blue[:, :middle].sum() / blue[:, middle:].sum() == pytest.approx(4, rel=0.1)


# --- what goes wrong -------------------------------------------------------------------------------------


def test_bad_input_is_said_in_one_line(tmp_path):
    for draw in (lambda runs: draw_curves(runs, tmp_path / "x.png"), lambda runs: draw_report(runs, tmp_path)):
        with pytest.raises(InputError, match="no runs"):
            draw([])
    for counts in (np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)):
        with pytest.raises(InputError, match=r"counts of shape \["):
            draw_partition(counts, tmp_path / "x.png", title="")
    with pytest.raises(InputError, match="1 class names for 2 classes"):
        draw_partition(np.ones((3, 2)), tmp_path / "x.png", title="", class_names=["a"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        draw_partition(np.ones((1, 1)), tmp_path / "file" / "x.png", title="")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_text("old")

    def no_space(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(InputError, match="no space"):
        draw_curves([one_column("a", 2)], path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_picture_never_comes_by_way_of_pyplot():
    """It keeps figures for whoever shows them, and asks for a screen; tests/repository says who imports matplotlib."""
    files = [*(Path(__file__).parents[2] / "fedmom").rglob("*.py")]
    assert [path.name for path in files if "matplotlib" in path.read_text(encoding="utf-8")]
    assert not [path for path in files if "matplotlib.pyplot" in path.read_text(encoding="utf-8")]


def test_a_picture_that_cannot_be_drawn_is_one_line_and_a_name_that_no_picture_has_is_refused(tmp_path, capsys):
    """A run whose folder's name no font can show has been trained all the same."""

    def fails():
        raise TypeError("font.set_text: 'x\\udcfc'\nis no str")

    assert not draw_or_say_why(fails)
    assert capsys.readouterr().err == "fedmom: no picture was drawn: TypeError: font.set_text: 'x\\udcfc' is no str\n"
    for name in ("p", "p.xyz", "p.raw"):
        with pytest.raises(InputError, match=r"pictures are PNG or PDF"):
            style.check_picture(tmp_path / name)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        style.check_picture(tmp_path / "d.png")
    assert draw_or_say_why(lambda: style.check_picture(tmp_path / "p.png"))
