"""`fedmom watch`: reads files alone, whole lines only, and follows runs that go on, are cut back or become longer."""

import itertools
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedmom.cli import main
from fedmom.cli.watch import QUIET_SECONDS, Watched, curve, run_view, watch
from fedmom.errors import InputError
from fedmom.records.follow import Follower
from fedmom.records.status import Heart
from histories import make_run, records
from laws import table


def write(folder, lines):
    """rounds.jsonl, in place of the old one, as a resume does it."""
    aside = folder / ".aside"
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    aside.replace(folder / "rounds.jsonl")


def append(folder, text):
    with open(folder / "rounds.jsonl", "a") as file:
        file.write(text)


def shown(renderable, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_every_line_is_read_once_and_only_when_it_is_whole(tmp_path):
    lines = records(4)
    folder = make_run(tmp_path / "run", {"run.num-rounds": 4}, lines[:1])
    follower = Follower(folder)
    assert follower.look().records == lines[:1]
    text = json.dumps(lines[1]) + "\n"
    append(folder, text[:20])
    assert follower.look() == ([], False)
    append(folder, text[20:] + json.dumps(lines[2]) + "\n")
    assert follower.look() == (lines[1:3], False)
    assert follower.look() == ([], False)
    assert follower.rounds == lines[:3]


def test_a_run_that_goes_on_from_its_checkpoint_takes_rounds_back(tmp_path):
    lines = records(9)
    folder = make_run(tmp_path / "run", {"run.num-rounds": 9}, lines[:6])
    follower = Follower(folder)
    follower.look()
    write(folder, lines[:4])
    assert follower.look() == ([], True)
    assert follower.rounds == lines[:4]
    append(folder, "".join(json.dumps(line) + "\n" for line in lines[4:]))
    assert follower.look() == (lines[4:], False)
    write(folder, lines)  # the same once more is no news
    assert follower.look() == ([], False)


def test_a_run_without_rounds_and_what_is_no_run(tmp_path):
    folder = make_run(tmp_path / "run", {}, [])
    (folder / "rounds.jsonl").unlink()
    watched = Watched(folder)
    assert not watched.look()
    assert watched.state == "unfinished"
    assert "0/100" in shown(run_view(watched, 100))
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=wrong.name):
            Follower(wrong)


@table("heart", [True, False])
def test_silence_is_said_and_the_end_is_seen(tmp_path, heart):
    now = [0.0]
    folder = make_run(tmp_path / "run", {"run.num-rounds": 5}, records(2))
    beats = Heart(folder, 2) if heart else None
    watched = Watched(folder, clock=lambda: now[0])
    watched.look()
    assert watched.state == ("running" if heart else "unfinished")
    append(folder, json.dumps(records(5)[2]) + "\n")
    watched.look()
    assert watched.state == "running"
    now[0] = QUIET_SECONDS + 1
    assert watched.state == f"no round for {QUIET_SECONDS + 1:.0f} s"
    append(folder, "".join(json.dumps(line) + "\n" for line in records(5)[3:]))
    watched.look()
    assert watched.state == "running"
    (folder / "final.safetensors").touch()
    if beats:
        beats.end("done")
    watched.look()
    assert watched.state == "done"
    assert watched.has_ended


@table("status", ["interrupted", "diverged", "failed"])
def test_what_ended_before_its_time_is_never_called_running(tmp_path, capsys, status):
    folder = make_run(tmp_path / "sweep/run", {"run.num-rounds": 5}, records(2))
    Heart(folder, 2).end(status, "for a reason")
    assert main.call(["watch", str(folder)]) == 0  # it ends by itself
    text = capsys.readouterr().out
    assert f"run: {status}" in text
    assert "for a reason" in text
    assert "running" not in text
    assert "s left" not in text
    assert main.call(["watch", str(tmp_path / "sweep")]) == 0
    text = capsys.readouterr().out
    assert f"0 of 1 runs done, 1 {status}" in text


def test_the_view_says_what_matters_at_any_width(tmp_path):
    folder = make_run(tmp_path / "run", {"run.num-rounds": 50}, records(40))
    beats = Heart(folder, 40)
    watched = Watched(folder)
    watched.look()
    beats.end("done")
    for width in (60, 100, 200):
        text = shown(run_view(watched, width), width)
        for word in ("40/50", "run: running", "accuracy", "best accuracy 98.8 %", "momentum average"):
            assert word in " ".join(text.replace("│", " ").split()), (width, text)
        assert any("\u2801" <= letter <= "\u28ff" for letter in text)
        assert max(map(len, text.splitlines())) <= width


@table("values, size", itertools.product([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0, 1.0, 0.0]], [(1, 1), (10, 3), (40, 7)]))
def test_a_curve_begins_and_ends_where_it_should(values, size):
    width, height = size
    lines = curve(range(len(values)), values, width, height)
    assert [len(line) for line in lines] == [width] * height
    dots = {(r, c) for r in range(height) for c in range(width) if lines[r][c] != "\u2800"}
    assert len({c for _, c in dots}) == width  # joined: no gap
    if values[0] != values[-1] and width > 1:
        rows = {0.0: height - 1, 1.0: 0}
        assert (rows[values[0]], 0) in dots
        assert (rows[values[-1]], width - 1) in dots


def test_lines_come_while_somebody_else_writes(tmp_path, capsys):
    lines = records(6)
    folder = make_run(tmp_path / "run", {"run.num-rounds": 6}, lines[:2])

    def go_on():
        time.sleep(0.5)
        append(folder, "".join(json.dumps(line) + "\n" for line in lines[2:]))
        (folder / "final.safetensors").touch()

    writer = threading.Thread(target=go_on)
    writer.start()
    watch(folder, Console(width=100))
    writer.join()
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" · ")[0] for line in said] == ["run: round 2/6", "run: round 6/6"]


def test_a_sweep_is_watched_run_by_run(tmp_path, capsys):
    for name, done in (("a", 3), ("b", 1)):
        make_run(tmp_path / "sweep" / name, {"run.num-rounds": 3}, records(done))
    (tmp_path / "sweep/a/final.safetensors").touch()
    assert main.call(["watch", str(tmp_path / "sweep"), "--once"]) == 0
    text = capsys.readouterr().out
    assert "3/3" in text
    assert "1/3" in text
    assert "1 of 2 runs done" in text


def test_a_run_that_knows_of_no_tracker_is_told_to_one(tmp_path):
    pytest.importorskip("tensorboard")
    folder = make_run(tmp_path / "run", {"run.num-rounds": 3}, records(3))
    (folder / "final.safetensors").touch()
    assert main.call(["watch", str(folder), "--once", "--track", "tensorboard"]) == 0
    assert list(folder.glob("events.out.tfevents.*"))


@table(
    "words, why",
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: is neither a run folder"),
        (["run", "--track", "tensorbord"], "did you mean tensorboard"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_run(Path("run"), {}, records(1))
    assert main.call(["watch", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
