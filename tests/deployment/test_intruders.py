"""Who does not belong is turned away, and a log names them: at the gate, at the SuperLink, or by the strategy."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers import CHANGES, IMAGE, LONGER, ROOT, Deployment, assert_engines, docker, wait_until
from fedmom.deploy.certificates import make_authority, make_node_key, make_secret
from fedmom.deploy.commands import Commands, superlink
from fedmom.deploy.layout import open_deployment

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]


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
    """What a container in the SuperNodes' network says while it runs a command, for a minute at most."""
    place = ("--network", f"{deployment.name}_fleet", "--volume", f"{keys}:/keys:ro")
    return docker("run", "--rm", *place, IMAGE, "timeout", "60", *command, check=False)


def ask(deployment: Deployment, keys: Path, path: str, *, size: int = 3, method: str = "POST") -> str:
    """Status of one request of `size` bytes to the gate."""
    script = (
        "import http.client, ssl; "
        "c = http.client.HTTPSConnection('gate', 8000, context=ssl.create_default_context(cafile='/keys/ca.pem')); "
        f"c.request('{method}', '{path}', b'x' * {size}, {{'content-type': 'application/protobuf'}}); "
        "print(c.getresponse().status)"
    )
    return outsider(deployment, keys, "python3", "-c", script).strip().splitlines()[-1]


def public_key(keys: Path) -> str:
    """As the gate's log has it: what a node sends of its key."""
    import base64

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    key = load_ssh_public_key((keys / "node.pub").read_bytes())
    return base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()


NODE = ("flower-supernode", "--superlink=gate:8000", "--auth-supernode-private-key=/keys/node", "--isolation=process")


def test_a_node_whose_key_nobody_registered(deployment, keys):
    text = outsider(deployment, keys, *NODE, "--root-certificates=/keys/ca.pem")
    assert "305" in text or "not registered" in text.lower(), text
    log = deployment.logs("gate")
    refused = [line for line in log.splitlines() if "/v1/fleet/activate-node" in line and "refused" in line]
    assert any(public_key(keys) in line for line in refused), log[-2000:]


def test_a_node_with_another_ca(deployment, keys):
    """It does not believe that our server is the one, so it sends nothing."""
    text = outsider(deployment, keys, *NODE, "--root-certificates=/keys/other.pem")
    assert "certificate verify failed" in text, text
    assert "alert unknown ca" in deployment.logs("gate")


def test_a_node_without_tls(deployment, keys):
    text = outsider(deployment, keys, "flower-supernode", "--superlink=gate:8000", "--insecure", "--isolation=process")
    assert "400" in text, text
    assert "plain HTTP request" in deployment.logs("gate")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/control/start-run", "POST", "403"),
        ("/v1/control/list-runs", "POST", "403"),
        ("/v1/runtime/pull-task-input", "POST", "403"),
        ("/v1/fleet/register-node", "POST", "403"),
        ("/v1/fleet/../control/start-run", "POST", "403"),
        ("/v1/fleet/%2e%2e/control/start-run", "POST", "403"),
        ("/v1/control/start-run/../../fleet/get-run", "POST", "400"),  # to the SuperLink a malformed get-run
        ("/v1/fleet/pull-messages", "GET", "403"),
        ("/docs", "GET", "403"),
    ],
)
def test_whoever_asks_the_gate_for_what_no_supernode_needs(deployment, keys, path, method, status):
    """Least of all for a new run, whose code would run on every client."""
    assert ask(deployment, keys, path, method=method) == status
    assert f'"{method} {path} HTTP/1.1" {status} refused' in deployment.logs("gate")


def test_a_malformed_and_an_unsigned_request(deployment, keys):
    assert ask(deployment, keys, "/v1/fleet/push-messages") == "400"
    assert ask(deployment, keys, "/v1/fleet/push-messages", size=0) == "401"
    log = deployment.logs("gate")
    for status in (400, 401):
        assert f'"POST /v1/fleet/push-messages HTTP/1.1" {status} refused' in log


def test_an_oversized_request(deployment, keys):
    """No piece of an honest update is larger than 5 MiB."""
    assert ask(deployment, keys, "/v1/fleet/push-object", size=32 << 20) == "413"
    assert '"POST /v1/fleet/push-object HTTP/1.1" 413 refused' in deployment.logs("gate")


@contextlib.contextmanager
def another_node(deployment: Deployment, keys: Path, client: int) -> Iterator[None]:
    """A node with a registered key of its own that says it holds `client`, and its app."""
    commands = Commands(open_deployment(deployment.keys))
    registered = commands.json(superlink("supernode", "register", str(keys / "node.pub")))
    name, network = f"{deployment.name}-second", f"{deployment.name}_client-{client}"
    volume = ("--volume", f"{keys}:/keys:ro")
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


# Updates that no honest client sends. Flower delivers the app, so that of the intruder is one that misbehaves on a word
# in its data folder; the server cannot tell it from a node that runs a program of its own.

MISBEHAVE = """

_honest = _record


def _record(tensors, asked):
    from pathlib import Path

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


@pytest.fixture(scope="module")
def rogue(tmp_path_factory):
    """A checkout whose clients misbehave where their data folder says so."""
    app = tmp_path_factory.mktemp("rogue") / "app"
    shutil.copytree(ROOT, app, ignore=shutil.ignore_patterns(".*", "runs", "build", "docs", "tests", "benchmarks"))
    with open(app / "clients" / "client_app.py", "a") as file:
        file.write(MISBEHAVE)
    return app


REASONS = {
    "nan": "its update has NaN or infinite numbers in params/",
    "oversized": "must be [16, 64] float64",
    "unknown": "its update has an unknown params/more",
    "malformed": "an array is not in numpy's format",
    "mislisted": "is not what its name lists",
}


def test_updates_that_no_honest_client_sends(deployment, rogue, tmp_path):
    """One kind after the other is refused by name and asked for again; then the client behaves, and nothing is left."""
    changes = {**LONGER, "run.num-rounds": 2, "server.on-failure": "retry", "server.retries": 1000}
    word = deployment.keys / "client-1" / "data" / "misbehave"
    run = deployment.run(tmp_path / "rogue", changes, "--app", str(rogue))
    run.wait_for_round(1)
    try:
        for how, reason in REASONS.items():
            word.write_text(how)
            wait_until(lambda reason=reason: reason in run.said(), reason)
    finally:
        word.unlink()
    text = run.end()
    for reason in REASONS.values():
        (line, *_) = (line for line in text.splitlines() if reason in line)
        assert line.startswith("round 2: client 1, node ")
    assert_engines(tmp_path / "rogue", changes)
