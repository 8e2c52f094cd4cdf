"""Who does not belong is turned away, and a log names them: at the gate, at the SuperLink, or by the strategy."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import CHANGES, IMAGE, Deployment, docker, wait_until
from fedmom.deploy.certificates import as_sent, make_authority, make_node_key, make_secret
from fedmom.deploy.commands import Commands, superlink
from fedmom.deploy.initialise import open_deployment

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]
WHERE_NOTHING_CHANGED = "test_nodes_that_do_not_belong"  # fingerprint.py


@pytest.fixture
def keys(deployment, tmp_path):
    """A folder with the deployment's CA, another CA, and a node key that nobody has registered."""
    shutil.copy(deployment.keys / "ca.pem", tmp_path / "ca.pem")
    make_authority(tmp_path / "other.pem", tmp_path / "other-key.pem")
    make_node_key(tmp_path / "node")
    make_secret(tmp_path / "superexec")
    tmp_path.chmod(0o755)
    for path in tmp_path.iterdir():
        path.chmod(0o644)  # the container's user must read it
    return tmp_path


def outsider(deployment: Deployment, keys: Path, *command: str) -> str:
    """What a container in the SuperNodes' network says while it runs a command, for ten minutes at most."""
    place = ("--network", f"{deployment.name}_fleet", "--volume", f"{keys}:/keys:ro", *DIRECT)
    return docker("run", "--rm", *place, IMAGE, "timeout", "600", *command, check=False)


DIRECT = ("--env", "NO_PROXY=*", "--env", "no_proxy=*")  # as the Compose files have it
NODE = ("flower-supernode", "--superlink=gate:8000", "--auth-supernode-private-key=/keys/node", "--isolation=process")
CA = "--root-certificates=/keys/ca.pem"
# A clock that is 8 s ahead, for one process.
AHEAD = """
import datetime, time
now, seconds = datetime.datetime, time.time
class Ahead(now):
    @classmethod
    def now(cls, tz=None):
        return now.now(tz) + datetime.timedelta(seconds=8)
datetime.datetime, time.time = Ahead, lambda: seconds() + 8
"""
NODES = {
    "unregistered": f"{' '.join(NODE)} {CA}",
    "another CA": f"{' '.join(NODE)} --root-certificates=/keys/other.pem",
    "no TLS": "flower-supernode --superlink=gate:8000 --insecure --isolation=process",
    "clock": f"PYTHONPATH=/keys/ahead {' '.join(NODE).replace('/keys/node', '/keys/registered')} {CA}",
}


def test_nodes_that_do_not_belong(deployment, keys):
    """Side by side in one container, each is refused and says why, and a log names it."""
    (keys / "ahead").mkdir()
    (keys / "ahead" / "sitecustomize.py").write_text(AHEAD)
    shutil.copy(deployment.keys / "client-1" / "node.key", keys / "registered")
    (keys / "registered").chmod(0o644)
    lines = [f"({command} --port={9300 + n}) >/tmp/{n} 2>&1 &" for n, command in enumerate(NODES.values())]
    lines += ["wait", *(f"cat /tmp/{n}; echo; echo {'=' * 9}" for n in range(len(NODES)))]
    said = dict(zip(NODES, outsider(deployment, keys, "sh", "-c", "\n".join(lines)).split("=" * 9), strict=False))
    log = deployment.logs("gate")
    assert "305" in said["unregistered"], said
    assert f'"POST /v1/fleet/activate-node HTTP/1.1" 412 refused, public key {as_sent(keys / "node.pub")}' in log
    # It does not believe that our server is the one, so it sends nothing.
    assert "certificate verify failed" in said["another CA"], said
    assert "alert unknown ca" in log
    assert "400" in said["no TLS"], said
    assert "plain HTTP request" in log
    # Flower takes a clock that is off for an intruder's: node and operator are told of the clock.
    assert re.search(r"it is [789] s ahead of the server's: set it", said["clock"]), said
    assert "client 1: its key is registered, and was refused (401): is its clock right?" in deployment.call("status")


REQUESTS = [
    ("/v1/control/start-run", "POST", 3, "403"),
    ("/v1/control/list-runs", "POST", 3, "403"),
    ("/v1/runtime/pull-task-input", "POST", 3, "403"),
    ("/v1/fleet/register-node", "POST", 3, "403"),
    ("/v1/fleet/../control/start-run", "POST", 3, "403"),
    ("/v1/fleet/%2e%2e/control/start-run", "POST", 3, "403"),
    ("/v1/control/start-run/../../fleet/get-run", "POST", 3, "400"),  # to the SuperLink a malformed get-run
    ("/v1/fleet/pull-messages", "GET", 3, "403"),
    ("/docs", "GET", 3, "403"),
    ("/v1/fleet/push-messages", "POST", 3, "400"),
    ("/v1/fleet/push-messages", "POST", 0, "401"),
    # No piece of an honest update is larger than 5 MiB.
    ("/v1/fleet/push-object", "POST", 32 << 20, "413"),
]


def test_whoever_asks_the_gate_for_what_no_supernode_needs(deployment, keys):
    """Least of all for a new run, whose code would run on every client; and malformed, unsigned, oversized requests."""
    script = (
        "import http.client, json, ssl, sys\n"
        "context = ssl.create_default_context(cafile='/keys/ca.pem')\n"
        "for path, method, size, _ in json.loads(sys.argv[1]):\n"
        "    c = http.client.HTTPSConnection('gate', 8000, context=context)\n"
        "    c.request(method, path, b'x' * size, {'content-type': 'application/protobuf'})\n"
        "    print(c.getresponse().status, flush=True)"
    )
    text = outsider(deployment, keys, "python3", "-c", script, json.dumps(REQUESTS))
    assert text.split() == [status for *_, status in REQUESTS], text
    log = deployment.logs("gate")
    for path, method, _, status in REQUESTS:
        assert f'"{method} {path} HTTP/1.1" {status} refused' in log, path


@contextlib.contextmanager
def another_node(deployment: Deployment, keys: Path, client: int) -> Iterator[None]:
    """A node with a registered key of its own that says it holds `client`, and its app."""
    commands = Commands(open_deployment(deployment.keys))
    registered = commands.json(superlink("supernode", "register", str(keys / "node.pub")))
    name, network = f"{deployment.name}-second", f"{deployment.name}_client-{client}"
    volume = ("--volume", f"{keys}:/keys:ro", *DIRECT)
    secret = "--superexec-auth-secret-file=/keys/superexec"
    try:
        docker(
            *("run", "--detach", "--name", name, "--network", f"{deployment.name}_fleet", *volume, IMAGE, *NODE),
            *("--root-certificates=/keys/ca.pem", "--host=0.0.0.0", "--port=9094", secret),
            f"--node-config=partition-id={client} num-partitions=3",
        )
        docker("network", "connect", network, name)
        docker(
            *("run", "--detach", "--name", f"{name}-app", "--network", network, *volume, IMAGE, "flower-superexec"),
            *("--insecure", f"--runtime-api-address={name}:9094", secret),
        )

        def online() -> bool:
            nodes = commands.json(superlink("supernode", "list"))["nodes"]
            return sum(node["status"] == "online" for node in nodes) == 4

        wait_until(online, "four nodes online")
        yield
    finally:
        docker("rm", "--force", name, f"{name}-app", check=False)
        commands.json(superlink("supernode", "unregister", str(registered["node-id"])))


def test_two_nodes_that_claim_the_same_client(deployment, keys, tmp_path):
    with another_node(deployment, keys, 1):
        text = deployment.run(tmp_path / "twice", CHANGES).end(2)
    assert re.search(r"client 1: nodes \d+ and \d+ both hold it", text)
