"""The same run on the engine, on Flower's Simulation Engine, and on a real SuperLink: one x, one u. All slow.

A `flwr run` costs most of a minute of imports, so each of these has as much in it as one run can show. What every
option means is test_flower's and test_relay's, on a Grid in one process; float32 and one client per node on a SuperLink
are test_containers'.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from flower_processes import Flower

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DIGITS = {
    "data.num-clients": 5,
    "model.name": "mlp",
    "model.hidden": 32,
    "algorithm.num-local-steps": 2,
}
FLOAT64 = {**DIGITS, "run.dtype": "float64", "run.num-rounds": 4, "run.eval-every": 3}
GOSSIP = {"algorithm.name": "d-sgd-m", "algorithm.topology": "exponential"}
NESTEROV = {"algorithm.nesterov": True}
PERIODS = {"algorithm.states": "x: average every 2; u: average every 2", "algorithm.outer": "nesterov"}
ADAMW = {"algorithm.optimizer": "adamw", "algorithm.states": "m: average every 2; v: local", "algorithm.lr": 0.01}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("simulated"))
    yield flower
    flower.close()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("deployed"))
    try:
        flower.deploy(num_nodes=2)
        yield flower
    finally:
        flower.close()


def assert_the_engines(changes, folder, tolerance):
    """x, u, buffers and every line's numbers are those of the engine."""
    engine = fedmom.run(changes, out=folder.with_name(f"{folder.name}-engine"), callbacks=[fedmom.Callback()])
    ours, about = read_tensors(engine.folder / "final.safetensors")
    theirs, their_about = read_tensors(folder / "final.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert {**about, "run_id": None} == {**their_about, "run_id": None}
    records = read_rounds(folder)
    assert [record["round"] for record in records] == list(range(1, len(engine.rounds) + 1))
    for mine, other in zip(engine.rounds, records, strict=True):
        # Nobody knows how far apart what did not travel is.
        unseen = {"consensus_distance", "momentum_spread"} if "algorithm.outer" in changes else set()
        assert mine.keys() - unseen <= other.keys() <= mine.keys()
        for key in other.keys() - {"wall_seconds", "client_steps_per_second"}:
            right, got = (np.asarray(record[key], dtype=float) for record in (mine, other))
            np.testing.assert_allclose(got, right, rtol=max(1e-8, 10 * tolerance), atol=1e-10, err_msg=key)


def test_flower_run_trains_resumes_and_fails_by_name(simulated, tmp_path):
    """On Flower's Simulation Engine, by option II, on nodes that hold blocks and keep rows; resumed in between."""
    changes = {**FLOAT64, **NESTEROV, **PERIODS, "engine.path": "stack", "engine.chunk-size": 3}
    ran = simulated.run({**changes, "run.num-rounds": 3}, 2)
    assert ran.status == "finished:completed", ran.text
    # What a user sees: the rounds as they end, and where the folder is of a run that has named none.
    assert "round 1/3 · train loss" in ran.text
    (folder,) = set(re.findall(r"^(?:run folder: )?(/.*/runs/flower-[-\d]+)$", ran.text, re.MULTILINE))
    assert Path(folder).is_absolute()  # below the SuperLink's directory, which need not be the user's
    ran = simulated.run({**changes, "run.resume": folder}, 2)
    assert ran.status == "finished:completed", ran.text
    assert "resumed after round 3" in ran.text
    assert f"\n{folder}\n" in ran.text
    assert_the_engines(changes, Path(folder), 1e-10)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    ran = simulated.run({**changes, "run.out": str(taken)}, 2)
    assert ran.status == "finished:failed"
    reason = f"--out {taken}: exists already and is no run folder; name another --out"
    assert ran.details.endswith(f": {reason}")
    assert reason in ran.text
    assert [path.name for path in taken.iterdir()] == ["mine"]


def test_a_superlink_with_tls_and_two_supernodes_gives_the_engines_result(deployed, tmp_path):
    """Algorithm 2, which no container runs, with AdamW, on nodes that hold blocks."""
    changes = {**FLOAT64, **GOSSIP, **ADAMW, "run.num-rounds": 2, "engine.path": "loop"}
    ran = deployed.run({**changes, "run.out": str(tmp_path / "run")})
    assert ran.status == "finished:completed", ran.text + deployed.logs()
    assert f"round 1/{changes['run.num-rounds']} · train loss" in ran.text
    assert f"\n{tmp_path / 'run'}\n" in ran.text
    assert_the_engines(changes, tmp_path / "run", 1e-10)
