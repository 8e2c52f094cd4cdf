"""Tables against histories made by hand."""

from pathlib import Path

import pytest

from fedmom.errors import InputError
from fedmom.results.comparison import end_sheet, equal_sheet, run_sheets
from fedmom.results.groups import alone
from fedmom.results.reading import Run
from fedmom.results.sheets import written_out
from fedmom.results.tables import MISSING, as_markdown, as_text, fitted
from histories import classifier, quadratic


def summary_table(runs):
    return written_out(end_sheet(alone(runs), of_runs=True))


def equal_table(runs, axis):
    return written_out(equal_sheet(alone(runs), axis, of_runs=True))


def columns(table):
    header, rows = table
    assert all(len(row) == len(header) for row in rows)
    return {title: [row[i] for row in rows] for i, title in enumerate(header)}


def test_summary_says_where_each_run_ended():
    runs = [
        classifier("a", 10, eval_every=4),
        classifier("b", 3, accuracy=[0.2, 0.9, 0.5], sent=2_500_000),
    ]
    table = columns(summary_table(runs))
    assert table["run"] == ["a", "b"]
    assert table["rounds"] == ["10", "3"]
    assert table["local steps"] == ["80", "24"]
    assert table["joint epochs"] == ["5", "1.5"]
    assert table["test loss"] == ["0.1250", "0.3333"]  # a was last evaluated in round 8
    assert table["test accuracy"] == ["8.0 %", "50.0 %"]
    assert table["best accuracy"] == ["8.0 %", "90.0 %"]
    assert table["MB sent"] == ["10", "7.5"]
    assert table["seconds"] == ["2.5", "0.75"]
    assert table["client-steps/s"] == ["911", "904"]  # the median: round 1 does not pull it down


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
    assert table["test loss"] == ["0.2500", "0.2000", MISSING, "0.1250", "0.09091", "0.1667"]
    assert table["test accuracy"] == ["4.0 %", "5.0 %", MISSING, "8.0 %", "11.0 %", "6.0 %"]


def test_equal_joint_epochs():
    runs = [classifier("slow", 30, epochs=0.1), classifier("fast", 40, epochs=0.8, eval_every=2)]
    table = columns(equal_table(runs, "joint_epochs"))  # slow ends at 3.0, though 30 * 0.1 > 3 in floats
    assert table["at joint epochs"] == ["1.5", "1.5", "3", "3"]
    assert table["evaluated at"] == ["1.5", MISSING, "3", "1.6"]
    assert table["test accuracy"] == ["15.0 %", MISSING, "30.0 %", "2.0 %"]


def test_joint_epochs_that_differ_by_rounding_are_equal():
    exact, summed = classifier("exact", 10, epochs=0.1), classifier("summed", 10, epochs=0.1)
    summed.rounds[-1]["joint_epochs"] = sum([0.1] * 10) + 1e-12
    assert columns(equal_table([exact, summed], "joint_epochs"))["test accuracy"][-2:] == [
        "10.0 %",
        "10.0 %",
    ]


def test_equal_bytes():
    runs = [classifier("a", 8, sent=1_000_000), classifier("b", 8, sent=500_000, eval_every=3)]
    table = columns(equal_table(runs, "bytes_sent"))
    assert table["at bytes sent"] == ["2 MB", "2 MB", "4 MB", "4 MB"]
    assert table["evaluated at"] == ["2 MB", "1.5 MB", "4 MB", "3 MB"]
    assert table["test accuracy"] == ["2.0 %", "3.0 %", "4.0 %", "6.0 %"]


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
    assert "test accuracy" not in header
    table = columns(equal_table(runs, "round"))
    assert table["loss"] == ["0.0625", "0.0625", "0.003906", "0.003906"]
    assert table["distance"] == ["0.25", "0.25", "0.0625", "0.0625"]


def test_mixed_tasks_leave_gaps():
    table = columns(summary_table([quadratic("q", 4), classifier("c", 4)]))
    assert table["distance"] == ["0.0625", MISSING]
    assert table["test accuracy"] == [MISSING, "4.0 %"]
    assert table["MB sent"] == [MISSING, "4"]


def test_a_diverged_run_shows_that_it_did():
    run = classifier("nan", 3)
    run.rounds[-1]["test_loss"] = float("nan")
    run.rounds[-1]["test_accuracy"] = None
    table = columns(summary_table([run]))
    assert table["test loss"] == ["nan"]
    assert table["best accuracy"] == ["2.0 %"]


def test_runs_that_were_never_evaluated():
    runs = [classifier("a", 3, eval_every=9)]
    assert columns(summary_table(runs))["test loss"] == [MISSING]
    assert columns(equal_table(runs, "round"))["evaluated at"] == [MISSING] * 2


def test_an_unknown_axis_names_the_right_ones():
    with pytest.raises(InputError, match="did you mean round"):
        equal_table([classifier("a", 3)], "rounds")


@pytest.mark.parametrize("name", ["a", "I = 16, momentum quasi-global, Dirichlet α = 0.1, hidden = 300"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_table_is_no_wider_than_the_terminal_and_no_cell_is_cut(name, num_rows):
    header = ["run", "test accuracy", "joint epochs", "client-steps/s", "not done"]
    rows = [[f"{name}{r}", "97.3 % ± 0.2", "142.5", f"{r},000", "seed 0: diverged"] for r in range(num_rows)]
    assert fitted(header, rows, None) == as_text(header, rows)
    words = sorted(" ".join(cell for row in rows for cell in row[1:]).split())
    for width in (36, 40, 60, 80, 500):
        text = fitted(header, rows, width)
        assert max(map(len, text.split("\n"))) <= width
        found = " ".join(text.split()).split()
        assert not [
            word for word in {*words, *name.split(), *" ".join(header[1:]).split()} if word not in " ".join(found)
        ]
    pairs = fitted(["configs/x.toml", ""], [["operations/s", "12 GFLOP/s, 40 % of 30 GFLOP/s measured"]] * 2, 36)
    assert max(map(len, pairs.split("\n"))) <= 36


def test_text_is_aligned():
    text = as_text(["run", "loss"], [["a", "0.5"], ["longer", "10.25"]])
    assert text.splitlines() == ["run      loss", "------  -----", "a         0.5", "longer  10.25"]
    assert as_text(["run"], []) == "run\n---"


def test_markdown_escapes_bars_and_line_breaks():
    assert as_markdown(["run", "x"], [["a|b\nc", "1"]]).splitlines()[1:] == [
        "| --- | ---: |",
        "| a\\|b c | 1 |",
    ]


@pytest.mark.parametrize("make", [alone, run_sheets])
def test_no_runs_and_no_rounds_are_said_in_one_line(make):
    with pytest.raises(InputError, match="no runs"):
        make([])
    with pytest.raises(InputError, match="'hollow' has no rounds"):
        make([classifier("a", 2), Run("hollow", Path("hollow"), [])])
