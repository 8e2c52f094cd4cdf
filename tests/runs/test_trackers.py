"""Trackers hear every round once, in order, also over a resume; and a tracker that breaks costs no run."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedmom
from fedmom.cli import main
from fedmom.errors import InputError
from fedmom.records.history import read_rounds
from fedmom.runs.trackers import TAGS, TRACKERS, Tracking, make_trackers, numbers_of

QUADRATIC = {"data.dataset": "quadratic", "run.num-rounds": 5, "engine.path": "loop"}


class Listens:
    """A tracker of the user's own."""

    def __init__(self, breaks_at=0):
        self.heard, self.breaks_at = [], breaks_at

    def start(self, run):
        self.run = run

    def log(self, step, numbers):
        if step == self.breaks_at:
            raise ConnectionError("the server is away")
        self.heard.append((step, numbers))

    def end(self, status):
        self.status = status


def test_a_tracker_of_ones_own_hears_everything_once(tmp_path):
    mine = Listens()
    result = fedmom.run(QUADRATIC, out=tmp_path / "run", callbacks=[Tracking([mine])])
    assert [step for step, _ in mine.heard] == [1, 2, 3, 4, 5]
    for (_, numbers), record in zip(mine.heard, result.rounds, strict=True):
        assert numbers == numbers_of(record)
        assert numbers["loss"] == record["loss"]
    assert mine.status == "done"
    assert (mine.run.name, mine.run.first_round) == ("run", 1)
    assert mine.run.settings["algorithm.beta"] == 0.9
    fedmom.run(resume=tmp_path / "run", sets={"run.num-rounds": 7}, callbacks=[Tracking([mine])])
    assert [step for step, _ in mine.heard] == [1, 2, 3, 4, 5, 6, 7]
    assert mine.run.first_round == 6


def test_numbers_are_the_finite_ones():
    record = {"round": 3, "a": 1, "b": 2.5, "c": float("nan"), "d": "text", "e": True, "f": [1], "g": float("inf")}
    assert numbers_of(record) == {"a": 1.0, "b": 2.5}


def test_a_tracker_that_breaks_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    breaks, holds = Listens(breaks_at=3), Listens()
    result = fedmom.run(QUADRATIC, out=tmp_path / "run", callbacks=[Tracking([breaks, holds])])
    assert result.status == "done"
    assert [step for step, _ in breaks.heard] == [1, 2]
    assert [step for step, _ in holds.heard] == [1, 2, 3, 4, 5]
    (line,) = capsys.readouterr().err.splitlines()
    assert "Listens hears no more of this run: ConnectionError: the server is away" in line


def test_an_unknown_tracker_and_a_missing_package_are_one_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match="did you mean mlflow"):
        make_trackers(["mlfow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(InputError, match=rf"pip install 'fedmom\[{name}\]'"):
            make_trackers([name])
    config = Path(__file__).parents[2] / "configs/quadratic.toml"
    assert main.call(["run", str(config), "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.slow
def test_tensorboard_has_every_round_once_also_after_a_kill(tmp_path):
    """A run that is cut off between two checkpoints and goes on: what came after the checkpoint is dropped."""
    pytest.importorskip("tensorboard")

    class Cut(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == 4:
                (tmp_path / "checkpoint").write_bytes((tmp_path / "run/checkpoint.safetensors").read_bytes())
            if record["round"] == 8:
                raise OSError("cut")

    sets = {**QUADRATIC, "run.num-rounds": 12, "run.checkpoint-every": 4}
    with pytest.raises(OSError, match="cut"):
        fedmom.run(sets, out=tmp_path / "run", callbacks=[Tracking(["tensorboard"]), Cut()])
    (tmp_path / "run/checkpoint.safetensors").write_bytes((tmp_path / "checkpoint").read_bytes())
    result = fedmom.run(resume=tmp_path / "run", callbacks=[Tracking(["tensorboard"])])
    events = scalars(tmp_path / "run")
    assert {TAGS["train_loss"], TAGS["lr"], TAGS["bytes_sent"]} <= set(events.Tags()["scalars"])
    found = events.Scalars(TAGS["train_loss"])
    assert [one.step for one in found] == list(range(1, 13))
    assert [one.value for one in found] == pytest.approx([r["train_loss"] for r in result.rounds], rel=1e-6)
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_mlflow_on_a_real_server(tmp_path, monkeypatch):
    """A server of its own with SQLite; the resumed run is the same MLflow run."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("flask", reason="the server needs the whole of mlflow, not mlflow-skinny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(port, server)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        mlflow.set_tracking_uri(None)
        fedmom.run(QUADRATIC, out=tmp_path / "run", callbacks=[Tracking(["mlflow"])])
        fedmom.run(resume=tmp_path / "run", sets={"run.num-rounds": 8}, callbacks=[Tracking(["mlflow"])])
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("fedmom")
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == "FINISHED"
        assert found.info.run_name == "run"
        assert found.data.params["algorithm.beta"] == "0.9"
        assert found.data.tags["fedmom.status"] == "done"
        history = client.get_metric_history(found.info.run_id, "train_loss")
        assert [one.step for one in history] == list(range(1, 9))
        assert [one.value for one in history] == [r["train_loss"] for r in read_rounds(tmp_path / "run")]
        assert [item.path for item in client.list_artifacts(found.info.run_id)] == ["config.toml"]
    finally:
        import signal

        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=600)


def _wait(port, server):
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert server.poll() is None, "the MLflow server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the MLflow server did not come up")


@pytest.mark.slow
def test_mlflow_that_cannot_be_reached_is_said_before_the_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)
    with pytest.raises(InputError, match="tracker 'mlflow'"):
        fedmom.run(QUADRATIC, out=tmp_path / "run", callbacks=[Tracking(["mlflow"])])


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    result = fedmom.run(QUADRATIC, out=tmp_path / "run", callbacks=[Tracking(["wandb"])])
    assert result.status == "done"
    (log,) = (tmp_path / "run").rglob("run-*.wandb")
    words = (b"train_loss", b"consensus_distance", b"algorithm.beta")
    deadline = time.monotonic() + 900  # wandb's own process closes the file after the run has ended
    while any(word not in log.read_bytes() for word in words):
        assert time.monotonic() < deadline, log.read_bytes()[:1000]
        time.sleep(0.1)
    assert (tmp_path / "run" / "tracking.json").exists()
