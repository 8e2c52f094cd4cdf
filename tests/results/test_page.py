"""The HTML page: what it holds, and what a real browser does with it."""

import csv
import gzip
import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from browser import opened, problems, skip_without_browser
from fedmom.cli import main
from fedmom.results.groups import group_runs
from fedmom.results.page import content, write_page
from fedmom.results.ranking import results
from fedmom.results.reading import collect
from histories import make_run, records


@pytest.fixture
def sweep(tmp_path):
    """Two policies and two seeds on real digits, and one policy with another α."""
    for policy, alpha, seed in [("average", 0.3, 0), ("average", 0.3, 1), ("reset", 0.3, 0), ("reset", 0.1, 0)]:
        sets = {"algorithm.momentum-policy": policy, "data.alpha": alpha, "run.seed": seed, "run.num-rounds": 12}
        lines = records(12, speed=2 if policy == "average" else 1, shift=0.01 * seed)
        folder = make_run(tmp_path / "sweep" / f"{policy},{alpha:g},{seed}", sets, lines)
        about = {"command": ["fedmom", "sweep", "a b.toml"], "versions": {"torch": "2.14"}, "device": "cpu"}
        (folder / "environment.json").write_text(json.dumps(about))
    return tmp_path / "sweep"


@pytest.fixture
def page(sweep):
    runs, notes = collect([sweep])
    return write_page(group_runs(runs), [], sweep / "report.html", notes=notes)


def payload(page):
    return json.loads(re.search(r'id="page-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


class Links(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "poster")]


def test_nothing_in_the_page_is_fetched(page):
    text = page.read_text(encoding="utf-8")
    links = Links(text).found
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert page.stat().st_size < 3e6


def test_plotly_is_inside_whole(page):
    from plotly.offline import get_plotlyjs

    packed = re.search(r'id="plotly-packed">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert gzip.decompress(b64decode(packed)).decode() == get_plotlyjs()


def test_curves_hold_means_deviations_and_seeds(page):
    groups = payload(page)["curves"]["groups"]
    assert [group["label"] for group in groups] == [
        "momentum average, Dirichlet α = 0.3",
        "momentum reset, Dirichlet α = 0.1",
        "momentum reset, Dirichlet α = 0.3",
    ]
    several, single = groups[0], groups[1]
    np.testing.assert_allclose(several["mean"]["test_loss"], 1 / (2 * np.arange(1, 13)) + 0.005, rtol=1e-5)
    np.testing.assert_allclose(several["sd"]["test_loss"], np.std([0, 0.01], ddof=1), rtol=1e-4)
    assert len(several["seeds"]["test_loss"]) == 2
    assert "sd" not in single
    assert several["x"]["joint_epochs"][-1] == 6.0


def test_long_runs_are_thinned_but_keep_their_ends(tmp_path):
    make_run(tmp_path / "long", {"run.num-rounds": 5000}, records(5000, eval_every=7))
    group = content.curves(group_runs(collect([tmp_path])[0]))["groups"][0]
    rounds = group["x"]["round"]
    assert rounds[0] == 1
    assert rounds[-1] == 5000
    assert len(rounds) <= content.MAX_POINTS + 2
    assert len([value for value in group["mean"]["test_loss"] if value is not None]) > 500


def test_every_way_of_splitting_the_data_is_drawn_once(page):
    parts = payload(page)["partitions"]
    assert [part["title"].partition("α")[2] for part in parts] == [" = 0.3, seed 0", " = 0.1, seed 0"]
    for part in parts:
        counts = np.array(part["z"])
        assert counts.shape == (10, 20)
        assert counts.sum() == 1437


def test_many_clients_are_shown_as_shares(tmp_path):
    sets = {"data.num-clients": 1437, "data.partition": "iid", "data.min-size": 0}
    make_run(tmp_path / "many", sets, records(1))
    (part,) = content.partitions(group_runs(collect([tmp_path])[0]))
    shares = np.array(part["z"])
    assert shares.shape == (10, content.MAX_CLIENTS)
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-4)


def test_data_that_are_not_here_are_said(tmp_path):
    make_run(tmp_path / "a", {"data.dataset": "gone.npz"}, records(1))
    runs, _ = collect([tmp_path])
    page = write_page(group_runs(runs), [], tmp_path / "report.html")
    assert "No picture" in page.read_text(encoding="utf-8")


def test_names_cannot_break_the_page(tmp_path):
    name = "<script>alert(1)</script>&'\"</script>"
    folder = make_run(tmp_path / name.replace("/", "∕"), {"model.name": "a:b"}, records(2))
    runs, _ = collect([folder])
    text = write_page(group_runs(runs), [], tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<script>") == 1  # ours
    assert "alert(1)" in text


def test_infinite_numbers_are_gaps(tmp_path):
    lines = records(3)
    lines[1]["test_loss"], lines[2]["consensus_distance"] = float("nan"), float("inf")
    make_run(tmp_path / "a", {}, lines)
    group = content.curves(group_runs(collect([tmp_path])[0]))["groups"][0]
    assert group["mean"]["test_loss"] == [1.0, None, 0.333333]
    assert group["mean"]["consensus_distance"][2] is None


def test_the_page_says_how_to_run_it_again(page, sweep):
    text = page.read_text(encoding="utf-8")
    assert "fedmom sweep &#39;a b.toml&#39;" in text
    assert "torch" in text
    assert text.count("download=") == 4


def test_the_command_writes_a_page_alone_or_a_folder(sweep, capsys, monkeypatch):
    from fedmom.results.pictures import curves

    monkeypatch.setattr(curves, "draw_groups", lambda groups, path, notes: path.write_text(""))
    assert main.call(["report", str(sweep), "--out", str(sweep / "new" / "x.html")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {sweep / 'new' / 'x.html'}"
    assert [path.name for path in (sweep / "new").iterdir()] == ["x.html"]
    assert main.call(["report", str(sweep)]) == 0
    assert {"curves.png", "report.md", "report.html"} <= {path.name for path in sweep.iterdir()}
    (sweep / "file").touch()
    capsys.readouterr()
    assert main.call(["report", str(sweep), "--out", str(sweep / "file" / "x.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- in a real browser -----------------------------------------------------------------------------------------


def texts(driver, script):
    return driver.execute_script(f"return [...document.querySelectorAll({script})].map(e => e.textContent)")


@pytest.mark.slow
@pytest.mark.parametrize("look", [{}, {"dark": True}, {"width": 390, "height": 844, "touch": True}], ids=str)
def test_a_browser_shows_the_page(page, look):
    """Opens from disk without an error, draws, toggles a legend entry by keyboard, sorts, and fits the screen."""
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with opened(page, **look) as driver:
        assert problems(driver) == []
        plots = driver.find_elements("css selector", ".plot")
        assert len(plots) == 6  # one is the end against a key
        lines = "document.querySelectorAll('#plot-test_loss .scatterlayer .trace path.js-line').length"
        before = driver.execute_script(f"return {lines}")
        assert before == 4  # three means and a band
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('#plot-test_loss .js-line')].map(e => e.getTotalLength())"
        )
        assert min(drawn) > 50  # pixels

        entry = driver.find_elements("css selector", "#legend button")[1]
        entry.send_keys(Keys.ENTER)
        assert driver.execute_script(f"return {lines}") == 3
        focused = driver.switch_to.active_element
        assert focused.get_attribute("aria-pressed") == "false"
        focused.send_keys(Keys.SPACE)
        assert driver.execute_script(f"return {lines}") == 4

        driver.execute_script(
            "const s = document.getElementById('axis'); s.value = 'bytes_sent'; s.dispatchEvent(new Event('change'))"
        )
        assert "MB" in driver.execute_script("return document.querySelector('#plot-test_loss .xtitle').textContent")
        driver.execute_script("document.getElementById('each').click()")
        assert driver.execute_script(f"return {lines}") == 6

        column = 4  # test loss
        head = driver.find_elements("css selector", "#tables table thead button")[column]
        for sign, said in ((1, "ascending"), (-1, "descending")):
            driver.execute_script("arguments[0].click()", head)
            cells = texts(driver, f"'#tables table:first-of-type tbody tr :nth-child({column + 1})'")[:3]
            values = [sign * float(text.split()[0]) for text in cells]
            assert values == sorted(values)
            assert head.find_element("xpath", "..").get_attribute("aria-sort") == said

        assert driver.execute_script("return document.querySelectorAll('.partition .heatmaplayer image').length") == 2
        fits(driver)
        try_controls(
            driver, f"return {lines}", json.loads(driver.find_element("id", "page-data").get_attribute("textContent"))
        )
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 200
        assert dark == bool(look.get("dark"))
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", A4 | {"deviceScaleFactor": 1, "mobile": False})
        fits(driver)
        cut = "[...document.querySelectorAll('.wide, .plot')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert driver.execute_script(f"return {cut}") == 0
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"
        assert problems(driver) == []


A4 = {"width": 688, "height": 1010}  # pixels between margins of 14 mm


def fits(driver):
    wide = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]


def try_controls(driver, lines, data):
    """Filter, smoothing, log axis, curves as CSV, and the end against a key."""

    def change(name, value, event="change"):
        script = (
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('{}'))"
        )
        driver.execute_script(script.format(event), name, value)

    before = driver.execute_script(lines)
    change("filter", "average 0.3", "input")
    assert driver.execute_script(lines) < before
    assert (
        len([row for row in driver.find_elements("css selector", "#at-the-end + .wide tbody tr") if row.is_displayed()])
        == 1
    )
    change("filter", "", "input")
    assert driver.execute_script(lines) == before
    drawn = "return document.querySelector('#plot-test_loss .js-line').getAttribute('d')"
    for name, value in (("smooth", "7"), ("log-x", "")):
        old = driver.execute_script(drawn)
        driver.execute_script(
            "const e = document.getElementById('log-x'); if (arguments[0] === 'log-x') e.click()", name
        )
        if value:
            change(name, value)
        assert driver.execute_script(drawn) != old, name
    kept = data["curves"]
    text = driver.execute_script("return curvesAsCsv(...arguments)", kept["groups"], kept["axes"], kept["measures"])
    header, *rows = csv.reader(io.StringIO(text))
    assert len(rows) == sum(len(group["x"]["round"]) for group in kept["groups"])
    at = header.index("test_loss")
    assert [float(row[at]) for row in rows[:12]] == pytest.approx(kept["groups"][0]["mean"]["test_loss"])
    assert len(driver.find_elements("css selector", "#swept-plot .scatterlayer .trace")) == 2  # two policies against α


def test_the_page_says_what_came_out_and_nothing_that_is_untrue_of_some_runs(page):
    runs, _ = collect([page.parent])
    groups = group_runs(runs)
    text = " ".join(content.summary(groups))
    assert "model and momentum are averaged" not in text
    assert "(average: the paper: u is averaged" in text
    assert "reset: u = 0" in text
    averaged = group_runs([run for run in runs if run.settings["algorithm.momentum-policy"] == "average"])
    assert "model and momentum are averaged" in " ".join(content.summary(averaged))
    html = page.read_text(encoding="utf-8")
    for line in results(groups):
        assert f'<p class="result">{line}</p>' in html
    swept = content.curves(groups)
    assert list(swept["swept"]) == ["data.alpha"]
    assert [group["family"]["data.alpha"] for group in swept["groups"]] == ["momentum average", *["momentum reset"] * 2]
    assert [group["at"]["data.alpha"] for group in swept["groups"]] == [0.3, 0.1, 0.3]


def test_the_page_needs_no_file_but_its_own():
    folder = Path(content.__file__).parent
    assert {path.name for path in folder.iterdir() if path.suffix != ".pyc"} - {"__pycache__"} == {
        *("__init__.py", "content.py", "clients.py", "write.py", "report.html", "report.css"),
        *("report.js", "clients.js", "pure.js"),
    }
