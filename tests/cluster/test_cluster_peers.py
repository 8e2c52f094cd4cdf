"""Algorithm 2 on two machines: rows that travel once, and links that are lost."""

import json
import time

import numpy as np
import pytest
from test_cluster_faults import PEERS, Driver
from test_cluster_runs import SMALL as OF_RUNS
from test_cluster_runs import equal, run

from fedmom.records.history import read_rounds

pytestmark = pytest.mark.slow
OUTAGE = 10.0  # seconds without rows: longer than simulation.straggler-seconds of the test, shorter than Ray's patience
SMALL = {**OF_RUNS, "data.num-clients": 8, "algorithm.name": "d-sgd-m"}
FOUR = {"engine.workers": 4}


def settled(*changes):
    """Settings of a run."""
    sets = dict(SMALL)
    for more in changes:
        sets |= more
    return sets


@pytest.mark.xdist_group("cluster: runs")
def test_rows_travel_to_a_machine_once_whoever_needs_them_there(cluster, tmp_path):
    """A complete graph of four blocks, two on each machine."""
    rng, wide = np.random.default_rng(0), 15_000
    x, y = rng.normal(size=(84, wide)), np.arange(84) % 10
    np.savez(tmp_path / "wide.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    data = {"data.dataset": str(tmp_path / "wide.npz"), "data.partition": "iid", "model.name": "logistic"}
    often = {"data.batch-size": 1, "run.eval-every": 100, "run.checkpoint-every": 100}
    graph = settled(data, often, {"algorithm.topology": "complete", "run.num-rounds": 6})
    (peers, engine) = run(
        cluster,
        {"sets": {**graph, **FOUR}, "out": str(tmp_path / "peers")},
        {"sets": graph, "out": str(tmp_path / "engine")},
    )
    assert peers[0] == engine[0] == "done", (peers, engine)
    equal(tmp_path / "peers", tmp_path / "engine", "clients.safetensors")
    x_and_u = 2 * 8 * (wide * 10 + 10)
    each = (peers[2][4][1] - peers[2][0][1]) / 4 / x_and_u  # the last round is evaluated
    assert 4 <= each < 5, each  # the rows of four clients; once for each block there would be 8


@pytest.mark.xdist_group("cluster: runs")
def test_rows_that_do_not_arrive_are_links_to_skip_or_end_the_run_by_name(machines, tmp_path):
    """The port is closed by which Ray's stores send rows from machine to machine; calls get through."""
    for machine in machines.alive():
        machine.leave()
    other = machines.join(object_manager_port=8076)
    late = {**PEERS, "simulation.straggler-seconds": 6.0, "run.num-rounds": 1000000}
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
    skip.end()
    stop.failed(f" on {other.name} ")
    told = json.loads((stop.out / "status.json").read_text())["reason"]
    assert "did not arrive" in told
