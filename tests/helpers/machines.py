"""Machines of a Ray cluster on this one: namespaces of their own for network, mounts, processes and the host's name.

Each has its own address on a bridge between them, its own /srv (data, temporary files, Ray's sessions) and /dev/shm
(Ray's object store); the rest of the disk is the same for all, as one image on all machines would be. What goes over
the wire is counted by the kernel. Needs root, and Linux.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PORT = 6379
_NETWORK = "10.213"
_UNSHARE = ("unshare", "-n", "-m", "-p", "-u", "-i")
_numbers = itertools.count(1)


def missing() -> str:
    """Why there can be no such machines here, "" if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "namespaces for the machines of a cluster need root"
    for program in ("ip", "nsenter", "unshare", "mount", "taskset"):
        if shutil.which(program) is None:
            return f"no program {program}"
    tried = subprocess.run([*_UNSHARE, "--fork", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


class Network:
    """A bridge, and the machines at it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.machines = folder, list[Machine]()
        # Others on this machine may have a network of their own: no two share a bridge, nor addresses.
        self.bridge, self.subnet = f"fm{os.getpid()}n{next(_numbers)}", f"{_NETWORK}.{os.getpid() % 250}"
        _do("ip", "link", "add", self.bridge, "type", "bridge")
        _do("ip", "link", "set", self.bridge, "up")

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.kill()
        _do("ip", "link", "delete", self.bridge)

    def machine(self, cores: str = "") -> "Machine":
        """A new one, without anything that runs on it. cores: those of its affinity, such as "0" or "0,1"; "": all."""
        self.machines.append(Machine(self, len(self.machines) + 1, cores))
        return self.machines[-1]


class Machine:
    """One machine of a network, until it is killed."""

    def __init__(self, network: Network, number: int, cores: str) -> None:
        self.name, self.address, self.cores = f"node-{number}", f"{network.subnet}.{number}", cores
        self.srv = network.folder / self.name  # /srv, as that machine sees it
        (self.srv / "tmp").mkdir(parents=True)
        self.link = f"{network.bridge}m{number}"  # this end of its cable
        self.processes: list[subprocess.Popen[bytes]] = []
        self.init = subprocess.Popen(
            # As an init does, it lets its orphans go: `ray stop` waits for what it has killed to be gone.
            [*_UNSHARE, "--fork", "--kill-child", "--mount-proc", "env", "--ignore-signal=CHLD", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = _sleeping_child(self.init.pid)
        _do("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _do("ip", "link", "set", self.link, "master", network.bridge, "up")
        script = f"""
            hostname {self.name}
            mount --bind {self.srv} /srv
            mount -t tmpfs tmpfs /dev/shm
            ip link set lo up
            ip addr add {self.address}/24 dev eth0
            ip link set eth0 up
        """
        self.call("sh", "-ec", script)

    def words(self, *words: str, cwd: Path = ROOT) -> list[str]:
        """A command line that runs `words` on this machine."""
        there = ["env", f"--chdir={cwd}"]  # a process that enters another's mounts is at their root
        pinned = ["taskset", "-c", self.cores] if self.cores else []
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", "-i", *there, *pinned, *words]

    def environment(self, **more: str) -> dict[str, str]:
        """Of every command on it: the environment's programs come first, no Ray of the test's own is known."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": "/srv/tmp", "HOME": "/srv", "OMP_NUM_THREADS": "1"}
        # Else every driver makes Ray start a process for each core of each machine, which nobody needs here.
        ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}
        return {**outer, **own, **ray, **more}

    def start(self, *words: str, output: Path | None = None, cwd: Path = ROOT, **more: str) -> subprocess.Popen[bytes]:
        """A command on this machine that goes on; `output` takes what it prints, `more` is added to its environment."""
        with open(output or os.devnull, "wb") as file:
            process = subprocess.Popen(
                self.words(*words, cwd=cwd),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(**more),
            )
        self.processes.append(process)
        return process

    def call(self, *words: str, status: int | None = 0, cwd: Path = ROOT, **more: str) -> str:
        """What a command on this machine prints, once it has ended with that status (None: with any)."""
        done = subprocess.run(
            self.words(*words, cwd=cwd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(**more),
        )
        said = done.stdout + done.stderr
        assert status is None or done.returncode == status, f"{self.name}: {words}: {done.returncode}\n{said}"
        return said

    def leave(self) -> None:
        """Out of the cluster, which knows of it at once, as it does not of a machine that is killed; then it ends."""
        self.call("ray", "stop", status=None)
        self.kill()

    def kill(self) -> None:
        """All its processes end at once, and so does its network."""
        if self.init.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.init.wait()
        for process in self.processes:
            process.wait()

    def halt(self) -> None:
        """The same, but its connections end first: Ray knows at once, and not after 20 to 30 s."""
        self.call("kill", "-9", "-1", status=None)
        self.kill()

    def pull_cable(self) -> None:
        """As if the power were cut: nothing comes from it any more, not even the end of a connection."""
        _do("ip", "link", "set", self.link, "down")

    def plug_in(self) -> None:
        """The cable that was pulled."""
        _do("ip", "link", "set", self.link, "up")

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes that it has received and sent so far."""
        line = next(line for line in self.call("cat", "/proc/net/dev").splitlines() if "eth0:" in line)
        words = line.split(":")[1].split()
        return int(words[0]), int(words[8])


class Cluster(Network):
    """Machines that run Ray: a head, on which drivers run too, and others that join it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.head = self._begin("--head", f"--port={PORT}", "--include-dashboard=false")
        self.address = f"{self.head.address}:{PORT}"
        self.others: list[Machine] = []

    def join(self, cores: str = "", *more: str, **environment: str) -> Machine:
        """Another machine of the cluster; `more` words for `ray start`."""
        self.others.append(self._begin(f"--address={self.address}", *more, cores=cores, **environment))
        return self.others[-1]

    def _begin(self, *words: str, cores: str = "", **environment: str) -> Machine:
        machine = self.machine(cores)
        here, memory = f"--node-ip-address={machine.address}", "--object-store-memory=300000000"
        machine.call("ray", "start", *words, here, memory, **environment)
        return machine

    def alive(self) -> list[Machine]:
        """The machines beside the head that have not been killed."""
        return [machine for machine in self.others if machine.init.poll() is None]

    def fedmom(self, *words: str, status: int | None = 0, on: Machine | None = None, **more: str) -> str:
        """What a command of fedmom prints, on the head if nothing else is said."""
        return (on or self.head).call("fedmom", *words, status=status, **more)


def _sleeping_child(pid: int) -> int:
    """unshare's child, the first process of the new namespaces, once it has become `sleep`."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == "sleep\n":
            return int(children[0])
        time.sleep(0.02)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
