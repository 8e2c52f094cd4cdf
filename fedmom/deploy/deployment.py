"""A deployment that was initialised: its folder, and the settings in its .env files."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedmom.errors import InputError
from fedmom.machine.files import write_text

CONNECTION = "deployment"  # the SuperLink's name in Flower's config


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
        return setting_of(self.folder / ".env", self.settings, "FEDMOM_CONTROL_PORT")

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
    settings = read_env(folder / ".env")
    setting_of(folder / ".env", settings, "FEDMOM_CLIENTS")
    return Deployment(folder, settings)


def setting_of(path: Path, settings: Mapping[str, str], name: str) -> int:
    """A setting that is a number of clients or of a port; InputError names the file, `path`, where it is none."""
    text = settings.get(name, "")
    if not text.isdecimal() or not 1 <= int(text) <= 65534:
        raise InputError(
            f"{path}: {name} = {text!r}: must be a whole number from 1 to 65534; where there is no such line, "
            "`fedmom deploy init` adds it"
        )
    return int(text)


def read_env(path: Path) -> dict[str, str]:
    """The settings of an .env file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def write_env(path: Path, settings: Mapping[str, str]) -> dict[str, str]:
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
    return read_env(path)
