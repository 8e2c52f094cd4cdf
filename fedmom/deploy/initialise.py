"""What `fedmom deploy init` leaves on disk: one folder with everything that is not in the checkout.

deployment/
  ca.pem, ca-key.pem    the authority; the key never leaves this machine
  compose.yml, .env     the federation on this machine
  flower/config.toml    FLWR_HOME of the `flwr` command
  started/              what runs were started with, and their numbers
  server/               the server's certificate, keys and data/
  client-0/, …          each client's keys and data/

With --address, for clients on other machines, compose.yml and .env lie in server/ and in every client's folder as well:
those are the projects then, and each folder is all that its machine needs.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedmom.deploy.certificates import (
    days_left,
    make_authority,
    make_node_key,
    make_public_half,
    make_secret,
    make_server_certificate,
    read_certificate,
)
from fedmom.deploy.checks import check_parts, checked_host, reachable_host
from fedmom.deploy.commands import CONNECTION
from fedmom.deploy.compose import client, client_gpu_override, federation, gpu_override, server
from fedmom.errors import InputError
from fedmom.machine.files import write_text

IMAGE_USER = 10001  # the image's own; where root deploys, containers still run as nobody in particular
DEFAULTS = {
    "FEDMOM_CLIENTS": "3",
    "FEDMOM_PORT": "8000",
    "FEDMOM_GPU": "0",
    "FEDMOM_SERVER": "",
}
_SERVERS = "-server"  # the end of the server's project's name, where clients have projects of their own
_LOCAL = ("localhost", "127.0.0.1", "superlink", "gate")


class Deployment(NamedTuple):
    """An initialised deployment."""

    folder: Path
    settings: dict[str, str]  # of .env

    @property
    def num_clients(self) -> int:
        return int(self.settings["FEDMOM_CLIENTS"])

    @property
    def address(self) -> str:
        """HOST:PORT where clients on other machines find the server; empty where all are on this one."""
        return self.settings.get("FEDMOM_SERVER", "")

    @property
    def control_port(self) -> int:
        """The SuperLink's, on loopback: where `flwr` finds it."""
        return _number(self.folder / ".env", self.settings, "FEDMOM_CONTROL_PORT")

    @property
    def identity(self) -> str:
        """What its containers and volumes are labelled with; empty where it is older than such labels."""
        return self.settings.get("FEDMOM_ID", "")

    @property
    def project_name(self) -> str:
        """Of the Compose project that this machine runs."""
        return self.settings.get("COMPOSE_PROJECT_NAME", "fedmom")

    @property
    def project(self) -> Path:
        """The folder whose compose.yml and .env this machine runs."""
        return self.folder / "server" if self.address else self.folder

    @property
    def files(self) -> list[Path]:
        """The Compose files that this machine runs."""
        gpu = not self.address and self.settings.get("FEDMOM_GPU", "0") == "1"
        return [self.project / "compose.yml", *([self.project / "gpu.yml"] if gpu else [])]

    def node_keys(self) -> list[Path]:
        """The clients' public keys, in their order."""
        return [self.folder / f"client-{c}" / "node.key.pub" for c in range(self.num_clients)]


def open_deployment(folder: Path) -> Deployment:
    """InputError where there is none."""
    if not (folder / ".env").is_file():
        raise InputError(f"--dir {folder}: is no deployment (it has no .env); `fedmom deploy init` makes one")
    settings = _read_env(folder / ".env")
    _number(folder / ".env", settings, "FEDMOM_CLIENTS")
    return Deployment(folder, settings)


def initialise(
    folder: Path,
    *,
    num_clients: int | None = None,
    address: str | None = None,
    port: int | None = None,
    hosts: Sequence[str] = (),
    name: str | None = None,
    gpu: bool | None = None,
) -> list[str]:
    """Make what is missing of a deployment, keep the rest, and say which is which, one line each.

    None leaves a setting as it was, or takes what DEFAULTS has. `address`: the server's name or IP as clients on other
    machines reach it; empty for a federation on this one. `port`: the one that clients reach the server at, the next
    one being for `flwr` on this machine; without an address that is `port` itself. `hosts`: more names for the
    server's certificate.
    """
    settings = _settings(folder / ".env", num_clients, address, port, name, gpu)
    address = _host_of(settings["FEDMOM_SERVER"])
    names = [*([address] if address else []), *_LOCAL, *(checked_host("--host", host) for host in hosts)]
    num_clients = int(settings["FEDMOM_CLIENTS"])
    check_parts(
        folder, num_clients, names, elsewhere=bool(address)
    )  # before the first write: what fails leaves nothing
    notes = list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # it holds the CA's key
    if not (folder / ".gitignore").exists():  # it may lie in a checkout
        write_text(folder / ".gitignore", "*\n")
    ca, ca_key = folder / "ca.pem", folder / "ca-key.pem"
    if not ca.exists():
        make_authority(ca, ca_key)
        notes.append(f"made {ca} and {ca_key}")
    notes.append(_expiry(ca))
    _server(folder, names, notes)
    for c in range(num_clients):
        _client(folder / f"client-{c}", ca, notes)
    _own_secrets(folder)
    _write_projects(folder, settings)
    write_flower_config(Deployment(folder, settings))
    return notes


def _settings(
    env: Path, num_clients: int | None, address: str | None, port: int | None, name: str | None, gpu: bool | None
) -> dict[str, str]:
    """What goes into .env: as asked for, else as it was, else DEFAULTS. InputError names what cannot be."""
    before = {**DEFAULTS, **(_read_env(env) if env.is_file() else {})}
    num_clients = _number(env, before, "FEDMOM_CLIENTS") if num_clients is None else num_clients
    port = _number(env, before, "FEDMOM_PORT") if port is None else port
    gpu = before["FEDMOM_GPU"] == "1" if gpu is None else gpu
    address = _host_of(before["FEDMOM_SERVER"]) if address is None else address
    if address:
        address = reachable_host("--address", address.removeprefix("[").removesuffix("]"))
    # A new deployment is told from all others: by this, and by a name that has some of it. One that is older than that
    # keeps the name it has, and no identity.
    identity = before.get("FEDMOM_ID", "") if env.is_file() else secrets.token_hex(8)
    if name is None:
        name = before.get("COMPOSE_PROJECT_NAME", f"fedmom-{identity[:6]}" if identity else "fedmom")
        if before["FEDMOM_SERVER"]:
            name = name.removesuffix(_SERVERS)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):  # Compose's rule
        raise InputError(f"--name {name!r}: must be of a-z, 0-9, '-' and '_', and begin with a letter or digit")
    return {
        "FEDMOM_CLIENTS": str(num_clients),
        "FEDMOM_USER": "{}:{}".format(*_user()),
        "FEDMOM_ID": identity,
        "COMPOSE_PROJECT_NAME": f"{name}{_SERVERS}" if address else name,
        "FEDMOM_PORT": str(port),
        "FEDMOM_CONTROL_PORT": str(port + 1 if address else port),
        "FEDMOM_GPU": str(int(gpu)),
        "FEDMOM_SERVER": f"{f'[{address}]' if ':' in address else address}:{port}" if address else "",
    }


def _write_projects(folder: Path, settings: dict[str, str]) -> None:
    """The Compose files and their .env: of the federation, and with an address of the server and of every client."""
    num_clients, name = int(settings["FEDMOM_CLIENTS"]), settings["COMPOSE_PROJECT_NAME"].removesuffix(_SERVERS)
    every = _write_env(folder / ".env", settings)
    write_text(folder / "compose.yml", federation(num_clients))
    write_text(folder / "gpu.yml", gpu_override(num_clients))
    if not settings["FEDMOM_SERVER"]:
        return
    _write_env(folder / "server" / ".env", every)
    write_text(folder / "server" / "compose.yml", server())
    for c in range(num_clients):
        own = {
            "COMPOSE_PROJECT_NAME": f"{name}-client-{c}",
            "COMPOSE_FILE": "compose.yml:gpu.yml" if settings["FEDMOM_GPU"] == "1" else "compose.yml",
            "FEDMOM_CLIENT": str(c),
            **{key: settings[key] for key in ("FEDMOM_ID", "FEDMOM_SERVER", "FEDMOM_CLIENTS", "FEDMOM_USER")},
        }
        _write_env(folder / f"client-{c}" / ".env", own)
        write_text(folder / f"client-{c}" / "compose.yml", client())
        write_text(folder / f"client-{c}" / "gpu.yml", client_gpu_override())


def write_flower_config(deployment: Deployment) -> None:
    """Flower's own configuration: where the SuperLink is, and by which CA it is known, in full: folders are moved."""
    ca = (deployment.folder / "ca.pem").resolve()
    file = deployment.folder / "flower" / "config.toml"
    file.parent.mkdir(exist_ok=True)
    write_text(
        file,
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{deployment.control_port}"\nroot-certificates = {json.dumps(str(ca))}\n',
    )


def certificate_notes(deployment: Deployment) -> list[str]:
    """When the CA and the server's certificate expire."""
    return [_expiry(path) for path in (deployment.folder / "ca.pem", deployment.folder / "server" / "server.pem")]


def _server(folder: Path, hosts: list[str], notes: list[str]) -> None:
    server, ca = folder / "server", folder / "ca.pem"
    certificate, key = server / "server.pem", server / "server-key.pem"
    (server / "data").mkdir(parents=True, exist_ok=True)
    if not certificate.exists():
        make_server_certificate(certificate, key, ca=ca, ca_key=folder / "ca-key.pem", hosts=hosts)
        notes.append(f"made {certificate} and {key} for {', '.join(dict.fromkeys(hosts))}")
    notes.append(_expiry(certificate))
    _copy_ca(ca, server / "ca.pem")
    _secret(server / "superexec.key", notes)


def _client(folder: Path, ca: Path, notes: list[str]) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    key, public = folder / "node.key", folder / "node.key.pub"
    if key.exists() and not public.exists():
        make_public_half(key)
        notes.append(f"made {public} of {key.name}")
    elif not public.exists():
        make_node_key(key)
        notes.append(f"made {key} and {public.name}")
    _copy_ca(ca, folder / "ca.pem")
    _secret(folder / "superexec.key", notes)


def _secret(path: Path, notes: list[str]) -> None:
    if not path.exists():
        make_secret(path)
        notes.append(f"made {path}")


def _copy_ca(ca: Path, target: Path) -> None:
    if not target.exists() or target.read_bytes() != ca.read_bytes():
        shutil.copyfile(ca, target)


def _expiry(path: Path) -> str:
    certificate = read_certificate(path)
    days = days_left(certificate)
    end = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    if days < 0:
        return f"{path}: EXPIRED on {end}; docs/deployment.md says how to renew it"
    soon = ": renew it soon (docs/deployment.md says how)" if days < 30 else ""
    return f"{path}: valid until {end}, {days} days{soon}"


def _user() -> tuple[int, int]:
    """Who the containers run as: whoever owns the secrets, but never root."""
    uid, gid = os.getuid(), os.getgid()
    return (uid, gid) if uid else (IMAGE_USER, IMAGE_USER)


def _own_secrets(folder: Path) -> None:
    """Where root deploys, the files that containers mount belong to the containers' user; the CA's key stays root's."""
    if os.getuid():
        return
    for place in (folder / "server", *folder.glob("client-*")):
        for path in (place / "ca.pem", place / "server.pem", *place.glob("*.key"), place / "server-key.pem"):
            if path.exists():
                os.chown(path, IMAGE_USER, IMAGE_USER)


def _host_of(server: str) -> str:
    """The host of HOST:PORT, without the brackets of IPv6; empty for an empty one."""
    return server.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _number(path: Path, settings: Mapping[str, str], name: str) -> int:
    text = settings.get(name, "")
    if not text.isdecimal() or not 1 <= int(text) <= 65534:
        raise InputError(
            f"{path}: {name} = {text!r}: must be a whole number from 1 to 65534; where there is no such line, "
            "`fedmom deploy init` adds it"
        )
    return int(text)


def _read_env(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _write_env(path: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Write settings (no secrets), each in its old line; lines that a user added stay. Gives all settings."""
    first = "# Settings of the Compose file beside; no secrets. `fedmom deploy init` keeps what you add."
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else [first]
    missing = dict(settings)
    for at, line in enumerate(lines):
        key = line.partition("=")[0].strip()
        if key in settings:
            lines[at] = f"{key}={settings[key]}"
            missing.pop(key, None)
    write_text(path, "\n".join([*lines, *(f"{key}={value}" for key, value in missing.items())]) + "\n")
    return _read_env(path)
