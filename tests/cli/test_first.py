"""The first minutes: a project that runs, a look at a configuration, a list of runs."""

import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedmom.cli import main
from fedmom.cli.first import commands
from fedmom.cli.first.text import duration, filled, listed_out
from fedmom.config.load import load
from fedmom.config.schema import FILE, FIRST
from fedmom.machine.cache import Kept, nothing_kept
from fedmom.records.history import from_the_end, last_round
from fedmom.records.listing import list_runs
from laws import table

RESOLVED = "[run]\nnum-rounds = 40\n"


@pytest.fixture
def fed(in_tmp, capsys, monkeypatch):
    """fed("ls", …) -> (exit status, what is printed, what is complained)."""
    monkeypatch.setattr(commands, "line_width", lambda: None)

    def command(*arguments):
        capsys.readouterr()
        status = main.call([*map(str, arguments)])
        return status, *capsys.readouterr()

    yield command
    sys.modules.pop("mine", None)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(folder, status="done", config=RESOLVED, seen="2026-01-01T00:00:00+00:00", rounds=40, **numbers):
    """A run folder as far as a list looks at it."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.toml").write_text(config)
    about = {"status": status, "reason": "so it is", "round": rounds, "pid": 1, "host": "elsewhere", "seen": seen}
    (folder / "status.json").write_text(json.dumps(about))
    lines = [
        json.dumps({"round": n, "train_loss": 2.0, **(numbers if n % 2 == 0 else {})}) for n in range(1, rounds + 1)
    ]
    (folder / "rounds.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_a_project_is_written_over_nothing(fed, in_tmp):
    for name in ("config.toml", ".fedmom.schema.json"):
        place = in_tmp / name.strip(".")
        place.mkdir()
        (place / name).write_text("mine")
        status, out, err = fed("new", place)
        assert (status, out, files(place)) == (2, "", {name: b"mine"})
        assert f"{place / name}: exists already" in err
        assert err.count("\n") == 1
    for place in (in_tmp / "config.toml" / "config.toml", Path("/proc/none")):
        status, out, err = fed("new", place)
        assert (status, out, err.count("\n")) == (2, "", 1), err


def test_a_project_names_the_ten_keys_to_know_and_its_schema(fed, in_tmp):
    status, out, _ = fed("new")
    project = in_tmp / "fedmom-project"
    assert status == 0
    assert out.splitlines()[-3:] == ["  cd fedmom-project", "  fedmom check config.toml", "  fedmom run config.toml"]
    text = (project / "config.toml").read_text()
    assert {f"{head}.{key}" for head, table in tomllib.loads(text).items() for key in table} == set(FIRST)
    assert text.startswith("#:schema ./.fedmom.schema.json\n")
    assert (project / ".fedmom.schema.json").read_bytes() == FILE.read_bytes()
    load(project / "config.toml")
    assert all(name in out for name in files(project))


def test_a_check_refuses_what_a_run_refuses(fed, in_tmp):
    assert fed("new", ".")[0] == 0
    (in_tmp / "taken").mkdir()
    (in_tmp / "taken" / "config.toml").write_text("")
    before = files(in_tmp)
    for change, words in {
        "model.name=mine:modle": "did you mean mine:model?",
        "model.name=mein:model": "start fedmom where mein.py is",
        "algorithm.lr=-1": "algorithm.lr = -1",
        "run.backend=flower": "flwr run",
        "run.out=taken": "exists already",
        "run.resume=taken": "leave it out",
    }.items():
        status, out, err = fed("check", "config.toml", "--set", change)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert words in err
    status, _, err = fed("check", "nowhere.toml")
    assert status == 2
    assert "nowhere.toml" in err
    assert {name: text for name, text in files(in_tmp).items() if "__pycache__" not in name} == before


def test_a_check_of_formulas_says_what_they_come_to_and_writes_nothing(fed, in_tmp, monkeypatch):
    monkeypatch.setenv("FEDMOM_CACHE", str(in_tmp / "cache"))
    text = '[data]\ndataset = "quadratic"\n[algorithm]\nlr = 0.1\nnum-local-steps = 2\n[run]\nnum-rounds = 7\n'
    (in_tmp / "q.toml").write_text(text)
    status, out, err = fed("check", "q.toml", "--set", "run.eval-every=3")
    assert (status, err, set(files(in_tmp))) == (0, "", {"q.toml"})
    assert "N = 2, all of them in every round" in out
    assert "R = 7, I = 2: 28 client-steps" in out
    assert "of 3 evaluations" in out
    assert out.endswith("next      fedmom run q.toml --set run.eval-every=3\n")
    status, out, err = fed("check", "q.toml", "--set", "algorithm.lr=1e200")
    assert (status, out, err.count("\n")) == (3, "", 1), err


@pytest.mark.slow
@pytest.mark.parametrize("change", ["algorithm.name=d-sgd-m", "algorithm.momentum-policy=local", "run.dtype=bfloat16"])
def test_a_check_says_what_a_run_then_does(fed, in_tmp, change, monkeypatch):
    """Client-steps, parameters, the sizes of files."""
    from fedmom.experiments.check import check_config
    from fedmom.experiments.run import run

    monkeypatch.setenv("FEDMOM_CACHE", str(in_tmp / "cache"))
    fed("new", ".")
    sets = [change, "data.num-clients=5", "run.num-rounds=4"]
    sets += ["algorithm.num-local-steps=1"] if "d-sgd-m" in change else []
    before = set(files(in_tmp))
    found = check_config("config.toml", sets)
    assert {name for name in files(in_tmp) if "__pycache__" not in name} == before
    result = run("config.toml", sets=sets, out="run")
    last, size = result.rounds[-1], lambda name: (in_tmp / "run" / name).stat().st_size
    assert found.client_steps == last["steps"] * last["num_clients"]
    assert found.num_parameters == sum(x.numel() for x in result.state_dict.values())
    assert [(layer.kind, layer.output, layer.parameters) for layer in found.layers] == [
        ("Linear", "[B, 64]", 1088),
        ("ReLU", "[B, 64]", 0),
        ("Linear", "[B, 10]", 650),
    ]
    assert found.rounds_bytes == pytest.approx(size("rounds.jsonl"), rel=0.1)
    assert 0 < size("checkpoint.safetensors") - found.checkpoint_bytes < 2000
    rows = size("clients.safetensors") if found.rows_bytes else 0
    assert bool(found.rows_bytes) == (in_tmp / "run" / "clients.safetensors").exists()
    assert found.rows_bytes <= rows <= found.rows_bytes + 2000
    assert found.data.sizes.sum() == found.data.num_train == 4000


def test_a_check_counts_the_looks_at_every_client(in_tmp, monkeypatch):
    import fedmom
    from fedmom.experiments.check import check_config

    monkeypatch.setenv("FEDMOM_CACHE", "")
    data = "[data]\nnum-clients = 5\nclient-test-share = 0.2\n[model]\nname = 'logistic'\n[engine]\npath = 'loop'\n"
    (in_tmp / "c.toml").write_text(f"{data}[run]\nnum-rounds = 5\nclient-eval-every = 2\npersonal-steps = 1\n")
    found = check_config("c.toml")
    fedmom.run("c.toml", out="run", callbacks=[fedmom.Callback()])
    history = fedmom.load("run").clients
    assert found.num_looks == len(history.results) == 3
    assert found.look_seconds > 0
    assert found.data.own_tests.tolist() == history.test_examples.tolist()
    assert "own_mean_loss" not in found.step  # two clients' step is no look at all of them
    size = (in_tmp / "run/clients.jsonl").stat().st_size
    assert found.results_bytes == pytest.approx(size, rel=0.5)


@pytest.mark.slow
def test_from_nothing_to_a_comparison(fed, in_tmp, monkeypatch):
    fed("new", ".")
    status, out, _ = fed("check", "config.toml")
    assert status == 0
    assert "mine:model: 1,738 parameters" in out
    for policy in ("average", "reset"):
        sets = ["--set", f"algorithm.momentum-policy={policy}"]
        assert fed("run", "config.toml", "--quiet", "--out", f"runs/{policy}", *sets)[0] == 0
    rows = {row.name: row.value for row in list_runs(Path("runs"))}
    assert rows["average"] > rows["reset"] + 0.005 > 0.9  # what the project's README is about
    assert fed("compare", "runs/average", "runs/reset")[0] == 0
    status, out, _ = fed("ls")
    assert [line.split("\t")[:3] for line in out.splitlines()] == [
        [os.path.join("runs", name), "done", "50/50"] for name in ("reset", "average")
    ]


def test_runs_are_listed_the_newest_first_whatever_became_of_them(fed, in_tmp):
    runs = in_tmp / "runs"
    put(runs / "old", test_accuracy=0.5)
    put(runs / "cut", "interrupted", seen="2026-01-02T00:00:00+00:00", rounds=12, loss=3.0)
    put(runs / "nan", "diverged", seen="2026-01-03T00:00:00+00:00", rounds=0)
    for number, value in enumerate((0.7, 0.9)):
        put(runs / "many" / f"seed={number}", seen="2026-01-04T00:00:00+00:00", test_accuracy=value)
    (runs / "many" / "sweep.json").write_text('{"seed=2": {"status": "not begun"}}')
    put(runs / "no-config", config=None, seen="2025-01-03T00:00:00+00:00", rounds=3)
    (put(runs / "no-rounds", seen="2025-01-02T00:00:00+00:00", rounds=4) / "rounds.jsonl").write_bytes(
        b"\xff\n{}\n[]\n"
    )
    (put(runs / "no-text", seen="2025-01-01T00:00:00+00:00", rounds=4) / "config.toml").write_bytes(b"\xff\xfe")
    (runs / "comparison").mkdir()
    status, out, _ = fed("ls")
    assert status == 0
    cells = {Path(line.split("\t")[0]).name: line.split("\t")[1:] for line in out.splitlines()}
    assert [*cells][:4] == ["many", "nan", "cut", "old"]
    assert set(cells) == {"many", "nan", "cut", "old", "no-config", "no-rounds", "no-text"}
    assert cells["many"][:3] == ["2 done, 1 not begun", "80/80", "best 90.0 %"]
    assert cells["nan"][:3] == ["diverged", "0/40", ""]
    assert cells["cut"][:3] == ["interrupted", "12/40", "loss 3"]
    assert cells["old"][:3] == ["done", "40/40", "50.0 %"]
    for name, reason in {
        "no-config": "config.toml is missing",
        "no-rounds": "has no line",
        "no-text": "no text",
    }.items():
        assert cells[name][0] == "broken"
        assert reason in cells[name][-1]
    assert len(fed("ls", "--all")[1].splitlines()) == 10
    assert [line.split("\t")[1] for line in fed("ls", runs / "many")[1].splitlines()] == ["done", "done", "not begun"]
    assert fed("ls", runs / "old")[1].startswith(f"{runs / 'old'}\tdone\t40/40\t50.0 %")


@table("width", [60, 80, 120])
def test_a_list_keeps_to_the_terminal_and_cuts_no_name(fed, in_tmp, monkeypatch, width):
    for name in ("config-20260101-120000", "a-run-with-" + "a-long-name-" * 3):
        put(in_tmp / "runs" / name, "interrupted", test_loss=0.1234)
    monkeypatch.setattr(commands, "line_width", lambda: width)
    _, out, _ = fed("ls")
    lines = out.splitlines()
    assert all(len(line) <= width for line in lines if "--resume" not in line), out
    assert all(any(line.startswith(path.name) for line in lines) for path in (in_tmp / "runs").iterdir())


def test_a_list_of_nothing_is_one_line(fed, in_tmp):
    for make in (lambda: None, lambda: (in_tmp / "runs").mkdir()):
        make()
        status, out, err = fed("ls")
        assert (status, out) == (0, "")
        assert "fedmom new" in err
        assert err.count("\n") == 1
    status, out, err = fed("ls", "nowhere")
    assert (status, out, err) == (2, "", "fedmom: nowhere: no such folder\n")


def test_rounds_are_read_from_the_end(in_tmp):
    """Lines longer than what is read at a time, and one that a kill cut short."""
    for sizes in ([], [1], [5000], [10, 70_000, 10, 4096, 4095, 1], [3] * 5000):
        lines = [json.dumps({"round": n, "x": "y" * size}) + "\n" for n, size in enumerate(sizes, 1)]
        (in_tmp / "rounds.jsonl").write_text("".join(lines) + '{"round": 99')
        assert [record["round"] for record in from_the_end(in_tmp)] == [*range(len(sizes), 0, -1)]
        assert last_round(in_tmp) == len(sizes)


def test_who_only_looks_keeps_nothing(in_tmp):
    kept = Kept(in_tmp / "cache" / "ways.json", str, 5)
    with nothing_kept():
        assert not kept.put("a", "b")
    assert not (in_tmp / "cache").exists()
    assert kept.put("a", "b")
    with nothing_kept():
        assert kept.read() == {"a": "b"}


def test_text_fits():
    assert filled("data", "some words and more", 20) == "data      some words\n          and more"
    assert listed_out([["run", "when"], ["a-long-name", "now"]], 12) == "run     when\na-long-name\n         now"
    times = {5e-4: "under 1 ms", 0.0123: "12 ms", 0.5: "0.5 s", 59.6: "60 s", 7300: "2.03 h", 1e6: "11.6 days"}
    assert {seconds: duration(seconds) for seconds in times} == times
    assert np.all([len(line) <= 60 for line in filled("x", "word " * 99, 60).splitlines()])
