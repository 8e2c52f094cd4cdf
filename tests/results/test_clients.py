"""Every client's own results: tables, pictures and the page, on files written by hand."""

import csv
import json

import numpy as np
import pytest
from pictures import pixels, where

import fedmom
from browser import opened, problems, skip_without_browser
from fedmom.cli import main, results
from fedmom.errors import InputError
from fedmom.records.history import ClientHistory, line_of, thinned
from fedmom.results.clients.table import clients_of, clients_rows, looked_at, spread_table
from fedmom.results.comparison import end_sheet, equal_sheet, parse_target
from fedmom.results.groups import alone, group_runs
from fedmom.results.page import clients as page
from fedmom.results.page import write_page
from fedmom.results.pictures import style
from fedmom.results.pictures.clients import draw_clients, spreads_of
from fedmom.results.pictures.style import COLOURS
from fedmom.results.reading import collect
from fedmom.results.report import finished
from fedmom.results.sheets import written_out
from fedmom.results.tables import measure_of, measures_in
from fedmom.rounds.results import ClientResults
from histories import classifier, make_run, records


def history(n, *, rounds=(2, 4), personal=False, named=False, shares=True, without=0):
    """Clients whose first `without` have no test examples; a personal accuracy is 5 points above the own one."""
    draw = np.random.default_rng(n)
    test = draw.integers(1, 40, n)
    test[:without] = 0
    names = [f"writer, {client:03d}" for client in range(n)] if named else None
    found = ClientHistory(draw.integers(20, 400, n), test, names, [])
    for number in rounds:
        own = np.where(test == 0, np.nan, draw.integers(1, 18, n) / 20)
        loss = np.where(test == 0, np.nan, draw.random(n))  # in an order of its own
        values = {"own_loss": loss, "own_accuracy": own}
        if personal:
            values |= {"personal_loss": loss / 2, "personal_accuracy": own + 0.05}
        kept = {name: one for name, one in values.items() if shares or name.endswith("loss")}
        found.results.append(ClientResults(number, kept))
    return found


def run_with(folder, clients, sets=None, rounds=4):
    """A run folder of a run that looked at these clients."""
    lines = records(rounds)
    for looked in clients.results:
        lines[looked.round - 1] |= looked.record()
    make_run(folder, sets or {}, lines)
    (folder / "clients.jsonl").write_text(clients.about() + "".join(map(line_of, clients.results)), encoding="utf-8")
    return folder


def test_the_spread_over_the_clients_is_that_of_plain_numbers(tmp_path):
    for n, without in ((1, 0), (2, 1), (5, 0), (250, 12)):
        looked = looked_at(clients_of(run_with(tmp_path / str(n), history(n, without=without))))
        header, rows = spread_table(looked)
        assert header == ["measure", "mean", "worst 10 %", "first quartile", "median", "third quartile", "Jain's index"]
        assert [row[0] for row in rows] == ["own accuracy", "own loss"]
        shares, losses = (
            sorted(value for value in looked.results.values[name].tolist() if not np.isnan(value))
            for name in ("own_accuracy", "own_loss")
        )
        losses.reverse()
        assert len(shares) == n - without
        for row, found, factor, form in ((rows[0], shares, 100, "{:.1f} %"), (rows[1], losses, 1, "{:#.4g}")):
            worst = found[: -(-len(found) // 10)]
            wanted = [sum(found) / len(found), sum(worst) / len(worst), *np.percentile(found, [25, 50, 75])]
            assert row[1:6] == [form.format(factor * value) for value in wanted]
        assert rows[0][6] == f"{sum(shares) ** 2 / (len(shares) * sum(a * a for a in shares)):.3f}"
        assert rows[1][6] == "–"
        clients = f"{n} client{'s' if n > 1 else ''}"
        assert looked.about == f"round 4: {clients}{f', {without} without test examples' if without else ''}"


def test_the_worst_come_first_and_clients_without_test_examples_last(tmp_path):
    folder = run_with(tmp_path / "a", history(250, personal=True, named=True, without=12))
    for name, sign in ((None, 1), ("own_loss", -1), ("personal_accuracy", 1), ("personal_loss", -1)):
        looked = looked_at(clients_of(folder), 2)
        measure = looked.judged_by(name)
        assert measure.key == (name or "own_accuracy")
        values = sign * looked.results.values[measure.key]
        order = [int(row[0][0]) for row in clients_rows(looked, measure, None)]
        by_hand = sorted(range(250), key=lambda client: (np.isnan(values[client]), values[client], client))
        assert order[:-12] == by_hand[:-12]
        assert sorted(order[-12:]) == list(range(12))
        assert [int(row[0][0]) for row in clients_rows(looked, measure, 20)] == order[:20]


def test_the_command_prints_tables_that_fit_and_writes_all_clients(tmp_path, capsys, monkeypatch):
    found = history(250, personal=True, named=True, without=12)
    folder = run_with(tmp_path / "a", found)
    for width in (60, 80, 120):
        monkeypatch.setattr(results, "terminal_width", lambda width=width: width)
        assert main.call(["clients", str(folder)]) == 0
        lines = capsys.readouterr().out.replace(str(folder), "run").splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.startswith(tuple("0123456789")) for line in lines) % 20 == 0
    monkeypatch.setattr(results, "terminal_width", lambda: None)
    assert main.call(["clients", str(folder), "--all", "--round", "2", "--csv", str(tmp_path / "new" / "all.csv")]) == 0
    text = capsys.readouterr().out
    assert "round 2: 250 clients, 12 without test examples" in text
    assert text.count("writer, ") == 250
    with open(tmp_path / "new" / "all.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, values in found.results[0].values.items():
        np.testing.assert_array_equal([float(row[name] or "nan") for row in rows], values)
    assert [row["id"] for row in rows] == found.names
    assert [int(row["test_examples"]) for row in rows] == found.test_examples.tolist()
    one = run_with(tmp_path / "one", history(1))
    assert main.call(["clients", str(one)]) == 0
    assert "id" not in capsys.readouterr().out.split()


def test_a_mistake_is_one_line_that_says_what_would_be_right(tmp_path, capsys):
    folder = run_with(tmp_path / "sweep" / "a", history(2))
    make_run(tmp_path / "plain", {}, records(1))
    begun = run_with(tmp_path / "begun", history(2, rounds=()))
    short = run_with(tmp_path / "short", history(2))
    with open(short / "clients.jsonl", "a", encoding="utf-8") as file:
        file.write('{"round": 6, "own_loss": [1.0]}\n')
    other = run_with(tmp_path / "other", history(2))
    (other / "clients.jsonl").write_text("[]\n")
    for words, said in (
        ([tmp_path / "gone"], "gone: no such folder"),
        ([folder / "config.toml"], "config.toml: is a file"),
        ([tmp_path / "sweep"], f"sweep: is the folder of a sweep; name one of its 1 run: {folder}"),
        ([tmp_path / "plain"], "has no clients.jsonl; run.client-eval-every"),
        ([tmp_path / "plain"], "data.client-test-share"),
        ([begun], "clients.jsonl: has no evaluation yet"),
        ([short], "clients.jsonl:4: own_loss has 1 numbers; there are 2 clients"),
        ([other], "clients.jsonl:1: does not say who the clients are"),
        ([folder, "--round", "3"], "--round 3: the clients were looked at in 2, 4; choose one"),
        ([folder, "--by", "accuracy"], "--by = 'accuracy' is not known: did you mean own_accuracy?"),
        ([folder, "--out", tmp_path / "x.txt"], "pictures are PNG or PDF"),
        ([folder, "--csv", tmp_path], "is a folder; name a file"),
    ):
        assert main.call(["clients", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_runs_are_compared_by_the_mean_and_the_worst_tenth(tmp_path):
    titles = {
        "own_worst10_accuracy": "own accuracy, worst 10 %",
        "personal_median_top5": "personal top-5 accuracy, median",
        "own_q25_loss": "own loss, first quartile",
        "own_accuracy_jain": "own accuracy, Jain's index",
    }
    assert {key: measure_of(key).title for key in titles} == titles
    assert [measure_of(key).unit for key in titles] == [" %", " %", "", ""]
    assert [measure_of(key).rises for key in titles] == [True, True, False, True]
    assert measure_of("own_accuracy_histogram") is measure_of("own_accuracy") is measure_of("owner_mean_loss") is None

    one = history(5, personal=True, rounds=(4,)).results[0].record()
    keys = [f"{whose}_{what}_accuracy" for whose in ("own", "personal") for what in ("mean", "worst10")]
    assert [measure.key for measure in measures_in([[one]])] == keys
    assert len(measures_in([[one]], every=True)) == 2 * (5 + 5 + 1)
    plain = history(5, shares=False, rounds=(4,)).results[0].record()
    assert [measure.key for measure in measures_in([[plain]])] == ["own_mean_loss", "own_worst10_loss"]

    # Two rhythms: the model was tested in rounds 3, 6 and 9, the clients in round 4.
    run = classifier("a", 10, eval_every=3)
    run.rounds[3].update(one)
    (row,) = written_out(end_sheet(alone([run]), of_runs=True))[1]
    assert row[1:3] == ["9.0 %", "9.0 %"]
    assert row[3:7] == [f"{100 * one[key]:.1f} %" for key in keys]
    late, early = (written_out(equal_sheet(alone([run]), "round", of_runs=True))[1][place] for place in (1, 0))
    assert late[2] == "9"
    assert early[2] == "3"
    assert late[-4:] == early[-4:] == row[3:7]
    assert parse_target("own_median_accuracy=0.01", [run]).reached(run.rounds)["round"] == 4
    with pytest.raises(InputError, match="own_q25_loss"):
        parse_target("own_q24_loss=1", [run])


def test_a_long_run_keeps_the_rounds_that_looked():
    lines = [
        {"round": r, "test_loss": 1.0} | ({"own_num_clients": 3, "own_mean_loss": 1.0} if r % 10 == 7 else {})
        for r in range(1, 1001)
    ]
    kept = thinned(lines, 100)
    assert sum("own_mean_loss" in record for record in kept) >= 10
    assert len(kept) < 130


@pytest.mark.slow
def test_pictures_show_own_and_personal_results(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)
    for n, personal, shares in ((1, False, True), (2, True, False), (250, True, True)):
        found = history(n, personal=personal, shares=shares, without=n // 20)
        path = tmp_path / f"{n}.png"
        draw_clients(found.records(), path, shown=2)
        seen = [where(pixels(path), colour).sum() >= 20 for colour in COLOURS[:3]]
        assert seen == [True, personal, False]
        spreads = spreads_of(found.records())
        metric = "accuracy" if shares else "loss"
        assert [spread.measure.key for spread in spreads] == [f"own_{metric}", f"personal_{metric}"][: 1 + personal]
        values = found.results[-1].values[f"own_{metric}"]
        assert spreads[0].rounds == [2, 4]
        assert spreads[0].lines["median"][-1] == np.nanmedian(values)
        assert sum(spreads[0].histogram["counts"]) == n - n // 20
    with pytest.raises(InputError, match="no client has test examples"):
        draw_clients(history(2, without=2).records(), tmp_path / "none.png")


@pytest.mark.slow
def test_a_run_that_looked_has_a_picture_of_its_clients_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style, "DPI", 40)
    monkeypatch.setattr("fedmom.results.pictures.curves.draw_curves", lambda runs, path: path.touch())
    found = history(2, named=True)
    folder = run_with(tmp_path / "a", found)
    result = fedmom.load(folder)
    lines = finished(folder, result.rounds)
    assert lines[-2:] == [f"clients: {folder / 'clients.png'}", str(folder)]
    np.testing.assert_array_equal(result.clients.results[-1].values["own_loss"], found.results[-1].values["own_loss"])
    assert result.clients.names == found.names
    assert result._replace(folder=None).clients is None
    assert [text in result._repr_html_() for text in ('alt="curves"', 'alt="clients"')] == [True, True]
    drawn = [{axes.get_ylabel() for axes in result.plot(clients=which).axes} for which in (False, True)]
    assert drawn[1] == {"Clients' accuracy (%)", "Clients"}
    assert not any("Clients" in label for label in drawn[0])

    plain = make_run(tmp_path / "plain", {}, records(2))
    assert not any("clients" in line for line in finished(plain, records(2))[:-1])
    assert not (plain / "clients.png").exists()
    assert fedmom.load(plain).clients is None
    with pytest.raises(InputError, match="no clients' own results"):
        fedmom.load(plain).plot(clients=True)

    (folder / "clients.png").unlink()
    monkeypatch.setattr("fedmom.results.page.write_page", lambda *groups, **notes: "x.html")
    (tmp_path / "out").mkdir()
    assert main.call(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert f"clients: {tmp_path / 'out' / 'clients.png'}" in capsys.readouterr().out
    assert "(clients.png)" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_the_page_has_a_part_for_each_run_that_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_RUNS", 4)
    runs = tmp_path / "runs"
    run_with(runs / "a", history(250, personal=True, named=True, without=12), {"run.seed": 1})
    run_with(runs / "b", history(1), {"run.seed": 2})
    (run_with(runs / "c", history(2), {"run.seed": 3}) / "clients.jsonl").unlink()
    (run_with(runs / "d", history(2), {"run.seed": 4}) / "clients.jsonl").write_text("{}\n")
    run_with(runs / "e", history(2), {"run.seed": 5})
    make_run(runs / "plain", {"run.seed": 6}, records(4))
    many, single, bare, broken, more = page.clients(group_runs(collect([runs])[0]))

    assert many["facts"] == "Round 4: 250 clients, 12 without test examples"
    assert many["header"][:5] == ["client", "id", "examples", "test examples", "own accuracy"]
    shares = [float(row[4][1]) for row in many["rows"]]
    assert len(shares) == page.MOST_ROWS
    assert shares == sorted(shares)
    assert "200 worst of 250" in many["note"]
    assert [spread["whose"] for spread in many["spreads"]] == ["own", "personal"]
    assert (many["label"], many["round"], many["unit"], many["factor"]) == ("Accuracy", 4, " %", 100.0)
    assert single["spreads"][0]["rounds"] == [2, 4]
    assert [len(one["rows"]) for one in (single, bare)] == [1, 0]
    assert "does not say who the clients are" in broken["trouble"]
    assert "1 more run" in more["title"]
    assert all(json.dumps(page.drawn_of(one), allow_nan=False) for one in (many, single, bare, broken, more))
    text = write_page(group_runs(collect([runs])[0]), [], tmp_path / "x.html").read_text(encoding="utf-8")
    assert text.count('class="sortable clients"') == 2
    plain = write_page(group_runs(collect([runs / "plain"])[0]), [], tmp_path / "y.html").read_text(encoding="utf-8")
    assert 'href="#clients"' not in plain


@pytest.mark.slow
def test_a_browser_draws_the_clients_and_sorts_them(tmp_path):
    """On a screen, a phone and paper; a filter of runs hides no client."""
    skip_without_browser()
    folder = run_with(tmp_path / "a", history(250, personal=True, named=True, without=12))
    file = write_page(group_runs(collect([folder])[0]), [], tmp_path / "x.html")
    for look in ({}, {"width": 390, "height": 844, "touch": True}):
        with opened(file, **look) as driver:
            drawn = "return document.querySelectorAll('[data-clients] .trace').length"
            assert driver.execute_script(drawn) >= 8
            driver.execute_script("document.querySelector('details.long').open = true; filterTables('nothing')")
            assert driver.execute_script("return document.querySelectorAll('table.clients tr[hidden]').length") == 0
            head = driver.find_elements("css selector", "table.clients thead button")[4]
            for sign in (1, -1):
                driver.execute_script("arguments[0].click()", head)
                cells = "[...document.querySelectorAll('table.clients td:nth-child(5)')].map(e => e.dataset.value)"
                values = [sign * float(text) for text in driver.execute_script(f"return {cells}")]
                assert values == sorted(values)
            driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
            wide = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1]
            assert driver.execute_script(drawn) >= 8
            assert problems(driver) == []
