"""Jobs of a Slurm that is not there: batch scripts run on the first of some machines, as Slurm runs them.

Their `srun` and `scontrol` are the stand-ins beside this file. Both know only what they need to.
"""

import itertools
import json
import socket
import subprocess
import threading
from pathlib import Path

from machines import Machine

STAND_INS = Path(__file__).parent / "slurm"
# Writes down its process's id, then becomes the command.
_NOTED = ("sh", "-c", 'echo $$ >"$0"; exec "$@"')
_KILL_TREE = "tree() { for child in $(cat /proc/$1/task/*/children); do tree $child; done; kill -KILL $1; }; tree $0"


class Slurm:
    """What answers srun, and starts jobs. `folder`: short, as the path of a socket must be."""

    def __init__(self, machines: list[Machine], folder: Path) -> None:
        self.machines, self.folder = {machine.name: machine for machine in machines}, folder
        self.path, self._numbers = folder / "slurm", itertools.count()
        self._listening = socket.create_server(str(self.path), family=socket.AF_UNIX)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def requeued(self) -> list[str]:
        """Ids of the jobs that asked to be requeued."""
        noted = Path(f"{self.path}.requeued")
        return noted.read_text().split() if noted.exists() else []

    def job(self, number: int, nodes: str, script: Path, *words: str, cwd: Path, **more: str) -> "Job":
        """A job on all `nodes` ("node-[1-2]"), two cores each, whose script has just been started on the first."""
        path = f"{STAND_INS}:{next(iter(self.machines.values())).environment()['PATH']}"
        own = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": nodes, "SLURM_CPUS_PER_TASK": "2"}
        environment = {"PATH": path, "SLURM_STAND_IN": str(self.path), **own, **more}
        return self._start(next(iter(self.machines)), ["bash", str(script), *words], cwd, environment)

    def _start(self, node: str, words: list[str], cwd: Path, environment: dict[str, str]) -> "Job":
        noted = self.folder / f"pid-{next(self._numbers)}"
        output, machine = noted.with_suffix(".out"), self.machines[node]
        process = machine.start(*_NOTED, str(noted), *words, output=output, cwd=cwd, **environment)
        return Job(machine, process, noted, output)

    def _serve(self) -> None:
        while True:
            try:
                srun, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._step, args=(srun,), daemon=True).start()

    def _step(self, srun: socket.socket) -> None:
        lines = srun.makefile()
        asked = json.loads(lines.readline())
        if asked["node"] not in self.machines:
            answer = {"status": 1, "said": f"srun: error: {asked['node']} does not respond"}
        else:
            step = self._start(asked["node"], asked["words"], Path(asked["cwd"]), asked["environment"])
            threading.Thread(target=lambda: [step.kill() for _ in lines], daemon=True).start()
            answer = {"status": step.process.wait() % 256, "said": step.output.read_text(errors="replace")}
        srun.sendall(json.dumps(answer).encode() + b"\n")


class Job:
    """A process on one of the machines, under the id that it has there."""

    def __init__(self, machine: Machine, process: "subprocess.Popen[bytes]", noted: Path, output: Path) -> None:
        self.machine, self.process, self.noted, self.output = machine, process, noted, output

    def signal(self, name: str) -> None:
        """Sends it, as `scancel --batch` does."""
        self.machine.call("kill", f"-{name}", self.noted.read_text().strip(), status=None)

    def kill(self) -> None:
        """It and all that it started end at once."""
        self.machine.call("sh", "-c", _KILL_TREE, self.noted.read_text().strip(), status=None)

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it printed, once it has ended."""
        return self.process.wait(), self.output.read_text(errors="replace")
