"""Runs on two machines come to what one machine comes to; what is not the same on both is refused by name."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmom.records.files import FINAL, read_tensors
from fedmom.records.history import read_rounds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster: runs")]
DRIVER = Path(__file__).with_name("drive.py")
SMALL = {
    "data.dataset": "digits",
    "data.num-clients": 10,
    "data.batch-size": 8,
    "model.name": "mlp",
    "model.hidden": 16,
    "algorithm.num-local-steps": 2,
    "algorithm.lr": 0.05,
    "run.num-rounds": 4,
    "run.dtype": "float64",
    "engine.path": "loop",
    "simulation.num-cpus": 0.5,
}


def run(cluster, *runs, on=None):
    """[status, message] of each of fedmom.run's arguments, by one driver on the head."""
    where = {"simulation.ray-address": cluster.address}
    lines = []
    for given in runs:
        new = {} if "resume" in given else {"config": {}}
        lines.append(json.dumps({**new, **given, "sets": {**SMALL, **where, **given.get("sets", {})}}))
    machine = on or cluster.head
    done = subprocess.run(
        machine.words(sys.executable, str(DRIVER)),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=machine.environment(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def equal(first, second):
    ours, theirs = (read_tensors(folder / FINAL)[0] for folder in (first, second))
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-10 * torch.linalg.norm(theirs[name]), name


def same(first, second):
    """To the byte, but for times."""
    assert (first / FINAL).read_bytes() == (second / FINAL).read_bytes()
    ours, theirs = (
        [{name: v for name, v in record.items() if "second" not in name} for record in read_rounds(folder)]
        for folder in (first, second)
    )
    assert ours == theirs


WORKERS, LOCAL = {"engine.workers": 2}, {"simulation.ray-address": ""}
SIMULATION = {"run.backend": "simulation", "simulation.num-actors": 2}


def test_two_machines_come_to_what_one_comes_to_and_go_on_with_its_run(cluster, tmp_path):
    """Unequal weights and an odd number of blocks, so that the sums of the nodes are not alike."""
    samples = {"algorithm.client-weights": "samples", "algorithm.cohort-size": 7}
    two = {"run.num-rounds": 2}
    done = run(
        cluster,
        {"sets": samples, "out": str(tmp_path / "engine")},
        {"sets": {**samples, **WORKERS}, "out": str(tmp_path / "two")},
        {"sets": {**samples, **WORKERS, **two, **LOCAL}, "out": str(tmp_path / "begun-on-one")},
        {"sets": {"run.num-rounds": 4}, "resume": str(tmp_path / "begun-on-one")},
        {"sets": {**samples, **SIMULATION}, "out": str(tmp_path / "simulation")},
    )
    assert [status for status, _ in done] == ["done"] * 5, done
    equal(tmp_path / "two", tmp_path / "engine")
    equal(tmp_path / "simulation", tmp_path / "engine")
    same(tmp_path / "begun-on-one", tmp_path / "two")


def test_what_travels_is_a_few_times_the_model_for_a_node_and_not_for_a_client(cluster, tmp_path):
    """100 clients on two machines. The rounds alone: a run of two of them is taken off one of ten."""
    (other,) = cluster.alive()
    size = {"model.name": "logistic", "data.dataset": str(tmp_path / "wide.npz"), "data.num-clients": 100}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(220, 20_000)).astype(np.float32), np.arange(220) % 10
    np.savez(tmp_path / "wide.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    state = 2 * 4 * (20_000 * 10 + 10)  # x and u in float32
    settings = {**size, **WORKERS, "run.dtype": "float32", "algorithm.num-local-steps": 1, "data.batch-size": 1}
    settings |= {"run.eval-every": 100, "data.partition": "iid"}
    taken = []
    for rounds in (2, 10):
        before = other.wire_bytes()
        (done,) = run(cluster, {"sets": {**settings, "run.num-rounds": rounds}, "out": str(tmp_path / f"{rounds}")})
        assert done[0] == "done", done
        taken.append([after - at for at, after in zip(before, other.wire_bytes(), strict=True)])
    received, sent = ((long - short) / 8 / state for short, long in zip(*taken, strict=True))
    # The start once, in float32; of four blocks on either node the sum of x and u, in float64, where they would be four
    # themselves. Once in a while the last one goes to the node that is idle.
    assert 0.9 < received < 1.5, (received, sent)
    assert 0.9 < sent < 3.5, (received, sent)


def test_what_only_this_machine_has_is_refused_by_name(cluster, tmp_path):
    """Data, and a folder of data of another content; for every backend that uses the cluster."""
    (other,) = cluster.alive()
    here, there = (machine.srv / "data.npz" for machine in (cluster.head, other))
    shutil.copy(Path(__file__).parents[1] / "stored" / "tiny.npz", here)
    data = {"data.dataset": "/srv/data.npz", "data.num-clients": 4}
    gossip = {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring", **WORKERS}
    ((status, message),) = run(cluster, {"sets": {**data, **WORKERS}})
    assert status == "refused"
    assert "/srv/data.npz" in message
    assert f"(on {other.name} " in message
    assert "\n" not in message
    with np.load(here) as arrays:
        np.savez(there, **{name: array[::-1] for name, array in arrays.items()})
    for status, message in run(cluster, {"sets": {**data, **gossip}}, {"sets": {**data, "run.backend": "simulation"}}):
        assert status == "refused"
        assert message.startswith("data.dataset = '/srv/data.npz': "), message
        assert other.name in message


def test_another_version_on_a_node_is_refused_by_name(cluster):
    (other,) = cluster.alive()
    about = Path(str(metadata.distribution("safetensors")._path)) / "METADATA"
    now = metadata.version("safetensors")
    changed = other.srv / "METADATA"
    changed.write_text(about.read_text().replace(f"\nVersion: {now}\n", "\nVersion: 0.0.1\n"))
    other.call("mount", "--bind", str(changed), str(about))
    try:
        said = cluster.fedmom(
            "run", "quickstart", "--set", "engine.workers=2", "--set", f"simulation.ray-address={cluster.address}",
            status=2,
        )  # fmt: skip
    finally:
        other.call("umount", str(about))
    (line,) = [line for line in said.splitlines() if "0.0.1" in line]
    assert line.startswith(f"fedmom: {other.name} ")
    assert f"safetensors 0.0.1 (here: {now})" in line
    assert "round 1" not in said


def test_workers_are_spread_by_the_cores_that_a_node_may_use_and_a_node_that_joins_late_gets_some(cluster, tmp_path):
    """Three workers, where the head has two cores and the other machine one."""
    for machine in cluster.alive():
        machine.leave()
    narrow = cluster.join(cores="0")
    script = [sys.executable, str(Path(__file__).with_name("spread.py")), str(tmp_path), cluster.address]
    process = subprocess.Popen(cluster.head.words(*script), stdout=subprocess.PIPE, env=cluster.head.environment())
    with process:
        assert json.loads(process.stdout.readline()) == {cluster.head.name: 2, narrow.name: 1}
        narrow.leave()
        late = cluster.join()
        assert json.loads(process.stdout.readline()) == [late.name]
