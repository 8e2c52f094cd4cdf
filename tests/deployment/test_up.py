"""Bringing a deployment up, without an engine."""

from types import SimpleNamespace

import pytest

from fedmom.deploy import federation
from fedmom.deploy.commands import CommandError

BUSY = "flwr supernode list: Server error '504 Gateway Time-out' for url 'https://127.0.0.1:1/v1/control/list-nodes'"


class Said:
    """Commands whose flwr fails a few times."""

    dry = False

    def __init__(self, *errors):
        self.errors, self.asked = list(errors), 0
        self.deployment = SimpleNamespace(num_clients=1, node_keys=lambda: ["key"], address="", settings={})

    def flwr(self):
        return []

    def compose(self, *words):
        return ["docker", "compose", *words]

    def do(self, command, **options):
        return ""

    def json(self, command):
        self.asked += 1
        if self.errors:
            raise CommandError(self.errors.pop(0))
        return {"nodes": [{"status": "online"}]}


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch):
    for name in ("write_flower_config", "_wait_for"):
        monkeypatch.setattr(federation, name, lambda *_: None)
    monkeypatch.setattr(federation, "_SECONDS_BETWEEN_LOOKS", 0.0)


def test_a_superlink_that_is_busy_is_asked_again():
    """For as long as all may take: a machine at a fifth of its speed lets the door wait in vain."""
    commands = Said(BUSY, BUSY)
    federation.up(commands, None, lambda text: None)
    assert commands.asked == 4
    commands = Said(*[BUSY] * 3)
    with pytest.raises(CommandError, match="504"):
        federation.up(commands, None, lambda text: None, wait=-1.0)
    assert commands.asked == 1


def test_what_is_wrong_for_good_is_said_at_once():
    commands = Said("flwr supernode list: Server error '500 Internal Server Error'")
    with pytest.raises(CommandError, match="500"):
        federation.up(commands, None, lambda text: None)
    assert commands.asked == 1
