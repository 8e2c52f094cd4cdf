"""Real containers on a real Docker engine: build, up, train, down. Skips where no engine answers."""

import pytest

import fedmom
from both_sides import same_clients
from containers import CHANGES, CONFIG, IMAGE, assert_engines, docker
from fedmom.records.history import read_rounds

# All modules of this kind in one process: their tests share the containers.
pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]


def test_three_clients_train_to_the_engines_model(trained):
    rounds = read_rounds(trained)
    assert len(rounds) == 2
    assert_engines(trained, CHANGES)
    print(f"seconds from round 1 to 2: {rounds[1]['wall_seconds'] - rounds[0]['wall_seconds']:.1f}")


def test_in_float32_the_model_is_the_engines_to_rounding(deployment, tmp_path):
    changes = {**CHANGES, "run.dtype": "float32", "run.num-rounds": 1}
    deployment.run(tmp_path / "single", changes).end()
    assert_engines(tmp_path / "single", changes, 1e-5)


def test_several_labels_and_every_clients_own_results_are_the_engines(deployment, tmp_path):
    """Each client has a last layer of its own, which its node keeps, and is judged after its steps.

    So does AdamW's v, which waits for its exchange, while m is averaged in every round and the server steps on.
    """
    changes = CHANGES | {
        "data.dataset": "digit-traits",
        "data.task": "multi-label",
        "data.client-test-share": 0.2,
        "algorithm.personal": "head",
        "run.client-eval-every": 2,
        "run.personal-steps": 2,
        "algorithm.optimizer": "adamw",
        "algorithm.lr": 0.01,
        "algorithm.states": "m: average; v: average every 2",
        "algorithm.outer": "nesterov",
    }
    said = deployment.run(tmp_path / "labels", changes).end()
    assert "this server holds" not in said
    assert_engines(tmp_path / "labels", changes)
    fedmom.run(CONFIG, sets=changes, out=tmp_path / "engine", callbacks=[fedmom.Callback()])
    found = same_clients(tmp_path / "labels", tmp_path / "engine")
    assert {"own_accuracy", "personal_accuracy"} < set(found.results[-1].values)


def test_a_name_that_the_server_knows_is_refused(deployment, trained, tmp_path):
    """Two run folders here may have one name; there they would be one."""
    text = deployment.run(tmp_path / trained.name, CHANGES).end(2)
    assert f"the server has a run folder '{trained.name}' already" in text


def test_no_secret_is_in_the_image_the_environment_or_a_log(deployment):
    secrets = [path.read_text().strip() for path in deployment.keys.rglob("superexec.key")]
    secrets += [line for path in deployment.keys.rglob("node.key") for line in path.read_text().splitlines()[1:-1]]
    assert len(secrets) > 4
    names = docker("ps", "--format", "{{.Names}}", "--filter", f"name={deployment.name}-").split()
    assert len(names) == 10
    logs = [docker("logs", name) for name in names]
    for seen in (docker("image", "history", "--no-trunc", IMAGE), docker("inspect", *names), *logs):
        assert "PRIVATE KEY" not in seen
        assert not any(secret in seen for secret in secrets)
