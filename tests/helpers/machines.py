"""Machines of a Ray cluster on this one: namespaces of their own for network, mounts, processes and the host's name.

Each has its own address on a bridge between them, its own /srv (data, temporary files, Ray's sessions) and /dev/shm
(Ray's object store); the rest of the disk is the same for all, as one image on all machines would be. What goes over
the wire is counted by the kernel. Needs root, and Linux.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PORT = 6379
_SUBNET, _BRIDGE = "10.213.0", "bridge"
_ENTER = ("-n", "-m", "-p", "-u", "-i")
# With the test's process ends what it has unshared, however it ends.
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child")


def missing() -> str:
    """Why there can be no such machines here, "" if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "namespaces for the machines of a cluster need root"
    for program in ("ip", "nsenter", "unshare", "setpriv", "mount", "taskset"):
        if shutil.which(program) is None:
            return f"no program {program}"
    tried = subprocess.run([*_UNSHARE, *_ENTER, "true"], capture_output=True, text=True)
    return tried.stderr.strip()


class Network:
    """A bridge, and the machines at it.

    It is in a namespace of its own: rules of this machine's firewall, as Docker sets them, do not reach it, and several
    networks have the same addresses.
    """

    subnet = _SUBNET

    def __init__(self, folder: Path) -> None:
        self.folder, self.machines = folder, list[Machine]()
        self._unshared, self._pid = _unshared("-n")
        self.link("add", _BRIDGE, "type", "bridge")
        self.link("set", _BRIDGE, "up")

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.kill()
        self._unshared.kill()
        self._unshared.wait()

    def link(self, *words: str) -> None:
        """`ip link` with these words, where the bridge is."""
        _do("nsenter", "-t", str(self._pid), "-n", "ip", "link", *words)

    def machine(self, cores: str = "") -> "Machine":
        """A new one, without anything that runs on it. cores: those of its affinity, such as "0" or "0,1"; "": all."""
        self.machines.append(Machine(self, len(self.machines) + 1, cores))
        return self.machines[-1]


class Machine:
    """One machine of a network, until it is killed."""

    def __init__(self, network: Network, number: int, cores: str) -> None:
        self.name, self.address, self.cores = f"node-{number}", f"{network.subnet}.{number}", cores
        self.network = network
        self.srv = network.folder / self.name  # /srv, as that machine sees it
        (self.srv / "tmp").mkdir(parents=True)
        self.cable = f"{_BRIDGE}{number}"  # the bridge's end of it
        self.processes: list[subprocess.Popen[bytes]] = []
        # As an init does, it lets its orphans go: `ray stop` waits for what it has killed to be gone.
        self.init, self.pid = _unshared(*_ENTER, "--mount-proc", "env", "--ignore-signal=CHLD")
        network.link("add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        network.link("set", self.cable, "master", _BRIDGE, "up")
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
        return ["nsenter", "-t", str(self.pid), *_ENTER, *there, *pinned, *words]

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
        """Out of the cluster, which knows of it at once, as it does not of a machine that is killed; then it ends.

        As `ray stop` does, without its command line.
        """
        self.call("pkill", "-TERM", "-x", "raylet")
        while self.call("pgrep", "-x", "raylet", status=None):
            time.sleep(0.05)
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
        self.network.link("set", self.cable, "down")

    def plug_in(self) -> None:
        """The cable that was pulled."""
        self.network.link("set", self.cable, "up")

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes that it has received and sent so far."""
        line = next(line for line in self.call("cat", "/proc/net/dev").splitlines() if "eth0:" in line)
        words = line.split(":")[1].split()
        return int(words[0]), int(words[8])


class Cluster(Network):
    """Machines that run Ray: a head, on which drivers run too, and others that join it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.head = self._begin("", head=True, gcs_server_port=PORT)
        self.address = f"{self.head.address}:{PORT}"
        self.others: list[Machine] = []

    def join(self, cores: str = "", **ray: Any) -> Machine:
        """Another machine of the cluster; `ray`: parameters of Ray's daemons there."""
        self.others.append(self._begin(cores, head=False, gcs_address=self.address, **ray))
        return self.others[-1]

    def _begin(self, cores: str, **ray: Any) -> Machine:
        machine = self.machine(cores)
        given = {"node_ip_address": machine.address, "object_store_memory": 300_000_000, **ray}
        machine.call(sys.executable, str(Path(__file__).with_name("ray_node.py")), json.dumps(given))
        return machine

    def alive(self) -> list[Machine]:
        """The machines beside the head that have not been killed."""
        return [machine for machine in self.others if machine.init.poll() is None]

    def fedmom(self, *words: str, status: int | None = 0, on: Machine | None = None, **more: str) -> str:
        """What a command of fedmom prints, on the head if nothing else is said."""
        return (on or self.head).call("fedmom", *words, status=status, **more)


def _unshared(*words: str) -> tuple[subprocess.Popen[bytes], int]:
    """unshare with these words, and the process id, outside, of the first process in the new namespaces."""
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*_UNSHARE, *words, "sleep", "infinity"], **quiet)
    return process, _sleeping_child(process.pid)


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
