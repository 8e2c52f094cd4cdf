"""Whether the container is well: each word of $HEALTH is a check, and all must hold.

https://HOST:PORT/PATH, http://… and tcp://HOST:PORT: its service answers. heard:SECONDS: the other side (of a SuperNode
the SuperLink) has answered it within so many seconds (links.py).
"""

import os
import socket
import ssl
import sys
import time
from urllib.parse import urlsplit

HEARD = "/tmp/heard"


def check(address: str, seconds: float = 8.0) -> str:
    """What is wrong with the service at `address`; empty where it is well."""
    where = urlsplit(address)
    if where.scheme == "heard":
        return heard(float(where.path))
    try:
        with socket.create_connection((where.hostname, where.port), seconds) as plain:
            if where.scheme == "tcp":
                return ""
            connection = plain
            if where.scheme == "https":
                # It asks itself, on loopback, for which its certificate need not be made out.
                context = ssl._create_unverified_context()
                connection = context.wrap_socket(plain, server_hostname=where.hostname)
            connection.sendall(f"GET {where.path} HTTP/1.0\r\nHost: {where.hostname}\r\n\r\n".encode())
            answer = connection.recv(64).split()
    except OSError as error:
        return str(error)
    return "" if answer[1:2] == [b"200"] else f"it answered {answer[:2]}"


def heard(limit: float, path: str = HEARD) -> str:
    """What is wrong where the other side did not answer within `limit` seconds."""
    try:
        ago = time.time() - os.stat(path).st_mtime
    except OSError:
        return "the other side has not answered yet"
    return "" if ago <= limit else f"the other side answered last {ago:.0f} s ago, more than {limit:g}"


if __name__ == "__main__":
    problems = [f"{one}: {wrong}" for one in os.environ.get("HEALTH", "").split() if (wrong := check(one))]
    sys.exit("; ".join(problems) if problems else 0)
