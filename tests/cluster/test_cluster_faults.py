"""What becomes of a run when a part of its cluster dies in mid-round, or cannot be reached any more.

A model of the user's stays in the middle of a round on one machine until that machine is killed.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from machines import ROOT, Cluster, missing
from test_cluster_runs import equal

import fedmom
from fedmom.records.files import FINAL
from fedmom.records.history import read_rounds

pytestmark = pytest.mark.slow
OUTAGE = 8.0  # seconds that a cable is out: Ray gives a machine up after some 20, a run its head after 30
TIMED = {"wall_seconds", "client_steps_per_second"}
SMALL = {
    "model.name": "held_model:model",
    "data.num-clients": 6,
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 8,
    "run.checkpoint-every": 2,
    "run.dtype": "float64",
    "engine.path": "loop",
    "simulation.num-cpus": 1,
}
ENDLESS = {"run.num-rounds": 1000000, "run.eval-every": 1000, "simulation.num-cpus": 0.25}
WORKERS = {"engine.workers": 2, "engine.chunk-size": 3}  # one block for each
PEERS = {"engine.workers": 2, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}
SIMULATION = {"simulation.num-actors": 2, "simulation.retries": 0, "simulation.clients-per-node": 3}
MODEL = """
import math, socket, time
from pathlib import Path
from torch import nn

FOLDER = Path(__file__).parent


class Held(nn.Sequential):
    def forward(self, x):
        if (FOLDER / "slow").exists():
            time.sleep(0.1)
        rounds = FOLDER / "run" / "rounds.jsonl"
        if list(FOLDER.glob("hold-*")) and rounds.exists() and len(rounds.read_text().splitlines()) > 1:
            here = (FOLDER / f"hold-{socket.gethostname()}").exists()
            if here:
                (FOLDER / "held").touch()
            while here or not (FOLDER / "held").exists():  # the other machine's actor may not be up yet
                time.sleep(0.05)
        return super().forward(x)


def model(shape, num_classes):
    return Held(nn.Flatten(), nn.Linear(math.prod(shape), num_classes))
"""


class Driver:
    """One `fedmom run` on a machine of the cluster, and what it has written so far."""

    def __init__(self, cluster, folder: Path, changes, *more: str, on=None, held=None) -> None:
        """held: the machine on which a round will be held."""
        self.folder, self.out, self.log = folder, folder / "run", folder / "log"
        self.cluster, self.on = cluster, on or cluster.head
        folder.mkdir()
        (folder / "held_model.py").write_text(MODEL)
        if held is not None:
            (folder / f"hold-{held.name}").touch()
        if changes.get("run.num-rounds") == ENDLESS["run.num-rounds"]:
            (folder / "slow").touch()  # others have the cores meanwhile
        sets = {**SMALL, **changes, "simulation.ray-address": cluster.address}
        words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
        self._start("quickstart", "--out", str(self.out), *words, *more)

    def _start(self, *words: str) -> None:
        path = f"{self.folder}:{ROOT}"
        self.process = self.on.start("fedmom", "run", *words, output=self.log, PYTHONPATH=path)

    def rounds(self) -> int:
        path = self.out / "rounds.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, happened, what: str) -> None:
        while not happened():
            assert self.process.poll() is None, f"it ended before {what}: {self.log.read_text()}"
            time.sleep(0.2)

    def more_rounds(self, count: int = 2) -> None:
        """Until it has done some more."""
        wanted = self.rounds() + count
        self.wait_for(lambda: self.rounds() >= wanted, f"round {wanted}")

    def ended(self, status: int) -> str:
        """What it said, after it has ended with that status."""
        assert self.process.wait() == status, self.log.read_text()
        return self.log.read_text()

    def failed(self, why: str) -> None:
        """It has ended with status 4 and one line of its round, which the folder tells too; and says how to go on."""
        lines = self.ended(4).splitlines()
        told = json.loads((self.out / "status.json").read_text())
        assert told["status"] == "failed"
        assert why in told["reason"], told
        assert lines[-2:] == [
            f"fedmom: {told['reason']}",
            f"fedmom: go on with: fedmom run --resume {self.out}",
        ]
        # The round that it was in, or the one whose rows were to be brought for a checkpoint.
        assert told["reason"].partition(":")[0] in [f"round {self.rounds() + more}" for more in (0, 1)]

    def resume(self, *more: str) -> None:
        """Go on with it."""
        self._start("--resume", str(self.out), *more)

    def end(self) -> None:
        """Ask it to end, as a batch system does."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        self.ended(130)

    def result(self) -> tuple[bytes, list]:
        """The final model's bytes, and the records of all rounds but for times."""
        records = [{k: v for k, v in record.items() if k not in TIMED} for record in read_rounds(self.out)]
        return (self.out / FINAL).read_bytes(), records


@pytest.mark.xdist_group("cluster: faults")
def test_a_head_away_for_a_while_ends_nothing_and_a_lost_one_every_run(tmp_path):
    """The cable of the head, for drivers elsewhere; its daemon, for one that runs there."""
    if why := missing():
        pytest.skip(why)
    with Cluster(tmp_path / "machines") as cluster:
        other = cluster.join()
        alone = {"engine.workers": 1}
        there = [
            Driver(cluster, tmp_path / "peers", {**ENDLESS, **PEERS}, on=other),
            Driver(
                cluster,
                tmp_path / "simulation",
                {**ENDLESS, "simulation.num-actors": 1},
                "--backend",
                "simulation",
                on=other,
            ),
        ]
        here = Driver(cluster, tmp_path / "here", {**ENDLESS, **alone})
        for driver in (*there, here):
            driver.more_rounds()
        cluster.head.pull_cable()
        time.sleep(OUTAGE)
        cluster.head.plug_in()
        for driver in (*there, here):
            driver.more_rounds()
        cluster.head.pull_cable()
        cluster.head.call("pkill", "-9", "gcs_server")
        here.failed("Ray's head (its GCS) has ended")
        for driver in there:
            driver.failed(f"Ray's head at {cluster.address} has not answered for 30 s")


@pytest.mark.xdist_group("cluster: faults")
def test_a_node_killed_in_mid_round_is_met_as_every_backend_and_policy_says(cluster, tmp_path, monkeypatch):
    """What goes on, and what stops and goes on with what is left, come to what this machine alone comes to."""
    (other,) = cluster.alive()

    def driver(name, *changes, backend="engine"):
        settings = {"simulation.num-cpus": 0.25}
        for more in changes:
            settings |= more
        return Driver(cluster, tmp_path / name, settings, "--backend", backend, held=other)

    strict = driver("strict", WORKERS, {"simulation.retries": 0})
    patient = driver("patient", WORKERS, {"simulation.retries": 2})
    stop, retry, proceed = (
        driver(policy, SIMULATION, {"server.on-failure": policy}, backend="simulation")
        for policy in ("stop", "retry", "proceed")
    )
    peers = driver("peers", PEERS, {"simulation.on-link-failure": "skip"})
    for held in (strict, patient, stop, retry, proceed, peers):
        held.wait_for((held.folder / "held").exists, f"a round on {other.name}")
    other.halt()
    for failed in (strict, stop):
        failed.failed("died once")
    peers.failed(f" on {other.name}: their Ray actor died")
    strict.resume("--set", "engine.workers=1")
    for goes_on in (patient, retry, proceed, strict):
        goes_on.ended(0)
    assert strict.result() == patient.result()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "held_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(alone)
    fedmom.run("quickstart", sets=SMALL, out=alone / "run")
    for goes_on in (patient, retry):
        equal(goes_on.out, alone / "run")
    assert len(proceed.result()[1]) == SMALL["run.num-rounds"]
    assert sum(record.get("num_failed", 0) for record in read_rounds(proceed.out)) > 0
