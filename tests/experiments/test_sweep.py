"""`fedmom sweep`: all combinations, once each, resumable as a whole, ranked by a metric."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedmom.cli import main
from fedmom.config.load import load
from fedmom.errors import InputError
from fedmom.experiments import crew
from fedmom.experiments.crew import CellEnded, Requests
from fedmom.experiments.grid import cells_of, drawn, full, listed, parse_grid, seeds_of
from fedmom.experiments.sweep import check, measured_by, sweep
from fedmom.records.files import MANIFEST
from fedmom.records.history import read_rounds
from fedmom.records.status import read_status
from fedmom.results.ranking import metric_of, rankings
from laws import table

ROOT = Path(__file__).parents[2]
QUADRATIC = Path("quadratic")  # by the name of the shipped one
GRID = ["algorithm.lr=0.1,0.25", "algorithm.num-local-steps=1,2,3"]


def run(out, words=GRID, seeds=(0,), **options):
    return list(sweep(QUADRATIC, cells_of(full(parse_grid(words)), seeds), out, **options))


def test_every_combination_runs_once_as_an_ordinary_folder(tmp_path):
    ended = run(tmp_path, seeds=(0, 1))
    assert [one.status for one in ended] == ["done"] * 12
    assert len({one.cell.name for one in ended}) == 12
    for one in ended:
        folder = tmp_path / one.cell.name
        assert len(read_rounds(folder)) == 3
        assert (folder / "final.safetensors").exists()
        config = (folder / "config.toml").read_text()
        assert f"lr = {one.cell.sets['algorithm.lr']}" in config
        assert f"seed = {one.cell.sets['run.seed']}" in config


def test_what_is_done_is_not_run_again_and_a_larger_grid_adds(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != MANIFEST}
    again = run(tmp_path)
    assert [one.seconds for one in again] == [0.0] * 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    more = run(tmp_path, [GRID[0], "algorithm.num-local-steps=1,2,3,6"])
    assert [one.seconds > 0 for one in more] == [False] * 6 + [True] * 2


def test_a_longer_sweep_goes_on_and_another_one_is_refused(tmp_path):
    """The same folders with more rounds go on from their ends; with another key changed they are not taken for it."""
    run(tmp_path, GRID[1:])
    cells = cells_of(full(parse_grid(GRID[1:])), [0])
    longer = ["run.num-rounds=5"]
    check(QUADRATIC, cells, tmp_path, longer)
    assert [one.status for one in run(tmp_path, GRID[1:], sets=longer)] == ["done"] * 3
    assert {len(read_rounds(folder)) for folder in tmp_path.glob("num*")} == {5}
    assert [one.seconds for one in run(tmp_path, GRID[1:], sets=longer)] == [0.0] * 3
    with pytest.raises(InputError, match=r"num-local-steps=1,seed=0: algorithm\.beta = 0\.9: the run in .* has 0\.5"):
        check(QUADRATIC, cells, tmp_path, ["algorithm.beta=0.9"])


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_bytes(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    same = ["engine.path=loop", "engine.threads=1"]
    run(alone, GRID[1:], sets=same)
    assert {one.status for one in run(both, GRID[1:], workers=2, sets=same)} == {"done"}
    for folder in alone.glob("num*"):
        final = folder / "final.safetensors"
        assert final.read_bytes() == (both / folder.name / "final.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: messages")
@pytest.mark.usefixtures("one_ray")
def test_ray_actors_give_the_same_bytes(tmp_path):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    same = ["engine.path=loop", "engine.threads=1"]
    run(alone, ["algorithm.lr=0.1,1e30"], sets=[*same, "run.num-rounds=40"])
    ended = run(spread, ["algorithm.lr=0.1,1e30"], sets=[*same, "run.num-rounds=40"], workers=2, ray="local")
    assert {one.cell.name: one.status for one in ended} == {"lr=0.1,seed=0": "done", "lr=1e+30,seed=0": "diverged"}
    final = Path("lr=0.1,seed=0") / "final.safetensors"
    assert (alone / final).read_bytes() == (spread / final).read_bytes()
    assert [one.seconds for one in run(spread, ["algorithm.lr=0.1"], sets=[*same, "run.num-rounds=40"])] == [0.0]


def test_a_model_that_breaks_is_a_failed_run_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("breaks.py").write_text("def model(shape, classes):\n    raise OSError('no weights')\n")
    (tmp_path / "two.toml").write_text("[data]\nnum-clients = 2\n[run]\nnum-rounds = 1\n")
    cells = cells_of(full(parse_grid(["model.name=breaks:model,logistic"])), [0])
    ended = list(sweep(Path("two.toml"), cells, tmp_path / "out"))
    assert [one.status for one in ended] == ["refused", "done"]  # as `fedmom run` would: exit status 2
    assert "no weights" in ended[0].message
    assert "no weights" in json.loads((tmp_path / "out" / MANIFEST).read_text())[ended[0].cell.name]["message"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="process ids as Linux has them")
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    """kill -9 in mid-run, twice: in the end the same bytes as an uninterrupted sweep."""
    grid = [
        "--grid",
        "algorithm.num-local-steps=1,2",
        "--set",
        "engine.path=loop",
        "--set",
        "engine.threads=1",
        "--set",
        "run.num-rounds=300",
        "--seeds",
        "2",
    ]
    command = [sys.executable, "-m", "fedmom", "sweep", str(QUADRATIC), *grid]

    def rounds():
        return sum(len(read_rounds(f.parent)) for f in (tmp_path / "cut").glob("*/rounds.jsonl"))

    for _ in range(2):
        before = rounds()
        process = subprocess.Popen([*command, "--out", str(tmp_path / "cut"), "--workers", "2"])
        wait_for(process, lambda before=before: rounds() >= before + 40)
        left = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in left):  # until they see that it is gone
            time.sleep(0.05)
    subprocess.run([*command, "--out", str(tmp_path / "cut"), "--workers", "2"], check=True, capture_output=True)
    # In this process: that it makes no difference is another test's.
    same = ["engine.path=loop", "engine.threads=1", "run.num-rounds=300"]
    run(tmp_path / "whole", ["algorithm.num-local-steps=1,2"], seeds=(0, 1), sets=same)
    folders = [path.parent for path in (tmp_path / "whole").glob("*/final.safetensors")]
    assert len(folders) == 4
    for folder in folders:
        other = tmp_path / "cut" / folder.name
        assert len(read_rounds(other)) == 300
        assert (folder / "final.safetensors").read_bytes() == (other / "final.safetensors").read_bytes()


def test_a_run_that_fails_says_why_and_the_others_go_on(tmp_path):
    ended = run(tmp_path, ["algorithm.lr=0.1,1e30"], sets=["run.num-rounds=40"])
    assert [one.status for one in ended] == ["done", "diverged"]
    assert ended[1].message
    assert json.loads((tmp_path / MANIFEST).read_text())[ended[1].cell.name]["status"] == "diverged"
    ((_, _, rows),) = rankings(ended, tmp_path, "distance")
    assert [row[0] for row in rows] == ["γ = 0.1", "γ = 1e+30"]
    assert rows[1][4] == "seed 0: diverged"


def test_the_table_ranks_by_the_metric(tmp_path):
    ended = run(tmp_path, seeds=(0, 1))
    ((_, header, rows),) = rankings(ended, tmp_path, "distance")
    values = [float(row[2].split()[0]) for row in rows]
    assert values == sorted(values)
    assert header[2].startswith("distance")
    assert [(row[1], row[3]) for row in rows] == [(str(rank), "2") for rank in range(1, len(rows) + 1)]
    done = tmp_path / ended[0].cell.name
    assert metric_of(done) == "loss"


def test_a_run_without_the_number_stands_last_and_is_not_counted(tmp_path):
    """Diverged, without such a measure, or not a number at its end."""
    cells = cells_of([{"algorithm.lr": lr} for lr in (0.1, 0.2)], [0, 1, 2])
    for cell, values in zip(cells, ([5.0], [7.0], [9.0], [1.0], [None], [float("nan")]), strict=True):
        (tmp_path / cell.name).mkdir()
        lines = [json.dumps({"round": 1, **({} if value is None else {"loss": value})}) for value in values]
        (tmp_path / cell.name / "rounds.jsonl").write_text("".join(f"{line}\n" for line in lines))
    ended = [CellEnded(cell, "done", "", 1.0) for cell in cells]
    broken = [*ended[:2], ended[2]._replace(status="diverged"), *ended[3:]]
    ((_, _, rows),) = rankings(broken, tmp_path, "loss")
    assert rows == [
        ["γ = 0.2", "1", "1.000", "1 of 3", "seed 1: no loss; seed 2: no loss"],
        ["γ = 0.1", "2", "6.000 ± 1.414", "2 of 3", "seed 2: diverged"],
    ]


def test_ranks_are_of_one_data_setting(tmp_path):
    """Less skewed data are easier: that is no merit of a learning rate."""
    grid = [{"data.alpha": alpha, "algorithm.lr": lr} for alpha in (0.1, 1.0) for lr in (0.1, 0.2)]
    cells = cells_of(grid, [0])
    for cell, accuracy in zip(cells, (0.6, 0.8, 0.95, 0.9), strict=True):
        (tmp_path / cell.name).mkdir()
        (tmp_path / cell.name / "rounds.jsonl").write_text(json.dumps({"round": 1, "test_accuracy": accuracy}) + "\n")
    ended = [CellEnded(cell, "done", "", 1.0) for cell in cells]
    found = rankings(ended, tmp_path, "test_accuracy")
    assert [(one.setting, one.rows) for one in found] == [
        ("Dirichlet α = 0.1", [["γ = 0.2", "1", "80.0 %", "1"], ["γ = 0.1", "2", "60.0 %", "1"]]),
        ("Dirichlet α = 1", [["γ = 0.1", "1", "95.0 %", "1"], ["γ = 0.2", "2", "90.0 %", "1"]]),
    ]
    (alone,) = rankings([ended[0], ended[2]], tmp_path, "test_accuracy")  # no two share one
    assert "rank" not in alone.header
    assert len(alone.rows) == 2


def test_random_combinations_go_by_the_seed():
    grid = parse_grid(["algorithm.lr=0.1,0.2,0.3,0.4", "algorithm.beta=0.0,0.5,0.9"])
    chosen = drawn(grid, 5, 0)
    assert chosen == drawn(grid, 5, 0) != drawn(grid, 5, 1)
    assert len({tuple(one.values()) for one in chosen}) == 5
    assert all(one in full(grid) for one in chosen)
    with pytest.raises(InputError, match="12 combinations"):
        drawn(grid, 13, 0)


def test_a_list_of_runs_comes_from_a_file(tmp_path):
    path = tmp_path / "runs.toml"
    path.write_text('[[run]]\n"algorithm.lr" = 0.1\n[[run]]\n"algorithm.lr" = 0.2\n"data.batch-size" = 1\n')
    assert listed(path) == [{"algorithm.lr": 0.1}, {"algorithm.lr": 0.2, "data.batch-size": 1}]
    for text in ("run = 3", "[other]\na = 1", "[[run"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"runs\.toml"):
            listed(path)
    with pytest.raises(InputError, match="no such file"):
        listed(tmp_path / "none.toml")


def seeds_and_names(number, words, sets=()):
    combinations = full(parse_grid(words))
    cells = cells_of(combinations, seeds_of(number, QUADRATIC, sets, combinations))
    return [(cell.sets["run.seed"], cell.name, cell.group) for cell in cells]


def test_the_seeds_are_those_that_were_asked_for(tmp_path):
    """By --seeds, a grid or --set, else the configuration's; where two of them say it, neither is dropped."""
    rounds = "run.num-rounds=3"
    assert seeds_and_names(2, [rounds]) == [(s, f"num-rounds=3,seed={s}", "num-rounds=3") for s in (0, 1)]
    assert seeds_and_names(None, ["run.seed=5,7"]) == [(s, f"base,seed={s}", "base") for s in (5, 7)]
    assert seeds_and_names(None, [rounds], ["run.seed=7"]) == [(7, "num-rounds=3,seed=7", "num-rounds=3")]
    config = tmp_path / "nine.toml"
    config.write_text((ROOT / "configs/quadratic.toml").read_text().replace("[run]", "[run]\nseed = 9"))
    assert list(seeds_of(None, config, [], [{}])) == [9]
    for number, words, sets in (
        (2, ["run.seed=1,2"], []),
        (2, [rounds], ["run.seed=7"]),
        (None, ["run.seed=1"], ["run.seed=7"]),
    ):
        with pytest.raises(InputError, match=r"run\.seed"):
            seeds_and_names(number, words, sets)
    ended = run(tmp_path / "out", ["run.seed=1,2"], seeds=[0], sets=["data.noise-sigma=1"])
    assert len({(tmp_path / "out" / one.cell.name / "final.safetensors").read_bytes() for one in ended}) == 2


def test_values_that_hold_commas_stand_in_brackets():
    grid = ["algorithm.lr-milestones=[0.5, 0.75],[.3]", "data.start='1,2'", "data.curvatures=[1;3],[[2,1],[4,1]]"]
    assert parse_grid(grid) == {
        "algorithm.lr-milestones": ["0.5,0.75", ".3"],
        "data.start": ["1,2"],
        "data.curvatures": ["1;3", "2,1;4,1"],
    }
    assert parse_grid(["algorithm.lr-milestones=0.5", "algorithm.lr=.1, 5., 1e-3,+1"]) == {
        "algorithm.lr-milestones": ["0.5"],
        "algorithm.lr": [0.1, 5.0, 0.001, 1],
    }
    assert parse_grid(["algorithm.momentum-policy= average, reset ", 'data.data-dir="a,b",c']) == {
        "algorithm.momentum-policy": ["average", "reset"],
        "data.data-dir": ["a,b", "c"],
    }


def test_a_list_of_runs_may_begin_with_a_byte_order_mark_and_hold_lists(tmp_path):
    path = tmp_path / "runs.toml"
    path.write_text('\ufeff[[run]]\nalgorithm.lr-milestones = [0.5, 0.75]\n"run.seed" = 4\n', encoding="utf-8")
    (cell,) = cells_of(listed(path), [0])
    check(QUADRATIC, [cell], tmp_path / "out", [])
    assert (cell.sets["run.seed"], cell.name) == (4, "lr-milestones=0.5,0.75,seed=4")


def test_names_fit_any_file_system_and_are_the_runs_own(tmp_path):
    long = {"data.data-dir": "ü" * 300}
    cells = cells_of([long, {"data.data-dir": "ü" * 301}, {"data.data-dir": "a/b"}, {"data.data-dir": "a_b"}], [0, 1])
    assert len({cell.name for cell in cells}) == 8
    assert all(len(cell.name.encode()) < 255 and "/" not in cell.name for cell in cells)
    assert cells[0].name == cells_of([long], [0])[0].name  # whatever stands beside it


def test_random_combinations_of_a_grid_too_large_to_write_out():
    grid = {f"key{i}": list(range(100)) for i in range(20)}
    assert len({tuple(one.values()) for one in drawn(grid, 3, 0)}) == 3
    with pytest.raises(InputError, match="--random N"):
        full(grid)


@table(
    "words, sets, why",
    [
        (["algorithm.lr"], [], "SECTION.KEY=VALUE"),
        (["algorithm.lr="], [], "SECTION.KEY=VALUE"),
        (["algorithm.lrr=1"], [], "did you mean"),
        (["algorithm.lr=0.1,0.1"], [], "given twice"),
        (["algorithm.lr=1,1.0"], [], "given twice"),
        (["algorithm.lr=0.1", "algorithm.lr=0.2"], [], "given twice"),
        (["algorithm.lr=0.1,,0.2"], [], "a value is missing"),
        (["algorithm.lr=0.1,"], [], "a value is missing"),
        (["algorithm.lr=[0.1,0.2]"], [], "without brackets"),
        (["algorithm.lr-milestones=0.5,0.75"], [], r"lr-milestones=\[0.5\],\[0.75\] for 2"),
        (["data.curvatures=1;3,2;6"], [], r"data.curvatures=\[1;3\],\[2;6\] for 2"),
        (["algorithm.lr-milestones=[0.5,0.75"], [], "closing ] is missing"),
        (["algorithm.lr=0,05,0,1"], [], r"given twice|algorithm\.lr"),
        (["algorithm.lr=0.1,-1"], [], r"lr=-1.*seed=0: algorithm\.lr"),
        (["run.out=a,b"], [], "folder of its own"),
        (["run.resume=a"], [], "folder of its own"),
        (["run.backend=engine,flower"], [], r"backend=flower,seed=0: run\.backend"),
        (["engine.device=cpu,cuda"], [], r"device=cuda,seed=0: engine\.device"),
        (["algorithm.lr=0.1,0.2"], ["algorithm.lr=0.3"], r"algorithm\.lr: is given by --set and"),
        (["algorithm.lr=0.1"], ["run.resume=x"], r"run\.resume"),
        (["algorithm.lr=0.3"], [], r"lr=0\.3,seed=0: --out .* is no run folder"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(tmp_path, words, sets, why):
    (tmp_path / "lr=0.3,seed=0").mkdir(exist_ok=True)
    (tmp_path / "lr=0.3,seed=0" / "mine").touch()
    with pytest.raises(InputError, match=why) as error:
        check(QUADRATIC, cells_of(full(parse_grid(words)), [0]), tmp_path, sets)
    assert "\n" not in str(error.value)


def test_what_to_rank_by_is_a_number_that_some_run_records():
    """Looked up before anything runs, so the names are a second list: it has every number of every stored run."""
    cells = cells_of([{"algorithm.lr": 0.1}], [0])
    for metric, why in (("distanse", "did you mean distance"), ("test_accuracy", "choose one of")):
        with pytest.raises(InputError, match=f"--metric = '{metric}' is not known: {why}"):
            check(QUADRATIC, cells, Path("nowhere"), [], metric=metric)
    for folder in (ROOT / "tests/stored").glob("*/"):
        numbers = {name for record in read_rounds(folder) for name, v in record.items() if isinstance(v, int | float)}
        config = load(folder / "config.toml").config
        assert numbers <= measured_by(config), folder.name


def test_runs_may_be_ranked_by_a_number_that_only_some_record(tmp_path, capsys):
    words = [
        "--grid",
        "algorithm.name=pr-sgd-m,d-sgd-m",
        "--metric",
        "consensus_distance_after",
        "--out",
        str(tmp_path),
    ]
    assert main.call(["sweep", str(QUADRATIC), *words]) == 0
    out = capsys.readouterr().out
    assert "seed 0: no consensus_distance_after" in out
    assert out.index("d-sgd-m") < out.index("pr-sgd-m")


def test_the_same_run_twice_and_a_folder_that_is_none_of_a_sweep_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"lr=1,seed=0 and lr=1\.0,seed=0"):
        cells_of([{"algorithm.lr": 1}, {"algorithm.lr": 1.0}], [0])
    (alone,) = run(tmp_path, ["algorithm.lr=0.1"])
    for folder, what in ((tmp_path / alone.cell.name, "a run folder"), (tmp_path / MANIFEST, "a file")):
        with pytest.raises(InputError, match=what):
            check(QUADRATIC, [alone.cell], folder, [])


def test_an_interrupted_run_ends_the_sweep(tmp_path, monkeypatch):
    cells = cells_of(full(parse_grid(["algorithm.lr=0.1,0.2"])), [0])
    monkeypatch.setattr(crew, "run_cell", lambda work, cell: CellEnded(cell, "interrupted", "", 1.0))
    assert [one.status for one in sweep(QUADRATIC, cells, tmp_path)] == ["interrupted"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_first_request_to_end_is_noted_and_a_later_one_raised(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.asked
        assert requests.line.poll()
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same request
        monkeypatch.setattr(crew, "ONE_REQUEST_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def children(pid):
    """Process ids of a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def long_sweep(out, *words):
    """`fedmom sweep` of four endless runs in a session of its own, as a terminal has it."""
    command = [sys.executable, "-m", "fedmom", "sweep", str(QUADRATIC), "--grid", "algorithm.lr=0.1,0.2,0.3,0.4"]
    command += ["--set", "run.num-rounds=2000000", "--set", "engine.path=loop", "--out", str(out), *words]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process, happened):
    while not happened():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)


def has_ended_well(process, out, begun):
    """Status 130, how to go on in the last line, no traceback, no process left, and only `begun` runs, all saved."""
    _, err = process.communicate()  # until the last of them has closed it
    assert process.returncode == 130, err
    assert err.rstrip().endswith(f"the same command goes on from {out}")
    assert "Traceback" not in err
    assert len(list(out.glob("*/config.toml"))) == begun
    for path in out.glob("*/config.toml"):
        assert (path.parent / "checkpoint.safetensors").exists()
        assert read_status(path.parent).status == "interrupted"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="process ids as Linux has them")
@pytest.mark.parametrize(
    ("words", "whole_group", "number"),
    [
        ([], False, signal.SIGTERM),  # as a scheduler sends it
        (["--workers", "2"], True, signal.SIGINT),  # as a terminal does
        (["--workers", "2"], True, signal.SIGTERM),  # as systemd does
        (["--workers", "2", "--ray", "local"], True, signal.SIGINT),
    ],
)
def test_a_sweep_that_is_asked_to_end_leaves_checkpoints_and_begins_nothing(tmp_path, words, whole_group, number):
    if "--ray" in words:
        pytest.importorskip("ray")
    out, running = tmp_path / "sweep", 2 if words else 1
    with long_sweep(out, *words) as process:
        wait_for(process, lambda: len(list(out.glob("*/rounds.jsonl"))) == running)
        os.killpg(process.pid, number) if whole_group else process.send_signal(number)
        has_ended_well(process, out, running)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="process ids as Linux has them")
def test_ctrl_c_while_the_processes_of_a_sweep_start(tmp_path):
    with long_sweep(tmp_path / "sweep", "--workers", "2") as process:
        # The one that keeps account of shared memory, and two that import torch now.
        wait_for(process, lambda: len(children(process.pid)) == 3)
        os.killpg(process.pid, signal.SIGINT)
        has_ended_well(process, tmp_path / "sweep", 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="process ids as Linux has them")
def test_a_process_that_is_killed_costs_its_run_alone(tmp_path):
    out = tmp_path / "sweep"
    with long_sweep(out, "--workers", "2") as process:
        wait_for(process, lambda: len(list(out.glob("*/rounds.jsonl"))) == 2)
        killed = read_status(next(out.glob("*/rounds.jsonl")).parent).pid
        os.kill(killed, signal.SIGKILL)
        wait_for(process, lambda: len(list(out.glob("*/rounds.jsonl"))) == 3)
    known = json.loads((out / MANIFEST).read_text())
    assert sorted(one["status"] for one in known.values()) == ["failed", *["not begun"] * 3]
    assert "SIGKILL" in next(one["message"] for one in known.values() if one["status"] == "failed")
