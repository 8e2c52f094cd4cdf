"""A sweep over a cluster: a run per node, and what becomes of it where a machine or the sweep itself is ended."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from fedmom.cli.main import call
from fedmom.machine.cores import usable_cores
from fedmom.records.files import FINAL, MANIFEST, read_tensors
from fedmom.records.history import read_rounds
from fedmom.records.status import read_status

pytestmark = pytest.mark.slow
ROUNDS = 300
# Two take the threads of the node that begins them, which are part of a run's identity.
RUNS = """
[[run]]
algorithm.lr = 0.05
[[run]]
algorithm.lr = 0.1
[[run]]
algorithm.lr = 0.2
engine.threads = 1
[[run]]
algorithm.lr = 0.25
engine.threads = 1
"""
SWEEP = (
    f"fedmom sweep quadratic --list runs.toml --set run.num-rounds={ROUNDS} --set engine.path=loop "
    "--set run.checkpoint-every=1 --set algorithm.correction=held:correction"
)
# While there is a file of that name, a run takes six minutes.
HELD = """
import os
import time

def correction(gradient, params, start):
    if os.path.exists("hold"):
        time.sleep(0.3)
    return gradient
"""


@pytest.fixture
def project(tmp_path):
    """A folder that all machines see, with a module of the user's own."""
    return filled(tmp_path)


def filled(folder):
    folder.mkdir(exist_ok=True)
    (folder / "held.py").write_text(HELD)
    (folder / "runs.toml").write_text(RUNS)
    return folder


def running(out):
    """{host: folder} of the runs that have trained for some rounds and are at work now."""
    folders = [path.parent for path in out.glob("*/status.json")]
    found = {folder: json.loads((folder / "status.json").read_text()) for folder in folders}
    return {
        one["host"]: folder
        for folder, one in found.items()
        if one["status"] == "running" and len(read_rounds(folder)) >= 2
    }


def only_child(pid):
    """The command itself, of which nsenter is the parent."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def wait_for(process, output, happened):
    while not happened():
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)


@pytest.mark.xdist_group("cluster: page")
def test_a_sweep_runs_a_cell_on_every_node_and_loses_none_by_a_signal_nor_with_a_machine(
    machines, project, monkeypatch, capsys
):
    """Asked to end, called again, and one machine killed: what comes of it is what this machine alone comes to."""
    for machine in machines.alive():
        machine.leave()
    pinned = machines.join(cores="0")
    names = {machines.head.name, pinned.name}
    out, output, hold = project / "out", project / "output", project / "hold"
    command = f"cd {project} && exec {SWEEP} --ray {machines.address} --out {out}"
    hold.touch()
    process = machines.head.start("sh", "-c", command, output=output)
    wait_for(process, output, lambda: set(running(out)) == names)
    begun = running(out)
    os.kill(only_child(process.pid), signal.SIGINT)
    assert process.wait() == 130, output.read_text()
    assert output.read_text().rstrip().endswith(f"the same command goes on from {out}")
    assert [read_status(path.parent).status for path in out.glob("*/config.toml")] == ["interrupted"] * 2
    assert not list(out.glob(".sweep*"))
    for host, folder in begun.items():
        own = 1 if host == pinned.name or "threads=1" in folder.name else usable_cores()
        assert f"threads = {own}\n" in (folder / "config.toml").read_text()

    process = machines.head.start("sh", "-c", command, output=output)
    wait_for(process, output, lambda: set(running(out)) == names)
    lost = running(out)[pinned.name]
    before = read_rounds(lost)[:2]
    pinned.kill()
    hold.unlink()
    assert process.wait() == 0, output.read_text()
    assert f"{lost.name}: done on {read_status(lost).host} in " in output.read_text()
    assert read_status(lost).host == machines.head.name
    assert read_rounds(lost)[:2] == before  # with the seconds that they took there

    alone = project / "alone"
    monkeypatch.chdir(project)
    assert call([*shlex.split(SWEEP)[1:], "--out", str(alone)]) == 0
    same_results(out, alone)
    assert table(output.read_text()) == table(capsys.readouterr().out)


def same_results(ours, theirs):
    assert {one["status"] for one in json.loads((ours / MANIFEST).read_text()).values()} == {"done"}
    folders = [path.parent.name for path in theirs.glob("*/config.toml")]
    assert len(folders) == 4
    for name in folders:
        assert [one["round"] for one in read_rounds(ours / name)] == [*range(1, ROUNDS + 1)]
        (ended, _), (other, _) = (read_tensors(folder / name / FINAL) for folder in (ours, theirs))
        assert {key: value.tolist() for key, value in ended.items()} == {k: v.tolist() for k, v in other.items()}
        if "threads=1" in name:
            assert (ours / name / FINAL).read_bytes() == (theirs / name / FINAL).read_bytes()


def table(text):
    """The ranking that a sweep ends with."""
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if "rank" in line)
    return lines[begin : lines.index("", begin)]


@pytest.mark.xdist_group("cluster: faults")
def test_a_disk_that_only_one_machine_sees_is_refused_before_any_run(cluster, project):
    other = cluster.alive()[0]
    filled(cluster.head.srv / "own")

    def refused(folder, out, why):
        command = f"cd {folder} && {SWEEP} --ray {cluster.address} --out {out}"
        said = cluster.head.call("sh", "-c", command, status=2)
        assert said.startswith(f"fedmom: {other.name} ({other.address}): {why}")
        assert len(said.splitlines()) == 1

    refused(project, "/srv/out", "does not see the sweep's folder /srv/out; name an --out on a disk that all machines")
    refused("/srv/own", project / "out", "has no folder /srv/own; start the sweep in a folder on a disk")
    (filled(other.srv / "own") / "held.py").write_text(f"{HELD}# of last week\n")
    refused("/srv/own", project / "out", "has another /srv/own/held.py; keep it on a disk")
    assert not [*(cluster.head.srv / "out").glob("*/"), *(project / "out").glob("*/")]
