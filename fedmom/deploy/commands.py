"""The docker and flwr commands of a deployment: run here, or only printed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmom.deploy.deployment import CONNECTION, Deployment
from fedmom.errors import InputError, missing_package

_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_IDENTITY = ("FEDMOM_ID", "FEDMOM_CLIENTS", "FEDMOM_USER", "FEDMOM_PORT", "FEDMOM_CONTROL_PORT", "FEDMOM_SERVER")


class CommandError(InputError):
    """A command of Docker's or Flower's failed: what it was, and the last thing it said."""


class Commands:
    """Runs commands for one deployment; with `dry` it prints what would change something instead of doing it."""

    def __init__(self, deployment: Deployment, *, dry: bool = False) -> None:
        self.deployment, self.dry = deployment, dry
        # Which project it is, and of what settings, is said by the deployment's own files, whatever the shell has.
        own = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
        own |= {name: deployment.settings[name] for name in _IDENTITY if name in deployment.settings}
        self.environment = {**own, **_FLOWER, "FLWR_HOME": str(deployment.folder.resolve() / "flower")}

    def environment_of(self, command: Sequence[str]) -> dict[str, str]:
        """What a command sees: Flower's talk to this machine alone, which is behind no proxy."""
        if Path(command[0]).name != "flwr":
            return self.environment
        return {name: value for name, value in self.environment.items() if not name.lower().endswith("_proxy")}

    def compose(self, *words: str) -> list[str]:
        """`docker compose …` for what this machine runs."""
        files = [word for path in self.deployment.files for word in ("--file", str(path))]
        place = ("--project-name", self.deployment.project_name, "--project-directory", str(self.deployment.project))
        return ["docker", "compose", *place, *files, *words]

    @staticmethod
    def flwr(*words: str) -> list[str]:
        """`flwr …`, of fedmom's own environment where it is there, else of the PATH; InputError for neither."""
        beside = Path(sys.executable).with_name("flwr")
        if not beside.exists() and shutil.which("flwr") is None:
            raise _missing("flwr")
        return [str(beside) if beside.exists() else "flwr", *words]

    def do(self, command: Sequence[str], *, quiet: bool = True, changes: bool = True, seconds: float = 600) -> str:
        """Run to the end and give standard output; CommandError where it fails.

        quiet: keep its output; else it goes to the terminal. changes: whether a dry run leaves it out.
        """
        if self.dry and changes:
            print(self.written(command))
            return ""
        try:
            done = subprocess.run(
                command,
                env=self.environment_of(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if quiet else None,
                stderr=subprocess.PIPE if quiet else None,
                text=True,
                timeout=seconds,
            )
        except FileNotFoundError:
            raise _missing(command[0]) from None
        except subprocess.TimeoutExpired:
            raise CommandError(f"{self.written(command)}: not done after {seconds:g} s") from None
        if done.returncode:
            said = f"{done.stdout or ''}\n{done.stderr or ''}"
            if list(command[:2]) == ["docker", "compose"] and "docker --help" in said:  # docker takes it for an option
                raise InputError("docker compose: is not installed here; see https://docs.docker.com/compose/install/")
            raise CommandError(f"{self.written(command)}: failed ({_last_line(said) or f'status {done.returncode}'})")
        return done.stdout or ""

    def json(self, command: Sequence[str]) -> dict[str, Any]:
        """What a command of Flower's answers with --format json; CommandError where it failed."""
        text = self.do([*command, "--format", "json"], changes=False, seconds=300)
        try:
            answer = json.loads(text[text.index("{") :])
        except ValueError:
            raise CommandError(f"{self.written(command)}: answered no JSON ({_last_line(text)})") from None
        if not answer.get("success"):
            said = " ".join(str(answer.get("error-message") or "failed").split())
            raise CommandError(f"{self.written(command)}: {said}")
        return dict(answer)

    def start(self, command: Sequence[str]) -> "subprocess.Popen[str]":
        """A process that goes on beside this one and is read from, in a session of its own: Ctrl-C is for us."""
        try:
            return subprocess.Popen(
                command,
                env=self.environment_of(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise _missing(command[0]) from None

    def written(self, command: Sequence[str]) -> str:
        """The command as one would type it."""
        home = f"FLWR_HOME={shlex.quote(self.environment['FLWR_HOME'])} "
        short = [Path(command[0]).name, *command[1:]]
        return (home if short[0] == "flwr" else "") + shlex.join(short)


def build_command(app: Path, image: str, arguments: Iterable[str] = ()) -> list[str]:
    """`docker build` of the checkout; `arguments` as NAME=VALUE."""
    given = [word for argument in arguments for word in ("--build-arg", argument)]
    return ["docker", "build", "--network=host", "--tag", image, *given, str(app)]


def image_of(deployment: Deployment, environment: Mapping[str, str] = os.environ) -> str:
    """The image's name: the environment's, the deployment's, or fedmom."""
    return environment.get("FEDMOM_IMAGE") or deployment.settings.get("FEDMOM_IMAGE") or "fedmom"


def superlink(*words: str) -> list[str]:
    """A flwr command with the connection's name at its end."""
    return Commands.flwr(*words, CONNECTION)


def _missing(program: str) -> InputError:
    if Path(program).name == "docker":
        return InputError("docker: is not installed here; see https://docs.docker.com/engine/install/")
    return missing_package("fedmom deploy", Path(program).name, "flower")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
