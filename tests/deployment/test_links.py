"""Connections of the image's processes: a cut handshake is tried again, silence is seen, an ended loop ends all."""

import contextlib
import functools
import importlib.util
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from fedmom.deploy.certificates import make_authority, make_server_certificate

pytestmark = pytest.mark.xdist_group("a node's own process")
IMAGE = Path(__file__).parents[2] / "deploy" / "image"


@functools.cache
def flowers():
    """Flower's connections. They come with a server of HTTP, which other tests' processes do without."""
    from flwr.supercore.protobuf import client
    from flwr.supercore.retry import http_retry, retry_invoker

    return SimpleNamespace(clients=client, http_retry=http_retry, retry_invoker=retry_invoker)


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"image_{name}", IMAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def links():
    return load("links")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(port, the CA's file, a list of how the next connections are met: "cut", "half", or a status)."""
    folder = tmp_path_factory.mktemp("keys")
    ca, key = folder / "ca.pem", folder / "ca-key.pem"
    make_authority(ca, key)
    make_server_certificate(folder / "s.pem", folder / "s-key.pem", ca=ca, ca_key=key, hosts=["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "s.pem", folder / "s-key.pem")
    listening = socket.create_server(("127.0.0.1", 0))
    to_come: list = []

    def serve():
        while True:
            connection, _ = listening.accept()
            how = to_come.pop(0)
            if how == "half":
                connection.recv(1 << 16)  # the client's hello: with nothing left unread it sees an end, not a reset
            if how in ("cut", "half"):
                connection.close()
                continue
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1 << 16)
                date = formatdate(time.time() - 8, usegmt=True)
                head = f"HTTP/1.1 {how} ?\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                secured.sendall(head.encode())

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1], ca, to_come


def ask(port: int, ca: Path, invoker) -> None:
    verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    verify.load_verify_locations(ca)
    invoker.wait_function = lambda seconds: None
    client = flowers().clients.ProtobufClient(f"https://127.0.0.1:{port}", verify=verify, retry_invoker=invoker)
    answer = SimpleNamespace(ParseFromString=lambda data: None)
    asked = SimpleNamespace(SerializeToString=lambda deterministic: b"")
    client._unary_unary(path="/x", rpc_method="x", request=asked, response_type=lambda: answer)


@pytest.fixture
def mended(links, monkeypatch, tmp_path):
    """Flower's own classes with the changes, which are taken back; the mark lies in a folder of its own."""
    retry_invoker, clients = flowers().retry_invoker, flowers().clients
    monkeypatch.setattr(retry_invoker.RetryInvoker, "__init__", retry_invoker.RetryInvoker.__init__)
    monkeypatch.setattr(clients.ProtobufClient, "_send", clients.ProtobufClient._send)
    monkeypatch.setattr(links, "mark", lambda: (tmp_path / "heard").touch())
    assert links.try_cut_handshakes_again(retry_invoker) + links.leave_marks(clients) == []
    return tmp_path / "heard"


def test_a_cut_handshake_is_tried_again(mended, server):
    port, ca, to_come = server
    to_come[:] = ["cut", "half", 200]
    ask(port, ca, flowers().http_retry.make_simple_http_retry_invoker())
    assert to_come == []
    assert mended.exists()


def test_flower_itself_gives_up(server):
    """Where this fails, Flower has mended it, and the change can go."""
    port, ca, to_come = server
    to_come[:] = ["half", 200]
    with pytest.raises(httpx.ConnectError):
        ask(port, ca, flowers().http_retry.make_simple_http_retry_invoker())


def test_a_certificate_that_does_not_fit_is_an_end(mended, server, tmp_path):
    port, _, to_come = server
    make_authority(tmp_path / "other.pem", tmp_path / "other-key.pem")
    to_come[:] = ["half", 200]
    with pytest.raises(httpx.ConnectError, match="certificate"):
        ask(port, tmp_path / "other.pem", flowers().http_retry.make_simple_http_retry_invoker())
    assert not mended.exists()


def test_a_401_says_how_the_clocks_differ(links):
    now = time.time()
    for ahead, said in [(8, "8 s ahead of the server's: set it"), (-400, "400 s behind the server's: set it")]:
        assert said in links.refused(formatdate(now - ahead, usegmt=True), now // 1)
    assert "set it" not in links.refused(formatdate(now, usegmt=True), now)
    assert "no longer knows this key" in links.refused("no date", now)


def test_a_service_is_well_while_the_other_side_answers(tmp_path, monkeypatch):
    health = load("health")
    monkeypatch.setattr(health.heard, "__defaults__", (str(tmp_path / "heard"),))
    assert health.check("heard:60") == "the other side has not answered yet"
    (tmp_path / "heard").touch()
    assert health.check("heard:60") == ""
    os.utime(tmp_path / "heard", (0, time.time() - 100))
    assert "the other side answered last 100 s ago, more than 60" in health.check("heard:60")


ENDS = {
    "links.run_to_the_end(lambda: None)": 1,  # Flower's loop returns where its connection is lost
    "links.run_to_the_end(lambda: 1 / 0)": 1,
    "links.run_to_the_end(lambda: sys.exit(0))": 0,
    "links.or_end(lambda sender: 1 / 0, None)": 1,  # heartbeats
}


def test_the_process_ends_where_its_loop_does_whatever_threads_it_has():
    script = "import links, sys, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
    ended = [subprocess.Popen([sys.executable, "-c", script + end], cwd=IMAGE, stderr=subprocess.PIPE) for end in ENDS]
    assert [process.wait(timeout=120) for process in ended] == list(ENDS.values())
    for process in ended:
        process.stderr.close()


def test_an_app_that_ends_has_time_to_hand_over_what_it_keeps(links, monkeypatch):
    """Flower gives it five seconds, whatever it has still to send."""
    from flwr.supercore.exit import exit as ends

    monkeypatch.setattr(ends, "FORCE_EXIT_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(ends.os, "_exit", lambda code: left.append(code))
    monkeypatch.setattr(ends, "trigger_exit_handlers", lambda run_before_force_exit: time.sleep(0.1))
    monkeypatch.setattr(ends, "event", lambda *words: None)
    counts = []
    for changes in ([], [links.let_apps_end]):
        assert [change(ends) for change in changes] == [[]] * len(changes)
        left = []
        with pytest.raises(SystemExit):
            ends.flwr_exit(0)
        counts.append(len(left))
    assert counts == [1, 0]
    assert links.let_apps_end(SimpleNamespace()) != []
