"""Two deployments on one engine: one whose server and clients are projects of their own, as on separate machines.

They share no name, and of the second the server and its clients share an address, a CA and keys alone (conftest.py).
"""

import json
import re
import shutil

import pytest

from containers import CHANGES, IMAGE, Deployment, assert_engines, docker

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500), pytest.mark.xdist_group("containers")]
TWO = {**CHANGES, "data.num-clients": 2}


def test_they_share_no_network_and_no_volume(hosts, deployment):
    made, _, machines = hosts
    used = {}
    projects = {"server": made.name, "all": deployment.name}
    projects |= {f"client-{c}": f"{made.name.removesuffix('-server')}-client-{c}" for c in range(len(machines))}
    for what, project in projects.items():
        names = docker("ps", "--format", "{{.Names}}", "--filter", f"name=^{project}-").split()
        assert names, what
        about = json.loads(docker("inspect", *names))
        networks = {name for one in about for name in one["NetworkSettings"]["Networks"]}
        mounts = {mount["Source"] for one in about for mount in one["Mounts"]}
        used[what] = networks | mounts
    for one in used:
        for other in used:
            assert one == other or not used[one] & used[other], (one, other)


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
    network = f"{made.name.removesuffix('-server')}-client-0_fleet"
    volume = f"{machines[0]}/ca.pem:/keys/ca.pem:ro"
    text = docker("run", "--rm", "--network", network, "--volume", volume, IMAGE, "python3", "-c", script)
    assert text.split() == ["control", "False", "gate", "403"]


def test_nobody_but_this_machine_comes_through_the_door(deployment):
    """A neighbour who is routed to the container's own address, as engines before Docker 28 let him, is turned away."""
    script = (
        "import http.client, socket, ssl\n"
        "c = http.client.HTTPSConnection('door', 8000, context=ssl._create_unverified_context())\n"
        "c.request('POST', '/v1/control/list-runs', b''); print(c.getresponse().status)\n"
        "try: print(socket.getaddrinfo('superlink', 8000))\n"
        "except socket.gaierror: print('nobody')"
    )
    text = docker("run", "--rm", "--network", f"{deployment.name}_control", IMAGE, "python3", "-c", script)
    assert text.split() == ["403", "nobody"]
    assert '"POST /v1/control/list-runs HTTP/1.1" 403 refused' in deployment.logs("door")
    ports = docker("ps", "--format", "{{.Ports}}", "--filter", f"name={deployment.name}-").split()
    published = [port for port in ports if "->" in port]
    assert len(published) == 1
    assert re.match(r"127\.0\.0\.1:\d+->8000/tcp", published[0])


@pytest.mark.parametrize("command", [("up",), ("down", "--volumes"), ("status",), ("run", "configs/deploy.toml")])
def test_a_copy_of_a_deployments_folder_touches_nothing_of_it(deployment, command, tmp_path):
    before = deployment.containers()
    copy = Deployment(tmp_path)
    shutil.copytree(deployment.keys, copy.keys, symlinks=True)
    text = copy.call(*command, status=2)
    assert f"was started from {deployment.keys}, which is still there" in text
    assert deployment.containers() == before


@pytest.mark.parametrize("command", [("up",), ("down", "--volumes")])
def test_another_deployment_of_the_same_name_touches_nothing_of_it(deployment, command, tmp_path):
    before = deployment.containers()
    other = Deployment(tmp_path)
    other.call("init", "--clients", "1", "--name", deployment.name)
    text = other.call(*command, status=2)
    assert f"the project '{deployment.name}' is that of the deployment in {deployment.keys}" in text
    assert deployment.containers() == before
