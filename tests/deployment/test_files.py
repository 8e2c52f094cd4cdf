"""Compose files, keys and certificates: what can be known of a deployment without an engine."""

import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedmom.cli import main
from fedmom.deploy.certificates import days_left, hosts_of, read_certificate
from fedmom.deploy.compose import client, client_gpu_override, federation, gpu_override, server
from fedmom.deploy.deployment import open_deployment
from fedmom.deploy.initialise import initialise, write_flower_config
from fedmom.errors import InputError
from laws import table

ROOT = Path(__file__).parents[2]
GATE = ROOT / "deploy" / "image" / "gate.conf"
HERE = str(Path(sys.executable).parent)
FILES = ["docker-compose.yml", "deploy/server.yml", "deploy/client.yml"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_checkouts_files_are_what_the_command_writes():
    assert (ROOT / "docker-compose.yml").read_text() == federation(3, "./deployment")
    assert (ROOT / "docker-compose.gpu.yml").read_text() == gpu_override(3)
    assert (ROOT / "deploy" / "server.yml").read_text() == server()
    assert (ROOT / "deploy" / "client.yml").read_text() == client()
    assert (ROOT / "deploy" / "client.gpu.yml").read_text() == client_gpu_override()


@pytest.mark.skipif(
    shutil.which("hadolint", path=HERE) is None, reason="hadolint is not installed (it has no wheel here)"
)
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([shutil.which("hadolint", path=HERE), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_gate_names_all_that_a_supernode_asks_for():
    """Flower's client is the list: a request that it learns to make must be let through, or left out, on purpose."""
    from flwr.supernode import fleet_http_client

    asked = set(re.findall(r'"/v1/fleet/([a-z-]+)"', Path(fleet_http_client.__file__).read_text()))
    passed = re.search(r"/v1/fleet/\(([^)]*)\)\$", (ROOT / "deploy" / "image" / "gate.conf").read_text())
    assert passed is not None
    # A node that brings a key of its own making: the operator registers them.
    assert set(passed[1].split("|")) == asked - {"register-node", "unregister-node"}


def test_the_gate_hands_on_the_path_that_it_matched():
    """Not the one that was written: /v1/control/start-run/../../fleet/get-run is one of ours to nginx alone."""
    passed = re.findall(r"^ *proxy_pass (.*);$", GATE.read_text(), re.MULTILINE)
    assert passed == ["$superlink/v1/fleet/$1"]


@table("name", ["docker-compose.yml", "deploy/server.yml"])
def test_unfinished_requests_fill_the_gates_tmp_before_its_memory(name):
    """A /tmp is part of a container's memory; at its limit the kernel kills the gate, and every node's request."""
    gate = read(name)["services"]["gate"]
    (size,) = re.findall(r"^/tmp:.*size=(\d+)m$", gate["tmpfs"][0])
    assert gate["deploy"]["resources"]["limits"]["memory"] == "1g"
    assert int(size) <= 512
    (buffer,) = re.findall(r"client_body_buffer_size (\d+)k;", GATE.read_text())
    (connections,) = re.findall(r"worker_connections (\d+);", GATE.read_text())
    (workers,) = re.findall(r"worker_processes (\d+);", GATE.read_text())
    assert int(buffer) * int(connections) * int(workers) <= 64 * 1024  # kB: 64 MB
    # What one address may send at once fits, so that nobody alone fills it; nor does one hold most connections.
    (largest,) = re.findall(r"client_max_body_size (\d+)m;", GATE.read_text())
    (at_once,) = re.findall(r"limit_conn address (\d+);", GATE.read_text())
    assert int(at_once) * int(largest) < int(size)
    assert "limit_conn_zone $binary_remote_addr zone=address:" in GATE.read_text()
    assert int(connections) * int(workers) >= 8000


@table("num_clients", [1, 2, 5])
def test_every_client_has_a_node_and_an_app_of_its_own(num_clients):
    services = yaml.safe_load(federation(num_clients))["services"]
    assert len(services) == 4 + 2 * num_clients
    for c in range(num_clients):
        node, app = services[f"supernode-{c}"], services[f"clientapp-{c}"]
        assert any(f"partition-id={c} " in word for word in node["command"])
        assert set(node["networks"]) == {"fleet", f"client-{c}"}
        assert app["networks"] == [f"client-{c}"]  # what a run brings reaches its own node and nothing else


@table("name", FILES)
def test_containers_can_do_little(name):
    for service, keys in read(name)["services"].items():
        assert keys["read_only"] is True, service
        assert keys["cap_drop"] == ["ALL"], service
        assert keys["security_opt"] == ["no-new-privileges:true"], service
        assert keys["user"].startswith("${FEDMOM_USER:-10001"), service
        assert {"cpus", "memory", "pids"} <= set(keys["deploy"]["resources"]["limits"]), service
        assert keys["restart"] == "unless-stopped", service


@table("name", FILES)
def test_one_port_at_most_and_no_secret_in_an_environment(name):
    text, services = (ROOT / name).read_text(), read(name)["services"]
    assert "PRIVATE" not in text
    ports = [port for keys in services.values() for port in keys.get("ports", [])]
    outside = [port for port in ports if not port.startswith("127.0.0.1:")]
    # The SuperLink's is on loopback, for `flwr` on this machine; what other machines see is the gate.
    assert outside == (services["gate"]["ports"] if name == "deploy/server.yml" else [])
    assert len(ports) - len(outside) == len(services["door"]["ports"] if "superlink" in services else [])
    for service, keys in services.items():
        more = {
            "supernode": {"FEDMOM_POLL_SECONDS"},
            "clientapp": {"OMP_NUM_THREADS"},
            "serverapp": {"OMP_NUM_THREADS"},
        }
        known = {"HEALTH", "NO_PROXY", "no_proxy", *more.get(service.partition("-")[0], ())}
        assert set(keys["environment"]) == known, service
        # Only the way from a client's machine to the server may have a proxy, and only where its .env says so.
        elsewhere = "${FEDMOM_NO_PROXY-*}" if (name, service) == ("deploy/client.yml", "supernode") else "*"
        assert keys["environment"]["NO_PROXY"] == keys["environment"]["no_proxy"] == elsewhere
        for secret in keys.get("secrets", []):
            conf = GATE.with_name(f"{service}.conf")
            words = [conf.read_text()] if conf.exists() else keys["command"]
            assert any(f"/run/secrets/{secret}" in word for word in words), (service, secret)


@table("name", FILES)
def test_tls_and_authentication_are_on(name):
    for keys in read(name)["services"].values():
        command = " ".join(keys["command"])
        if command.startswith("flower-superlink"):
            assert "--enable-supernode-auth" in command
            assert "--ssl-keyfile" in command
            assert "--insecure" not in command
        if command.startswith("flower-supernode"):
            assert "--root-certificates" in command
            assert "--auth-supernode-private-key" in command
            assert "--insecure" not in command
        if "superexec" in command.split()[0]:
            assert "--superexec-auth-secret-file" in command


def has_compose() -> bool:
    command = ["docker", "compose", "version"]
    return shutil.which("docker") is not None and not subprocess.run(command, capture_output=True).returncode


def assert_compose_takes(folder: Path, *names: str) -> None:
    """`docker compose config` of files in the checkout, with the .env that `init` made in `folder`."""
    files = [word for name in names for word in ("--file", str(ROOT / name))]
    command = ["docker", "compose", "--env-file", str(folder / ".env"), *files, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Marked as well as not: the fast tests' machine may lack Docker where the other tests' machine has it.
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.container)])
def test_compose_takes_all_files(tmp_path, again):
    if not has_compose():
        pytest.skip("`docker compose` is not installed")
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    initialise(here, num_clients=3)
    assert_compose_takes(here, "docker-compose.yml")
    assert_compose_takes(here, "docker-compose.yml", "docker-compose.gpu.yml")
    initialise(elsewhere, num_clients=2, address="fl.example.org")
    assert_compose_takes(elsewhere / "server", "deploy/server.yml")
    assert_compose_takes(elsewhere / "client-1", "deploy/client.yml")
    assert_compose_takes(elsewhere / "client-1", "deploy/client.yml", "deploy/client.gpu.yml")


# What `init` makes


def test_init_makes_everything_once(tmp_path):
    folder = tmp_path / "deployment"
    initialise(folder, num_clients=2, hosts=["fl.example.org", "10.0.0.7"])
    private = [path for path in folder.rglob("*") if path.is_file() and "key" in path.name and path.suffix != ".pub"]
    assert {"ca-key.pem", "server-key.pem", "node.key", "superexec.key"} <= {path.name for path in private}
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {"localhost", "superlink", "fl.example.org", "10.0.0.7"} <= set(
        hosts_of(read_certificate(folder / "server" / "server.pem"))
    )
    assert days_left(read_certificate(folder / "ca.pem")) > 300
    before = {path: path.read_bytes() for path in private}
    notes = initialise(folder, num_clients=3)  # one client more
    assert {path: path.read_bytes() for path in private} == before
    assert any("client-2" in note for note in notes)
    assert open_deployment(folder).num_clients == 3
    assert "PRIVATE" not in (folder / ".env").read_text()


def read_env(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))


def test_every_machine_gets_a_folder_with_all_that_it_needs_and_no_more(tmp_path):
    """The server's own secrets stay out of the clients' folders, and a client's out of everybody else's."""
    folder = tmp_path / "d"
    initialise(folder, num_clients=2, address="fl.example.org", port=9000)
    assert "fl.example.org" in hosts_of(read_certificate(folder / "server" / "server.pem"))
    for place in ("server", "client-0", "client-1"):
        needed = yaml.safe_load((folder / place / "compose.yml").read_text())["secrets"]
        assert all((folder / place / secret["file"]).is_file() for secret in needed.values()), place
    assert {path.name for path in (folder / "client-1").iterdir()} == {
        *("ca.pem", "node.key", "node.key.pub", "superexec.key", "data", ".env", "compose.yml", "gpu.yml")
    }
    own = read_env(folder / "client-1" / ".env")
    assert (own["FEDMOM_CLIENT"], own["FEDMOM_CLIENTS"], own["FEDMOM_SERVER"]) == ("1", "2", "fl.example.org:9000")
    assert read_env(folder / "server" / ".env")["FEDMOM_CONTROL_PORT"] == "9001"
    assert "127.0.0.1:9001" in (folder / "flower" / "config.toml").read_text()
    assert open_deployment(folder).files == [folder / "server" / "compose.yml"]


def test_settings_that_are_not_given_stay(tmp_path):
    folder = tmp_path / "d"
    initialise(folder, num_clients=2, address="fl.example.org", port=9000, name="ours", gpu=True)
    first = read_env(folder / ".env")
    with open(folder / ".env", "a") as file:
        file.write("# mine\nFEDMOM_MEMORY=8g\n")
    initialise(folder, num_clients=3)
    assert "# mine\nFEDMOM_MEMORY=8g\n" in (folder / ".env").read_text()
    first["FEDMOM_MEMORY"] = "8g"
    assert read_env(folder / ".env") == {**first, "FEDMOM_CLIENTS": "3"}
    assert read_env(folder / "client-2" / ".env")["COMPOSE_PROJECT_NAME"] == "ours-client-2"
    assert read_env(folder / "client-2" / ".env")["COMPOSE_FILE"] == "compose.yml:gpu.yml"


def test_a_client_may_keep_its_key_to_itself(tmp_path):
    """The public half alone is enough here."""
    own = tmp_path / "d" / "client-0"
    own.mkdir(parents=True)
    (own / "node.key.pub").write_text("ecdsa-sha2-nistp384 AAAA\n")
    initialise(tmp_path / "d", num_clients=1, address="fl.example.org")
    assert not (own / "node.key").exists()
    assert (own / "node.key.pub").read_text() == "ecdsa-sha2-nistp384 AAAA\n"


def test_git_leaves_a_deployment_alone(tmp_path):
    """`fedmom deploy init` makes it in the checkout, and `git add --all` would take the CA's key along."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    initialise(tmp_path / "deployment", num_clients=1)
    done = subprocess.run(["git", "-C", tmp_path, "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_flower_finds_the_ca_of_a_deployment_that_was_moved(tmp_path):
    initialise(tmp_path / "before", num_clients=1)
    (tmp_path / "before").rename(tmp_path / 'an "other" place')
    moved = open_deployment(tmp_path / 'an "other" place')
    write_flower_config(moved)
    flower = tomllib.loads((moved.folder / "flower" / "config.toml").read_text())
    assert Path(flower["superlink"]["deployment"]["root-certificates"]).samefile(moved.folder / "ca.pem")


def test_settings_of_an_older_deployment_name_what_is_missing(tmp_path):
    initialise(tmp_path, num_clients=1)
    lines = (tmp_path / ".env").read_text().splitlines(keepends=True)
    (tmp_path / ".env").write_text("".join(line for line in lines if "CONTROL_PORT" not in line))
    with pytest.raises(InputError, match=r"\.env: FEDMOM_CONTROL_PORT = '': must be.*fedmom deploy init"):
        write_flower_config(open_deployment(tmp_path))


def test_a_name_that_ends_like_a_servers_stays(tmp_path):
    initialise(tmp_path, num_clients=1, name="my-server")
    initialise(tmp_path)
    assert read_env(tmp_path / ".env")["COMPOSE_PROJECT_NAME"] == "my-server"
    initialise(tmp_path / "elsewhere", num_clients=1, name="my-server", address="fl.example.org")
    initialise(tmp_path / "elsewhere")
    assert read_env(tmp_path / "elsewhere" / ".env")["COMPOSE_PROJECT_NAME"] == "my-server-server"


@table("address", ["fd00:0::1", "[fd00::1]"])
def test_an_ipv6_address_is_told_from_its_port(tmp_path, address):
    initialise(tmp_path, num_clients=1, address=address)
    initialise(tmp_path)
    assert read_env(tmp_path / "client-0" / ".env")["FEDMOM_SERVER"] == "[fd00::1]:8000"
    assert "fd00::1" in hosts_of(read_certificate(tmp_path / "server" / "server.pem"))


def test_half_a_nodes_key(tmp_path):
    """The public half is made anew; the private one cannot be, and a client on this machine needs it."""
    initialise(tmp_path, num_clients=1)
    key, public = tmp_path / "client-0" / "node.key", tmp_path / "client-0" / "node.key.pub"
    before = public.read_text()
    public.unlink()
    initialise(tmp_path)
    assert public.read_text() == before
    key.unlink()
    with pytest.raises(InputError, match=r"node\.key: is missing.* move node\.key\.pub away"):
        initialise(tmp_path)


def test_an_address_that_the_certificate_does_not_know_is_refused(tmp_path):
    initialise(tmp_path / "d", num_clients=1)
    with pytest.raises(InputError, match=r"server\.pem: is not made out for fl\.example\.org; move it and server-key"):
        initialise(tmp_path / "d", num_clients=1, address="fl.example.org")


def test_half_an_authority_is_not_made_whole_by_another(tmp_path):
    initialise(tmp_path / "d", num_clients=1)
    (tmp_path / "d" / "ca-key.pem").unlink()
    with pytest.raises(InputError, match=r"has ca\.pem but not its pair"):
        initialise(tmp_path / "d", num_clients=1)


@table(
    "arguments, words",
    [
        (["up", "--dir", "nowhere"], ["--dir nowhere", "fedmom deploy init"]),
        (["run", "--dir", "nowhere"], ["CONFIG is missing"]),
        (["run", "x.toml", "--dir", "nowhere"], ["--dir nowhere"]),
        (["init", "--host", "ä b"], ["--host", "must be a name in ASCII or an IP address"]),
        (["init", "--host", ""], ["--host ''", "must be a name"]),
        (["init", "--address", "fl.example.org:9000"], ["--address 'fl.example.org:9000'", "without a port (--port"]),
        (["init", "--address", "https://fl.example.org"], ["--address 'https://fl.example.org'", "must be a name"]),
        (["init", "--name", "Ours"], ["--name 'Ours'", "a-z"]),
        (["status", "--dir", "wrong"], ["wrong/.env: FEDMOM_CLIENTS = 'abc': must be a whole number"]),
        (["init", "--dir", "wrong"], ["wrong/.env: FEDMOM_CLIENTS = 'abc': must be a whole number"]),
        (["init", "--dir", "wrong", "--clients", "2"], ["wrong/.env: FEDMOM_PORT = '-1': must be a whole number"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / ".env").write_text("FEDMOM_CLIENTS=abc\nFEDMOM_PORT=-1\n")
    with pytest.raises(InputError) as error:
        CliRunner().invoke(main.app, ["deploy", *arguments], catch_exceptions=False, standalone_mode=False)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_dry_run_prints_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "deployment"
    initialise(folder, num_clients=3)
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("something ran"))
    where = ["--dir", str(folder), "--dry-run"]
    result = CliRunner().invoke(main.app, ["deploy", "down", *where], catch_exceptions=False)
    assert "docker compose" in result.output
    assert " down " in result.output
    result = CliRunner().invoke(main.app, ["deploy", "run", "configs/deploy.toml", *where], catch_exceptions=False)
    for words in ("docker build ", "docker compose ", "client-2/node.key.pub deployment", "flwr run "):
        assert words in result.output
