"""What breaks while three clients in containers train: the run ends with the engine's model, or with a name.

Each test states what was broken, and what docs/deployment.md says of it.
"""

import re

import pytest

from containers import LONGER, assert_engines, docker
from fedmom.records import read_rounds

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]
# A message that is lost with its node is missed after this long, and sent again.
RETRY = {**LONGER, "server.on-failure": "retry", "server.retries": 50, "server.timeout-seconds": 20.0}
STRAGGLER = 30.0  # several times what a round takes on a busy machine of two cores


# What a run gets over by itself: {what breaks: (who breaks it, changes of the configuration)}
PASSING = {
    "a client's app is killed": (lambda there: there.kill("clientapp-1"), {}),
    "a client's node is killed": (lambda there: there.kill("supernode-1"), {}),
    "a client's network is cut for 25 s": (
        lambda there: there.cut_off("supernode-1", "fleet", 25),
        {"server.timeout-seconds": 300.0},  # longer than the cut: nothing is sent again
    ),
    "the SuperLink is killed": (lambda there: there.kill("superlink"), {}),
    "the gate is killed": (lambda there: there.kill("gate"), {}),
}


@pytest.mark.parametrize("what", PASSING)
def test_the_run_goes_on_and_ends_with_the_engines_model(deployment, tmp_path, what):
    break_it, changes = PASSING[what][0], {**RETRY, **PASSING[what][1]}
    out = tmp_path / re.sub("[^a-z0-9]+", "-", what.lower())
    run = deployment.run(out, changes)
    run.wait_for_round(1)
    break_it(deployment)
    run.end()
    assert len(read_rounds(out)) == changes["run.num-rounds"]
    assert_engines(out, changes)


def test_the_servers_app_is_killed_and_the_run_goes_on_from_its_checkpoint(deployment, tmp_path):
    run = deployment.run(tmp_path / "server-killed", LONGER)
    run.wait_for_round(2)
    deployment.kill("serverapp")
    run.end(4)
    assert 2 <= len(read_rounds(tmp_path / "server-killed")) < LONGER["run.num-rounds"]
    deployment.resume(tmp_path / "server-killed")
    assert len(read_rounds(tmp_path / "server-killed")) == LONGER["run.num-rounds"]
    assert_engines(tmp_path / "server-killed", LONGER)


def test_a_straggler_past_the_limit_stops_the_run_by_name(deployment, tmp_path):
    changes = {**LONGER, "server.on-failure": "stop", "server.timeout-seconds": STRAGGLER}
    run = deployment.run(tmp_path / "straggler", changes)
    run.wait_for_round(1)
    docker("pause", deployment.container("clientapp-2"))
    try:
        text = run.end(4)
    finally:
        docker("unpause", deployment.container("clientapp-2"))
    assert "client 2, node" in text
    deployment.call("up")
    deployment.resume(tmp_path / "straggler")
    assert_engines(tmp_path / "straggler", changes)


def test_without_a_straggler_the_others_go_on_where_that_was_asked_for(deployment, tmp_path):
    proceed = {"server.on-failure": "proceed", "server.min-clients": 2, "server.timeout-seconds": STRAGGLER}
    run = deployment.run(tmp_path / "proceeds", {**LONGER, **proceed, "run.num-rounds": 3})
    run.wait_for_round(1)
    docker("pause", deployment.container("clientapp-2"))
    try:
        text = run.end()
    finally:
        docker("unpause", deployment.container("clientapp-2"))
    assert "client 2, node" in text
    assert "the round goes on without" in text
    assert len(read_rounds(tmp_path / "proceeds")) == 3


def test_a_client_with_a_full_disk_stops_the_run_by_name_and_goes_on_once_there_is_room(deployment, tmp_path):
    changes = {**LONGER, "server.on-failure": "stop", "server.timeout-seconds": 60.0}
    run = deployment.run(tmp_path / "full", changes)
    run.wait_for_round(1)
    app = deployment.container("clientapp-0")
    docker("exec", app, "sh", "-c", "dd if=/dev/zero of=/tmp/fill bs=1M 2>/dev/null; true")
    try:
        text = run.end(4)
    finally:
        docker("exec", app, "rm", "-f", "/tmp/fill")
    assert "client 0, node" in text
    deployment.resume(tmp_path / "full")
    assert_engines(tmp_path / "full", changes)
