"""Run folders between the server and this machine, and a run that is followed, without an engine."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fedmom.cli import main
from fedmom.config.keys import Config
from fedmom.config.load import replace
from fedmom.deploy import federation, remote_runs
from fedmom.deploy import following as follow
from fedmom.deploy.bundle import Cargo, Travels
from fedmom.deploy.commands import CommandError, Commands
from fedmom.deploy.deployment import open_deployment
from fedmom.deploy.following import Following, RemoteEnded
from fedmom.deploy.initialise import initialise
from fedmom.errors import InputError
from fedmom.records.files import CHECKPOINT, CONFIG, ENDED, ROUNDS, read_about, write_tensors
from fedmom.runs.callbacks import Callback

ROOT = Path(__file__).parents[2]


class HereRuns(remote_runs.RemoteRuns):
    """The server's volume is a folder of this machine."""

    def _execute(self, *words: str) -> str:
        return self._pipe(list(words)).decode()

    def _pipe(self, words: list[str], data: bytes | None = None) -> bytes:
        done = subprocess.run(words, input=data, capture_output=True)
        if done.returncode:
            raise CommandError(done.stderr.decode())
        return done.stdout


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(remote_runs, "VOLUME", str(tmp_path / "volume"))
    return HereRuns(None)


def make_run(folder: Path, run_id: str, rounds: int) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f"# {run_id}\n")
    (folder / ROUNDS).write_text("{}\n" * rounds)
    write_tensors(folder / CHECKPOINT, {"x": torch.zeros(1)}, {"run_id": run_id, "round": rounds})
    return folder


def test_a_run_folder_comes_as_it_is_there(runs, tmp_path):
    assert not runs.fetch("run", tmp_path / "run")
    there = make_run(tmp_path / "volume" / "run", "a", 3)
    (there / ENDED).write_text("{}")  # says of the server's process what it is; here it would lie
    make_run(tmp_path / "run", "a", 2)
    assert runs.fetch("run", tmp_path / "run")
    names = {path.name for path in there.iterdir()} - {ENDED}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {
        name: (there / name).read_bytes() for name in names
    }


def test_rounds_that_were_made_here_are_not_written_over(runs, tmp_path):
    """A run that was taken further on this machine is brought there, not the other way round."""
    make_run(tmp_path / "volume" / "run", "a", 3)
    here = make_run(tmp_path / "run", "a", 5)
    assert not runs.fetch("run", here)
    assert read_about(here / CHECKPOINT)["round"] == 5
    runs.bring(here, "run")
    assert read_about(tmp_path / "volume" / "run" / CHECKPOINT)["round"] == 5


def test_a_folder_of_the_same_name_that_is_another_run_is_not_written_over(runs, tmp_path):
    make_run(tmp_path / "volume" / "run", "a", 3)
    here = make_run(tmp_path / "run", "b", 2)
    with pytest.raises(InputError, match="is another run than the server's of the name 'run'"):
        runs.fetch("run", here)
    assert read_about(here / CHECKPOINT) == {"run_id": "b", "round": 2}
    assert {path.name for path in here.iterdir()} == {CONFIG, ROUNDS, CHECKPOINT}


def test_a_broken_checkpoint_here_is_replaced(runs, tmp_path):
    make_run(tmp_path / "volume" / "run", "a", 3)
    here = make_run(tmp_path / "run", "a", 3)
    (here / CHECKPOINT).write_bytes(b"half")
    assert runs.fetch("run", here)
    assert read_about(here / CHECKPOINT)["round"] == 3


def test_a_run_that_somebody_is_at_is_busy(runs, tmp_path):
    assert not runs.busy("run")
    there = make_run(tmp_path / "volume" / "run", "a", 3)
    assert not runs.busy("run")
    handle = os.open(there, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert runs.busy("run")
    os.close(handle)
    assert not runs.busy("run")


@pytest.fixture
def following(tmp_path, monkeypatch):
    """Of a run named `run`; Flower says what `said` holds, and the server does not answer."""
    initialise(tmp_path / "deployment", num_clients=1)
    made = Following(Commands(open_deployment(tmp_path / "deployment")), ROOT, "run", tmp_path / "run", print)
    monkeypatch.setattr(follow, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(made.remote, "look", lambda name, seen: None)
    monkeypatch.setattr(made.remote, "fetch", lambda name, target: False)
    monkeypatch.setattr(made, "_log", lambda: SimpleNamespace(poll=lambda: None, terminate=lambda: None))
    monkeypatch.setattr(made.commands, "json", lambda command: {"run-id": 7})
    return made


def test_two_runs_that_are_started_at_once_keep_their_settings_apart(following, tmp_path):
    """`flwr run` reads the file when it has imported what it needs, which is seconds later."""
    other = Following(following.commands, ROOT, "other", tmp_path / "other", print)
    files = []
    following.commands.json = lambda command: files.append(Path(command[-1])) or {"run-id": len(files)}
    following.start(Config(), {})
    before = files[0].read_text()
    other.start(Config(run=replace(Config(), "run", num_rounds=77).run), {})
    assert files[0].read_text() == before
    assert "num-rounds = 77" in files[1].read_text()


def test_what_the_configuration_overrules_is_said_once(following, monkeypatch):
    """By this machine, which knows which keys were given; the server, which does not, may say the same."""
    said = []
    following.say = said.append
    monkeypatch.setattr(following.remote, "check_has", lambda needs: None)
    following._send(Cargo(Config(), Travels({}, {}), ("beta = 0.5 wins", "I = 1 is overruled")))
    assert said == ["beta = 0.5 wins", "I = 1 is overruled"]
    following._pass_on(SimpleNamespace(stdout=["beta = 0.5 wins\n", "3 Flower nodes\n"]))
    assert said[2:] == ["3 Flower nodes"]


def test_a_run_that_goes_on_is_followed_and_not_started_again(following, monkeypatch):
    monkeypatch.setattr(following.remote, "busy", lambda name: True)
    monkeypatch.setattr(following, "_ask", lambda: ("running", "N/A"))
    monkeypatch.setattr(follow, "_SECONDS_TO_END", 0.0)
    with pytest.raises(InputError, match="the server runs it already; it was not started from here"):
        following.take_up()
    following.start(Config(), {})
    following.run_id = ""
    assert following.take_up()
    assert following.run_id == "7"
    monkeypatch.setattr(following.remote, "busy", lambda name: False)
    assert not following.take_up()


def test_a_stopped_run_is_given_time_to_end(following, monkeypatch):
    """Flower calls it finished while its process still has the folder."""
    answers = iter([True, True, False])
    monkeypatch.setattr(following.remote, "busy", lambda name: next(answers))
    monkeypatch.setattr(following, "_ask", lambda: ("finished:stopped", ""))
    following.start(Config(), {})
    assert not following.take_up()
    assert next(answers, None) is None


def test_a_configuration_that_comes_late_costs_no_round(following, monkeypatch):
    """A busy server gives the rounds, and config.toml only when it is asked again."""
    records, texts, told = [{"round": 1}, {"round": 2}], iter([None, None, ""]), []

    class Told(Callback):
        def on_start(self, start):
            told.append(("start", start.first_round))

        def on_round(self, record, state):
            told.append(("round", record["round"]))

    monkeypatch.setattr(following.remote, "look", lambda name, seen: remote_runs.Look(records[seen:], None))
    monkeypatch.setattr(following.remote, "config", lambda name: next(texts, ""))
    monkeypatch.setattr(following, "_ask", lambda: ("finished:completed" if len(told) == 3 else "running", ""))
    monkeypatch.setattr(following, "_ended", lambda status, details: RemoteEnded("done", ""))
    monkeypatch.setattr(follow, "load", lambda path: SimpleNamespace(config=Config()))
    assert following.to_the_end([Told()]).status == "done"
    assert told == [("start", 1), ("round", 1), ("round", 2)]


def test_a_deployment_that_was_taken_down_is_not_waited_for(following, monkeypatch):
    monkeypatch.setattr(following, "_ask", lambda: ("", ""))
    answers = iter([["a container"], ["a container"], []])
    monkeypatch.setattr(federation, "services", lambda commands: next(answers))
    ended = following.to_the_end([])
    assert ended == ("failed", "the deployment was taken down after round 0")
    assert next(answers, None) is None


def test_a_second_ctrl_c_says_that_the_run_goes_on_and_how_it_is_followed(tmp_path, monkeypatch):
    """The first one stops the run, and whoever does not wait for that is told so."""
    initialise(tmp_path / "deployment", num_clients=3)
    monkeypatch.setattr("fedmom.deploy.federation.check_ours", lambda commands: None)
    monkeypatch.setattr(federation, "is_up", lambda commands: True)
    monkeypatch.setattr(remote_runs.RemoteRuns, "config", lambda self, name: None)
    monkeypatch.setattr(Following, "start", lambda self, config, own: setattr(self, "run_id", "77"))
    monkeypatch.setattr(Following, "_log", lambda self: SimpleNamespace(poll=lambda: None, terminate=lambda: None))

    def interrupted(self, *words, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote_runs.RemoteRuns, "look", interrupted)
    monkeypatch.setattr(Commands, "do", interrupted)  # while `flwr stop` is under way
    words = ["run", str(ROOT / "configs" / "deploy.toml"), "--out", str(tmp_path / "out"), "--app", str(ROOT)]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        command = ["deploy", *words, "--dir", str(tmp_path / "deployment")]
        result = CliRunner().invoke(main.app, command, standalone_mode=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.return_value == 130
    assert "stopping the run; once more Ctrl-C leaves it as it is" in result.output
    assert "run 77 may still be going on there" in result.output
    go_on = f"go on with: fedmom deploy run --resume {tmp_path / 'out'} --dir {tmp_path / 'deployment'}"
    assert go_on in result.output


def test_a_dry_run_of_a_resume_prints_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    initialise(tmp_path / "deployment", num_clients=3)
    (tmp_path / "run").mkdir()
    text = (ROOT / "configs" / "deploy.toml").read_text()
    (tmp_path / "run" / CONFIG).write_text(text.replace("[data]", '[data]\ndata-dir = "/data"'))
    words = ["deploy", "run", "--resume", str(tmp_path / "run"), "--dry-run", "--dir", str(tmp_path / "deployment")]
    result = CliRunner().invoke(main.app, words, catch_exceptions=False)
    assert "flwr run " in result.output
    words[3] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"--resume .*nowhere: is no run folder"):
        CliRunner().invoke(main.app, words, catch_exceptions=False, standalone_mode=False)
