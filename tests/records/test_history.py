"""What a run leaves in its folder: damage is found, and long runs are not held in memory."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

import fedmom
from fedmom.errors import InputError
from fedmom.records import history
from fedmom.records.files import CHECKPOINT, CLIENTS, RESULTS, ROUNDS, read_about, read_tensors, write_tensors
from fedmom.records.folder import RunFolder
from fedmom.records.history import ClientHistory, History, cut_back, read_clients, read_rounds, thinned
from fedmom.rounds.results import ClientResults
from laws import table

QUADRATIC = {
    "data.dataset": "quadratic",
    "algorithm.momentum-policy": "local",
    "run.num-rounds": 4,
    "engine.path": "loop",
    "engine.threads": 1,
}
QUIET = [fedmom.Callback()]


@table("name", [CHECKPOINT, CLIENTS])
def test_one_flipped_bit_anywhere_is_refused_in_one_line(tmp_path, name):
    fedmom.run({}, sets=QUADRATIC, out=tmp_path, callbacks=QUIET)
    whole = (tmp_path / name).read_bytes()
    for at in range(0, 8 * len(whole), 37):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << at % 8
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError) as error:
            read_tensors(tmp_path / name)
        assert "\n" not in str(error.value)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError):
        fedmom.run(resume=tmp_path, sets={"run.num-rounds": 5}, callbacks=QUIET)
    (tmp_path / name).write_bytes(whole)
    assert fedmom.run(resume=tmp_path, sets={"run.num-rounds": 5}, callbacks=QUIET).status == "done"


@table("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_checksum_is_of_every_kind_of_tensor(tmp_path, dtype):
    tensors = {"a": torch.ones(2, 3).to(dtype).T, "none": torch.ones(0, 3).to(dtype), "one": torch.ones(()).to(dtype)}
    write_tensors(tmp_path / CHECKPOINT, tensors, {"round": 1})
    found, about = read_tensors(tmp_path / CHECKPOINT)
    assert about == read_about(tmp_path / CHECKPOINT) == {"round": 1}
    assert b"crc32:" in (tmp_path / CHECKPOINT).read_bytes()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def write(folder, count):
    lines = [{"round": r, "test_loss": 1 / r, "wall_seconds": float(r)} for r in range(1, count + 1)]
    (folder / ROUNDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@table("most", [3, 100])
def test_rounds_are_a_sequence_wherever_they_are(tmp_path, monkeypatch, most):
    monkeypatch.setattr(history, "MOST_KEPT", most)
    lines = write(tmp_path, 9)
    found, count = cut_back(tmp_path, 7, ())
    rounds, lines = found.settled(), lines[:7]
    assert (count, isinstance(rounds, list)) == (9, most == 100)
    assert read_rounds(tmp_path) == lines
    assert len(rounds) == 7
    assert list(rounds) == lines
    assert rounds == lines
    assert rounds != lines[:6]
    assert [rounds[0], rounds[-1], rounds[3]] == [lines[0], lines[-1], lines[3]]
    assert rounds[2:5] == lines[2:5]
    assert rounds[::-2] == lines[::-2]
    assert list(reversed(rounds)) == lines[::-1]
    with pytest.raises(IndexError):
        rounds[7]


def test_a_long_runs_result_is_that_of_a_short_one(tmp_path, monkeypatch):
    short = fedmom.run({}, sets=QUADRATIC, out=tmp_path / "short", callbacks=QUIET)
    monkeypatch.setattr(history, "MOST_KEPT", 2)
    assert fedmom.run(resume=tmp_path / "short", callbacks=QUIET).rounds == short.rounds
    assert fedmom.run({}, sets=QUADRATIC, callbacks=QUIET).rounds[-1]["round"] == 4  # without a folder


def test_memory_does_not_grow_with_the_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_KEPT", 100)
    lines = write(tmp_path, 5000)
    tracemalloc.start()
    rounds, _ = cut_back(tmp_path, 5000, ())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3e5  # a list of them takes 2.5 MB
    some = thinned(rounds, 100)
    assert len(some) < 200
    assert (some[0], some[-1]) == (lines[0], lines[-1])


def test_records_that_were_added_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_KEPT", 3)
    rounds, lines = History(tmp_path), write(tmp_path, 8)
    for count, line in enumerate(lines, 1):
        write(tmp_path, count)
        rounds.append(line)
        assert list(rounds) == lines[:count]
        assert [rounds[place] for place in range(count)] == lines[:count]
    assert rounds.last == rounds[-1] == read_rounds(tmp_path)[-1]


def test_a_kill_at_any_byte_of_clients_jsonl_loses_nothing_that_a_checkpoint_covers(tmp_path):
    """Cut back to the last whole round and written on, the file is what it would have been; the first line too."""
    who = ClientHistory(np.array([3, 4]), np.array([0, 1]), None, [])
    results = [ClientResults(r, {"own_loss": np.array([np.nan, 1 / r])}) for r in (2, 4)]
    rounds = [{"round": r} | (results[r // 2 - 1].record() if r % 2 == 0 else {}) for r in range(1, 5)]
    file, folder = tmp_path / RESULTS, RunFolder(tmp_path)

    def write_on(first):
        for record in rounds[first:]:
            folder.append(record, next((one for one in results if one.round == record["round"]), None), who)
        return file.read_text(), (tmp_path / ROUNDS).read_text()

    whole = write_on(0)
    lines = whole[0].splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    for at in sorted({*range(0, len(whole[0]), 17), *(int(end) - back for end in ends for back in (0, 1, 2))}):
        done = (
            max(1, 2 * whole[0][:at].count("\n") - 1) if at < ends[-1] else 4
        )  # rounds before the one whose line was being written
        file.write_text(whole[0][:at])
        (tmp_path / ROUNDS).write_text("".join(whole[1].splitlines(keepends=True)[:done]))
        read = read_clients(tmp_path)
        assert (read is None) == (at < len(lines[0]) - 1)
        assert cut_back(tmp_path, done, ())[1] == done
        assert write_on(done) == whole, at
    for kept in ([0, 2], [0, 1]):
        (tmp_path / ROUNDS).write_text(whole[1])
        file.write_text("".join(lines[k] for k in kept) + "{\n")
        with pytest.raises(InputError, match=rf"clients\.jsonl: lacks round {6 - 2 * kept[1]}, "):
            cut_back(tmp_path, 4, {"test_loss"})
        assert len(file.read_text().splitlines()) == 3, "nothing is thrown away"
        assert (tmp_path / ROUNDS).read_text() == whole[1]


def test_what_is_missing_or_broken_before_the_end_is_named(tmp_path):
    """Only the last line may be half a line: a kill cuts it short."""
    lines = [json.dumps(line) + "\n" for line in write(tmp_path, 5)]
    (tmp_path / ROUNDS).write_text("".join(lines) + lines[0][:9])
    assert len(read_rounds(tmp_path)) == 5
    (tmp_path / ROUNDS).write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(InputError, match="lacks rounds before the checkpoint's, 5"):
        cut_back(tmp_path, 5, ())
    (tmp_path / ROUNDS).write_text("".join(lines[:2]) + lines[2][:9] + "\n" + "".join(lines[3:]))
    with pytest.raises(InputError, match=":3: is not a round's record"):
        read_rounds(tmp_path)


def test_thinning_keeps_the_best_round_and_the_ends():
    lines = [{"round": r, "test_loss": 1.0, "test_accuracy": 0.9 if r == 778 else 0.5} for r in range(1, 2001)]
    kept = [record["round"] for record in thinned(lines, 20)]
    assert kept == sorted(kept)
    assert {1, 778, 2000} <= set(kept)
    assert len(kept) < 50
