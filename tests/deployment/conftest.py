"""Two deployments for all tests of containers, side by side on one engine."""

import ipaddress
import itertools
import json
import os
import shutil
import subprocess

import pytest

import fingerprint
from containers import (
    CHANGES,
    IMAGE,
    PROXIES,
    Deployment,
    build_image,
    docker,
    engine_answers,
    environment,
    free_port,
    proxied,
    three_clients,
    wait_until,
)
from fedmom.deploy.certificates import make_node_key
from fedmom.records.history import read_rounds
from runs import give_digits


def pytest_collection_modifyitems(config, items):
    """Where fingerprint.py has told .ci/run that nothing has changed, one of the faults and one of the intruders."""
    if os.environ.get("FEDMOM_FAULTS") == "one":
        kept = fingerprint.one_of_each(items)
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    if not engine_answers():
        missing = pytest.fail if os.environ.get("FEDMOM_NEEDS_ENGINE") else pytest.skip
        missing("no Docker engine answers (`docker info` fails)")
    build_image()
    # From here on the shell and Docker's configuration name a proxy that is not there; none of this needs one.
    PROXIES.update(proxied(tmp_path_factory.mktemp("docker")))


@pytest.fixture(scope="session")
def deployment(image, tmp_path_factory):
    """Three clients on one machine, under the name that `init` gives."""
    with three_clients(tmp_path_factory.mktemp("deployment")) as made:
        yield made


@pytest.fixture(scope="session")
def trained(deployment, tmp_path_factory):
    """The folder of a run of CHANGES that nothing befell."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert "accuracy" in deployment.run(folder, CHANGES).end()
    return folder


@pytest.fixture(scope="session")
def patience(trained):
    """Seconds after which a client is a straggler: several times what a round took here, however slow this machine is.

    A round takes the longer the more else is going on, so they are never few.
    """
    ends = [0.0, *(record["wall_seconds"] for record in read_rounds(trained))]
    return max(20.0, 6 * max(after - before for before, after in itertools.pairwise(ends)))


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


@pytest.fixture(scope="session")
def address(image):
    """Where containers of any network find this machine."""
    (network,) = json.loads(docker("network", "inspect", "bridge"))
    (config,) = network["IPAM"]["Config"]
    # A new engine names the subnet alone; the machine has its first address.
    return config.get("Gateway") or str(next(ipaddress.ip_network(config["Subnet"]).hosts()))


@pytest.fixture(scope="session")
def hosts(deployment, address, tmp_path_factory):
    """(the second deployment as the server's machine has it, the port, the clients' folders on theirs).

    They run on the same engine, each from a folder that was carried away from where `fedmom deploy init` made it, and
    the clients reach the server at the address of the machine, through the one port that it publishes.
    """
    made = Deployment(tmp_path_factory.mktemp("server"))
    port = free_port(also=1)
    machines = [tmp_path_factory.mktemp(f"machine-{c}") / "fedmom" for c in range(2)]
    # Client 1 makes its key where it will be used, and sends the public half.
    own = made.keys / "client-1"
    own.mkdir(parents=True)
    make_node_key(machines[1].with_name("node.key"))
    shutil.copy(machines[1].with_name("node.key.pub"), own / "node.key.pub")
    made.call("init", "--clients", "2", "--address", address, "--port", str(port))
    for c, machine in enumerate(machines):
        shutil.move(made.keys / f"client-{c}", machine)
        (made.keys / f"client-{c}").mkdir()
        shutil.copy(machine / "node.key.pub", made.keys / f"client-{c}" / "node.key.pub")
    shutil.move(machines[1].with_name("node.key"), machines[1] / "node.key")
    shutil.copystat(machines[0] / "node.key", machines[1] / "node.key")
    owner = (machines[0] / "node.key").stat()
    os.chown(machines[1] / "node.key", owner.st_uid, owner.st_gid)
    server = made.start("up", "--wait", "300")
    try:
        wait_until(lambda: "healthy" in docker("ps", "--filter", f"name={made.name}-gate"), "the gate is well")
        for machine in machines:
            compose(machine, "up", "--detach", "--no-build")
        text = server.end()
        assert "nodes online: 2 of 2" in text
        yield made, port, machines
    finally:
        server.process.kill()
        for machine in machines:
            compose(machine, "down", "--volumes")
        made.call("down", "--volumes")


def compose(machine, *words: str) -> None:
    """`docker compose` as one types it in the folder on the client's machine."""
    done = subprocess.run(
        ["docker", "compose", *words],
        cwd=machine,
        env=environment(FEDMOM_IMAGE=IMAGE),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
