"""A run on a deployment, from its start to its folder on this machine."""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fedmom.config.keys import Config
from fedmom.config.load import load, parse_sets, replace, to_toml
from fedmom.config.resolve import resolve
from fedmom.deploy import federation
from fedmom.deploy.bundle import DATA
from fedmom.deploy.commands import CONNECTION, CommandError, Commands, superlink
from fedmom.deploy.remote_runs import VOLUME, RemoteRuns
from fedmom.errors import InputError
from fedmom.machine.files import write_text
from fedmom.method.state import ClientState
from fedmom.records.files import CHECKPOINT, CONFIG, read_about
from fedmom.records.resume import resume_config
from fedmom.runs.callbacks import Callback, Start

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_END = 60.0  # of the server's app, once its run is over or was stopped
_LOOKS_BETWEEN_QUESTIONS = 15  # to Flower, whether the run still is: seconds of a core, most of them imports
_EMPTY = ClientState({}, {}, {})
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
# Of what the server's app prints, its rounds are read from the folder, and its last table is printed here.
_ITS_ROUNDS = re.compile(r"round \d+/\d+ · ")
_BOXES = (" ", "│", "╭", "╰", "Traceback", "ERROR")  # what follows is a traceback, or Flower's own words on an error
_ITS_TROUBLE = re.compile(r"round \d+: ")
_CHATTER = re.compile(
    r"Using SuperLink|(INFO|DEBUG)\s*:|Successfully installed |fedmom: no picture|curves: |run +rounds |-{3,} "
)


class Ended(NamedTuple):
    """How a run on a deployment ended."""

    status: str  # done, diverged, failed, interrupted, or refused (the configuration was wrong)
    message: str


def config_to_send(
    source: Path | None, sets: Iterable[str], *, name: str, resume: Path | None
) -> tuple[Config, Config]:
    """(the configuration for the run, the same resolved): checked here, before a node is asked for anything."""
    if resume is not None and source is None:
        source = resume / CONFIG
    if source is None:
        raise InputError("CONFIG is missing: name a TOML file (configs/ has examples), or --resume DIR")
    changes = {**parse_sets(sets), "data.data-dir": DATA}
    config = load(source, changes).config
    if resume is not None:
        settled = resume_config(resume, source, changes).config
    else:
        settled = resolve(load(source, changes)).config
    place = f"{VOLUME}/{name}"
    where = {"out": "", "resume": place} if resume is not None else {"out": place, "resume": ""}
    # What was recorded of a run names its backend; the nodes must see the keys that a new run gave them.
    return replace(replace(config, "run", backend="engine"), "run", **where), settled


class Following:
    """One run: started, followed, stopped by Ctrl-C, fetched."""

    def __init__(self, commands: Commands, app: Path, name: str, target: Path, say: Callable[[str], None]) -> None:
        self.commands, self.app, self.name, self.target, self.say = commands, app, name, target, say
        self.remote = RemoteRuns(commands)
        self.run_id = ""
        self.records: list[dict] = []
        self._trouble = ""
        self._away = False  # and that has been said
        self.stopped = False

    def start(self, config: Config) -> None:
        """Hand the app and the configuration to the SuperLink."""
        # A file for each run: `flwr` reads it seconds later, when another command may have written the next one's.
        file = self._started(".toml")
        file.parent.mkdir(exist_ok=True)
        write_text(file, to_toml(config, "A run that was started, as the nodes got it."))
        command = Commands.flwr("run", str(self.app.resolve()), CONNECTION, "--run-config", str(file))
        if self.commands.dry:
            self.commands.do(command)
            return
        self.run_id = str(self.commands.json(command)["run-id"])
        write_text(self._started(".id"), self.run_id)

    def take_up(self) -> bool:
        """Whether the server is still at this run, which whoever started it follows no more: it is followed then.

        Raises InputError where it is at a run of this name that was not started from here.
        """
        file = self._started(".id")
        self.run_id = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        deadline = time.monotonic() + _SECONDS_TO_END
        while self.remote.busy(self.name):
            status, _ = self._ask() if self.run_id else ("", "")
            if status and not status.startswith("finished"):
                return True
            if time.monotonic() > deadline:
                raise InputError(f"--resume {self.target}: the server runs it already; it was not started from here")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return False

    def to_the_end(self, callbacks: Iterable[Callback], *, done: int = 0) -> Ended:
        """Tell `callbacks` of every round after `done`; fetch the folder; give the end. Ctrl-C stops the run."""
        callbacks, seen, started = list(callbacks), done, False
        log = self._log()
        try:
            looks = 0
            while True:
                look = self.remote.look(self.name, seen)
                if look is not None and not started and (look.records or look.ended):
                    started = self._tell_start(callbacks, seen + 1)
                for record in look.records if look else []:
                    seen += 1
                    self.records.append(record)
                    for callback in callbacks:
                        callback.on_round(record, _EMPTY)
                looks += 1
                over = log.poll() is not None or (look is not None and look.ended is not None)
                if over or looks % _LOOKS_BETWEEN_QUESTIONS == 0:
                    status, details = self._ask()
                    if not status and self._is_taken_down():
                        ended = Ended("failed", f"the deployment was taken down after round {seen}")
                        break
                    if status.startswith("finished"):
                        ended = self._ended(status, details)
                        break
                    if log.poll() is not None:  # the SuperLink was away for a while
                        log = self._log()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            self._stop()
            left = "" if self.stopped else f"; {self.left_alone()}"
            ended = Ended("interrupted", f"interrupted after round {seen}{left}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                log.terminate()
            for callback in callbacks if started else []:
                callback.on_error()  # the terminal in order; on_end has a Result, which is not here
        with contextlib.suppress(CommandError):
            self.remote.fetch(self.name, self.target)
        return ended

    def left_alone(self) -> str:
        """What to say where Ctrl-C came again before the run was known to be stopped."""
        if self.stopped:
            return "stopped on the server; its folder was not brought here"
        return f"run {self.run_id} may still be going on there: it was not seen to stop"

    def _tell_start(self, callbacks: list[Callback], first_round: int) -> bool:
        text = self.remote.config(self.name)
        if text is None:
            return False
        folder = self.target
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, text)
        config = load(folder / CONFIG).config
        per_round = max(1, config.algorithm.num_local_steps) * (config.algorithm.cohort_size or config.data.num_clients)
        for callback in callbacks:
            callback.on_start(Start(config, folder, first_round, per_round, ()))
        return True

    def _ended(self, status: str, details: str) -> Ended:
        look = self.remote.look(self.name, 0)
        if (
            look is not None
            and look.ended is not None
            and (look.ended["status"] == "done") == status.endswith("completed")
        ):
            return Ended(look.ended["status"], self._placed(look.ended["message"]))
        if status.endswith("stopped"):
            return Ended("interrupted", "the run was stopped")
        said = self._trouble or ("" if details in ("", "N/A") else details)
        refused = re.search(r"InputError: (.*)", said)
        if refused:
            return Ended("refused", self._placed(refused[1]))
        return Ended("failed", said or f"Flower says of run {self.run_id}: {status}")

    def _placed(self, message: str) -> str:
        """The message, and where a client's /data is outside its container, and who must be able to read it."""
        whose = re.search(r"\bclient (\d+)\b", message)
        if whose is None or not re.search(rf"(^|[\s'\"]){DATA}\b", message):
            return message
        deployment, client = self.commands.deployment, whose[1]
        here = deployment.folder / f"client-{client}" / "data"
        place = f"data/ (or FEDMOM_DATA) beside client {client}'s compose.yml" if deployment.address else str(here)
        user = deployment.settings.get("FEDMOM_USER", "10001:10001")
        return f"{message}; {DATA} of client {client} is {place}, to be read by FEDMOM_USER = {user}"

    def _ask(self) -> tuple[str, str]:
        """(status, details) of the run as Flower has it; the status is empty while the SuperLink is away."""
        try:
            command = superlink("list")
            (run,) = self.commands.json([*command, "--run-id", self.run_id])["runs"]
        except (CommandError, ValueError):
            return "", ""
        self._away = False
        return str(run["status"]), str(run["status-details"])

    def _is_taken_down(self) -> bool:
        """Docker answers, and has no container of the project: the SuperLink will not come back by itself."""
        try:
            return not federation.services(self.commands)
        except CommandError:
            return False

    def _started(self, ending: str) -> Path:
        return self.commands.deployment.folder / "started" / f"{self.name}{ending}"

    def _log(self) -> "subprocess.Popen[str]":
        """What the server's app prints, passed on by a thread of its own."""
        command = Commands.flwr("log", self.run_id, CONNECTION, "--stream")
        log = self.commands.start(command)
        threading.Thread(target=self._pass_on, args=(log,), daemon=True).start()
        return log

    def _pass_on(self, log: "subprocess.Popen[str]") -> None:
        assert log.stdout is not None
        told = set[str]()
        for raw in log.stdout:
            line = _ESCAPES.sub("", raw).rstrip()
            if line.startswith(("fedmom.errors.", "RuntimeError", "ImportError", "ModuleNotFoundError")):
                self._trouble = line
            if "Connection to the SuperLink is unavailable" in line:
                if not self._away:
                    self.say("the SuperLink is away: waiting for it")
                self._away = True
            if re.match(r"WARNING\s*:", line):
                line = re.sub(r"^WARNING\s*:\s*", "", line)
            elif _CHATTER.match(line) or _ITS_ROUNDS.match(line) or line.startswith(_BOXES):
                continue
            # Once rounds come, only what went wrong in one is news.
            if (self.records or not line or line in told) and not _ITS_TROUBLE.match(line):
                continue
            told.add(line)
            self.say(line)

    def _stop(self) -> None:
        self.say("stopping the run; once more Ctrl-C leaves it as it is")
        with contextlib.suppress(CommandError):
            self.commands.do(superlink("stop", self.run_id), seconds=60)
            self.stopped = True


def rounds_done(folder: Path) -> int:
    """The round of a run folder's checkpoint, 0 without one."""
    path = folder / CHECKPOINT
    return int(read_about(path)["round"]) if path.exists() else 0
