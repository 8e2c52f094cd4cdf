"""Real containers on a real Docker engine: build, up, train, down. Skips where no engine answers."""

import numpy as np
import pytest

from containers import CHANGES, IMAGE, assert_engines, docker
from fedmom.records import read_rounds
from runs import give_digits

# All modules of this kind in one process: their tests share the containers.
pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]


def test_three_clients_train_to_the_engines_model(deployment, tmp_path):
    text = deployment.run(tmp_path / "run", CHANGES).end()
    assert "accuracy" in text
    rounds = read_rounds(tmp_path / "run")
    assert len(rounds) == 2
    assert_engines(tmp_path / "run", CHANGES)
    print(f"seconds from round 1 to 2: {rounds[1]['wall_seconds'] - rounds[0]['wall_seconds']:.1f}")


def test_in_float32_the_model_is_the_engines_to_rounding(deployment, tmp_path):
    changes = {**CHANGES, "run.dtype": "float32"}
    deployment.run(tmp_path / "single", changes).end()
    assert_engines(tmp_path / "single", changes, 1e-5)


def test_a_name_that_the_server_knows_is_refused(deployment, tmp_path):
    """Two run folders here may have one name; there they would be one."""
    text = deployment.run(tmp_path / "run", CHANGES).end(2)
    assert "the server has a run folder 'run' already" in text


def test_no_secret_is_in_the_image_the_environment_or_a_log(deployment):
    secrets = [path.read_text().strip() for path in deployment.keys.rglob("superexec.key")]
    secrets += [line for path in deployment.keys.rglob("node.key") for line in path.read_text().splitlines()[1:-1]]
    assert len(secrets) > 4
    names = docker("ps", "--format", "{{.Names}}", "--filter", f"name={deployment.name}").split()
    assert len(names) == 9
    logs = [docker("logs", name) for name in names]
    for seen in (docker("image", "history", "--no-trunc", IMAGE), docker("inspect", *names), *logs):
        assert "PRIVATE KEY" not in seen
        assert not any(secret in seen for secret in secrets)


# Data that only the client has


LOCAL = {**CHANGES, "data.dataset": "local"}


@pytest.fixture
def local_data(deployment, tmp_path):
    """Real digits, unequally many, in each client's own folder, and the test set in the server's."""
    give_digits(tmp_path, 3)
    placed = [deployment.keys / f"client-{c}" / "data" / "digits.npz" for c in range(3)]
    placed.append(deployment.keys / "server" / "data" / "test.npz")
    for source, target in zip([*(f"client-{c}" for c in range(3)), "test"], placed, strict=True):
        target.write_bytes((tmp_path / f"{source}.npz").read_bytes())
        target.chmod(0o644)
    yield placed
    for path in placed:
        path.unlink(missing_ok=True)


def test_clients_train_on_what_lies_in_their_own_folders(deployment, local_data, tmp_path):
    deployment.run(tmp_path / "own", LOCAL).end()
    assert_engines(tmp_path / "own", {**LOCAL, "data.data-dir": str(deployment.keys)})


def test_corrupted_data_stop_a_run_before_it_begins(deployment, local_data, tmp_path):
    whole = local_data[1].read_bytes()
    local_data[1].write_bytes(whole[: len(whole) // 2])
    text = deployment.run(tmp_path / "corrupted", LOCAL).end(2)
    assert "/data/digits.npz is not an .npz file" in text
    assert not (tmp_path / "corrupted").exists()


def test_data_that_are_corrupted_under_way_stop_the_run_by_name_and_mended_ones_go_on(deployment, local_data, tmp_path):
    changes = {**LOCAL, "run.num-rounds": 6, "server.on-failure": "stop"}
    run = deployment.run(tmp_path / "spoilt", changes)
    run.wait_for_round(1)
    whole = local_data[1].read_bytes()
    held = dict(np.load(local_data[1]))
    np.savez(local_data[1], **{name: value[:7] for name, value in held.items()})
    text = run.end(4)
    assert "client 1, node" in text
    assert "client 1 holds 7 examples" in text
    done = len(read_rounds(tmp_path / "spoilt"))
    assert 1 <= done < changes["run.num-rounds"]
    local_data[1].write_bytes(whole)
    deployment.resume(tmp_path / "spoilt")
    assert_engines(tmp_path / "spoilt", {**changes, "data.data-dir": str(deployment.keys)})
