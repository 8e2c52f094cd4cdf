"""Files of what was measured: whole, bounded, shared by processes, and done without where they cannot be had."""

import json
import threading
from pathlib import Path

from fedmom.machine import cache
from fedmom.machine.cache import Kept, folder
from laws import table


@table(
    "environment, right",
    [
        ({"FEDMOM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"FEDMOM_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, None),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/fedmom"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/fedmom"),
        ({"HOME": "/c"}, "/c/.cache/fedmom"),
    ],
)
def test_the_folder_is_the_users_cache(environment, right, monkeypatch):
    for name in ("FEDMOM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert folder() == (right and Path(right))


def test_tests_keep_nothing_in_the_users_folder():
    assert folder() is None


def test_without_a_home_there_is_none(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDMOM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", no_home)
    assert folder() is None


def test_what_was_put_is_read_and_the_oldest_go(tmp_path):
    kept = Kept(tmp_path / "new" / "file.json", int, most=3)
    for number, name in enumerate("abcad"):
        assert kept.put(name, number)
    assert list(kept.read().items()) == [("c", 2), ("a", 3), ("d", 4)]
    assert [path.name for path in kept.path.parent.iterdir()] == ["file.json"]


DAMAGED = ["", "{", "[]", "1", "\x00", "[" * 100_000, '{"b": "x"}', '{"b": {}}', '{"b": 1e999}']


@table("text", DAMAGED)
def test_what_is_damaged_or_somebody_elses_is_left_out(text, tmp_path):
    kept = Kept(tmp_path / "file.json", int, most=3)
    kept.path.write_text(text)
    assert kept.read() == {}
    assert kept.put("a", 1)
    assert kept.read() == {"a": 1}
    kept.path.write_bytes(b"\xff")
    assert kept.read() == {}


def test_what_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", None):
        kept = Kept(path, int, most=3)
        assert not kept.put("a", 1)
        assert kept.read() == {}
    (tmp_path / "folder.json").mkdir()
    assert not Kept(tmp_path / "folder.json", int, most=3).put("a", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


def test_many_writers_at_once_lose_nothing(tmp_path):
    """Each has a file and a lock of its own, as processes have."""
    path, begin = tmp_path / "file.json", threading.Barrier(4)

    def write(who):
        begin.wait()
        for number in range(20):
            assert Kept(path, int, most=100).put(f"{who}.{number}", number)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) == {f"{who}.{number}": number for who in range(4) for number in range(20)}


def test_a_writer_that_was_stopped_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.05)
    with cache._alone(tmp_path):
        assert Kept(tmp_path / "file.json", int, most=3).put("a", 1)
