"""What a run puts on the link between a client's machine and the server, by the counters of the network interface.

Of a client's containers the SuperNode alone reaches the server; the client's app talks to that SuperNode on a network
of their own.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

from containers import Deployment, docker
from fedmom.records.files import CLIENTS, read_tensors
from fedmom.records.history import read_rounds

# Of every interface of a container: its address, and the bytes that it has sent and received so far.
_COUNTERS = "for d in /sys/class/net/*; do echo $(cat $d/address $d/statistics/tx_bytes $d/statistics/rx_bytes); done"


class Bytes(NamedTuple):
    """Of one client: what it has sent, and what it has received."""

    up: float
    down: float


class Counted(NamedTuple):
    """What a run sent by its own account, and what was seen of it on the link; of one client of N alike."""

    said: Bytes  # by rounds.jsonl
    kept: float  # what the last checkpoint has of the client's own
    seen: Bytes
    seconds: float


def counters(deployment: Deployment, client: int) -> Bytes:
    """Of the interface of its SuperNode in the network of the server's gate."""
    name = deployment.container(f"supernode-{client}")
    (about,) = json.loads(docker("inspect", name))
    address = about["NetworkSettings"]["Networks"][f"{deployment.name}_fleet"]["MacAddress"]
    lines = [line.split() for line in docker("exec", name, "sh", "-c", _COUNTERS).splitlines()]
    (found,) = (Bytes(float(sent), float(received)) for mac, sent, received in lines if mac == address)
    return found


def idle(deployment: Deployment, seconds: float = 5.0) -> Bytes:
    """Bytes a second while there is no run: the SuperNode asks for work, and says that it is there."""
    before, begin = counters(deployment, 0), time.monotonic()
    time.sleep(seconds)
    after, end = counters(deployment, 0), time.monotonic()
    return Bytes(*((b - a) / (end - begin) for a, b in zip(before, after, strict=True)))


def count(deployment: Deployment, out: Path, changes: dict) -> Counted:
    """A run to its end, of which the first client's link is looked at."""
    before, begin = counters(deployment, 0), time.monotonic()
    deployment.run(out, changes).end()
    after, end = counters(deployment, 0), time.monotonic()
    last = read_rounds(out)[-1]
    num_clients = last["num_clients"]
    # Where nothing else is said, as many bytes come back as clients send.
    said = Bytes(*(last.get(name, last["bytes_sent"]) / num_clients for name in ("bytes_sent", "bytes_received")))
    own = read_tensors(out / CLIENTS)[0].values() if (out / CLIENTS).exists() else ()
    kept = sum(value.numel() * value.element_size() for value in own) / num_clients
    return Counted(said, kept, Bytes(*(b - a for a, b in zip(before, after, strict=True))), end - begin)


def payload(run: Counted, around: Counted, rate: Bytes) -> Bytes:
    """What `run` sent and received beside the app's code, its questions and its heads.

    around: a run of as many rounds whose model has few numbers; rate: `idle`.
    """
    longer = run.seconds - around.seconds
    found = []
    for way in range(2):
        code = around.seen[way] - around.said[way]
        found.append(run.seen[way] - code - longer * rate[way])
    return Bytes(*found)
