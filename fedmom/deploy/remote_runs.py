"""Run folders in the volume of the server's app: read while they grow, fetched whole, brought back for a resume."""

import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedmom.deploy.commands import CommandError, Commands
from fedmom.errors import InputError
from fedmom.records.files import CHECKPOINT, CONFIG, ENDED, ROUNDS, read_about

VOLUME = "/runs"  # where the server's app has it
SERVICE = "serverapp"
_MARK = "-- end of the rounds --"


class Look(NamedTuple):
    """What is new in a run folder."""

    records: list[dict[str, Any]]
    ended: dict[str, str] | None  # how the run ended, once it has


class RemoteRuns:
    """Run folders by name, through `docker exec` in the container of the server's app."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self._container = ""

    def look(self, name: str, seen: int) -> Look | None:
        """The records after the first `seen`, and how the run ended; None while the container is away."""
        folder = f"{VOLUME}/{name}"
        script = f'tail -n "+$1" {ROUNDS}; echo "{_MARK}"; cat {ENDED}'
        try:
            text = self._execute("sh", "-c", f"cd {folder} && {{ {script}; }} 2>/dev/null || true", "sh", str(seen + 1))
        except CommandError:
            self._container = ""  # it may come back as another one
            return None
        lines, _, ended = text.partition(_MARK)
        records = []
        for line in lines.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # it is being written
                break
        try:
            return Look(records, json.loads(ended))
        except ValueError:
            return Look(records, None)

    def config(self, name: str) -> str | None:
        """The text of a run folder's config.toml; None while there is none."""
        try:
            return self._execute("cat", f"{VOLUME}/{name}/{CONFIG}") or None
        except CommandError:
            return None

    def check_has(self, packages: Mapping[str, str]) -> None:
        """InputError where the image lacks one of `packages` ({package: what names it})."""
        script = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
        missing = self._execute("python3", "-c", script, *packages).split() if packages else []
        if missing:
            raise InputError(
                f"{packages[missing[0]]}: the image has no package {missing[0]}; remove the image, and build it anew "
                f"by `fedmom deploy up --build-arg PACKAGES={missing[0]}`"
            )

    def busy(self, name: str) -> bool:
        """Whether a process of the server's app has the run folder: it holds a lock on it (fedmom.records.folder)."""
        folder = f"{VOLUME}/{name}"
        script = f"test -d {folder} || exit 0; flock --nonblock {folder} true || echo busy"
        return self._execute("sh", "-c", script).strip() == "busy"

    def fetch(self, name: str, target: Path) -> bool:
        """Copy a run folder to `target`, file by file, each whole or not at all.

        False where there is none, or where `target` is further than it; InputError where the two are of two runs.
        """
        try:
            self._execute("test", "-d", f"{VOLUME}/{name}")
        except CommandError as error:
            if "is not running" in str(error) or "no such container" in str(error).lower():
                raise
            return False
        data = self._pipe(["tar", "-C", f"{VOLUME}/{name}", "-cf", "-", "."])
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".fetched-") as aside:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                archive.extractall(aside, filter="data")
            if _is_further(target, Path(aside), name):
                return False
            # What a resume needs last: a kill in between leaves an older, whole folder.
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == CONFIG):
                if path.is_file() and path.name != ENDED and not path.name.startswith("."):
                    os.replace(path, target / path.name)
        return True

    def bring(self, source: Path, name: str) -> None:
        """Copy a run folder from here into the volume, owned by whom the app runs as."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in sorted(source.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    archive.add(path, path.name)
        self._execute("mkdir", "-p", f"{VOLUME}/{name}")
        self._pipe(["tar", "-C", f"{VOLUME}/{name}", "--no-same-owner", "-xf", "-"], packed.getvalue())

    def _execute(self, *words: str) -> str:
        return self.commands.do(["docker", "exec", self._id(), *words], changes=False, seconds=300)

    def _pipe(self, words: list[str], data: bytes | None = None) -> bytes:
        command = ["docker", "exec", "-i", self._id(), *words]
        done = subprocess.run(command, input=data or b"", capture_output=True, timeout=600)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise CommandError(f"{self.commands.written(command)}: failed ({said})")
        return done.stdout

    def _id(self) -> str:
        if not self._container:
            text = self.commands.do(self.commands.compose("ps", "--quiet", SERVICE), changes=False).split()
            if not text:
                raise CommandError(f"{SERVICE}: is not running; `fedmom deploy up` starts it")
            self._container = text[0]
        return self._container


def _is_further(here: Path, there: Path, name: str) -> bool:
    """Whether the checkpoint here is a later one than the fetched one; InputError where they are of two runs."""
    try:
        mine = read_about(here / CHECKPOINT)
    except InputError:  # none, or a broken one: the other is what there is
        return False
    if not (there / CHECKPOINT).exists():
        return True
    theirs = read_about(there / CHECKPOINT)
    if mine["run_id"] != theirs["run_id"]:
        raise InputError(f"{here}: is another run than the server's of the name {name!r}; rename the folder here")
    return bool(mine["round"] > theirs["round"])


def checked_name(path: Path) -> str:
    """The name of a local run folder, as it will be in the volume; InputError where a shell would misread it."""
    name = path.resolve().name
    if not name or name.startswith((".", "-")) or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise InputError(f"--out {path}: its last part must be letters, digits, '.', '_' and '-'")
    return name
