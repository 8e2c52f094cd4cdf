"""A deployment of real containers, and what the tests do with it: runs, faults, a look at its logs."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fedmom
from fedmom.deploy.deployment import open_deployment
from fedmom.records.files import read_tensors

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "deploy.toml"
IMAGE = "fedmom:test"
# Real digits; rounds as short as Flower lets them be.
CHANGES = {
    "model.name": "mlp",
    "model.hidden": 16,
    "algorithm.num-local-steps": 5,
    "run.num-rounds": 2,
    "run.dtype": "float64",
}


# What `proxied` gives, once the image is built. The tests beside these, in the same process, have the machine's own.
PROXIES: dict[str, str] = {}


def environment(**more: str) -> dict[str, str]:
    """Of every command that these tests start."""
    return {**os.environ, **PROXIES, **more}


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=1200, env=environment())
    assert not check or done.returncode == 0, (
        f"docker {shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=600).returncode == 0


def build_image() -> None:
    """With what this machine's build needs, such as another torch: NAME=VALUE words in FEDMOM_BUILD_ARGS."""
    arguments = [w for word in shlex.split(os.environ.get("FEDMOM_BUILD_ARGS", "")) for w in ("--build-arg", word)]
    docker("build", "--network=host", "--tag", IMAGE, *arguments, str(ROOT))


def proxied(folder: Path) -> dict[str, str]:
    """An environment in which the shell and Docker's configuration name a proxy where nothing listens."""
    nowhere = "http://127.0.0.1:9"
    proxies = {"httpProxy": nowhere, "httpsProxy": nowhere, "noProxy": "example.org"}
    given = Path(os.environ.get("DOCKER_CONFIG", Path.home() / ".docker"))
    if (given / "cli-plugins").is_dir():
        (folder / "cli-plugins").symlink_to((given / "cli-plugins").resolve())
    (folder / "config.json").write_text(json.dumps({"proxies": {"default": proxies}}))
    return {"DOCKER_CONFIG": str(folder), "https_proxy": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere}


def free_port(also: int = 0) -> int:
    """A port that is free on loopback, and the `also` after it."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        try:
            for after in range(1, also + 1):
                with socket.socket() as found:
                    found.bind(("127.0.0.1", port + after))
        except OSError:
            continue
        return port


def wait_until(
    holds: Callable[[], bool], what: str, seconds: float = 900.0, evidence: Callable[[], str] = lambda: ""
) -> None:
    """Until it holds; an AssertionError with the evidence once `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}\n{evidence()}"
        time.sleep(0.3)


def sets(changes: dict) -> list[str]:
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


class Run:
    """`fedmom deploy run` under way."""

    def __init__(self, process: subprocess.Popen, output: Path, deployment: "Deployment", out: Path | None) -> None:
        self.process, self.output, self.deployment, self.out = process, output, deployment, out
        self.name = out.name if out else ""

    def said(self) -> str:
        """What the command has printed so far."""
        return self.output.read_text()

    def wait_for_round(self, number: int, seconds: float = 900.0) -> None:
        """Until a round is over on the server; the next one is then under way."""

        # It is looked for there: each `docker exec` from here costs more than the clients' steps.
        enough = f'[ "$(cat /runs/{self.name}/rounds.jsonl 2>/dev/null | wc -l)" -ge {number} ]'
        script = f"for n in $(seq 25); do {enough} && echo over && break; sleep 0.2; done"

        def over() -> bool:
            assert self.process.poll() is None, self.said()
            return "over" in docker("exec", self.deployment.container("serverapp"), "sh", "-c", script, check=False)

        def evidence() -> str:
            services = ("superlink", "serverapp", *(f"{s}-{k}" for k in range(3) for s in ("supernode", "clientapp")))
            return "\n".join([self.said(), *(f"{s}:\n{self.deployment.logs(s)[-2000:]}" for s in services)])

        wait_until(over, f"round {number} of {self.name}", seconds, evidence)

    def wait_to_say(self, words: str, seconds: float = 900.0) -> None:
        """Until it has printed this; an AssertionError once it has ended without."""

        def said() -> bool:
            ended = self.process.poll() is not None
            if words in self.said():
                return True
            assert not ended, self.said()
            return False

        wait_until(said, words, seconds, self.said)

    def end(self, status: int = 0, seconds: float = 900.0) -> str:
        """What it said, once it has ended with this exit status."""
        try:
            self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
        assert self.process.returncode == status, f"{self.process.returncode}\n{self.said()[-6000:]}"
        return self.said()


class Deployment:
    """`fedmom deploy` on a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """Of the Compose project, as `init` gave it."""
        return open_deployment(self.keys).project_name

    @property
    def keys(self) -> Path:
        return self.folder / "deployment"

    def start(self, *words: str, out: Path | None = None) -> Run:
        command = [sys.executable, "-m", "fedmom", "deploy", *words, "--dir", str(self.keys)]
        output = self.folder / f"output-{time.monotonic_ns()}"
        with open(output, "w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=ROOT, env=environment(FEDMOM_IMAGE=IMAGE), **streams)
        return Run(process, output, self, out)

    def call(self, *words: str, status: int = 0) -> str:
        return self.start(*words).end(status, 900)

    def run(self, out: Path, changes: dict, *more: str) -> Run:
        return self.start("run", str(CONFIG), *sets(changes), "--out", str(out), *more, out=out)

    def go_on(self, out: Path, changes: dict | None = None) -> Run:
        """With nothing but the folder's name."""
        return self.start("run", "--resume", str(out), *sets(changes or {}), out=out)

    def container(self, service: str) -> str:
        return f"{self.name}-{service}-1"

    def kill(self, *services: str, seconds: float = 3.0) -> None:
        """SIGKILL to all their processes; they come back after some seconds."""
        names = [self.container(service) for service in services]
        docker("kill", *names)
        time.sleep(seconds)
        docker("start", *names)

    @contextlib.contextmanager
    def cut_off(self, service: str, network: str, seconds: float = 0.0) -> Iterator[None]:
        """Within the block, and for so many seconds at least, it has no network."""
        begin = time.monotonic()
        docker("network", "disconnect", "--force", f"{self.name}_{network}", self.container(service))
        try:
            yield
            time.sleep(max(0.0, begin + seconds - time.monotonic()))
        finally:
            docker("network", "connect", "--alias", service, f"{self.name}_{network}", self.container(service))

    def containers(self) -> dict[str, str]:
        """{name: id} of all of the project's."""
        only = ("--filter", f"label=com.docker.compose.project={self.name}")
        lines = docker("ps", "--all", "--format", "{{.Names}} {{.ID}}", *only).splitlines()
        return dict(line.split() for line in lines)

    def logs(self, service: str) -> str:
        return docker("logs", self.container(service))


@contextlib.contextmanager
def three_clients(folder: Path) -> Iterator[Deployment]:
    """A deployment of three clients on this machine, below `folder`, under the name that `init` gives."""
    made = Deployment(folder)
    made.call("init", "--clients", "3", "--port", str(free_port()))
    try:
        made.call("up")
        yield made
    finally:
        made.call("down", "--volumes")


def assert_engines(folder: Path, changes: dict, tolerance: float = 1e-10) -> None:
    """The run folder's x and u are those of the engine on this machine."""
    right = fedmom.run(CONFIG, sets=changes, callbacks=[fedmom.Callback()])
    found, _ = read_tensors(folder / "final.safetensors")
    for name, value in right.state_dict.items():
        torch.testing.assert_close(found[f"params/{name}"], value, rtol=tolerance, atol=tolerance)
    for name, value in right.momentum.items():
        torch.testing.assert_close(found[f"momentum/{name}"], value, rtol=tolerance, atol=tolerance)
