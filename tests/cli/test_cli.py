"""The command: exit statuses, one line for every mistake, and what is left on disk."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command

import fedmom
from fedmom.cli import main
from fedmom.cli.keys import listed, meaning
from fedmom.cli.show import _sent
from fedmom.config.keys import KEYS, SECTIONS
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.config.schema import FIRST, read_keys
from fedmom.data.shipped import DATASETS
from fedmom.errors import InputError
from fedmom.experiments.simulation import app_folder
from fedmom.method.algorithms import ALGORITHMS
from fedmom.records.files import CHECKPOINT, CONFIG, ENVIRONMENT, FINAL, ROUNDS, STATUS, read_about, read_tensors
from fedmom.records.history import read_rounds
from fedmom.results.pictures import curves
from fedmom.results.pictures.curves import draw_curves
from fedmom.runs import progress
from fedmom.tasks.models import MODELS
from laws import table

ROOT = Path(__file__).parents[2]
RING = ROOT / "configs/decentralized/ring.toml"
COMMANDS = [
    "run",
    "clients",
    "deploy",
    "sweep",
    "simulate-app",
    "partition",
    "bench",
    "topology",
    "compare",
    "report",
    "watch",
    "datasets",
    "models",
    "algorithms",
    "keys",
    "new",
    "check",
    "ls",
]
ENGINE = '[engine]\ndevice = "cpu"\npath = "vmap"\nchunk-size = 2\nthreads = 1\n'
QUADRATIC = '[data]\ndataset = "quadratic"\n[algorithm]\nlr = 0.05\nnum-local-steps = 2\n[run]\nnum-rounds = 4\n'
LOGISTIC = '[model]\nname = "logistic"\n[run]\nnum-rounds = 2\n'
TINY = '[data]\ndataset = "tiny.npz"\nnum-clients = 3\nbatch-size = 4\n' + LOGISTIC
DIGITS = "[data]\nnum-clients = 3\n" + LOGISTIC


@pytest.fixture(autouse=True)
def workplace(in_tmp, monkeypatch):
    """An empty folder with three small configurations and a data set of 30 examples; no pictures, which take time."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), np.arange(40) % 3
    np.savez("tiny.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    for name, text in [("quadratic", QUADRATIC), ("tiny", TINY), ("digits", DIGITS)]:
        Path(f"{name}.toml").write_text(text + ENGINE, encoding="utf-8")
    monkeypatch.setattr(curves, "draw_curves", lambda runs, path: None)
    # A wide terminal, so that no word that is looked for is broken.
    monkeypatch.setenv("COLUMNS", "300")
    yield in_tmp
    for name in ("mine", "broken"):  # modules that tests write here
        sys.modules.pop(name, None)


def torus(num_clients):
    return ["--set", "algorithm.topology=torus", "--set", f"data.num-clients={num_clients}"]


@pytest.fixture
def fed(capsys):
    """fed("run", …) -> (exit status, lines on standard output, lines on standard error)."""

    def command(*arguments) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        status = main.call([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return command


@pytest.fixture
def refused(fed, workplace):
    """refused(words, "run", …): status 2, one line with all the words, nothing printed, nothing left behind."""

    def command(words, *arguments) -> str:
        before = tree(workplace)
        status, out, err = fed(*arguments)
        assert (status, len(err)) == (2, 1), (status, err)
        assert out == []
        assert err[0].startswith("fedmom: ")
        assert "Traceback" not in err[0]
        for word in words:
            assert word in err[0], err[0]
        assert tree(workplace) == before
        return err[0]

    return command


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file and folder below, python's caches aside."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


# --- bad input: one line and exit status 2 ---------------------------------------------------------------
# Each check is tested where it is made: test_config, test_datasets, test_models, test_partition, test_topology, ….
# Here: whatever stage of a command finds a mistake, it becomes one line, and nothing is left behind.

STAGES = [
    ("algorithm.learning-rate=1", ["algorithm.learning-rate is not a key"]),
    ("lr=0.1", ["lr is not a key", "did you mean algorithm.lr or server.lr?"]),
    ("algorithm.lr=fast", ["algorithm.lr = 'fast'", "must be a number"]),
    ("algorithm.lr=0", ["algorithm.lr = 0.0", "> 0"]),
    ("algorithm.cohort-size=4", ["algorithm.cohort-size = 4", "at most data.num-clients = 3"]),
    ("data.dataset=none.npz", ["data.dataset = 'none.npz'", "no file none.npz"]),
    ("data.dataset=cifar10", ["data.dataset = 'cifar10'", "looked for", "fedmom datasets --download cifar10"]),
    ("data.dataset=mine:raises", ["data.dataset = 'mine:raises'", "the function raised OSError: one two"]),
    ("data.dataset=broken:make", ["data.dataset = 'broken:make'", "importing 'broken' raised"]),
    ("data.num-clients=2000", ["data.num-clients = 2000", "1437 examples", "at least one"]),
    ("model.name=nowhere:build", ["model.name = 'nowhere:build'", "no module named 'nowhere'"]),
    ("model.name=mine:leaves", ["model.name = 'mine:leaves'", "raised SystemExit: 7"]),
    ("data.batch-size=1000000000", ["data.batch-size = 1000000000", "GB are free"]),
]


@table("change, words", STAGES)
def test_a_mistake_found_at_any_stage_of_a_run_is_one_line(refused, change, words):
    raises = "def raises():\n    raise OSError('one\\ntwo')\n"
    Path("mine.py").write_text(raises + "def leaves(*args):\n    raise SystemExit(7)\n", encoding="utf-8")
    Path("broken.py").write_text("1 +\n", encoding="utf-8")
    refused(words, "run", "digits.toml", "--set", change)


def test_images_are_not_augmented_where_there_are_none(refused):
    refused(["data.augment = 'crop-flip'"], "run", "tiny.toml", "--set", "data.augment=crop-flip")


@table("command", ["run", "partition", "topology", "bench", "sweep"])
def test_every_command_names_what_is_wrong_with_its_configuration(refused, command):
    more = ["--grid", "run.num-rounds=1,2"] if command == "sweep" else []
    refused(["algorithm.lr = 0.0", "> 0"], command, "digits.toml", "--set", "algorithm.lr=0", *more)
    refused(["no.toml", "no such file", "quickstart"], command, "no.toml", *more)
    Path("bad.toml").write_bytes(b"[algorithm]\nlr = 1979-05-27\n")
    refused(["bad.toml: algorithm.lr", "must be a number"], command, "bad.toml", *more)
    Path("bad.toml").write_bytes(b'[algorithm]\n"a\\nb" = 1\n')  # a key with a line break in it
    refused(["bad.toml", "is not a key"], command, "bad.toml", *more)


def test_files_that_are_folders_and_folders_that_are_files(refused):
    Path("folder").mkdir()
    refused(["folder", "cannot be read"], "run", "folder")
    refused(["--out tiny.npz", "exists already"], "run", "quadratic.toml", "--out", "tiny.npz")
    refused(["tiny.npz/x", "cannot be made"], "run", "quadratic.toml", "--out", "tiny.npz/x")
    refused(["tiny.npz/x.toml", "cannot be read"], "run", "tiny.npz/x.toml")
    refused(["a" * 300, "File name too long"], "run", "quadratic.toml", "--out", "a" * 300)
    refused(["a" * 300, "File name too long"], "run", "digits.toml", "--set", "data.dataset=" + "a" * 300 + ".npz")


@table(
    "arguments, words",
    [
        (["run"], ["CONFIG is missing", "--resume DIR"]),
        (["run", "quadratic.toml", "--fast"], ["--fast"]),
        (["run", "quadratic.toml", "tiny.toml"], ["tiny.toml"]),
        (["run", "quadratic.toml", "--out"], ["--out", "requires an argument"]),
        (["run", "quadratic.toml", "--device", "nonsense"], ["engine.device = 'nonsense'", "auto, cpu, cuda"]),
        (["run", "quadratic.toml", "--out", "a", "--resume", "b"], ["--out a", "--resume b"]),
        (["rnu", "quadratic.toml"], ["No such command 'rnu'"]),
        (["partition"], ["Missing argument 'CONFIG'"]),
        (["partition", "quadratic.toml"], ["data.dataset = 'quadratic'", "no examples"]),
        (["topology"], ["Missing argument 'CONFIG'"]),
        (["topology", RING, *torus(7)], ["algorithm.topology = 'torus'", "data.num-clients = 7", "near: 4, 6, 8, 9"]),
        (["topology", "quadratic.toml"], ["algorithm.name = 'pr-sgd-m'", "no W", "--set algorithm.name=d-sgd-m"]),
        (["report"], ["Missing argument 'DIR...'"]),
        (["report", "nowhere"], ["nowhere: no such folder"]),
        (["report", "tiny.npz"], ["tiny.npz: is a file"]),
        (["keys", "xyzzy"], ["xyzzy", "fedmom keys"]),
        (["datasets", "--download", "digits"], ["data.dataset = 'digits'", "nothing to download"]),
    ],
)
def test_bad_arguments_are_one_line(refused, arguments, words):
    refused(words, *arguments)


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["engine.device = 'cuda'", "no CUDA device", "cpu or auto"], "run", "quadratic.toml", "--device", "cuda")


def test_a_full_memory_is_one_line(refused, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nsize 1")

    monkeypatch.setattr("fedmom.backends.local.choose", full)
    refused(
        ["memory is full", "data.batch-size", "can't allocate memory size 1"], "run", "quadratic.toml", "--out", "x"
    )


def test_bench_measures_unless_it_is_asked_to_remember(fed, monkeypatch):
    asked = []

    def measure(config, *, remember, **_):
        asked.append(remember and config.engine.remember)
        raise InputError("enough")

    monkeypatch.setattr("fedmom.experiments.bench.bench", measure)
    for sets in ([], ["--set", "engine.remember=true"], ["--set", "engine.remember=false"]):
        fed("bench", "quadratic.toml", *sets)
    assert asked == [False, True, False]


def test_errors_of_ours_are_not_hidden(fed, monkeypatch):
    def bug(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fedmom.backends.local.choose", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        fed("run", "quadratic.toml")


def test_a_run_folder_that_exists_is_refused_unless_it_is_empty(fed, refused):
    Path("new").mkdir()
    status, out, err = fed("run", "quadratic.toml", "--out", "new", "--quiet")
    assert (status, out, err) == (0, ["new"], [])
    refused(["--out new", "exists already", "--resume new"], "run", "quadratic.toml", "--out", "new")
    Path("other").mkdir()
    Path("other/note.txt").touch()
    refused(["--out other", "exists already"], "run", "quadratic.toml", "--out", "other")


# --- a good run ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_its_folder_and_prints_a_table(fed):
    status, out, err = fed("run", "tiny.toml", "--out", "a/b")
    assert (status, err) == (0, [])
    assert out[-1] == "a/b"
    assert any("N = 3" in line and "tiny.npz, logistic" in line for line in out)
    assert any(line.startswith("round 2/2 ·") for line in out)
    assert sorted(path.name for path in Path("a/b").iterdir()) == sorted(
        [CONFIG, ENVIRONMENT, ROUNDS, CHECKPOINT, FINAL, STATUS]
    )
    assert [record["round"] for record in read_rounds(Path("a/b"))] == [1, 2]
    about = json.loads(Path("a/b", ENVIRONMENT).read_text())
    assert about["versions"]["torch"] == version("torch")


def test_folders_without_a_name_are_made_below_runs(fed):
    folders = [fed("run", "quadratic.toml", "--quiet")[1] for _ in range(2)]
    assert len({name for (name,) in folders}) == 2
    for (name,) in folders:
        assert name.startswith("runs/quadratic-")
        assert Path(name, FINAL).is_file()


def test_a_resolved_config_runs_again_to_the_same_bytes(fed):
    changes = ["--set", "algorithm.nesterov=true", "--set", "run.num-steps=7"]
    assert fed("run", "quadratic.toml", "--out", "first", *changes)[0] == 0
    assert fed("run", f"first/{CONFIG}", "--out", "second")[0] == 0
    for name in (CONFIG, FINAL):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_what_was_overruled_is_said(fed):
    changes = ["algorithm.name=parallel-sgd-m", "run.num-steps=3"]
    status, out, err = fed("run", "quadratic.toml", "--out", "x", *(w for change in changes for w in ("--set", change)))
    assert (status, err) == (0, [])
    assert "parallel-sgd-m is I = 1: it overrules num-local-steps = 2" in out
    assert "run.num-steps = 3 gives 3 rounds: it overrules num-rounds" in out


def test_zero_local_steps_is_the_algorithms_own_interval(fed):
    assert fed("run", "quadratic.toml", "--out", "x", "--set", "algorithm.num-local-steps=0", "--quiet")[0] == 0
    assert load(Path("x", CONFIG)).config.algorithm.num_local_steps == 8
    assert read_rounds(Path("x"))[-1]["steps"] == 4 * 8


def test_set_values_may_hold_equals_signs(refused):
    sets = ["--set", "data.dataset=mnist", "--set", "data.data-dir=a=b=c"]
    refused(["looked for a=b=c/mnist.npz"], "run", "digits.toml", *sets)


def test_device_overrules_the_config(fed):
    assert fed("run", "quadratic.toml", "--set", "engine.device=cuda", "--device", "cpu", "--out", "x")[0] == 0
    assert load(Path("x", CONFIG)).config.engine.device == "cpu"


# --- resuming --------------------------------------------------------------------------------------------


@pytest.fixture
def finished(fed, workplace):
    """A run of four rounds, checkpoints after two and four."""
    sets = ["--set", "run.checkpoint-every=2"]
    assert fed("run", "quadratic.toml", "--out", "run", "--quiet", *sets)[0] == 0
    return workplace / "run"


RESUMES = [
    ("algorithm.lr=0.06", ["algorithm.lr = 0.06", "has 0.05", "nothing but the length"]),
    ("engine.path=loop", ["engine.path = 'loop'", "has 'vmap'"]),
    ("run.num-rounds=3", ["run.num-rounds = 3", "has 4", "only become longer"]),
]


@table("change, words", RESUMES)
def test_a_changed_config_is_refused_on_resume_by_name(refused, finished, change, words):
    refused(words, "run", "--resume", finished, "--set", change)


def test_a_longer_run_goes_on_to_the_bytes_of_one_that_was_long_from_the_start(fed, finished):
    assert fed("run", "quadratic.toml", "--out", "long", "--quiet", "--set", "run.num-rounds=6")[0] == 0
    status, out, err = fed("run", "--resume", finished, "--set", "run.num-rounds=6")
    assert (status, err) == (0, [])
    assert "resumed after round 4" in out
    assert any(line.startswith("round 6/6 ·") for line in out)
    params = [read_tensors(folder / FINAL)[0] for folder in (finished, Path("long"))]
    assert params[0].keys() == params[1].keys()
    assert all(torch.equal(params[0][name], params[1][name]) for name in params[0])
    assert [record["x"] for record in read_rounds(finished)] == [record["x"] for record in read_rounds(Path("long"))]


def test_the_same_config_may_be_given_again_on_resume(fed, finished):
    status, out, err = fed("run", "quadratic.toml", "--resume", finished, "--set", "run.checkpoint-every=2", "--quiet")
    assert (status, out, err) == (0, [str(finished)], [])


def test_a_chunk_larger_than_the_cohort_is_no_change_on_resume(fed):
    sets = ["--set", "engine.chunk-size=64"]
    for path in ("vmap", "loop"):
        sets_of_path = [*sets, "--set", f"engine.path={path}"]
        assert fed("run", "quadratic.toml", "--out", path, "--quiet", *sets_of_path)[0] == 0
        assert fed("run", "quadratic.toml", "--resume", path, "--quiet", *sets_of_path)[0] == 0


@table(
    "changes, name",
    [
        (["algorithm.lr-schedule=cosine"], "algorithm.lr-schedule = 'cosine'"),
        (["algorithm.interval=theory-iid", "algorithm.num-local-steps=0", "run.num-steps=32"], "algorithm.interval"),
    ],
)
def test_a_longer_run_is_refused_where_lr_or_the_interval_would_change(fed, refused, changes, name):
    sets, folder = [word for change in changes for word in ("--set", change)], f"run-{len(changes)}"
    assert fed("run", "quadratic.toml", "--out", folder, "--quiet", *sets)[0] == 0
    key = "run.num-steps" if "num-steps" in changes[-1] else "run.num-rounds"
    refused([f"{key} = 800", name, "depends on the length"], "run", "--resume", folder, "--set", f"{key}=800")
    assert fed("run", "--resume", folder, "--quiet") == (0, [folder], [])  # as it is, it goes on


def test_more_rounds_of_a_run_that_counts_steps_are_not_silently_ignored(fed):
    assert fed("run", "quadratic.toml", "--out", "x", "--quiet", "--set", "run.num-steps=8")[0] == 0
    _, out, _ = fed("run", "--resume", "x", "--set", "run.num-rounds=9")
    assert "run.num-steps = 8 gives 4 rounds: it overrules num-rounds" in out
    status, out, _ = fed("run", "--resume", "x", "--set", "run.num-steps=12")
    assert status == 0
    assert not any("overrules" in line for line in out)
    assert read_rounds(Path("x"))[-1]["round"] == 6


def test_what_is_no_run_folder_cannot_be_resumed(refused):
    Path("empty").mkdir()
    for name in ("nowhere", "empty", "tiny.npz"):
        refused([f"--resume {name}", "not a run folder"], "run", "--resume", name)


def test_a_broken_config_cannot_be_resumed(refused, finished):
    (finished / CONFIG).write_text("[run\n")
    refused([str(finished / CONFIG), "is not TOML"], "run", "--resume", finished)


def test_a_truncated_checkpoint_is_named(refused, finished):
    path = finished / CHECKPOINT
    content = path.read_bytes()
    for share in (0.0, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        refused([str(path), "is not a whole checkpoint"], "run", "--resume", finished)


def test_a_checkpoint_of_another_run_is_named(fed, refused, finished):
    assert fed("run", "quadratic.toml", "--out", "other", "--quiet", "--set", "run.seed=7")[0] == 0
    (finished / CHECKPOINT).write_bytes(Path("other", CHECKPOINT).read_bytes())
    refused([str(finished / CHECKPOINT), "belongs to another run"], "run", "--resume", finished)


@table("content", [b"", b"\xff\n{}\n", b"not json\nat all\n"])
def test_damaged_rounds_are_named(refused, finished, content):
    (finished / ROUNDS).write_bytes(content)
    refused([str(finished / ROUNDS)], "run", "--resume", finished)


# --- divergence and interruption -------------------------------------------------------------------------


def test_divergence_ends_with_status_3_and_the_last_good_checkpoint(fed):
    changes = ["algorithm.lr=1e6", "run.num-rounds=99"]
    status, out, err = fed("run", "quadratic.toml", "--out", "x", *(w for change in changes for w in ("--set", change)))
    assert (status, len(err)) == (3, 1)
    last = read_rounds(Path("x"))[-1]["round"]
    assert f"in round {last + 1} at lr = 1e+06" in err[0]
    assert "smaller lr" in err[0]
    assert out[-1] == "x"
    tensors, about = read_tensors(Path("x", CHECKPOINT))
    assert about["round"] == last >= 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert not Path("x", FINAL).exists()
    status, _, err = fed("run", "--resume", "x")
    assert (status, len(err)) == (3, 1)
    assert f"in round {last + 1} at lr = 1e+06" in err[0]


def test_divergence_in_the_first_round_leaves_no_checkpoint(fed):
    sets = ["--set", "model.name=mlp", "--set", "algorithm.lr=1e6"]
    status, _, err = fed("run", "tiny.toml", "--out", "x", *sets)
    assert (status, len(err)) == (3, 1)
    assert "in round 1 at lr = 1e+06" in err[0]
    assert not Path("x", CHECKPOINT).exists()
    assert fed("run", "--resume", "x")[0] == 3


def test_a_loss_that_overflows_only_in_the_evaluation_is_divergence_too(fed):
    changes = ["algorithm.lr=1e6", "algorithm.num-local-steps=1", "data.start=1e150", "run.num-rounds=1"]
    status, _, err = fed("run", "quadratic.toml", "--out", "x", *(w for change in changes for w in ("--set", change)))
    assert (status, len(err)) == (3, 1)
    assert "the loss became inf in round 1 at lr = 1e+06" in err[0]


def test_records_are_json_for_everyone(fed):
    fed("run", "quadratic.toml", "--out", "x", "--set", "algorithm.lr=1e6", "--set", "run.num-rounds=99")

    def refuse(word):
        raise AssertionError(word)

    for line in Path("x", ROUNDS).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_an_interrupted_run_has_status_130_and_goes_on_from_its_checkpoint(fed, monkeypatch):
    assert fed("run", "tiny.toml", "--out", "whole", "--quiet", "--set", "run.num-rounds=5")[0] == 0

    class Interrupt(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(progress, "callbacks", lambda console, **_: [Interrupt()])
    status, out, err = fed("run", "tiny.toml", "--out", "x", "--set", "run.num-rounds=5")
    assert status == 130
    assert err == ["fedmom: interrupted after round 3", "fedmom: go on with: fedmom run --resume x"]
    assert out[-1] == "x"
    assert read_about(Path("x", CHECKPOINT))["round"] == 3
    monkeypatch.setattr(progress, "callbacks", progress.callbacks)
    assert fed("run", "--resume", "x", "--quiet") == (0, ["x"], [])
    assert Path("x", FINAL).read_bytes() == Path("whole", FINAL).read_bytes()


def test_ctrl_c_before_the_first_round_is_one_line(fed, monkeypatch, workplace):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmom.runs.execute.build_problem", interrupt)
    before = tree(workplace)
    assert fed("run", "tiny.toml", "--out", "x") == (130, [], ["fedmom: interrupted"])
    assert tree(workplace) == before


@pytest.mark.slow  # a fast one with more signals: machine/test_output.py
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_real_process_with_a_checkpoint(workplace, number):
    command = [sys.executable, "-m", "fedmom", "run", "quadratic.toml", "--out", "x"]
    command += ["--quiet", "--set", "run.num-rounds=1000000", "--set", "run.checkpoint-every=1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while len(read_rounds(Path("x"))) < 5 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out.splitlines() == ["x"]
    done = read_rounds(Path("x"))[-1]["round"]
    assert err.splitlines()[0] == f"fedmom: interrupted after round {done}"
    assert "Traceback" not in err
    assert read_about(Path("x", CHECKPOINT))["round"] == done >= 5


# --- the other commands ----------------------------------------------------------------------------------


def test_help_teaches_by_example(fed):
    for command in COMMANDS:
        if command != "deploy":  # it has commands below
            teaches(fed, command)


def teaches(fed, command):
    """Its help has examples, and each of them parses."""
    status, out, err = fed(command, "--help")
    assert (status, err) == (0, [])
    usage, *lines = [line.strip() for line in out if line.strip()]
    assert usage.startswith("Usage:")
    assert command in usage
    examples = [line for line in lines if line.startswith("fedmom ")]
    assert examples
    for example in examples:
        words = example.split()[1:]
        get_command(main.app).make_context("fedmom", words[:1], resilient_parsing=True)
        sub = get_command(main.app).commands[words[0]]
        assert sub.make_context(words[0], words[1:]).params  # it parses: no option that is not there


def test_help_names_every_command_and_completion(fed):
    status, out, _ = fed("--help")
    text = "\n".join(out)
    assert status == 0
    for word in [*COMMANDS, "--show-completion", "--install-completion"]:
        assert word in text
    assert sorted(get_command(main.app).commands) == sorted(COMMANDS)


def test_no_command_shows_the_help(fed):
    status, out, err = fed()
    assert (status, err) == (2, [])
    assert any("Usage" in line for line in out)


@pytest.mark.slow
def test_completion_is_a_script_of_the_shell():
    env = {**os.environ, "_FEDMOM_COMPLETE": "source_bash"}
    code = "import sys; sys.argv = ['fedmom']; from fedmom.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "complete -o default -F _fedmom_completion fedmom" in done.stdout


def test_datasets_and_models_are_listed_with_a_line_each(fed):
    for command, names in (
        ("datasets", [*DATASETS, "quadratic", "FILE.npz", "FOLDER/", "FILE.bin, FOLDER/", "hf:NAME"]),
        ("models", list(MODELS)),
    ):
        status, out, err = fed(command)
        assert (status, err) == (0, [])
        listed = [line.split("  ")[0] for line in out]
        assert listed == [*names, "module:function"]
        assert all(len(line.split("  ", 1)[1].strip()) > 10 for line in out)


def test_algorithms_are_listed_with_their_equations_and_what_they_set(fed):
    status, out, err = fed("algorithms")
    assert (status, err) == (0, [])
    heads = [line.split("  ")[0] for line in out if line[:1] != " "]
    assert heads == list(ALGORITHMS)
    text = " ".join(" ".join(out).split())
    for entry in ALGORITHMS.values():
        assert " ".join(entry.equation.split()) in text
        assert all(f"{key} = {value!r}" in text for key, value in entry.sets.items())
        assert not any(entry.summary in line and entry.equation in line for line in out if entry.equation)
    assert "beta = 0.0" in text
    assert "num-local-steps = 1" in text


def test_keys_are_explained_all_or_by_word(fed):
    status, out, err = fed("keys")
    assert (status, err) == (0, [])
    assert [line for line in out if line.startswith("[")] == [f"[{section}]" for section in SECTIONS]
    of_keys = [line for line in out if line and not line.startswith("[")]
    assert [line.split()[0] for line in of_keys] == list(KEYS)
    for line, (name, key) in zip(of_keys, KEYS.items(), strict=True):
        assert key.doc in line
        assert all(choice in line for choice in key.choices)
        assert (line.split()[1] == "*") == (name in FIRST)
    chosen = [line.split() for line in fed("keys", "warm-up", "cohort")[1] if line[:1] not in ("", "[")]
    assert chosen == [line.split() for line in of_keys if "warm-up" in line or "cohort" in line]
    assert 1 < len(chosen) < len(of_keys)


def test_a_key_by_its_full_name_has_a_paragraph_with_range_and_example(fed):
    status, out, err = fed("keys", "algorithm.beta")
    assert (status, err) == (0, [])
    text = "\n".join(out)
    for part in ("algorithm.beta = 0.9", KEYS["algorithm.beta"].doc, "in [0, 1)", "--set algorithm.beta=0.95"):
        assert part in text
    (line,) = [line for line in fed("keys", "algorithm.states")[1] if "--set" in line]
    assert shlex.split(line)[-1] == f"algorithm.states={read_keys()['algorithm.states'].example}"
    text = "\n".join(fed("keys", "algorithm.topology")[1])
    assert all(f"{name} " in text and meaning in text for name, meaning in KEYS["algorithm.topology"].choices.items())
    assert KEYS["algorithm.topology"].also in text


def test_a_list_of_keys_fits_into_any_terminal():
    for width in (60, 80, 120):
        lines = [*listed(read_keys().values(), width)]
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines if line[:1] not in ("", " ", "[")] == list(KEYS)
        words = " ".join(line.strip() for line in lines)
        assert all(meaning(key).split()[-1] in words for key in read_keys().values())


@table(
    "words, right",
    [
        (["run", "x.toml", "--lr", "0.1"], "--set algorithm.lr=0.1"),
        (["run", "x.toml", "--learning_rate=0.1"], "--set algorithm.lr=0.1"),
        (["run", "x.toml", "--rounds"], "--set run.num-rounds=200"),
        (["run", "x.toml", "--gpu"], "--set engine.device=cuda"),
        (["sweep", "x.toml", "--lr=0.1,1"], "--grid algorithm.lr=0.1,1"),
        (["run", "x.toml", "--outt", "y"], "did you mean --out"),
        (["run", "quadratic.toml", "--device", "gpu"], "did you mean cuda?"),
        (["run", "quadratic.toml", "--set", "lr=0.1"], "did you mean algorithm.lr"),
        (["keys", "algoritm.lr"], "did you mean algorithm.lr"),
        (["keys", "learning_rate"], "did you mean algorithm.lr"),
        (["keys", "quantization"], "did you mean algorithm.codecs?"),
        (["keys", "server-lr"], "did you mean algorithm.outer-lr?"),
        (["run", "x.toml", "--compression"], "--set 'algorithm.codecs=x: int8; u: topk 0.1'"),
        (["sweep", "x.toml", "--outer-optimizer", "slowmo,fed m"], "--grid 'algorithm.outer=slowmo,fed m'"),
    ],
)
def test_what_people_type_is_answered_by_the_right_words(fed, words, right):
    status, out, err = fed(*words)
    assert (status, out, len(err)) == (2, [], 1)
    assert right in err[0]


def test_help_keys_and_version_need_no_torch(fed):
    heavy = ("torch", "matplotlib", "flwr", "ray", "networkx", "plotly", "torchvision")
    code = "import sys; from fedmom.cli.main import call; call(sys.argv[1:])"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    for words in (["--help"], ["run", "--help"], ["keys"], ["keys", "algorithm.lr"], ["run", "x.toml", "--lr", "1"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stderr)
    status, out, _ = fed("--version")
    assert (status, out) == (0, [f"fedmom {fedmom.__version__}"])


@pytest.mark.slow
@table(
    "sets, expected",
    [
        ([], ["16", "32 × (x and u)", "0.949253", "89"]),
        (["algorithm.topology=one-peer-exponential"], ["rounds in a period", "4"]),
        (["algorithm.topology=directed-ring", "data.num-clients=300"], ["directed", "0.999945"]),
        (["data.num-clients=1"], ["connected", "yes"]),
    ],
)
def test_a_topology_is_summed_up_and_drawn(fed, sets, expected):
    status, out, err = fed("topology", RING, *[word for value in sets for word in ("--set", value)], "--out", "t.png")
    assert (status, err) == (0, [])
    for word in expected:
        assert word in "\n".join(out)
    assert out[-1] == "t.png"
    assert Path("t.png").read_bytes().startswith(b"\x89PNG")
    Path("t.png").unlink()


@table(
    "change, sent",
    [
        ("name=d-sgd-m", "(x and u)"),
        ("beta=0", "(x)"),
        ("momentum-policy=reset", "(x)"),
        ("name=d-sgd-m-qg", "(x)"),
        ("name=gradient-tracking", "(x and y)"),
        ("optimizer=adamw", "(x, m, v)"),
        ("states=x: average every 2; u: average", "(x every 2 rounds and u)"),
        ("fragments=3", "(one of 3 parts of x and u)"),
    ],
)
def test_a_topology_says_which_states_a_link_carries(change, sent):
    assert _sent(resolve(load(RING, [f"algorithm.{change}"])).config.algorithm) == sent


def test_a_disconnected_topology_is_a_warning(fed):
    Path("two.edges").write_text("0 1\n2 3\n")
    sets = ["--set", "algorithm.topology=two.edges", "--set", "data.num-clients=4"]
    status, out, err = fed("topology", RING, *sets, "--out", "t.png")
    assert (status, len(err)) == (0, 1)
    assert "each part converges to its own model" in err[0]
    assert any("no, 2 parts" in line for line in out)


def test_a_partition_is_summed_up_and_drawn(fed):
    status, out, err = fed("partition", "digits.toml", "--set", "data.num-clients=12", "--out", "p.png")
    text = "\n".join(out)
    assert (status, err) == (0, [])
    assert out[-1] == "p.png"
    assert "N = 12, α = 0.3" in text
    assert "1,437" in text
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")


def test_natural_clients_are_listed_by_their_ids_and_thousands_by_quantiles(fed):
    content = dict(np.load("tiny.npz"))
    own = {"who": np.repeat(["cleo", "ann", "bob"], [5, 10, 15]), "who_test": np.repeat(["ann", "eve"], [4, 6])}
    np.savez("tiny.npz", **content, **own)
    natural = ["--set", "data.partition=natural", "--set", "data.clients=who", "--set", "data.num-clients=0"]
    status, out, err = fed("partition", "tiny.toml", *natural)
    assert (status, err) == (0, [])
    assert "N = 3, clients by who" in out[0]
    rows = [line.split() for line in out if line[:1] in ("0", "1", "2")]
    assert rows == [["0", "ann", "10", "3", "4"], ["1", "bob", "15", "3", "0"], ["2", "cleo", "5", "3", "0"]]
    sizes = np.arange(1, 102)  # 101 clients: quantiles are whole, by numpy's own rule client 1 + 100 q
    x, y = np.zeros((sizes.sum(), 2), np.float32), np.arange(sizes.sum()) % 3
    np.savez("tiny.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], who=np.repeat(np.arange(101), sizes))
    status, out, err = fed("partition", "tiny.toml", *natural)
    assert (status, err) == (0, [])
    assert any(line.endswith(" 1, 6, 26, 51, 76, 96, 101") for line in out)
    assert len(out) < 12


@pytest.mark.slow
def test_a_run_draws_its_curves_and_a_report_compares_runs(fed, monkeypatch):
    monkeypatch.setattr(curves, "draw_curves", draw_curves)
    for name in ("a", "b"):
        assert fed("run", "tiny.toml", "--out", name, "--quiet") == (0, [name], [])
    assert Path("a/curves.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = fed("report", "a", "b", "--out", "both")
    assert (status, err) == (0, [])
    assert out[-3:] == ["picture: both/curves.png", "tables: both/report.md", "page: both/report.html"]
    assert Path("both/curves.png").read_bytes().startswith(b"\x89PNG")
    report = Path("both/report.md").read_text(encoding="utf-8")
    for title in ("equal rounds", "equal joint epochs", "equal bytes"):
        assert title in report.lower()
    assert [line.split()[1] for line in fed("report", "a")[1][-3:]] == ["a/curves.png", "a/report.md", "a/report.html"]


def test_a_picture_that_overflows_says_nothing_on_standard_error(fed, monkeypatch):
    monkeypatch.setattr(curves, "draw_curves", draw_curves)
    sets = ["--set", "algorithm.lr=1e6", "--set", "run.num-rounds=99"]
    assert len(fed("run", "quadratic.toml", "--out", "x", *sets)[2]) == 1
    assert Path("x/curves.png").is_file()


# --- Flower ----------------------------------------------------------------------------------------------

PLAIN_APP = Path(__file__).parents[1] / "apps" / "plain_app"


@pytest.mark.slow
def test_simulate_app_runs_an_app_that_knows_nothing_of_fedmom(fed):
    status, _, err = fed("simulate-app", str(PLAIN_APP), "--num-clients", "3", "--num-actors", "1")
    assert status == 0, err
    assert f"{PLAIN_APP}: done in" in " ".join(err)
    assert "replies of 3 clients" in " ".join(err)


@pytest.mark.slow
def test_an_app_that_ends_itself_is_heard(fed):
    """Its own exit is no lost reader of our output."""
    arguments = ["--num-clients", "1", "--num-actors", "1", "--set", "mode=done"]
    with pytest.raises(SystemExit, match="there is no data folder"):
        fed("simulate-app", str(PLAIN_APP), *arguments)


def test_a_project_of_another_kind_is_no_flower_app(in_tmp):
    own = Path(fedmom.__file__).parents[1]
    for text in ("", "[project]\nname = 'x'\n", "[tool.flwr.app]\npublisher = 'x'\n", "[tool"):
        Path("pyproject.toml").write_text(text)
        assert app_folder(None) == own
    Path("pyproject.toml").write_text("[tool.flwr.app.components]\nserverapp = 'a:b'\n")
    assert app_folder(None) == in_tmp


@pytest.mark.slow
def test_what_cannot_be_simulated_is_one_line(fed):
    def refused(words, *arguments):
        status, out, err = fed("simulate-app", *arguments)
        assert (status, out, len(err)) == (2, [], 1), err
        for word in words:
            assert word in err[0], err[0]

    refused(["nowhere/pyproject.toml"], "nowhere", "--num-clients", "3")
    for text in ('tool = "x"', '[tool.flwr.app]\ncomponents = "x"', "[tool.flwr]\napp = 1"):
        Path("app").mkdir(exist_ok=True)
        Path("app/pyproject.toml").write_text(text)
        refused(["app/pyproject.toml", "components"], "app", "--num-clients", "3")
    refused(["no-such-key", "run config"], str(PLAIN_APP), "--num-clients", "3", "--set", "no-such-key=1")
    refused(["num-gpus"], str(PLAIN_APP), "--num-clients", "3", "--num-gpus", "0.5")
    status, _, err = fed("run", "quadratic.toml", "--backend", "nobody", "--out", "x")
    assert (status, len(err)) == (2, 1)
    assert "run.backend = 'nobody'" in err[0]
    status, _, err = fed("run", "quadratic.toml", "--backend", "simulation", "--app", "nowhere", "--out", "x")
    assert (status, len(err)) == (2, 1)
    assert "nowhere/pyproject.toml" in err[0]
    assert not Path("x").exists()
