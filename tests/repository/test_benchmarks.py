"""The programs that measure: one system's failure costs its row alone."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def raising(error):
    def way(load, rounds):
        raise error

    return way


def test_a_peer_that_fails_is_a_marked_row_and_the_others_stay(monkeypatch, tmp_path):
    import peers

    monkeypatch.setattr(peers, "doubts", lambda load, row: "")
    load = {"name": "cnn", "source": "random", "cohort": 2, "steps": 5}
    good = {"seconds": [9.0, 9.0, 1.0, 1.0], "losses": [2.0, 1.0], "parameters": 3}
    bad = {
        "no losses": lambda load, rounds: {**good, "losses": []},
        "no rounds": lambda load, rounds: {**good, "seconds": [1.0]},
        "no keys": lambda load, rounds: {},
        "raises": raising(ValueError("so")),
        "exits": raising(SystemExit("so")),
        "has no time": lambda load, rounds: {**good, "seconds": [0.0] * 4},
    }
    rows = [peers.measured(load, name, way, 4) for name, way in {"good": lambda *_: good, **bad}.items()]
    text = peers.table(rows)
    assert "| good | 10 |" in text
    for name in bad:
        assert f"| {name} | failed |" in text
        assert f"\n{name}, cnn: " in text
    peers.draw(rows[1:], tmp_path / "peers.png")  # nothing was measured


def test_a_seed_that_diverged_is_no_zero_in_a_mean():
    import decentralized
    import momentum_policies

    accuracies = [decentralized.accuracy(record, "a") for record in ({"a": 0.5}, {}, {"a": 0.7})]
    assert decentralized.shown(accuracies) == "60.0 ± 14.1 [2 of 3]"
    assert momentum_policies.cell({0.1: [{5: 50.0}, {}, {5: 70.0}]}, 5) == "60.0 ± 14.1 [2 of 3] (0.1*)"
