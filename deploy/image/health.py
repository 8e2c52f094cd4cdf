"""Whether the container's service answers at $HEALTH: https://HOST:PORT/PATH, http://… or tcp://HOST:PORT."""

import os
import socket
import ssl
import sys
from urllib.parse import urlsplit


def check(address: str, seconds: float = 3.0) -> str:
    """What is wrong with the service at `address`; empty where it is well."""
    where = urlsplit(address)
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


if __name__ == "__main__":
    address = os.environ.get("HEALTH", "")
    wrong = check(address) if address else ""
    sys.exit(f"{address}: {wrong}" if wrong else 0)
