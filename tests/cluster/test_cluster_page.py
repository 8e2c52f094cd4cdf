"""What docs/cluster.md says to type works as written, on two machines; so does the Slurm script, as a job.

Only the addresses are those of the machines here. Slurm itself is stood in for.
"""

import json
import re
import tempfile
import time
from pathlib import Path

import pytest
from machines import ROOT, Network, missing
from slurm_jobs import Slurm

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "cluster.md"
SCRIPT = ROOT / "examples" / "cluster" / "slurm.sh"


def blocks_by_hand():
    """[(address, commands)] of the section, in order; each of its blocks says on which machine it is typed."""
    section = re.search(r"^## By hand\n(.*?)^## ", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE).group(1)
    found = re.findall(r'^```sh title="on (\S+)"\n(.*?)^```$', section, re.DOTALL | re.MULTILINE)
    assert len(found) == section.count("```") // 2 > 3
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two machines without anything that runs on them, which know one another by name."""
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("pair")
    with Network(folder) as network:
        machines = [network.machine(), network.machine()]
        # As on Debian a machine's own name means its loopback too. node-3 has a name, and nothing else.
        lines = [f"{machine.address} {machine.name}" for machine in machines]
        lines += [f"{network.subnet}.3 node-3", "127.0.0.1 localhost"]
        for machine in machines:
            (machine.srv / "hosts").write_text("\n".join([f"127.0.1.1 {machine.name}", *lines, ""]))
            machine.call("mount", "--bind", "/srv/hosts", "/etc/hosts")
        yield machines


def processes_of_ray(machines):
    """Of those machines that are alive, the lines of ps."""
    said = "".join(machine.call("ps", "-eo", "stat,args") for machine in machines)
    return [line for line in said.splitlines() if "ray" in line]


def until_rounds(least, folder, job):
    """Waits for so many rounds of a run; fails if the job ends before."""
    while len(rounds(folder)) < least:
        assert job.process.poll() is None, job.output.read_text()
        time.sleep(0.05)


def until_gone(machines):
    """Ray's processes end a moment after what they watch; a test's own limit ends this where they do not."""
    while processes_of_ray(machines):
        time.sleep(0.2)


def rounds(folder):
    path = folder / "rounds.jsonl"
    return [json.loads(line)["round"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.xdist_group("cluster: page")
def test_every_command_by_hand_works_as_written(pair):
    here = dict(zip(("10.0.0.1", "10.0.0.2"), pair, strict=True))
    said = list[str]()
    for address, commands in blocks_by_hand():
        for written, machine in here.items():
            commands = commands.replace(written, machine.address)
        said.append(here[address].call("bash", "-ec", commands))
    assert any("2 Ray actors" in text for text in said)
    first, second = pair
    assert rounds(first.srv / "project/runs/cluster") == list(range(1, 6))
    assert not (second.srv / "project/runs").exists()
    assert not processes_of_ray(pair)


@pytest.fixture
def slurm(pair):
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # tmp_path is too long for a socket's
        made = Slurm(pair, Path(folder))
        yield made
        made.close()


@pytest.mark.xdist_group("cluster: page")
def test_a_job_stops_at_a_checkpoint_and_goes_on_when_it_is_requeued(pair, slurm, tmp_path):
    """Slurm's signal before the time limit requeues it; a preemption's does not, as Slurm then does so itself."""
    config = """
        model = {name = "mlp", hidden = 16}
        algorithm = {num-local-steps = 2}
        data = {num-clients = 4}
        run = {num-rounds = 1_000_000}
    """
    (tmp_path / "mine.toml").write_text(config)
    run = tmp_path / "runs" / "slurm-7"
    done = list[int]()
    for signal in ("USR1", "TERM"):
        job = slurm.job(
            7, "node-[1-2]", SCRIPT, "fedmom", "run", "mine.toml", "--set", "engine.workers=2", cwd=tmp_path
        )
        until_rounds(len(done) + 3, run, job)
        job.signal(signal)
        status, said = job.end()
        assert status == 130, said
        assert "fedmom: go on with: fedmom run --resume runs/slurm-7" in said
        assert slurm.requeued() == ["7"]
        done = rounds(run)
        assert done == list(range(1, len(done) + 1))
        until_gone(pair)


@pytest.mark.xdist_group("cluster: page")
def test_a_job_without_one_of_its_nodes_ends_and_says_so(pair, slurm, tmp_path):
    status, said = slurm.job(8, "node-[1-3]", SCRIPT, "fedmom", "run", "quickstart", cwd=tmp_path).end()
    assert status == 4, said
    assert "srun: error: node-3 does not respond" in said
    assert "Ray did not come up on every one of node-1 node-2 node-3" in said
    assert not list(tmp_path.iterdir())
    until_gone(pair)
