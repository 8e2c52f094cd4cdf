"""How an app's process is asked of the warm one: its command line and our standard streams, over a Unix socket."""

import os
import socket

SOCKET = "/tmp/warm.sock"
LONGEST = 1 << 16  # bytes of a command line


def ask(words: list[str]) -> bool:
    """Whether the warm process has taken the command; it then runs with our standard streams, and we need not wait."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(SOCKET)
            socket.send_fds(connection, ["\0".join(words).encode()], [0, 1, 2])
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b"y"
    except OSError:
        return False


def take(connection: socket.socket) -> tuple[list[str], list[int]]:
    """The other side: (command line, its three streams)."""
    data, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    while more := connection.recv(LONGEST):
        data += more
    return data.decode().split("\0"), streams


def serve() -> socket.socket:
    """A socket for the user of this process alone."""
    if os.path.exists(SOCKET):
        os.unlink(SOCKET)
    before = os.umask(0o077)
    try:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(SOCKET)
    finally:
        os.umask(before)
    server.listen(16)
    return server
