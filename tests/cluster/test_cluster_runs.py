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

pytestmark = pytest.mark.slow
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


def run(cluster, *runs):
    """[status, message, [bytes received, sent] after each round] of fedmom.run's arguments; one driver on the head."""
    where = {"simulation.ray-address": cluster.address}
    lines = []
    for given in runs:
        new, small = ({}, {}) if "resume" in given else ({"config": {}}, SMALL)
        lines.append(json.dumps({**new, **given, "sets": {**small, **where, **given.get("sets", {})}}))
    done = subprocess.run(
        cluster.head.words(sys.executable, str(DRIVER)),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=cluster.head.environment(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def equal(first, second, file=FINAL):
    ours, theirs = (read_tensors(folder / file)[0] for folder in (first, second))
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


WORKERS = {"engine.workers": 2}


@pytest.mark.xdist_group("cluster: runs")
def test_two_machines_come_to_what_one_comes_to_and_go_on_with_its_run(machines, tmp_path):
    """Unequal weights and an odd number of blocks, so that the sums of the nodes are not alike."""
    samples = {"algorithm.client-weights": "samples", "algorithm.cohort-size": 7}
    gossip = {"algorithm.name": "d-sgd-m", "algorithm.topology": "one-peer-exponential"}
    for machine in machines.alive():
        machine.leave()
    two = {"run.num-rounds": 2}
    ways = {"workers": samples, "peers": gossip}  # W is another in every round
    part = [{"sets": {**sets, **WORKERS, **two}, "out": str(tmp_path / f"{way}-part")} for way, sets in ways.items()]
    done = run(machines, *part)
    machines.join()
    more = []
    for way, sets in ways.items():
        more += [
            {"sets": sets, "out": str(tmp_path / f"{way}-engine")},
            {"sets": {**sets, **WORKERS}, "out": str(tmp_path / way)},
            {"sets": {"run.num-rounds": 4}, "resume": str(tmp_path / f"{way}-part")},
        ]
    done += run(machines, *more)
    assert [status for status, *_ in done] == ["done"] * 8, done
    for way in ways:
        equal(tmp_path / way, tmp_path / f"{way}-engine")
        same(tmp_path / f"{way}-part", tmp_path / way)
    equal(tmp_path / "peers", tmp_path / "peers-engine", "clients.safetensors")
    clients = [(tmp_path / name / "clients.safetensors").read_bytes() for name in ("peers-part", "peers")]
    assert clients[0] == clients[1]


@pytest.mark.xdist_group("cluster: runs")
def test_what_travels_is_a_few_times_the_model_for_a_node_and_not_for_a_client(cluster, tmp_path):
    """100 clients on two machines; of the driver's machine, and of the rounds alone."""
    size = {"model.name": "logistic", "data.dataset": str(tmp_path / "wide.npz"), "data.num-clients": 100}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(220, 20_000)).astype(np.float32), np.arange(220) % 10
    np.savez(tmp_path / "wide.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    state = 2 * 4 * (20_000 * 10 + 10)  # x and u in float32
    settings = {**size, **WORKERS, "run.dtype": "float32", "algorithm.num-local-steps": 1, "data.batch-size": 1}
    settings |= {"run.eval-every": 100, "data.partition": "iid"}
    ((status, message, wire),) = run(cluster, {"sets": {**settings, "run.num-rounds": 10}})
    assert status == "done", message
    received, sent = ((late - early) / 7 / state for early, late in zip(wire[1], wire[8], strict=True))
    # The start once, in float32; of four blocks on either node the sum of x and u, in float64, where they would be four
    # themselves. Once in a while the last one goes to the node that is idle.
    assert 0.9 < sent < 1.5, (received, sent)
    assert 0.9 < received < 3.5, (received, sent)


@pytest.mark.xdist_group("cluster: faults")
def test_what_only_this_machine_has_is_refused_by_name(cluster, tmp_path):
    """Data, and data of another content; by actors of both kinds, those of a pool and those of Algorithm 2."""
    (other,) = cluster.alive()
    here, there = cluster.head.srv, other.srv
    for name in ("here.npz", "both.npz"):
        shutil.copy(Path(__file__).parents[1] / "stored" / "tiny.npz", here / name)
    with np.load(here / "both.npz") as arrays:
        np.savez(there / "both.npz", **{name: array[::-1] for name, array in arrays.items()})
    data, others = ({"data.dataset": f"/srv/{name}", "data.num-clients": 4} for name in ("here.npz", "both.npz"))
    gossip = {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring", **WORKERS}
    missing, changed = run(cluster, {"sets": {**data, **WORKERS}}, {"sets": {**others, **gossip}})
    assert missing[0] == changed[0] == "refused", (missing, changed)
    assert "/srv/here.npz" in missing[1]
    assert f"(on {other.name} " in missing[1]
    assert "\n" not in missing[1]
    assert changed[1].startswith("data.dataset = '/srv/both.npz': "), changed
    assert other.name in changed[1]


@pytest.mark.xdist_group("cluster: runs")
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


@pytest.mark.xdist_group("cluster: runs")
def test_workers_are_spread_by_the_cores_that_a_node_may_use_and_a_node_that_joins_late_gets_some(cluster, tmp_path):
    """Three workers, where the head has two cores and the other machine one."""
    for machine in cluster.alive():
        machine.leave()
    narrow = cluster.join(cores="0")
    script = [sys.executable, str(Path(__file__).with_name("spread.py")), str(tmp_path), cluster.address]
    process = subprocess.Popen(cluster.head.words(*script), stdout=subprocess.PIPE, env=cluster.head.environment())
    try:
        assert json.loads(process.stdout.readline()) == {cluster.head.name: 2, narrow.name: 1}
        narrow.leave()
        late = cluster.join()
        assert json.loads(process.stdout.readline()) == [late.name]
        assert process.wait() == 0
    finally:
        process.kill()
        process.stdout.close()
