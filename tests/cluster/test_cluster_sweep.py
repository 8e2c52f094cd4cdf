"""A sweep over a cluster: a run per node, and what becomes of it where a machine or the sweep itself is ended."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fedmom.machine.cores import usable_cores
from fedmom.records.files import FINAL, MANIFEST
from fedmom.records.history import read_rounds
from fedmom.records.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]
ROUNDS = 300
GRID = [
    *("sweep", "quadratic", "--grid", "algorithm.lr=0.05,0.1,0.2,0.25", "--set", f"run.num-rounds={ROUNDS}"),
    *("--set", "algorithm.correction=held:correction", "--set", "run.checkpoint-every=2"),
]
# While there is a file of that name, a run takes two minutes.
HELD = """
import os
import time

def correction(gradient, params, start):
    if os.path.exists("hold"):
        time.sleep(0.1)
    return gradient
"""


@pytest.fixture
def project(tmp_path):
    """A folder that all machines see, with a module of the user's own."""
    (tmp_path / "held.py").write_text(HELD)
    return tmp_path


def running(out):
    """{host: folder} of the runs that have trained for some rounds and are at work now."""
    folders = [path.parent for path in out.glob("*/status.json")]
    found = {folder: json.loads((folder / "status.json").read_text()) for folder in folders}
    return {
        one["host"]: folder
        for folder, one in found.items()
        if one["status"] == "running" and len(read_rounds(folder)) >= 4
    }


def only_child(pid):
    """The command itself, of which nsenter is the parent."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def wait_for(process, output, happened):
    while not happened():
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)


def test_a_sweep_runs_a_cell_on_every_node_and_loses_neither_by_a_signal_nor_with_a_machine(cluster, project):
    """Asked to end, called again, and one machine killed: what comes of it is what this machine alone comes to."""
    pinned = cluster.join(cores="0")
    names = {cluster.head.name, *(machine.name for machine in cluster.alive())}
    out, output, hold = project / "out", project / "output", project / "hold"
    command = f"cd {project} && exec fedmom {' '.join(GRID)} --ray {cluster.address} --out {out}"
    hold.touch()
    process = cluster.head.start("sh", "-c", command, output=output)
    wait_for(process, output, lambda: set(running(out)) == names)
    threads = {host: (folder / "config.toml").read_text() for host, folder in running(out).items()}
    for host, text in threads.items():
        assert f"threads = {1 if host == pinned.name else usable_cores()}\n" in text
    os.kill(only_child(process.pid), signal.SIGINT)
    assert process.wait() == 130, output.read_text()
    assert output.read_text().rstrip().endswith(f"the same command goes on from {out}")
    assert [read_status(path.parent).status for path in out.glob("*/config.toml")] == ["interrupted"] * 3
    assert not list(out.glob(".sweep*"))

    process = cluster.head.start("sh", "-c", command, output=output)
    wait_for(process, output, lambda: set(running(out)) == names)
    lost = running(out)[pinned.name]
    pinned.kill()
    hold.unlink()
    assert process.wait() == 0, output.read_text()
    assert read_status(lost).host in names - {pinned.name}
    assert f"{lost.name}: done on node-" in output.read_text()

    alone = project / "alone"
    here = cluster.head.call("sh", "-c", f"cd {project} && fedmom {' '.join(GRID)} --workers 2 --out {alone}")
    for folder in alone.glob("*/"):
        assert [one["round"] for one in read_rounds(out / folder.name)] == [*range(1, ROUNDS + 1)]
        assert (folder / FINAL).read_bytes() == (out / folder.name / FINAL).read_bytes()
    assert {one["status"] for one in json.loads((out / MANIFEST).read_text()).values()} == {"done"}
    assert table(output.read_text()) == table(here)


def table(text):
    """The ranking that a sweep ends with: without what stands above it, and the folder's name."""
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if "rank" in line)
    return [line for line in lines[begin:] if "fedmom" not in line]


def test_a_disk_that_only_one_machine_sees_is_refused_before_any_run(cluster, project):
    other = cluster.alive()[0]
    own = cluster.head.srv / "own"
    own.mkdir()
    (own / "held.py").write_text(HELD)

    def refused(folder, out):
        words = f"cd {folder} && fedmom {' '.join(GRID)} --ray {cluster.address} --out {out}"
        said = cluster.head.call("sh", "-c", words, status=2)
        assert f"{other.name} ({other.address})" in said
        assert len(said.splitlines()) == 1
        return said

    assert "does not see the sweep's folder /srv/out; name an --out on a disk that all machines" in refused(
        project, "/srv/out"
    )
    assert not list((cluster.head.srv / "out").glob("*/"))
    assert "has no folder /srv/own; start the sweep in a folder on a disk" in refused("/srv/own", project / "out")
    assert not list((project / "out").glob("*/"))
    (other.srv / "own").mkdir()
    (other.srv / "own" / "held.py").write_text(f"{HELD}# of last week\n")
    assert "has another /srv/own/held.py" in refused("/srv/own", project / "out")
