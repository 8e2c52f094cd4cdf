"""Algorithm 2 on two machines: one machine's result, rows that travel once, and links and machines that are lost."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_cluster_faults import PEERS, Driver

from fedmom.records.files import FINAL, read_tensors
from fedmom.records.history import read_rounds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster: peers")]
OUTAGE = 6.0  # seconds without rows: longer than simulation.straggler-seconds of the test, shorter than Ray's patience
SMALL = {
    "model.name": "mlp",
    "model.hidden": 16,
    "data.num-clients": 8,
    "algorithm.name": "d-sgd-m",
    "algorithm.num-local-steps": 2,
    "run.num-rounds": 4,
    "run.dtype": "float64",
    "engine.path": "loop",
}
TIMED = {"wall_seconds", "client_steps_per_second"}
TWO, FOUR = {"engine.workers": 2}, {"engine.workers": 4}
RUNS = """
import json, sys
from pathlib import Path
import fedmom

class Wire(fedmom.Callback):
    wants_state = False

    def on_round(self, record, state):
        line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line)
        print(int(line.split(":")[1].split()[8]))

for given in json.load(sys.stdin):
    result = fedmom.run("quickstart" if "out" in given else None, **given, callbacks=[Wire()])
    assert result.status == "done", result.message
"""


def run(cluster, *runs):
    """fedmom.run with each of these arguments, by one process on the head; bytes it had sent after each round."""
    words = cluster.head.words(sys.executable, "-c", RUNS)
    env = cluster.head.environment()
    done = subprocess.run(words, input=json.dumps(runs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines() if line.isdigit()]


def settled(cluster, *changes):
    """Settings of a run on the cluster."""
    sets = {**SMALL, "simulation.ray-address": cluster.address}
    for more in changes:
        sets |= more
    return sets


def records(folder):
    return [{name: v for name, v in record.items() if name not in TIMED} for record in read_rounds(folder)]


def test_two_machines_come_to_the_engine_s_rows_and_one_of_them_goes_on_to_the_byte(cluster, tmp_path):
    graphs = ("ring", "one-peer-exponential", "complete")
    runs = []
    for graph in graphs:
        for name, workers in (("engine", {}), ("peers", TWO)):
            sets = settled(cluster, {"algorithm.topology": graph}, workers)
            runs.append({"sets": sets, "out": str(tmp_path / f"{graph}-{name}")})
    part = settled(cluster, {"algorithm.topology": "ring", "run.num-rounds": 2}, TWO)
    alone = {"simulation.ray-address": "", "simulation.num-cpus": 0.25, "run.num-rounds": 4}
    runs += [
        {"sets": part, "out": str(tmp_path / "part")},
        {"sets": alone, "resume": str(tmp_path / "part")},
    ]
    run(cluster, *runs)
    for graph in graphs:
        for file in (FINAL, "clients.safetensors"):
            ours, theirs = (read_tensors(tmp_path / f"{graph}-{name}" / file)[0] for name in ("peers", "engine"))
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-10 * torch.linalg.norm(theirs[name]), name
    for file in (FINAL, "clients.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "ring-peers" / file).read_bytes()
    assert records(tmp_path / "part") == records(tmp_path / "ring-peers")


def test_rows_travel_to_a_machine_once_whoever_needs_them_there(cluster, tmp_path):
    """A complete graph of four blocks, two on each machine."""
    rng, wide = np.random.default_rng(0), 30_000
    x, y = rng.normal(size=(84, wide)).astype(np.float32), np.arange(84) % 10
    np.savez(tmp_path / "wide.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    data = {"data.dataset": str(tmp_path / "wide.npz"), "data.partition": "iid", "model.name": "logistic"}
    often = {"data.batch-size": 1, "run.dtype": "float32", "run.eval-every": 100, "run.checkpoint-every": 100}
    graph = {"algorithm.topology": "complete", "run.num-rounds": 6}
    sent = run(cluster, {"sets": settled(cluster, data, often, FOUR, graph), "out": str(tmp_path / "run")})
    x_and_u = 2 * 4 * (wide * 10 + 10)
    each = (sent[4] - sent[0]) / 4 / x_and_u  # the last round is evaluated
    assert 4 <= each < 5, each  # the rows of four clients; once for each block there would be 8


def test_rows_that_do_not_arrive_are_links_to_skip_or_end_the_run_by_name(machines, tmp_path):
    """The port is closed by which Ray's stores send rows from machine to machine; calls get through."""
    for machine in machines.alive():
        machine.leave()
    other = machines.join("", "--object-manager-port=8076")
    late = {**PEERS, "simulation.straggler-seconds": 3.0, "run.num-rounds": 1000000}
    stop, skip = (
        Driver(machines, tmp_path / policy, {**late, "simulation.on-link-failure": policy})
        for policy in ("stop", "skip")
    )
    for driver in (stop, skip):
        driver.more_rounds()

    def skipped():
        return [record for record in read_rounds(skip.out) if "num_skipped_links" in record]

    while not skipped():  # a round may just be over when the port closes
        rule = ("rule", "add", "ipproto", "tcp", "dport", "8076", "blackhole")
        machines.head.call("ip", *rule)
        time.sleep(OUTAGE)
        machines.head.call("ip", "rule", "del", *rule[2:])
        skip.more_rounds(3)
    assert {record["num_skipped_links"] for record in skipped()} == {1}
    stop.failed(f" on {other.name} ")
    told = json.loads((stop.out / "status.json").read_text())["reason"]
    assert "did not arrive" in told
