"""Flower's strategies: under every key each does what its name says, or the key is refused before the first message."""

import pytest

from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.config.strategies import OURS, STRATEGIES
from fedmom.errors import InputError
from laws import table
from strategies.flower_strategies import STOCK

BASE = {"data.num-clients": 10, "run.backend": "simulation"}
PROCEED = {"server.on-failure": "proceed"}


def settle(name, **changes):
    return resolve(load({**BASE, "server.strategy": name}, changes))


def test_one_table_says_what_is_made():
    assert {OURS, *STOCK} == set(STRATEGIES)


@table("name", STRATEGIES)
def test_weights_and_absent_clients_are_taken_by_those_alone_that_can(name):
    """dp-fedavg's noise is for C clients of equal weight; trimmed means and Krum have no weights."""
    assert settle(name).notes == ()
    cases = {"client-weights": {"algorithm.client-weights": "samples"}, "on-failure": PROCEED}
    refused = {"fedtrimmedavg": ["client-weights"], "krum": ["client-weights"], "dp-fedavg": list(cases)}
    for key, changes in cases.items():
        most = {"server.min-clients": 9} if key == "on-failure" else {}
        if key in refused.get(name, []):
            with pytest.raises(InputError, match=rf"{key} = .*'{name}'"):
                settle(name, **changes, **most)
        else:
            settle(name, **changes, **most)
    settle(name, **PROCEED, **{"server.min-clients": 10})


@table(
    "name, changes, message",
    [
        ("krum", {"server.num-malicious": 4}, "num-malicious = 4: Krum needs at least 11 clients"),
        ("krum", PROCEED, "num-malicious = 0: Krum needs at least 3 clients .* 1 of 10 clients may make a round"),
        ("fedtrimmedavg", {"server.trim": 0.09}, "trim = 0.09: cuts off 0.9 clients at each end, which is none"),
        ("fedtrimmedavg", {**PROCEED, "server.min-clients": 4}, "where 4 of 10 clients may make a round; take 0.25"),
        ("fedtrimmedavg", {"algorithm.cohort-size": 2}, "of 2 clients none can be cut off"),
        (
            "fedavgm",
            {"algorithm.momentum-policy": "local"},
            "policy = 'local' lets clients keep states of their own, which needs pr-sgd-m",
        ),
        ("fedadam", {"algorithm.slow-momentum": 0.5}, "need pr-sgd-m"),
    ],
)
def test_too_few_for_what_a_strategy_does_is_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        settle(name, **changes)


def test_a_key_that_the_strategy_does_not_read_is_said():
    assert "does not read server.noise-multiplier" in settle("fedavg", **{"server.noise-multiplier": 2.0}).notes[0]
    assert "adds no noise" in settle("dp-fedavg", **{"server.noise-multiplier": 0.0}).notes[0]
