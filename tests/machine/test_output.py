"""What is printed, and where: no terminal, reader or disk ends a command, and no path is taken for a name."""

import errno
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fedmom
from fedmom.cli import main, options
from fedmom.machine import output
from fedmom.machine.output import Output, steady_output
from fedmom.records.files import CHECKPOINT, FINAL, read_about
from fedmom.records.status import read_status
from fedmom.results.pictures import curves
from laws import table

QUADRATIC = '[data]\ndataset = "quadratic"\n[run]\nnum-rounds = 3\n[engine]\npath = "loop"\nthreads = 1\n'
LETTERS = "γ = 0.1 · N × I – û ≤ ∞ ⌈n⌉ ⠁⠀ │ naïve 😀 \udcff"


@pytest.fixture
def workplace(in_tmp, monkeypatch):
    monkeypatch.setattr(curves, "draw_curves", lambda runs, path: None)  # which take time
    Path("q.toml").write_text(QUADRATIC)
    return in_tmp


@table("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16", "koi8-r"])
def test_every_letter_can_be_written_in_every_encoding(encoding):
    raw = io.BytesIO()
    stream = Output(io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    print(LETTERS, file=stream)
    text = raw.getvalue().decode(encoding)
    assert text.endswith("\n")
    assert "N" in text
    if encoding == "ascii":
        assert text.rstrip() == "gamma = 0.1 | N x I - u <= inf ?n? *  | naive ? \\xff"


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


@table(
    "error",
    [
        BrokenPipeError(),
        OSError(errno.EIO, "the terminal is gone"),
        OSError(errno.ENOSPC, "full"),
        ValueError("closed"),
    ],
)
def test_what_cannot_be_written_is_dropped(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with steady_output():
        for _ in range(3):
            print("x")
            sys.stdout.flush()
        assert output.nobody_reads()
        assert sys.stdout.tries == 1
    monkeypatch.setattr(sys, "stdout", Failing(BlockingIOError()))
    with steady_output():
        print("x", end="")
        assert not output.nobody_reads()  # the next text may be read


@table("encoding", ["ascii", "cp1252"])
def test_no_command_dies_of_a_terminal_with_few_letters(workplace, monkeypatch, encoding):
    for words in (["run", "q.toml", "--out", encoding], ["watch", encoding], ["keys"], ["run", "--help"]):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert main.call(words) == 0, words
        assert len(raw.getvalue()) > 100


def test_a_reader_that_goes_away_ends_no_training(workplace, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert main.call(["run", "q.toml", "--out", "x"]) == 0
    assert Path("x", FINAL).is_file()
    assert main.call(["watch", "x"]) == 0
    sys.stdout.close()  # as the interpreter does at its end: nothing is left to be said


# --- signals ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [["SIGTERM", "SIGINT", "SIGINT"], ["SIGHUP"]], ids="+".join)
def test_signals_leave_a_checkpoint_and_no_traceback(workplace, numbers):
    sets = ["--set", "run.num-rounds=1000000", "--set", "run.checkpoint-every=1000000"]
    words = [sys.executable, "-m", "fedmom", "run", "q.toml", "--out", "x", *sets]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (line := run.stdout.readline()).startswith("round "):
            assert line
        for number in numbers:
            run.send_signal(getattr(signal, number))
        out, err = run.communicate()
    finally:
        run.kill()
    assert run.returncode == 130
    assert "Traceback" not in out + err
    assert "Exception" not in out + err
    assert read_status(Path("x")).status == "interrupted"
    assert read_about(Path("x", CHECKPOINT))["round"] == read_status(Path("x")).round > 0


def test_a_signal_that_was_ignored_stays_ignored(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
        options.heed_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- paths ------------------------------------------------------------------------------------------------------


def test_a_tilde_is_home_in_every_path(workplace, monkeypatch, capsys):
    home = workplace / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "q.toml").write_text(QUADRATIC)
    (home / "digits.toml").write_text("[data]\nnum-clients = 3\n")
    (home / "w.csv").write_text("0.5,0.5\n0.5,0.5\n")
    sets = {"algorithm.name": "d-sgd-m", "algorithm.topology": "~/w.csv"}
    quiet = [fedmom.Callback()]
    assert fedmom.run("~/q.toml", sets={**sets, "run.out": "~/a"}, callbacks=quiet).folder == home / "a"
    assert fedmom.run(resume="~/a", sets={"run.num-rounds": 4}, callbacks=quiet).status == "done"
    for words in (
        ["run", "~/q.toml", "--out=~/b"],
        ["run", "q.toml", "--set", "run.out=~/c"],
        ["run", "--resume=~/c", "--set", "run.num-rounds=4"],
        ["partition", "~/digits.toml", "--out=~/p.png"],
        ["watch", "~/b"],
    ):
        assert main.call([*words]) == 0, (words, capsys.readouterr().err)
    assert {"a", "b", "c", "p.png"} <= {path.name for path in home.iterdir()}
    for words in (["run", "q.toml", "--out=~nobody-here/a"], ["run", "q.toml", "--set", "run.out=~nobody-here/a"]):
        capsys.readouterr()
        assert main.call(words) == 2
        assert "~nobody-here is no user of this machine; ./~nobody-here/a is a folder" in capsys.readouterr().err
    assert not [path for path in workplace.rglob("*") if path.name.startswith("~")]


def test_folders_without_a_name_are_each_commands_own(workplace):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(options.fresh_folder, [Path("q.toml")] * 16))
    assert len(set(folders)) == 16
    assert all(folder.is_dir() for folder in folders)


def test_a_command_that_is_refused_leaves_no_folder_behind(workplace, capsys):
    assert main.call(["run", "q.toml", "--set", "data.centers=1"]) == 2
    assert not Path("runs").exists()
    assert main.call(["run", "q.toml", "--quiet"]) == 0
    assert main.call(["run", "q.toml", "--set", "data.centers=1"]) == 2
    (folder,) = Path("runs").iterdir()
    assert str(folder) == capsys.readouterr().out.strip()


def test_requests_to_end_in_a_burst_are_one(workplace):
    """However they fall: between the first one's raise and the checkpoint, too."""

    class Burst(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == 2:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                finally:
                    for _ in range(3):
                        os.kill(os.getpid(), signal.SIGINT)

    result = fedmom.run("q.toml", out="x", callbacks=[Burst()])
    assert (result.status, read_status(Path("x")).status) == ("interrupted", "interrupted")
    assert read_about(Path("x", CHECKPOINT))["round"] == 2
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
