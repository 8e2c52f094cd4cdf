"""The server and its clients as projects of their own, which share an address, a CA and keys, as on separate machines.

They run on one engine here, each from a folder that was carried away from where `fedmom deploy init` made it, and the
clients reach the server at the address of the machine, through the one port that it publishes.
"""

import ipaddress
import json
import os
import shutil
import subprocess

import pytest

from containers import CHANGES, IMAGE, Deployment, assert_engines, docker, free_port, wait_until
from fedmom.deploy.certificates import make_node_key

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]
TWO = {**CHANGES, "data.num-clients": 2}


@pytest.fixture(scope="module")
def address(image):
    """Where containers of any network find this machine."""
    (network,) = json.loads(docker("network", "inspect", "bridge"))
    (config,) = network["IPAM"]["Config"]
    # A new engine names the subnet alone; the machine has its first address.
    return config.get("Gateway") or str(next(ipaddress.ip_network(config["Subnet"]).hosts()))


@pytest.fixture(scope="module")
def hosts(address, tmp_path_factory):
    """(the deployment as the server's machine has it, the port, the clients' folders on theirs)."""
    made = Deployment(tmp_path_factory.mktemp("server"), f"fedmom-hosts-{os.getpid()}")
    port = free_port(also=1)
    machines = [tmp_path_factory.mktemp(f"machine-{c}") / "fedmom" for c in range(2)]
    # Client 1 makes its key where it will be used, and sends the public half.
    own = made.keys / "client-1"
    own.mkdir(parents=True)
    make_node_key(machines[1].with_name("node.key"))
    shutil.copy(machines[1].with_name("node.key.pub"), own / "node.key.pub")
    made.call("init", "--clients", "2", "--address", address, "--port", str(port), "--name", made.name)
    for c, machine in enumerate(machines):
        shutil.move(made.keys / f"client-{c}", machine)
        (made.keys / f"client-{c}").mkdir()
        shutil.copy(machine / "node.key.pub", made.keys / f"client-{c}" / "node.key.pub")
    shutil.move(machines[1].with_name("node.key"), machines[1] / "node.key")
    shutil.copystat(machines[0] / "node.key", machines[1] / "node.key")
    owner = (machines[0] / "node.key").stat()
    os.chown(machines[1] / "node.key", owner.st_uid, owner.st_gid)
    server = made.start("up", "--wait", "120")
    try:
        wait_until(lambda: "healthy" in docker("ps", "--filter", f"name={made.name}-server-gate"), "the gate is well")
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
        env={**os.environ, "FEDMOM_IMAGE": IMAGE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_they_share_no_network_and_no_volume(hosts):
    made, _, _ = hosts
    used = {}
    for project in ("server", "client-0", "client-1"):
        names = docker("ps", "--format", "{{.Names}}", "--filter", f"name={made.name}-{project}").split()
        assert names
        about = json.loads(docker("inspect", *names))
        networks = {name for one in about for name in one["NetworkSettings"]["Networks"]}
        mounts = {mount["Source"] for one in about for mount in one["Mounts"]}
        used[project] = networks | mounts
    assert not used["server"] & used["client-0"]
    assert not used["server"] & used["client-1"]
    assert not used["client-0"] & used["client-1"]


def test_they_train_to_the_engines_model(hosts, tmp_path):
    made, _, _ = hosts
    made.run(tmp_path / "two-hosts", TWO).end()
    assert_engines(tmp_path / "two-hosts", TWO)


def test_from_a_clients_machine_nobody_starts_a_run(hosts, address):
    """The port for that is on the server's loopback alone, and the gate does not pass it on."""
    made, port, machines = hosts
    script = (
        "import socket, ssl, http.client\n"
        f"s = socket.socket(); s.settimeout(5); print('control', s.connect_ex(('{address}', {port + 1})) == 0)\n"
        "context = ssl.create_default_context(cafile='/keys/ca.pem')\n"
        f"c = http.client.HTTPSConnection('{address}', {port}, context=context)\n"
        "c.request('POST', '/v1/control/start-run', b'x'); print('gate', c.getresponse().status)"
    )
    network = f"{made.name}-client-0_fleet"
    volume = f"{machines[0]}/ca.pem:/keys/ca.pem:ro"
    text = docker("run", "--rm", "--network", network, "--volume", volume, IMAGE, "python3", "-c", script)
    assert text.split() == ["control", "False", "gate", "403"]
