"""`fedmom compare`: groups over seeds, tables at equal cost, targets, the speedup over N, and figures for a paper."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmom.cli import main
from fedmom.errors import InputError
from fedmom.method.states.policies import MOMENTUM_POLICIES
from fedmom.results.compare import default_out, draw_figures, write_tables
from fedmom.results.comparison import (
    AXES,
    all_sheets,
    end_sheet,
    equal_sheet,
    parse_target,
    run_sheets,
    speedups,
    target_sheet,
    usual_targets,
)
from fedmom.results.groups import POOLED, alone, check_fit, group_runs, of_groups, rivals
from fedmom.results.page import content
from fedmom.results.pictures import comparison, curves, style
from fedmom.results.pictures.curves import curve, styles
from fedmom.results.ranking import _t95
from fedmom.results.ranking import results as results_of
from fedmom.results.reading import collect
from fedmom.results.sheets import (
    FORMATS,
    Stat,
    latex,
    sheet_csv,
    sheet_latex,
    sheet_markdown,
    sheet_text,
    stat,
    written,
    written_out,
)
from fedmom.results.tables import MEASURES
from histories import make_run, records
from laws import table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep(tmp_path):
    """Two values of I and two seeds, whose losses differ by a shift of ±0.01."""
    for I in (1, 8):  # noqa: E741
        for seed, shift in ((0, 0.01), (1, -0.01)):
            sets = {"algorithm.num-local-steps": I, "run.seed": seed, "run.num-rounds": 10}
            make_run(tmp_path / "sweep" / f"I={I},seed={seed}", sets, records(10, speed=I, shift=shift, I=I))
    return tmp_path / "sweep"


def groups_of(*folders):
    return group_runs(collect(folders)[0])


def test_seeds_make_a_group_and_what_differs_its_label(sweep):
    groups = groups_of(sweep)
    assert [group.label for group in groups] == ["I = 1", "I = 8"]
    assert [[run.settings["run.seed"] for run in group.runs] for group in groups] == [[0, 1]] * 2


def test_numbers_are_ordered_by_size_and_keys_as_a_sentence(tmp_path):
    for policy in ("reset", "average"):
        for n in (16, 2, 4):
            sets = {"algorithm.momentum-policy": policy, "data.num-clients": n, "engine.chunk-size": n}
            make_run(tmp_path / f"{policy}{n}", sets, records(2))
    labels = [group.label for group in groups_of(tmp_path)]
    assert labels == [f"N = {n}, momentum {policy}" for n in (2, 4, 16) for policy in ("average", "reset")]


def test_what_follows_from_another_key_or_from_timing_makes_no_group(tmp_path):
    """The cohort follows N, R follows T and I, and `auto` chooses paths by timing."""
    for I, path in ((1, "loop"), (4, "vmap")):  # noqa: E741
        sets = {"run.num-steps": 40, "algorithm.num-local-steps": I, "engine.path": path, "data.num-clients": 5 * I}
        sets["run.keep-best"] = I == 1
        make_run(tmp_path / f"{I}", sets, records(3))
    assert [list(group.differs) for group in groups_of(tmp_path)] == [
        ["data.num-clients", "algorithm.num-local-steps"]
    ] * 2


@table("values", [[1.5], [1.0, 2.0], [0.1, 0.2, 0.4]])
def test_a_stat_is_the_mean_and_the_sample_deviation(values):
    found = stat([*values, None, float("nan")])
    assert (found.mean, found.num, found.of) == (pytest.approx(np.mean(values)), len(values), len(values) + 2)
    assert found.sd is None if len(values) == 1 else found.sd == pytest.approx(np.std(values, ddof=1))
    assert stat([None, float("inf")]) is None
    assert np.isnan(stat([float("nan")]).mean)  # a run that is alone shows that it diverged


def test_a_number_is_written_with_its_deviation_in_the_same_digits():
    assert written(Stat(84.927, 0.514, 3, 3), ".2f") == "84.93 ± 0.51"
    assert written(Stat(84.927, 0.514, 3, 3), ".1f", " %") == "84.9 % ± 0.5"
    assert written(Stat(84.927, None, 1, 1), ".2f") == "84.93"
    assert written(Stat(84.927, 0.514, 2, 3), ".2f") == "84.93 ± 0.51 (2 of 3)"
    assert written(Stat(12345.6, 78.9, 3, 3), "") == "12,346 ± 79"
    assert written(Stat(60.0, 0.0, 3, 3), "") == "60"
    assert written(Stat(1e-9, 2e-10, 3, 3), ".4g") == "1e-09 ± 2e-10"
    assert written(None, "") == "–"


def test_the_tables_say_what_the_records_say(sweep):
    groups = groups_of(sweep)
    sheet = end_sheet(groups)
    titles = [column.title for column in sheet.columns]
    loss = titles.index("test loss")
    for row, I in zip(sheet.rows, (1, 8), strict=True):  # noqa: E741
        assert row[titles.index("rounds")] == Stat(10, 0, 2, 2)
        assert row[loss].mean == pytest.approx(1 / (10 * I))
        assert row[loss].sd == pytest.approx(np.std([0.01, -0.01], ddof=1))
        assert row[titles.index("MB sent")].mean == pytest.approx(10)


def test_a_run_is_a_group_of_one(tmp_path):
    """A report and a comparison say the same of runs of one seed each, a last value that is no number too."""
    for lr, last in ((0.1, 0.5), (0.2, float("nan"))):
        lines = records(10)
        lines[-1]["test_loss"] = last
        make_run(tmp_path / f"{lr}", {"algorithm.lr": lr, "run.num-rounds": 10}, lines)
    runs, _ = collect([tmp_path])
    groups = group_runs(runs)
    assert [alone(runs)[0].runs, alone(runs)[1].runs] == [group.runs for group in groups]
    for several, single in zip(all_sheets(groups, [])[:4], run_sheets(runs), strict=True):
        assert several.title == single.title
        tables = []
        for header, rows in map(written_out, (several, single)):
            tables.append([dict(zip(header, row, strict=True)) for row in rows])
        common = [title for title in tables[0][0] if title in tables[1][0] and title not in ("run", "evaluated at")]
        assert {"test loss", "test accuracy"} <= set(common)
        assert [[row[title] for title in common] for row in tables[0]] == [
            [row[title] for title in common] for row in tables[1]
        ]
        assert {row["test loss"] for row in tables[1]} >= {"nan"}


@table("axis, half, end", [("round", 3, 7), ("joint_epochs", 1.75, 3.5), ("wall_seconds", 3.5, 7)])
def test_equal_means_the_largest_value_that_all_reached(tmp_path, axis, half, end):
    make_run(tmp_path / "short", {"run.num-rounds": 7}, records(7))
    make_run(tmp_path / "long", {"run.num-rounds": 40, "algorithm.lr": 0.5}, records(40, speed=2))
    sheet = equal_sheet(groups_of(tmp_path), axis)
    places = [row[2].mean for row in sheet.rows]
    assert places == pytest.approx([half, half, end, end])
    at = {"round": 7, "joint_epochs": 7, "wall_seconds": 7}[axis]
    assert {round(row[4].mean, 9) for row in sheet.rows[2:]} == {round(1 / at, 9), round(1 / (2 * at), 9)}


def test_a_target_is_the_first_evaluation_that_reached_it(tmp_path):
    make_run(tmp_path / "a", {"run.num-rounds": 20}, records(20, eval_every=4))
    make_run(tmp_path / "b", {"run.num-rounds": 20, "algorithm.lr": 0.5}, records(20, speed=0.1, eval_every=4))
    runs, _ = collect([tmp_path])
    target = parse_target("loss=0.11", runs)
    rows = {row[0]: row for row in target_sheet(group_runs(runs), target).rows}
    fast, slow = rows["γ = 0.05"], rows["γ = 0.5"]
    assert fast[1:4] == ["1", "1 of 1", Stat(12, None, 1, 1)]  # 1/r <= 0.11 from round 10 on, evaluated at 12
    assert slow[1:] == ["1", "0 of 1", *[None] * 5]
    assert parse_target("accuracy=90%", runs) == parse_target("test_accuracy=0.9", runs)


def test_the_usual_target_is_what_every_run_reached(sweep):
    runs, _ = collect([sweep])
    (target,) = usual_targets(runs)
    assert target.measure.key == "test_accuracy"
    assert all(target.reached(run.rounds) for run in runs)
    best = min(max(record["test_accuracy"] for record in run.rounds) for run in runs)
    assert best - 0.001 <= target.value <= best


@table("sizes", [[1, 2, 4, 8], [2, 6]])
def test_a_linear_speedup_lies_on_the_ideal_line(tmp_path, sizes):
    """Twice as many clients, half as many steps."""
    for n in sizes:
        for policy in ("average", "reset"):
            sets = {"data.num-clients": n, "algorithm.momentum-policy": policy, "run.num-rounds": 48}
            make_run(tmp_path / f"{n}-{policy}", sets, records(48, speed=n))
    runs, _ = collect([tmp_path])
    found = speedups(group_runs(runs), parse_target("loss=0.0417", runs))  # 1/24: round 24 / n
    assert [family.label for family in found] == ["momentum average", "momentum reset"]
    for family in found:
        assert family.num_clients == sizes
        assert [cell.mean for cell in family.by_steps] == pytest.approx([n / sizes[0] for n in sizes])
    assert speedups(group_runs(runs[:1]), parse_target("loss=0.5", runs)) == []


def test_csv_holds_the_numbers_in_full(sweep):
    for sheet in all_sheets(groups_of(sweep), usual_targets(collect([sweep])[0])):
        header, *rows = csv.reader(io.StringIO(sheet_csv(sheet)))
        assert len(rows) == len(sheet.rows)
        for line, row in zip(rows, sheet.rows, strict=True):
            assert len(line) == len(header)
            for column, cell in zip(sheet.columns, row, strict=True):
                at = header.index(column.full_title)
                if isinstance(cell, Stat):
                    assert float(line[at]) == pytest.approx(cell.mean)
                    assert header[at + 1 : at + 3] == [f"{column.full_title} sd", f"{column.full_title} n"]
                    assert line[at + 2] == str(cell.num)


def test_latex_is_escaped_and_every_row_has_its_columns(sweep):
    assert latex("50 % of a_b & γ = 0.1, I = 4") == r"50 \% of a\_b \& $\gamma$ = 0.1, $I$ = 4"
    for sheet in all_sheets(groups_of(sweep), []):
        text = sheet_latex(sheet)
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(lines) == len(sheet.rows) + 1
        assert {line.replace(r"\&", "").count("&") for line in lines} == {len(sheet.columns) - 1}
        assert text.count("{") == text.count("}")
        assert text.isascii()
        assert r"\pm" in text
        assert sheet.rows[0][0] in sheet_text(sheet)
        assert f"| {sheet.rows[0][0]} |" in sheet_markdown(sheet)


# --- figures ---------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_with_its_deviation(sweep):
    group = groups_of(sweep)[0]
    drawn = curve(group, "joint_epochs", "test_loss")
    np.testing.assert_allclose(drawn.x, 0.5 * np.arange(1, 11))
    np.testing.assert_allclose(drawn.y, 1 / np.arange(1, 11))
    np.testing.assert_allclose(drawn.sd, np.std([0.01, -0.01], ddof=1))


def test_a_seed_that_ended_early_and_is_counted_cuts_the_curve(tmp_path):
    make_run(tmp_path / "a", {"run.num-rounds": 9}, records(9))
    make_run(tmp_path / "b", {"run.num-rounds": 9, "run.seed": 1}, records(4))
    (group,) = group_runs(collect([tmp_path])[0], unfinished=True)
    assert curve(group, "round", "test_loss").x.tolist() == [1, 2, 3, 4]


def test_curves_can_be_told_apart_in_grey(tmp_path):
    for I in (1, 2, 4):  # noqa: E741
        for policy in ("average", "reset", "local"):
            sets = {"algorithm.num-local-steps": I, "algorithm.momentum-policy": policy}
            make_run(tmp_path / f"{I}{policy}", sets, records(1))
    looks = styles(groups_of(tmp_path))
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == 9
    assert len({(look["color"], look["marker"]) for look in looks}) == 3  # policies


def test_a_policy_has_one_colour_whatever_it_is_compared_with(tmp_path):
    for policy in ("average", "reset", "local"):
        for lr in (0.1, 0.2):
            make_run(tmp_path / f"{policy}{lr}", {"algorithm.momentum-policy": policy, "algorithm.lr": lr}, records(1))
    for names in (("average", "reset", "local"), ("local", "reset")):
        folders = [tmp_path / f"{policy}{lr}" for policy in names for lr in (0.1, 0.2)]
        for groups in (groups_of(*folders), alone(collect(folders)[0])):
            for group, look in zip(groups, styles(groups), strict=True):
                policy = group.settings["algorithm.momentum-policy"]
                assert look["color"] == style.COLOURS[style.POLICY_COLOURS[policy]]
    assert style.POLICY_COLOURS.keys() == MOMENTUM_POLICIES.keys()


@pytest.mark.slow
def test_figures_come_as_png_and_pdf_and_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 40)
    for n in (10, 20):
        lines = records(4, speed=n)
        for record in lines:  # panels take time: one column
            del record["joint_epochs"], record["bytes_sent"], record["wall_seconds"], record["momentum_spread"]
        make_run(tmp_path / "sweep" / f"{n}", {"data.num-clients": n, "run.num-rounds": 4}, lines)
    runs, _ = collect([tmp_path / "sweep"])
    groups, targets = group_runs(runs), usual_targets(runs)
    for out in ("one", "two"):
        paths = list(draw_figures(groups, targets, tmp_path / out))
        assert [path.name for path in paths] == [
            f"{n}.{k}" for n in ("curves", "spreads", "speedup") for k in ("png", "pdf")
        ]
    for path in paths:
        content = path.read_bytes()
        assert content == (tmp_path / "one" / path.name).read_bytes()
        if path.suffix == ".pdf":
            assert content.startswith(b"%PDF")
            assert b"/Type3" not in content
        else:
            with Image.open(path) as image:
                assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_nothing_to_draw_is_no_picture(tmp_path):
    make_run(tmp_path / "a", {}, [{"round": 1, "train_loss": 1.0}])
    groups = groups_of(tmp_path)
    assert comparison.draw_comparison(groups, tmp_path / "x") == []
    assert comparison.draw_speedup([], None, tmp_path / "x") == []


# --- the command, and what goes wrong --------------------------------------------------------------------------


def call(capsys, *words):
    status = main.call(["compare", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


@pytest.mark.slow
def test_the_command_prints_and_writes(sweep, capsys, monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)
    status, out, err = call(capsys, sweep, "--target", "accuracy=0.7")
    assert (status, err) == (0, [])
    for title in ("At the end", "To test accuracy ≥ 70 %"):
        assert f"\n{title}\n" in out
    assert "I = 8 ends best, at test accuracy" in out
    for title in (f"At equal {name}" for name in AXES.values()):
        assert f"\n{title}\n" not in out
        assert title.lower() in out  # where it is
    folder = default_out([sweep])
    assert folder == sweep / "comparison"
    assert {"curves.pdf", "spreads.png", "comparison.md", "tables.tex", "equal-bytes.csv"} <= {
        p.name for p in folder.iterdir()
    }
    assert "![curves](curves.png)" in (folder / "comparison.md").read_text()
    status, out, err = call(capsys, sweep, "--format", "latex")  # the comparison's own folder is no run
    assert status == 0
    assert out.startswith(r"\begin{table}")
    assert out.rstrip().endswith(r"\end{table}")


def test_runs_and_sweeps_may_be_named_together_and_twice(sweep):
    runs, _ = collect([sweep / "I=1,seed=0", sweep])
    assert len(runs) == 4


def test_a_half_written_line_is_left_out_and_a_broken_one_named(sweep, capsys):
    file = sweep / "I=1,seed=0" / "rounds.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"round": 11, "test_lo')
    assert len(collect([file.parent])[0][0].rounds) == 10
    file.write_text('{"round": 1, "te\n' + whole)
    status, out, err = call(capsys, sweep)
    assert (status, out, len(err)) == (2, "", 1)
    assert "rounds.jsonl:1: is not a round's record" in err[0]


# --- runs that are not finished, or once more what another one is ----------------------------------------------


def ended(folder, status, round_number):
    """The folder, as this version leaves it."""
    about = {"status": status, "reason": "so", "round": round_number, "pid": 0, "host": "h", "seen": "2026-01-01"}
    (folder / "status.json").write_text(json.dumps(about))


@pytest.fixture
def mixed(tmp_path):
    """Two groups. I = 1: seeds 0 and 1 done. I = 8: 0 and 1 done, five that are not, by every way not to be."""
    folder, cells = tmp_path / "mixed", {}
    for I in (1, 8):  # noqa: E741
        lines = {"done": 9, "done too": 9}
        lines |= {"interrupted": 4, "diverged": 3, "older": 2, "empty": 0, "refused": None} if I == 8 else {}
        for seed, (name, rounds) in enumerate(lines.items()):
            sets = {"algorithm.num-local-steps": I, "run.seed": seed, "run.num-rounds": 9}
            cells[f"{I} {name}"] = {"status": name, "message": "", "sets": sets}
            if rounds is None:
                continue
            lines_of = records(rounds, speed=I, shift=0.01 * (-1) ** seed if seed < 2 else 0.5, I=I)
            run = make_run(folder / f"{I} {name}", sets, lines_of)
            if name in ("done", "done too", "interrupted", "diverged"):
                ended(run, name.split()[0], rounds)
    (folder / "sweep.json").write_text(json.dumps(cells))
    return folder


def without(folder, kept):
    """Only the runs that are done, elsewhere."""
    other = folder.with_name("finished")
    other.mkdir()
    for run in folder.glob("*done*"):
        run.rename(other / run.name)
    return other


LEFT = ("interrupted, 4", "diverged, 3", "older (2", "refused, 0", "empty (0")


def test_numbers_are_of_finished_runs_alone_and_every_format_says_so(mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedmom.results.compare.draw_figures", lambda *_: [])
    monkeypatch.setattr(curves, "draw_groups", lambda groups, path, notes: path.parent.mkdir())
    monkeypatch.setattr(content, "partitions", lambda groups: [])
    groups = groups_of(mixed)
    assert [group.seeds for group in groups] == ["2", "2 of 7"]
    counted = [run for group in groups for run in group.runs]
    sheets = all_sheets(groups, usual_targets(counted))
    texts = [write(sheet) for sheet in sheets for write in FORMATS.values()]
    status, out, err = call(capsys, mixed, "--out", tmp_path / "out")
    assert (status, len(err)) == (0, 1)
    assert main.call(["report", str(mixed), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    for text in (out, *err, page, markdown, capsys.readouterr().out, *texts):
        assert [name for name in LEFT if f"{name} of 9 rounds" not in text] == []
    assert all("2 of 7" in text for text in (out, page, *texts))

    alone = groups_of(without(mixed, "done"))
    kept = [run for group in alone for run in group.runs]
    for sheet, other in zip(sheets, all_sheets(alone, usual_targets(kept)), strict=True):
        assert [row[2:] for row in sheet.rows] == [row[2:] for row in other.rows]


def test_figures_say_what_they_leave_out(mixed, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(comparison, "_save_all", lambda figure, stem: figures.append(figure) or [])
    monkeypatch.setattr(curves, "save_picture", lambda figure, path: figures.append(figure))
    groups = groups_of(mixed)
    comparison._draw_grid(groups, MEASURES[:1], ["round"], tmp_path / "x")
    runs = [run for group in groups for run in group.runs]
    short = [run._replace(rounds=[{"round": 1, "test_loss": 1.0}]) for run in runs]
    curves.draw_curves(short, tmp_path, of_groups(groups))
    for figure in figures:
        legend = figure.legends[0]
        said = " ".join([legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())])
        assert "left out" in said
    assert "5 of 9 runs left out" in figures[0].legends[0].get_title().get_text()
    assert "I = 8 (2 of 7 seeds)" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_unfinished_runs_count_where_that_is_asked_for(mixed, capsys, monkeypatch):
    one, eight = group_runs(collect([mixed])[0], unfinished=True)
    assert (one.seeds, eight.seeds) == ("2", "5 of 7, 3 unfinished")
    assert "counted though not finished: 8 interrupted" in eight.note
    assert equal_sheet([one, eight], "round").rows[-1][2].mean == 2
    monkeypatch.setattr("fedmom.results.compare.draw_figures", lambda *_: [])
    status, out, _ = call(capsys, mixed, "--unfinished")
    assert status == 0
    assert "5 of 7, 3 unfinished" in out


def pooled_beside_many(folder, sizes=(20,)):
    for n in (1, *sizes):
        for policy in ("average", "reset") if n > 1 else ("average",):
            for seed in (0, 1):
                sets = {"data.num-clients": n, "algorithm.momentum-policy": policy, "run.seed": seed}
                sets |= {"data.batch-size": 64} if n == 1 else {}
                shift = 0.4 * (policy == "reset") - 0.1 * (n == 1) + 0.01 * seed
                make_run(folder / f"{n}{policy}{seed}", sets, records(9 if n > 1 else 4, speed=2, shift=shift))


def test_one_client_with_all_data_is_a_line_and_none_of_the_groups(tmp_path):
    pooled_beside_many(tmp_path / "a")
    groups = groups_of(tmp_path / "a")
    assert [group.label for group in groups] == ["momentum average", "momentum reset", POOLED]
    target = usual_targets([run for group in rivals(groups) for run in group.runs])
    for sheet in all_sheets(groups, target):
        names = [row[0] for row in sheet.rows]
        assert (POOLED in names) == (sheet.name == "at-the-end" or sheet.name.startswith("to-")), sheet.name
    assert equal_sheet(rivals(groups), "round").rows[-1][2].mean == 9  # four rounds of it hold nobody back
    first, second = results_of(groups)
    assert first.startswith("Momentum average ends best, at test accuracy 97.0 % ± 0.4 (2 seeds), 20.0 points above")
    assert second == "Pooled (one client with all data) reaches 98.5 % ± 0.4 (2 seeds)."
    figure = comparison.draw_grid(groups, MEASURES[1:2], ["round"], [group.title for group in groups], "")
    assert 98.5 in [round(float(line.get_ydata()[0]), 4) for line in figure.axes[0].lines if len(line.get_ydata())]

    pooled_beside_many(tmp_path / "b", (4, 20))  # where N is studied, 1 is one of its values
    assert not any(group.pooled for group in groups_of(tmp_path / "b"))
    make_run(tmp_path / "a" / "other", {"data.num-clients": 1, "model.name": "mlp"}, records(4))
    assert [group.pooled for group in groups_of(tmp_path / "a")].count(True) == 1


def test_a_sentence_claims_no_more_than_the_seeds_can_tell(tmp_path):
    for name, shifts in (("near", (0.0, 0.05, 0.1)), ("nearer", (0.02, 0.06, 0.11)), ("far", (0.6, 0.65, 0.7))):
        for seed, shift in enumerate(shifts):
            sets = {"run.seed": seed, "model.name": f"mine:{name}"}
            make_run(tmp_path / f"{name}{seed}", sets, records(9, shift=shift))
    (line,) = results_of(groups_of(tmp_path))
    assert "mine:near ends best, at test accuracy 91.9 % ± 2.5 (3 seeds); within the noise of it: mine:nearer. " in line
    assert line.endswith("mine:far, ends 30.0 points below.")
    (line,) = results_of(groups_of(*(tmp_path / f"{name}0" for name in ("near", "far"))))
    assert line.endswith("one seed does not say how much of that is noise.")


def test_where_nothing_is_finished_that_is_said_and_a_run_alone_is_shown(mixed, capsys, monkeypatch):
    monkeypatch.chdir(mixed.parent)  # where its tables go
    monkeypatch.setattr("fedmom.results.compare.draw_figures", lambda *_: [])
    status, out, err = call(capsys, mixed / "8 interrupted", mixed / "8 diverged")
    assert (status, out, len(err)) == (2, "", 1)
    assert "8 interrupted (interrupted, 4 of 9 rounds), 8 diverged (diverged, 3 of 9 rounds); --unfinished" in err[0]
    status, out, _ = call(capsys, mixed / "8 interrupted")
    assert status == 0
    assert "1, 1 unfinished" in out


def test_one_seed_is_one_seed_however_often_it_was_run(tmp_path):
    for name, seed, rounds in (("a", 0, 5), ("b", 0, 9), ("c", 1, 9)):
        make_run(tmp_path / name, {"run.seed": seed, "run.num-rounds": 9}, records(rounds))
    (group,) = groups_of(tmp_path)
    assert ([run.name for run in group.runs], group.seeds) == (["b", "c"], "2")
    assert group.note == "left out: a (the same run as b)"
    (again,) = groups_of(tmp_path / "a", tmp_path / "b")
    assert (again.label, again.seeds) == ("a", "1")


def test_a_run_that_diverged_in_its_first_round_is_left_out_by_name(mixed, capsys, monkeypatch):
    monkeypatch.setattr("fedmom.results.compare.draw_figures", lambda *_: [])
    folder = make_run(mixed / "at once", {"algorithm.num-local-steps": 8, "run.seed": 9, "run.num-rounds": 9}, [])
    ended(folder, "diverged", 0)
    status, _, err = call(capsys, mixed / "1 done", folder, "--out", mixed / "out")
    assert (status, err) == (0, ["fedmom: I = 8: left out: at once (diverged, 0 of 9 rounds)"])


def test_a_run_that_is_done_and_has_lost_rounds_is_left_out_as_damaged(mixed, capsys, monkeypatch):
    monkeypatch.setattr("fedmom.results.compare.draw_figures", lambda *_: [])
    for name, kept in (("1 done", 8), ("8 done", 0)):
        lines = (mixed / name / "rounds.jsonl").read_text().splitlines(keepends=True)
        (mixed / name / "rounds.jsonl").write_text("".join(lines[:kept]))
    status, out, err = call(capsys, mixed, "--out", mixed / "out")
    assert status == 0
    assert "1 of 2" in out
    assert "left out: 1 done (damaged, 8 of 9 rounds)" in err[0]
    assert "8 done (damaged, 0 of 9 rounds)" in err[1]


def test_a_comparison_leaves_no_table_of_an_earlier_one(sweep, tmp_path):
    groups = groups_of(sweep)
    counted = [run for group in groups for run in group.runs]
    for value in (0.5, 0.6):
        write_tables(all_sheets(groups, [parse_target(f"accuracy={value}", counted)]), [], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("to-*")] == ["to-test-accuracy-60.csv"]


def test_what_a_quadratic_does_not_look_at_makes_no_group(tmp_path):
    base = {"data.dataset": "quadratic", "data.num-clients": 2, "run.num-rounds": 2}
    rounds = [{"round": r, "distance": 1 / r} for r in (1, 2)]
    make_run(tmp_path / "a", {**base, "model.name": "mlp"}, rounds)
    make_run(tmp_path / "b", {**base, "model.name": "cnn", "data.augment": "crop-flip", "run.seed": 1}, rounds)
    (group,) = groups_of(tmp_path)
    assert group.seeds == "2"


def test_runs_that_do_not_fit_together_say_what_differs(tmp_path):
    make_run(tmp_path / "digits", {}, records(2))
    make_run(tmp_path / "fashion", {"data.dataset": "fashion-mnist"}, records(2))
    with pytest.raises(InputError, match=r"data\.dataset is 'digits' in digits and 'fashion-mnist' in fashion"):
        check_fit(groups_of(tmp_path))
    other = make_run(tmp_path / "other", {"algorithm.lr": 0.3}, [{"round": 1, "distance": 1.0}])
    groups = groups_of(tmp_path / "digits", other)
    with pytest.raises(InputError, match="measured test_accuracy, test_loss, other distance"):
        check_fit(groups)


BAD = [
    (["nowhere"], "nowhere: no such folder"),
    (["empty"], "empty: is neither a run folder"),
    (["file"], "file: is a file"),
    (["none"], "none: none of its 1 runs has finished a round"),
    (["none/a"], "none/a: no run has finished a round yet"),
    (["sweep", "--target", "acuracy=0.9"], "did you mean"),
    (["sweep", "--target", "distance=0.9"], "choose one of test_accuracy, test_loss (no run has another)"),
    (["sweep", "--target", "accuracy"], "METRIC=NUMBER"),
    (["sweep", "--target", "accuracy=high"], "METRIC=NUMBER"),
    (["sweep", "--target", "accuracy=80"], "accuracy=80%"),
    (["sweep", "--target", "loss = nan"], "reached by no run, or by every one"),
    (["sweep", "--target", "loss=inf"], "reached by no run, or by every one"),
    (["sweep", "--format", "html"], "choose one of text, markdown, csv, latex"),
    (["sweep", "--out", "file"], "--out file: is a file; name a folder"),
    (["sweep", "--out", "~nobody-of-this-name/x"], "is no user of this machine; ./~nobody-of-this-name/x is"),
]


def test_bad_input_is_one_line(sweep, capsys, monkeypatch):
    monkeypatch.chdir(sweep.parent)
    Path("empty").mkdir()
    Path("file").touch()
    make_run(Path("none/a"), {}, [])
    before = sorted(sweep.parent.rglob("*"))
    for words, why in BAD:
        status, out, err = call(capsys, *words)
        assert (status, out, len(err)) == (2, "", 1), words
        assert why in err[0]
        assert sorted(sweep.parent.rglob("*")) == before


def test_what_the_seeds_can_tell_is_told_by_students_t():
    """Two-sided 95 %, as tables of it have it."""
    table = {1: 12.706, 5: 2.571, 9: 2.262, 10: 2.228, 12: 2.179, 20: 2.086, 30: 2.042, 120: 1.980}
    for freedom, t in table.items():
        assert _t95(freedom) == pytest.approx(t, abs=0.004)
