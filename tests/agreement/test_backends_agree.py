"""The same run on the engine, on Flower's Simulation Engine, and on a real SuperLink: one x, one u. All slow."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmom
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from flower_processes import Flower

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUADRATIC = {
    "data.dataset": "quadratic",
    "data.curvatures": "1;3;2;0.5;1.5",
    "data.centers": "4;-2;1;0;3",
    "algorithm.num-local-steps": 3,
    "run.num-rounds": 5,
}
DIGITS = {
    "data.num-clients": 5,
    "model.name": "mlp",
    "model.hidden": 32,
    "algorithm.num-local-steps": 2,
}
FLOAT64 = {**DIGITS, "run.dtype": "float64", "run.num-rounds": 4, "run.eval-every": 3}
FLOAT32 = {**DIGITS, "run.num-rounds": 2}
GOSSIP = {"algorithm.name": "d-sgd-m", "algorithm.topology": "exponential"}
NESTEROV = {"algorithm.nesterov": True}


# The tests of one SuperLink stay in one process: otherwise there would be two.
on_the_simulated = pytest.mark.xdist_group("flower-simulated")


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
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"wall_seconds", "client_steps_per_second"}:
            right, got = (np.asarray(record[key], dtype=float) for record in (mine, other))
            np.testing.assert_allclose(got, right, rtol=max(1e-8, 10 * tolerance), atol=1e-10, err_msg=key)


@on_the_simulated
@pytest.mark.parametrize(
    ("changes", "num_nodes", "tolerance"),
    [
        ({**FLOAT64, **NESTEROV}, 5, 1e-10),
        (FLOAT64, 2, 1e-10),
        ({**FLOAT64, **GOSSIP}, 5, 1e-10),
    ],
    ids=["digits-II", "digits-blocks", "decentralized"],
)
def test_flowers_simulation_engine_gives_the_engines_result(simulated, tmp_path, changes, num_nodes, tolerance):
    ran = simulated.run({**changes, "run.out": str(tmp_path / "run")}, num_nodes)
    assert ran.status == "finished:completed", ran.text
    # What a user sees: the rounds as they end, and where the run folder is.
    assert f"round 1/{changes['run.num-rounds']} · train loss" in ran.text
    assert f"\n{tmp_path / 'run'}\n" in ran.text
    assert_the_engines(changes, tmp_path / "run", tolerance)


@on_the_simulated
def test_a_run_that_names_no_folder_says_where_its_own_is(simulated):
    """Float32, the default, too: 1e-5 after two rounds."""
    changes = {**FLOAT32, **NESTEROV}
    ran = simulated.run(changes, 5)
    assert ran.status == "finished:completed", ran.text
    (folder,) = set(re.findall(r"^(?:run folder: )?(/.*/runs/flower-[-\d]+)$", ran.text, re.MULTILINE))
    assert Path(folder).is_absolute()  # below the SuperLink's directory, which need not be the user's
    assert_the_engines(changes, Path(folder), 1e-5)


@on_the_simulated
def test_under_flwr_run_too_a_run_resumes_and_a_mistake_is_a_failed_run(simulated, tmp_path):
    """Of quadratics by option II, on nodes that hold blocks."""
    folder, changes = tmp_path / "run", {**QUADRATIC, **NESTEROV}
    ran = simulated.run({**changes, "run.num-rounds": 3, "run.out": str(folder)}, 2)
    assert ran.status == "finished:completed", ran.text
    ran = simulated.run({**changes, "run.resume": str(folder)}, 2)
    assert ran.status == "finished:completed", ran.text
    assert "resumed after round 3" in ran.text
    assert_the_engines(changes, folder, 1e-10)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("")
    ran = simulated.run({**QUADRATIC, "run.out": str(taken)}, 2)
    assert ran.status == "finished:failed"
    reason = f"--out {taken}: exists already and is no run folder; name another --out"
    assert ran.details.endswith(f": {reason}")
    assert reason in ran.text
    assert [path.name for path in taken.iterdir()] == ["mine"]


@pytest.mark.xdist_group("flower-deployed")
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({**QUADRATIC, **NESTEROV, "run.num-rounds": 2}, 1e-10),
        ({**FLOAT32, "algorithm.momentum-policy": "local"}, 1e-5),
        ({**FLOAT64, **GOSSIP, "run.num-rounds": 2, "engine.path": "loop"}, 1e-10),
    ],
    ids=["quadratic-II-blocks", "digits-float32-local-blocks", "decentralized-blocks"],
)
def test_a_superlink_with_tls_and_two_supernodes_gives_the_engines_result(deployed, tmp_path, changes, tolerance):
    ran = deployed.run({**changes, "run.out": str(tmp_path / "run")})
    assert ran.status == "finished:completed", ran.text + deployed.logs()
    assert f"round 1/{changes['run.num-rounds']} · train loss" in ran.text
    assert f"\n{tmp_path / 'run'}\n" in ran.text
    assert_the_engines(changes, tmp_path / "run", tolerance)
