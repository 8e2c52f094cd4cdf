"""Temporary folders of processes, and where Ray's own are."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from fedmom.actors import cluster
from fedmom.errors import InputError
from fedmom.machine.scratch import ScratchFolder

HOLDER = """
import time
from fedmom.machine.scratch import ScratchFolder
print(ScratchFolder().path, flush=True)
time.sleep(60)
"""


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "fedmom-of-somebody").mkdir()
    own = ScratchFolder()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment)
    other = holder.stdout.readline().strip()
    assert {path.name for path in tmp_path.iterdir()} == {"fedmom-of-somebody", own.path.name, os.path.basename(other)}
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    third = ScratchFolder()
    assert not os.path.exists(other)
    assert own.path.is_dir()
    for folder in (own, third, third):
        folder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["fedmom-of-somebody"]


def test_a_long_tmpdir_gives_way_to_a_short_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(cluster, "_SHORT_FOLDERS", (str(tmp_path),))
    for short in ("/tmp", "/" + "x" * 36):
        monkeypatch.setenv("TMPDIR", short)
        assert cluster.ray_folder() is None
    for name in ("TMPDIR", "RAY_TMPDIR"):  # Ray looks at the second first
        monkeypatch.setenv(name, "/" + "x" * 100)
        assert cluster.ray_folder() == str(tmp_path / f"ray-{os.getuid()}")
    monkeypatch.setattr(cluster, "_SHORT_FOLDERS", ())
    with pytest.raises(InputError, match=r"RAY_TMPDIR = '/x+': .*set RAY_TMPDIR to a folder whose path has at most 37"):
        cluster.ray_folder()
