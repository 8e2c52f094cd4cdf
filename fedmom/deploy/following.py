"""A run on a deployment, from its start to its folder on this machine."""

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fedmom.config.keys import Config
from fedmom.config.load import load, to_toml
from fedmom.deploy import federation
from fedmom.deploy.bundle import DATA, Cargo, pack, stage
from fedmom.deploy.commands import CommandError, Commands, superlink
from fedmom.deploy.deployment import CONNECTION
from fedmom.deploy.remote_runs import RemoteRuns
from fedmom.errors import InputError
from fedmom.machine.files import write_text
from fedmom.method.state import ClientState
from fedmom.records.files import CHECKPOINT, CONFIG, read_about
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


class RemoteEnded(NamedTuple):
    """How a run on a deployment ended."""

    status: str  # done, diverged, failed, interrupted, or refused (the configuration was wrong)
    message: str


class Following:
    """One run: started, followed, stopped by Ctrl-C, fetched."""

    def __init__(self, commands: Commands, app: Path, name: str, target: Path, say: Callable[[str], None]) -> None:
        self.commands, self.app, self.name, self.target, self.say = commands, app, name, target, say
        self.remote = RemoteRuns(commands)
        self.run_id = ""
        self.records: list[dict] = []
        self._trouble = ""
        self._away = False  # and that has been said
        self.going_on = self.stopped = False  # at work before it was followed; stopped from here
        self.done = 0  # rounds of the checkpoint that it goes on from
        self._told = set[str]()  # lines that need not be said again

    def pack(self, config: Path | None, sets: Iterable[str], *, resume: Path | None = None) -> Cargo:
        """What to send for this run; InputError where it is wrong, or not for this deployment."""
        nodes = self.commands.deployment.num_clients
        return pack(config, sets, name=self.name, resume=resume, app=self.app, num_nodes=nodes)

    def begin(self, cargo: Cargo) -> None:
        """Start a new run. Raises InputError where the server has one of this name."""
        if not self.commands.dry and self.remote.config(self.name) is not None:
            raise InputError(
                f"--out {self.target}: the server has a run folder {self.name!r} already; take another name, or "
                "--resume"
            )
        self._send(cargo)

    def go_on(self, config: Path | None, sets: Iterable[str]) -> None:
        """Take up the run where the server is still at it, else start it again from its checkpoint, there or here.

        Raises InputError where `config` or `sets` would change a run that is going on, and where nobody has the run.
        """
        dry = self.commands.dry
        self.going_on = not dry and self.take_up()
        if self.going_on and (config is not None or sets):
            raise InputError(
                f"--resume {self.target}: run {self.run_id} is still going on as it was started; leave CONFIG and "
                "--set out"
            )
        if self.going_on:
            return
        there = not dry and self.remote.fetch(self.name, self.target)
        if not there and not (self.target / CONFIG).is_file():
            raise InputError(f"--resume {self.target}: is no run folder here, and the server has none of that name")
        cargo = self.pack(config, sets, resume=self.target)
        if not there and not dry:
            self.remote.bring(self.target, self.name)
        self._send(cargo)
        checkpoint = self.target / CHECKPOINT
        self.done = int(read_about(checkpoint)["round"]) if checkpoint.exists() else 0

    def _send(self, cargo: Cargo) -> None:
        if not self.commands.dry:
            self.remote.check_has(cargo.travels.needs)
        for note in cargo.notes:
            self.say(note)
        self._told |= {*cargo.notes}
        self.start(cargo.config, cargo.travels.own)

    def start(self, config: Config, own: Mapping[str, Path]) -> None:
        """Hand app and configuration to the SuperLink; `own`: {path in the bundle: file} of the user's code."""
        # A file for each run: `flwr` reads it seconds later, when another command may have written the next one's.
        file = self._started(".toml")
        file.parent.mkdir(exist_ok=True)
        write_text(file, to_toml(config, "A run that was started, as the nodes got it."))
        staged = self._started("-app")
        app = stage(self.app, own, staged)
        command = Commands.flwr("run", str(app.resolve()), CONNECTION, "--run-config", str(file))
        if self.commands.dry:  # whoever runs the printed command needs what it names
            self.commands.do(command)
            return
        try:
            self.run_id = str(self.commands.json(command)["run-id"])
        finally:
            shutil.rmtree(staged, ignore_errors=True)
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

    def to_the_end(self, callbacks: Iterable[Callback]) -> RemoteEnded:
        """Tell `callbacks` of every round to come; fetch the folder; give the end. Ctrl-C stops the run."""
        callbacks, seen, started = list(callbacks), self.done, False
        log = self._log()
        try:
            looks = 0
            while True:
                look = self.remote.look(self.name, seen)
                if look is not None and not started and (look.records or look.ended):
                    started = self._tell_start(callbacks, seen + 1)
                # A busy server may have given no config.toml yet: then its rounds are asked for once more.
                for record in look.records if look and started else []:
                    seen += 1
                    self.records.append(record)
                    for callback in callbacks:
                        callback.on_round(record, _EMPTY)
                looks += 1
                over = log.poll() is not None or (look is not None and look.ended is not None)
                if over or looks % _LOOKS_BETWEEN_QUESTIONS == 0:
                    status, details = self._ask()
                    if not status and self._is_taken_down():
                        ended = RemoteEnded("failed", f"the deployment was taken down after round {seen}")
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
            ended = RemoteEnded("interrupted", f"interrupted after round {seen}{left}")
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

    def _ended(self, status: str, details: str) -> RemoteEnded:
        look = self.remote.look(self.name, 0)
        if (
            look is not None
            and look.ended is not None
            and (look.ended["status"] == "done") == status.endswith("completed")
        ):
            return RemoteEnded(look.ended["status"], self._placed(look.ended["message"]))
        if status.endswith("stopped"):
            return RemoteEnded("interrupted", "the run was stopped")
        said = self._trouble or ("" if details in ("", "N/A") else details)
        refused = re.search(r"InputError: (.*)", said)
        if refused:
            return RemoteEnded("refused", self._placed(refused[1]))
        return RemoteEnded("failed", said or f"Flower says of run {self.run_id}: {status}")

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
            if (self.records or not line or line in self._told) and not _ITS_TROUBLE.match(line):
                continue
            self._told.add(line)
            self.say(line)

    def _stop(self) -> None:
        self.say("stopping the run; once more Ctrl-C leaves it as it is")
        with contextlib.suppress(CommandError):
            self.commands.do(superlink("stop", self.run_id), seconds=60)
            self.stopped = True
