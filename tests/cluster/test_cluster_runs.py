"""Runs on two machines come to what one machine comes to."""

import pytest
import torch

from fedmom.records.files import FINAL, read_tensors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]
SMALL = {
    "model.name": "mlp",
    "model.hidden": 16,
    "data.num-clients": 6,
    "algorithm.num-local-steps": 3,
    "run.num-rounds": 3,
    "run.dtype": "float64",
    "engine.path": "loop",
}


def words(changes):
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def run(cluster, out, changes, *more):
    where = {"simulation.ray-address": cluster.address}
    return cluster.fedmom("run", "quickstart", "--out", str(out), *words({**SMALL, **changes, **where}), *more)


def equal(first, second):
    ours, theirs = (read_tensors(folder / FINAL)[0] for folder in (first, second))
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-10 * torch.linalg.norm(theirs[name]), name


def test_a_round_of_actors_on_two_machines_is_the_engine_s(cluster, tmp_path):
    run(cluster, tmp_path / "engine", {})
    run(cluster, tmp_path / "workers", {"engine.workers": 4})
    equal(tmp_path / "workers", tmp_path / "engine")
