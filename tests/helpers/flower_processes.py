"""Flower's own processes for tests: `flwr run` on a SuperLink of the test's own, and one with TLS and SuperNodes.

Everything has ports and an FLWR_HOME of its own, by which the processes are found and ended.
"""

import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedmom.config.load import toml_scalar

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Ran(NamedTuple):
    """One `flwr run --stream`."""

    status: str  # as `flwr ls` has it: "finished:completed", "finished:failed"
    details: str  # why it failed
    text: str  # what it printed


class Flower:
    """`flwr` with a home in `folder`; a SuperLink that it starts itself, or one that `deploy` starts.

    All of it works in `folder`, so a run that names no folder leaves its records below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "flwr-home"
        self.home.mkdir(parents=True)
        self.superlink: list[str] = []  # its name, where it is not the local one
        self.spawned: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str, timeout: float = 1500) -> str:
        """Standard output and error of a command that must end with status 0 and in time."""
        where = {"env": self.environment, "cwd": self.folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, text=True, **where) as process:
            try:
                text, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"not done in {timeout:g} s:\n{process.communicate()[0]}\n{self.logs()}") from None
        assert process.returncode == 0, f"{text}\n{self.logs()}"
        return text

    def run(self, changes: Mapping[str, Any], num_nodes: int | None = None) -> Ran:
        """`flwr run` with these keys, on so many simulated nodes where the SuperLink is the local one."""
        config = self.folder / "run.toml"
        config.write_text("".join(f"{name} = {toml_scalar(value)}\n" for name, value in changes.items()))
        federation = []
        if num_nodes is not None:
            keys = f"num-supernodes={num_nodes} client-resources-num-cpus=1 client-resources-num-gpus=0"
            federation = ["--federation-config", f"{keys} init-args-num-cpus=2"]
        text = self.call(
            "flwr", "run", str(ROOT), *self.superlink, "--stream", "--run-config", str(config), *federation
        )
        # It ends with status 0 even where the run failed.
        started = re.search(r"Successfully started run (\d+)", text)
        assert started, text
        listed = self.call("flwr", "ls", *self.superlink, "--run-id", started[1], "--format", "json")
        (run,) = json.loads(listed)["runs"]
        return Ran(run["status"], run["status-details"], text)

    def spawn(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            where = {"env": self.environment, "cwd": self.folder}
            self.spawned[name] = subprocess.Popen(command, stdout=log, stderr=log, **where)

    def deploy(self, num_nodes: int) -> None:
        """A SuperLink with TLS and node authentication on loopback, and SuperNodes that it knows by their keys."""
        port = free_port()
        make_certificates(self.folder)
        files = {name: str(self.folder / f"{name}.pem") for name in ("ca", "server", "server-key")}
        self.spawn(
            *("superlink", "flower-superlink", "--port", str(port), "--enable-supernode-auth"),
            *("--disable-runtime-dependency-installation", "--ssl-ca-certfile", files["ca"]),
            *("--ssl-certfile", files["server"], "--ssl-keyfile", files["server-key"]),
        )
        self.superlink = ["secured"]
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "secured"\n\n[superlink.secured]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{files["ca"]}"\n'
        )
        self.wait_for(port)
        ports = [free_port() for _ in range(num_nodes)]
        for node in range(num_nodes):
            key = make_node_key(self.folder, node)
            self.call("flwr", "supernode", "register", f"{key}.pub", "secured")
            self.spawn(
                *(f"supernode-{node}", "flower-supernode", "--superlink", f"127.0.0.1:{port}"),
                *("--root-certificates", files["ca"], "--auth-supernode-private-key", str(key)),
                *("--port", str(ports[node])),
                *("--node-config", f"partition-id={node} num-partitions={num_nodes}"),
            )
        for port in ports:
            self.wait_for(port)

    def wait_for(self, port: int, seconds: float = 600) -> None:
        """Until somebody listens there; fails at once where a process that was started has ended."""
        deadline = time.monotonic() + seconds
        while True:
            ended = [name for name, process in self.spawned.items() if process.poll() is not None]
            assert not ended, f"ended by itself: {', '.join(ended)}\n{self.logs()}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, f"nobody listens on port {port}\n{self.logs()}"
                time.sleep(0.2)

    def close(self) -> None:
        """End every process whose environment names this home."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._processes():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 10
            while self._processes() and time.monotonic() < deadline:
                time.sleep(0.1)
        for process in self.spawned.values():
            process.wait(10)

    def _processes(self) -> list[int]:
        mark, found = f"FLWR_HOME={self.home}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.rglob("*.log"))


def make_certificates(folder: Path) -> None:
    """ca.pem, and server.pem with server-key.pem for 127.0.0.1, signed by it."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_name, server_name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("test CA", "127.0.0.1")
    )

    def signed(name: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )
        if ca:
            uses = {name: name in ("key_cert_sign", "crl_sign", "digital_signature") for name in _KEY_USES}
            builder = builder.add_extension(x509.KeyUsage(**uses), critical=True)
        return builder.sign(ca_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    (folder / "ca.pem").write_bytes(signed(ca_name, ca_key, True))
    (folder / "server.pem").write_bytes(signed(server_name, server_key, False))
    (folder / "server-key.pem").write_bytes(_private(server_key, serialization.PrivateFormat.PKCS8))


_KEY_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def make_node_key(folder: Path, node: int) -> Path:
    """A SuperNode's key pair as ssh-keygen writes it: node-0 and node-0.pub."""
    key, path = ec.generate_private_key(ec.SECP384R1()), folder / f"node-{node}"
    path.write_bytes(_private(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"node-{node}.pub").write_bytes(public + b"\n")
    return path


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
