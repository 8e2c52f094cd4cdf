"""What a run folder says of its run: at every end, and of a run whose process is gone."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

import fedmom
from fedmom.errors import InputError
from fedmom.records import files, status
from fedmom.records import folder as records
from fedmom.records.history import last_round
from fedmom.records.status import read_status
from forked import run_that_stays
from laws import table

QUADRATIC = {
    "data": {"dataset": "quadratic"},
    "algorithm": {"lr": 0.05, "num_local_steps": 2},
    "run": {"num_rounds": 4},
    "engine": {"path": "loop", "chunk_size": 2, "threads": 1},
}
DIVERGES = {"algorithm.lr": 1e6, "run.num-rounds": 99}


class At(fedmom.Callback):
    """Does something after a round."""

    def __init__(self, number, do):
        self.number, self.do = number, do

    def on_round(self, record, state):
        if record["round"] == self.number:
            self.do()


def throw(error):
    raise error


@table(
    "do, sets, wanted, round_number",
    [
        (lambda: None, {}, "done", 4),
        (lambda: throw(KeyboardInterrupt()), {}, "interrupted", 2),
        (lambda: throw(ValueError("mine")), {}, "failed", 2),
        (lambda: throw(SystemExit(1)), {}, "failed", 2),
        (lambda: None, DIVERGES, "diverged", None),
    ],
)
def test_every_end_is_written(tmp_path, do, sets, wanted, round_number):
    seen = []
    looks = At(1, lambda: seen.append(read_status(tmp_path / "run")))
    with contextlib.suppress(ValueError, SystemExit):
        fedmom.run(QUADRATIC, sets=sets, out=tmp_path / "run", callbacks=[looks, At(2, do)])
    assert (seen[0].status, seen[0].round, seen[0].pid) == ("running", 1, os.getpid())
    found = read_status(tmp_path / "run")
    assert found.status == wanted
    assert found.round == (last_round(tmp_path / "run") if round_number is None else round_number)
    assert bool(found.reason) == (wanted != "done")
    assert "\n" not in found.reason


def test_a_process_that_is_gone_was_killed(tmp_path):
    out = tmp_path / "run"
    child = run_that_stays(QUADRATIC, out, 3)
    try:
        while not (out / records.STATUS).exists() or (found := read_status(out)).round < 3:
            assert child.is_alive()
            time.sleep(0.01)
        assert (found.status, found.pid, found.round) == ("running", child.pid, 3)
        content = json.loads((out / records.STATUS).read_text())
        reused = {**content, "born": content["born"] - 1}  # another process has the number now
        (out / records.STATUS).write_text(json.dumps(reused))
        assert read_status(out).status == "killed"
        (out / records.STATUS).write_text(json.dumps(content))
        os.kill(child.pid, signal.SIGKILL)
        while (before := read_status(out)).is_running:  # nobody has waited for it yet: it is a zombie
            time.sleep(0.01)
        assert before.status == "killed"
    finally:
        child.kill()
        child.join()
    assert (read_status(out).status, read_status(out).round) == ("killed", 3)
    assert fedmom.run(resume=out, callbacks=[fedmom.Callback()]).status == "done"
    assert read_status(out).is_done


def test_a_run_elsewhere_is_known_by_when_it_was_last_heard_of(tmp_path):
    fedmom.run(QUADRATIC, out=tmp_path, callbacks=[fedmom.Callback()])
    content = json.loads((tmp_path / records.STATUS).read_text())

    def look(seen, **changes):
        seen = status.datetime.fromtimestamp(seen, status.UTC).isoformat()
        text = json.dumps({**content, "status": "running", "seen": seen, "host": "elsewhere", **changes})
        (tmp_path / records.STATUS).write_text(text)
        return read_status(tmp_path)

    assert look(time.time()).status == "running"
    assert look(time.time() - 3600).status == "silent"
    assert "elsewhere" in look(time.time() - 3600).reason
    # The same name is not the same machine: process ids of another kernel, or of a container, mean nothing here.
    assert look(time.time(), host=content["host"], boot="another", pid=2**22 + 1).status == "running"


@table("broken", [None, "", "{", "[]", '{"status": "running"}'])
def test_a_folder_without_a_readable_status_is_known_by_its_rounds(tmp_path, broken):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fedmom.run(QUADRATIC, out=whole, callbacks=[fedmom.Callback()])
    fedmom.run(QUADRATIC, out=cut, callbacks=[At(2, lambda: throw(KeyboardInterrupt()))])
    for folder in (whole, cut):
        path = Path(folder, records.STATUS)
        path.unlink() if broken is None else path.write_text(broken)
    assert read_status(whole)[:3] == ("done", "", 4)
    assert read_status(cut)[:3] == ("unfinished", "2 of 4 rounds", 2)
    assert read_status(tmp_path).status == "unfinished"


def test_a_refused_resume_leaves_the_status_as_it_was(tmp_path):
    fedmom.run(QUADRATIC, out=tmp_path, callbacks=[At(2, lambda: throw(KeyboardInterrupt()))])
    before = (tmp_path / records.STATUS).read_bytes()
    (tmp_path / records.CHECKPOINT).write_bytes(b"broken")
    with pytest.raises(InputError):
        fedmom.run(resume=tmp_path, callbacks=[fedmom.Callback()])
    assert (tmp_path / records.STATUS).read_bytes() == before


def test_a_resume_says_how_the_run_was(tmp_path):
    notes = []

    class Listen(fedmom.Callback):
        def on_start(self, start):
            notes.extend(start.notes)

    with contextlib.suppress(ValueError):
        fedmom.run(QUADRATIC, out=tmp_path, callbacks=[At(2, lambda: throw(ValueError("mine")))])
    fedmom.run(resume=tmp_path, callbacks=[Listen()])
    assert "it was failed: ValueError: mine" in notes


def test_a_full_disk_still_takes_the_last_word(tmp_path, monkeypatch):
    """The file's own place is written over where no new file can be made."""

    def full(path, sync=True):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    def fill():
        monkeypatch.setattr(files, "whole_file", full)

    with pytest.raises(InputError, match="No space left"):
        fedmom.run(QUADRATIC, sets={"run.checkpoint-every": 3}, out=tmp_path, callbacks=[At(2, fill)])
    monkeypatch.undo()
    found = read_status(tmp_path)
    assert (found.status, found.round) == ("failed", 3)
    assert "No space left on device" in found.reason
    assert fedmom.run(resume=tmp_path, callbacks=[fedmom.Callback()]).status == "done"


@table("name", [records.CONFIG, records.ROUNDS, records.CHECKPOINT])
def test_a_kill_loses_no_environment(tmp_path, monkeypatch, name):
    """As of any file that appears whole: at the moment at which each file is there, environment.json is."""
    replace, seen = os.replace, []

    def look(source, target):
        replace(source, target)
        if Path(target).name == name:
            seen.append((tmp_path / records.ENVIRONMENT).is_file())

    monkeypatch.setattr(os, "replace", look)
    fedmom.run(QUADRATIC, out=tmp_path, callbacks=[fedmom.Callback()])
    assert all(seen)
    (tmp_path / records.ENVIRONMENT).unlink()
    fedmom.run(resume=tmp_path, callbacks=[fedmom.Callback()])
    assert (tmp_path / records.ENVIRONMENT).is_file()
