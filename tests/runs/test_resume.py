"""Nothing that ran is lost: kills, interrupts and full disks, and the same bytes as an uninterrupted run."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedmom
from fedmom.engine.paths import PATHS
from fedmom.errors import InputError
from fedmom.records import folder
from fedmom.records.files import read_about, read_tensors
from fedmom.records.history import read_rounds
from forked import run_that_stays
from laws import table

DIGITS = {
    "data": {"dataset": "digits", "num_clients": 6, "batch_size": 8},
    "model": {"name": "mlp", "hidden": 16},
    "algorithm": {"num_local_steps": 3},
    "run": {"num_rounds": 12, "checkpoint_every": 3},
    "engine": {"path": "stack", "chunk_size": 4, "threads": 1},
}
VOLATILE = ("wall_seconds", "client_steps_per_second")


LOCAL = {**DIGITS, "algorithm": {"num_local_steps": 3, "momentum_policy": "local"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run at once, for looking at; one for each configuration."""
    folders: dict[str, Path] = {}

    def made(config=DIGITS, **sets) -> Path:
        key = json.dumps([config, sets])
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "run"
            fedmom.run(config, sets=sets, out=folders[key], callbacks=[fedmom.Callback()])
        return folders[key]

    return made


class StopAfter(fedmom.Callback):
    """Ctrl-C after a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_round(self, record, state):
        if record["round"] == self.number:
            raise KeyboardInterrupt


def same_run(a: Path, b: Path) -> None:
    """The same tensors to the byte, and the same records but for times."""
    names = [folder.FINAL, folder.CHECKPOINT]
    names += [folder.CLIENTS] if (a / folder.CLIENTS).exists() else []
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    lines = [[{k: v for k, v in r.items() if k not in VOLATILE} for r in read_rounds(path)] for path in (a, b)]
    assert lines[0] == lines[1]


@table("policy, stop, path", [("average", 1, "stack"), ("local", 7, "vmap"), ("reset", 3, "loop")])
def test_interrupted_run_resumes_to_the_same_bytes(whole, tmp_path, policy, stop, path):
    sets = {"algorithm.momentum-policy": policy, "algorithm.cohort-size": 4, "engine.path": path}
    sets["engine.chunk-size"] = 3
    first = fedmom.run(DIGITS, sets=sets, out=tmp_path / "parts", callbacks=[StopAfter(stop)])
    assert first.status == "interrupted"
    assert read_about(tmp_path / "parts" / folder.CHECKPOINT)["round"] == stop
    assert not (tmp_path / "parts" / folder.FINAL).exists()
    second = fedmom.run(resume=tmp_path / "parts", callbacks=[fedmom.Callback()])
    assert second.status == "done"
    same_run(whole(**sets), tmp_path / "parts")
    assert [r["round"] for r in second.rounds] == list(range(1, 13))
    times = [r["wall_seconds"] for r in second.rounds]
    assert times == sorted(times)  # over both parts


def test_interrupt_inside_a_round_loses_only_that_round(whole, tmp_path):
    class InRound(fedmom.Callback):
        steps = 0

        def on_steps(self, client_steps):
            self.steps += client_steps
            if self.steps > 6 * 3 * 4 + 5:  # in the fifth round
                raise KeyboardInterrupt

    result = fedmom.run(DIGITS, out=tmp_path / "run", callbacks=[InRound()])
    assert result.status == "interrupted"
    assert read_about(tmp_path / "run" / folder.CHECKPOINT)["round"] == 4
    fedmom.run(resume=tmp_path / "run", callbacks=[fedmom.Callback()])
    same_run(whole(), tmp_path / "run")


def wait_for_round(out: Path, number: int, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while len(read_rounds(out)) < number:
        assert is_alive(), "the child ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_cannot_share_a_folder_and_a_killed_run_resumes_to_the_same_bytes(whole, tmp_path):
    config = {**LOCAL, "data": {"dataset": "quadratic", "noise_sigma": 0.5}, "engine": {"path": "loop"}}
    out = tmp_path / "killed"
    child = run_that_stays(config, out, 5)
    try:
        wait_for_round(out, 5, child.is_alive)
        with pytest.raises(InputError, match="another process"):
            fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    finally:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert read_about(out / folder.CHECKPOINT)["round"] == 3
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    same_run(whole(config), out)


def test_killed_before_the_first_checkpoint_starts_again(whole, tmp_path):
    fedmom.run(DIGITS, out=tmp_path / "killed", callbacks=[StopAfter(2)])
    (tmp_path / "killed" / folder.CHECKPOINT).unlink()
    fedmom.run(resume=tmp_path / "killed", callbacks=[fedmom.Callback()])
    same_run(whole(), tmp_path / "killed")


def test_line_cut_short_by_a_kill_is_dropped(whole, tmp_path):
    out = tmp_path / "run"
    fedmom.run(DIGITS, out=out, callbacks=[StopAfter(7)])
    with open(out / folder.ROUNDS, "a") as file:
        file.write('{"round": 8, "ste')
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    same_run(whole(), out)


@table("after", ["rows moved aside", "new rows written"])
def test_kill_between_the_two_files_of_a_checkpoint(whole, tmp_path, monkeypatch, after):
    """The clients' rows and the checkpoint are two files; a kill between them must cost nothing."""
    out = tmp_path / "run"
    write, count = folder.write_tensors, [0]

    class Killed(BaseException):
        pass

    def dying(path, tensors, about):
        count[0] += 1
        # Checkpoints at rounds 3 and 6 write clients, checkpoint, clients, checkpoint.
        # After the kill nothing more is written.
        if count[0] >= {"rows moved aside": 3, "new rows written": 4}[after]:
            raise Killed
        write(path, tensors, about)

    monkeypatch.setattr(folder, "write_tensors", dying)
    with pytest.raises(Killed):
        fedmom.run(LOCAL, out=out, callbacks=[fedmom.Callback()])
    monkeypatch.setattr(folder, "write_tensors", write)
    assert read_about(out / folder.CHECKPOINT)["round"] == 3
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    same_run(whole(LOCAL), out)


def test_longer_run_equals_the_long_run_at_once(tmp_path):
    fedmom.run(DIGITS, out=tmp_path / "short", callbacks=[fedmom.Callback()])
    fedmom.run(resume=tmp_path / "short", sets={"run.num-rounds": 20}, callbacks=[fedmom.Callback()])
    fedmom.run(DIGITS, sets={"run.num-rounds": 20}, out=tmp_path / "long", callbacks=[fedmom.Callback()])
    same_run(tmp_path / "long", tmp_path / "short")


def test_longer_run_is_evaluated_where_the_long_run_is(tmp_path):
    """The short run's last round was evaluated because it was the last."""
    sets = {"run.eval-every": 5, "run.num-rounds": 7}
    fedmom.run(DIGITS, sets=sets, out=tmp_path / "short", callbacks=[fedmom.Callback()])
    fedmom.run(resume=tmp_path / "short", sets={"run.num-rounds": 12}, callbacks=[fedmom.Callback()])
    fedmom.run(DIGITS, sets={"run.eval-every": 5}, out=tmp_path / "long", callbacks=[fedmom.Callback()])
    same_run(tmp_path / "long", tmp_path / "short")


@table("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_a_line_is_written_keeps_line_and_state_together(whole, tmp_path, monkeypatch, number):
    append = folder.RunFolder.append
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def signalled(self, record, *more):
        if record["round"] == 5:
            os.kill(os.getpid(), number)
        append(self, record, *more)

    monkeypatch.setattr(folder.RunFolder, "append", signalled)
    try:
        result = fedmom.run(DIGITS, out=tmp_path / "run", callbacks=[fedmom.Callback()])
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert result.status == "interrupted"
    assert read_about(tmp_path / "run" / folder.CHECKPOINT)["round"] == len(read_rounds(tmp_path / "run")) == 5
    fedmom.run(resume=tmp_path / "run", callbacks=[fedmom.Callback()])
    same_run(whole(), tmp_path / "run")


def test_error_in_a_callback_leaves_a_checkpoint(tmp_path):
    class Broken(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == 5:
                raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="of the user's own"):
        fedmom.run(DIGITS, out=tmp_path / "run", callbacks=[Broken()])
    assert read_about(tmp_path / "run" / folder.CHECKPOINT)["round"] == 5


def test_resume_without_a_checkpoint_says_what_is_dropped(tmp_path):
    notes = []

    class Listen(fedmom.Callback):
        def on_start(self, start):
            notes.extend(start.notes)

    fedmom.run(DIGITS, out=tmp_path / "run", callbacks=[StopAfter(2)])
    (tmp_path / "run" / folder.CHECKPOINT).unlink()
    fedmom.run(resume=tmp_path / "run", callbacks=[Listen()])
    assert any("no checkpoint" in note and "2 lines" in note for note in notes)


def test_leftovers_of_a_kill_are_removed_and_do_not_block_the_folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.toml.123").write_text("half a con")
    fedmom.run(DIGITS, out=out, callbacks=[StopAfter(2)])
    assert not (out / ".config.toml.123").exists()
    (out / ".checkpoint.safetensors.123").write_bytes(b"half")
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    assert not (out / ".checkpoint.safetensors.123").exists()


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    out = tmp_path / "run"
    fedmom.run(DIGITS, out=out, callbacks=[fedmom.Callback()])
    before = {name: (out / name).read_bytes() for name in (folder.FINAL, folder.CHECKPOINT, folder.ROUNDS)}
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    assert before == {name: (out / name).read_bytes() for name in before}


def test_resume_takes_what_auto_chose(tmp_path):
    config = json.loads(json.dumps(DIGITS))
    del config["engine"]
    out = tmp_path / "run"
    first = fedmom.run(config, out=out, callbacks=[StopAfter(2)])
    second = fedmom.run(config, resume=out, callbacks=[fedmom.Callback()])
    assert second.config == first.config
    assert second.config.engine.path in PATHS


def test_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    fedmom.run(DIGITS, out=out, callbacks=[StopAfter(4)])
    good = (out / folder.CHECKPOINT).read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device") as error:
        fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    monkeypatch.undo()
    assert "\n" not in str(error.value)
    assert (out / folder.CHECKPOINT).read_bytes() == good
    assert not [p for p in out.iterdir() if ".safetensors." in p.name]
    fedmom.run(resume=out, callbacks=[fedmom.Callback()])
    same_run(whole(), out)


def test_final_file_holds_model_and_momentum(tmp_path):
    result = fedmom.run(DIGITS, out=tmp_path / "run", callbacks=[fedmom.Callback()])
    tensors, about = read_tensors(tmp_path / "run" / folder.FINAL)
    assert about["round"] == 12
    for name, value in result.state_dict.items():
        assert torch.equal(tensors[f"params/{name}"], value)
    for name, value in result.momentum.items():
        assert torch.equal(tensors[f"momentum/{name}"], value)


def test_two_interrupts_at_once_lose_nothing_of_what_is_personal(tmp_path):
    """The mean of the clients' own tensors is made here and at once: nobody has to wait for it, or give it up."""

    class Twice(fedmom.Callback):
        def on_round(self, record, state):
            if record["round"] == 2:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)

    keys = {"model.name": "mlp", "model.hidden": 4, "data.num-clients": 3, "algorithm.personal": "head"}
    keys |= {"run.num-rounds": 5, "run.eval-every": 50, "run.checkpoint-every": 50, "algorithm.num-local-steps": 2}
    found = fedmom.run(keys, out=tmp_path / "run", callbacks=[Twice()])
    assert found.status == "interrupted"
    assert (tmp_path / "run/checkpoint.safetensors").exists()
    kept = fedmom.load(tmp_path / "run")
    assert kept.state_dict.keys() == found.state_dict.keys()
    assert all(torch.equal(value, found.state_dict[name]) for name, value in kept.state_dict.items())
    assert kept.momentum.keys() == found.momentum.keys()
