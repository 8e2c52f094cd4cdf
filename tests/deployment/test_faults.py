"""What breaks while three clients in containers train: the run ends with the engine's model, or with a name.

A round costs Flower seconds, and a run some more, so what breaks breaks within few runs: one that gets over everything
by itself, and those that stop and go on from their checkpoints. What each ends with is the engine's.
"""

import contextlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from containers import CHANGES, IMAGE, ROOT, Deployment, Run, assert_engines, docker, wait_until
from fedmom.records.history import read_rounds

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600), pytest.mark.xdist_group("containers")]
# A message that is lost with its node is missed after this long, and sent again.
RETRY = {**CHANGES, "server.on-failure": "retry", "server.retries": 1000, "server.timeout-seconds": 20.0}
WHERE_NOTHING_CHANGED = "test_a_killed_server_app_stops_its_run_which_goes_on_to_the_engines_model"  # fingerprint.py

# Updates that no honest client sends. Flower delivers the app, so that of the intruder is one that misbehaves on a word
# in its data folder; the server cannot tell it from a node that runs a program of its own.
MISBEHAVE = """

_honest = _record


def _record(tensors, asked):
    import time
    from pathlib import Path

    while Path("/data/wait").exists():
        time.sleep(0.1)
    place = Path("/data/misbehave")
    how = place.read_text() if place.exists() else ""
    if how == "nan":
        tensors = {name: value * float("nan") for name, value in tensors.items()}
    if how == "oversized":
        tensors = {name: value.expand(2000, *value.shape).contiguous() for name, value in tensors.items()}
    if how == "unknown":
        tensors = {**tensors, "params/more": torch.zeros(3)}
    record = _honest(tensors, asked)
    if how == "malformed":
        name = next(iter(record))
        old = record[name]
        record[name] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=b"not an array")
    if how == "mislisted":
        record = ArrayRecord({name.replace("16", "17"): array for name, array in record.items()})
    return record
"""
REASONS = {
    "nan": "its update has NaN or infinite numbers in params/",
    "oversized": "must be [16, 64] float64",
    "unknown": "its update has an unknown params/more",
    "malformed": "an array is not in numpy's format",
    "mislisted": "is not what its name lists",
}
FULL = "No space left on device"
# Accepts so many connections in the gate's place and closes each in its TLS handshake.
CUTTER = (
    "import socket, sys\n"
    "server = socket.create_server(('0.0.0.0', 8000), backlog=64)\n"
    "for n in range(6):\n"
    "    connection = server.accept()[0]\n"
    "    connection.recv(65536)\n"
    "    connection.close()\n"
    "print('cut', flush=True)"
)
# So many requests from one address, with a whole header and a body that does not end, and so many with half a header.
SLOW = (
    "import socket, ssl, time\n"
    "context = ssl._create_unverified_context()\n"
    "held = []\n"
    "head = b'POST /v1/fleet/push-object HTTP/1.1\\r\\nHost: gate\\r\\nContent-Length: 9000000\\r\\n'\n"
    "for n in range(3000):\n"
    "    try:\n"
    "        s = context.wrap_socket(socket.create_connection(('gate', 8000), 20))\n"
    "        s.sendall(head + (b'\\r\\nx' if n < 2600 else b''))\n"
    "        held.append(s)\n"
    "    except OSError as error:\n"
    "        print(n, error, flush=True)\n"
    "print('held', len(held), flush=True)\n"
    "while True:\n"
    "    time.sleep(5)\n"
    "    for s in held:\n"
    "        try: s.sendall(b'x')\n"
    "        except OSError: pass\n"
)


@pytest.fixture(scope="module")
def rogue(tmp_path_factory):
    """A checkout whose clients misbehave where their data folder says so."""
    app = tmp_path_factory.mktemp("rogue") / "app"
    never = shutil.ignore_patterns(".*", "__pycache__")
    big = shutil.ignore_patterns("runs", "build", "docs", "tests", "benchmarks")  # of the root: fedmom/ has a runs/ too

    def left_out(folder: str, names: list[str]) -> set[str]:
        return never(folder, names) | (big(folder, names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, app, ignore=left_out)
    with open(app / "clients" / "client_app.py", "a") as file:
        file.write(MISBEHAVE)
    return app


@contextlib.contextmanager
def beside(deployment: Deployment, script: str, *words: str):
    """A container in the SuperNodes' network that runs a script meanwhile; gives its name."""
    name = f"{deployment.name}-beside"
    place = ("--network", f"{deployment.name}_fleet", "--ulimit", "nofile=8192:8192")
    docker("run", "--detach", "--name", name, *place, *words, IMAGE, "python3", "-c", script)
    try:
        yield name
    finally:
        docker("rm", "--force", name)


@contextlib.contextmanager
def full_disk(deployment: Deployment, service: str):
    """Within the block there is no room in all that its container may write to."""
    name = deployment.container(service)
    docker("exec", name, "sh", "-c", "dd if=/dev/zero of=/tmp/fill bs=1M 2>/dev/null; true")
    try:
        yield
    finally:
        docker("exec", name, "rm", "-f", "/tmp/fill")


@contextlib.contextmanager
def misbehaving(deployment: Deployment, client: int):
    """Within the block it sends what the word says that this gives to write to."""
    word = deployment.keys / f"client-{client}" / "data" / "misbehave"
    word.write_text(next(iter(REASONS)))
    try:
        yield word.write_text
    finally:
        word.unlink()


def test_a_run_gets_over_all_that_passes_and_ends_with_the_engines_model(deployment, rogue, tmp_path):
    """What is broken: see the comments; each between two rounds or within one."""
    changes = {**RETRY, "run.num-rounds": 9}
    run = deployment.run(tmp_path / "passing", changes, "--app", str(rogue))
    nodes = [deployment.container(f"supernode-{c}") for c in range(3)]
    run.wait_for_round(1)
    # All three at once, as Flower misses a killed node after a minute only. Client 0's node is killed. Client 1's app
    # is killed, and when it is back, its updates are refused by name, one kind after the other, and asked for again.
    # Client 2's network is cut for 25 s.
    with misbehaving(deployment, 1) as now_send:
        with deployment.cut_off("supernode-2", "fleet", 25):
            deployment.kill("clientapp-1", "supernode-0")
        for how, reason in REASONS.items():
            now_send(how)
            run.wait_to_say(reason)
    run.wait_for_round(3)
    # TLS handshakes are cut: another takes the gate's place and hangs up. Nobody ends of it.
    before = docker("inspect", "--format", "{{.State.StartedAt}}", *nodes)
    with deployment.cut_off("gate", "fleet"), beside(deployment, CUTTER, "--network-alias", "gate") as name:
        wait_until(lambda: "cut" in docker("logs", name), "handshakes were cut", 900, lambda: docker("logs", name))
    assert docker("inspect", "--format", "{{.State.StartedAt}}", *nodes) == before
    run.wait_for_round(4)
    # Client 1 keeps the run from its end, however fast the rounds are, until the connections to the gate are taken.
    wait = deployment.keys / "client-1" / "data" / "wait"
    wait.touch()
    deployment.kill("gate")
    # Somebody holds all the connections to the gate that it lets him, from here to the end.
    with beside(deployment, SLOW) as name:
        wait_until(lambda: "held" in docker("logs", name), "connections are held", 900, lambda: docker("logs", name))
        assert int(docker("logs", name).rpartition("held")[2]) > 1500
        with full_disk(deployment, "clientapp-2"):
            wait.unlink()
            run.wait_to_say(FULL)
            wait.touch()
        deployment.kill("superlink")
        wait.unlink()
        text = run.end()
    assert '"POST /v1/fleet/push-object HTTP/1.1" 503 refused' in deployment.logs("gate")
    named = {**dict.fromkeys(REASONS.values(), "round [23]: client 1"), FULL: "round [5-8]: client 2"}
    for reason, name in named.items():
        (line, *_) = (line for line in text.splitlines() if reason in line)
        assert re.match(f"{name}, node ", line), line
    assert len(read_rounds(tmp_path / "passing")) == changes["run.num-rounds"]
    assert_engines(tmp_path / "passing", changes)


def stopped(run: Run, name: str) -> int:
    """Rounds done of a run that has stopped, and has named what stopped it."""
    text = run.end(4)
    assert name in text
    assert "go on with: fedmom deploy run --resume" in text
    return len(read_rounds(run.out))


STOP = {**CHANGES, "server.on-failure": "stop", "server.timeout-seconds": 1500.0}


def test_a_run_that_stops_by_name_goes_on_to_the_engines_model(deployment, local_data, patience, tmp_path):
    """Data that were corrupted before and under way, and a straggler."""
    out = tmp_path / "stops"
    stop = {**STOP, "data.dataset": "local", "run.num-rounds": 7}
    whole = local_data[1].read_bytes()
    local_data[1].write_bytes(whole[: len(whole) // 2])
    text = deployment.run(out, stop).end(2)
    assert "client 1: data.dataset = 'local': /data/digits.npz is not an .npz file" in text
    folder = deployment.keys / "client-1" / "data"
    assert f"/data of client 1 is {folder}, to be read by FEDMOM_USER = " in text
    assert not out.exists()

    local_data[1].write_bytes(whole)
    run = deployment.run(out, stop)
    run.wait_for_round(1)
    held = dict(np.load(local_data[1]))
    np.savez(local_data[1], **{name: value[:7] for name, value in held.items()})
    done = stopped(run, "client 1 holds 7 examples")
    local_data[1].write_bytes(whole)

    run = deployment.go_on(out, {"server.timeout-seconds": patience})
    run.wait_for_round(done + 1)
    docker("pause", deployment.container("clientapp-2"))
    try:
        done = stopped(run, "client 2, node")
    finally:
        docker("unpause", deployment.container("clientapp-2"))

    deployment.go_on(out, {"server.timeout-seconds": stop["server.timeout-seconds"]}).end()
    assert len(read_rounds(out)) == stop["run.num-rounds"]
    assert_engines(out, {**stop, "data.data-dir": str(deployment.keys)})


def test_a_killed_server_app_stops_its_run_which_goes_on_to_the_engines_model(deployment, tmp_path):
    out, changes = tmp_path / "killed", {**STOP, "run.num-rounds": 7}
    run = deployment.run(out, changes)
    run.wait_for_round(1)
    deployment.kill("serverapp")
    assert stopped(run, "") < changes["run.num-rounds"]
    deployment.go_on(out).end()
    assert len(read_rounds(out)) == changes["run.num-rounds"]
    assert_engines(out, changes)


def test_without_a_straggler_the_others_go_on_where_that_was_asked_for(deployment, patience, tmp_path):
    proceed = {"server.on-failure": "proceed", "server.min-clients": 2, "server.timeout-seconds": patience}
    run = deployment.run(tmp_path / "proceeds", {**CHANGES, **proceed})
    run.wait_for_round(1)
    docker("pause", deployment.container("clientapp-2"))
    try:
        text = run.end()
    finally:
        docker("unpause", deployment.container("clientapp-2"))
    assert "client 2, node" in text
    assert "the round goes on without" in text
    assert len(read_rounds(tmp_path / "proceeds")) == 2


def test_a_node_that_has_lost_its_clients_rows_stops_the_run_which_goes_on_to_the_engines_model(deployment, tmp_path):
    """u never leaves the nodes, but for a checkpoint. Where the server holds it, the run gets over this by itself."""
    out = tmp_path / "rows"
    changes = {**RETRY, "algorithm.momentum-policy": "local", "run.num-rounds": 5, "run.checkpoint-every": 2}
    changes |= {"server.own-rows": "nodes", "server.retries": 5}
    run = deployment.run(out, changes)
    run.wait_for_round(2)
    deployment.kill("supernode-1")
    assert stopped(run, "client 1: this node has not what the client had of its own") < changes["run.num-rounds"]
    deployment.go_on(out).end()
    assert_engines(out, changes)

    out, changes = tmp_path / "relayed", changes | {"server.own-rows": "server", "run.num-rounds": 4}
    run = deployment.run(out, changes)
    run.wait_for_round(1)
    deployment.kill("supernode-1")
    run.end()
    assert_engines(out, changes)
