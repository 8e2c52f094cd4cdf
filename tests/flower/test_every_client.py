"""Every client's own results on data that nobody else has: what the clients tell is what one machine finds."""

import json

import pytest

from both_sides import assert_same, by_engine, by_flower, same_clients
from fedmom.records.history import read_clients
from laws import table
from runs import LOCAL, give_digits

KEYS = {
    **LOCAL,
    "model.name": "tests.apps.models:normed",
    "algorithm.personal": "norm",
    "algorithm.num-local-steps": 2,
    "algorithm.cohort-size": 2,
    "run.num-rounds": 2,
    "run.client-eval-every": 2,
    "run.personal-steps": 2,
}
RUNS = {
    "average": {"data.client-test-share": 0.3, "algorithm.lr-schedule": "step", "algorithm.lr-milestones": "0.7"},
    "local": {"algorithm.momentum-policy": "local", "run.metrics": "accuracy,f1"},
    "reset": {
        "algorithm.momentum-policy": "reset",
        "run.metrics": "f1",
        "algorithm.personal": "",
        "run.personal-steps": 0,
        "run.num-rounds": 4,
        "run.eval-every": 2,
        "run.client-eval-every": 3,
    },
    "between two exchanges": {
        "algorithm.optimizer": "adamw",
        "algorithm.states": "x: average every 2; m: average every 2; v: local",
        "run.client-eval-every": 1,
        "run.num-rounds": 3,
    },
    "algorithm 2": {
        "algorithm.name": "d-sgd-m",
        "algorithm.topology": "star",
        "algorithm.personal": "",
        "algorithm.cohort-size": 0,
        "run.personal-steps": 0,
        "run.num-rounds": 1,
    },
}


@table("run", RUNS)
def test_clients_tell_what_the_engine_finds(tmp_path, run):
    """On test examples that the clients held out, or brought; with models of their own, and without.

    A model that is evaluated and looked at is sent once: under `reset` those of rounds 2, 3 and 4. Under Algorithm 2
    a client's own model is its row, which goes to it alone.
    """
    more = RUNS[run]
    shares = "data.client-test-share" in more
    give_digits(tmp_path, 3, server=run in ("local", "algorithm 2"), clients=not shares)
    keys = {**KEYS, "data.data-dir": str(tmp_path), **more}
    engine = by_engine(keys, out=tmp_path / "engine")
    result, grid = by_flower(keys, 3, out=tmp_path / "flower")
    assert_same(result, engine, unseen={"consensus_distance", "momentum_spread"} if "exchanges" in run else frozenset())
    found = same_clients(tmp_path / "flower", tmp_path / "engine").results
    metrics, whose = more.get("run.metrics", "accuracy").split(","), ["own", "personal"][: 1 + (run != "reset")]
    assert {*found[-1].values} == {f"{one}_{name}" for one in whose for name in ("loss", *metrics)}
    assert all(len({*found[-1].values[f"{one}_loss"]}) == 3 for one in whose)
    if run == "reset":
        assert [one.round for one in found] == [3, 4]
        asked = [message for message in grid.pushed if message.metadata.message_type == "evaluate"]
        assert len(asked) == 3 * 3
    else:
        assert (found[-1].values["own_loss"] != found[-1].values["personal_loss"]).any()


def test_a_client_that_is_missing_has_no_numbers(tmp_path):
    """Client 1 does not judge the model of round 2: null, and the statistics are of the others."""
    give_digits(tmp_path, 3, server=True, clients=True)
    keys = {**KEYS, "data.data-dir": str(tmp_path), "server.on-failure": "proceed", "run.client-eval-every": 1}
    keys["algorithm.cohort-size"] = 3

    def fault(message, node):
        asked = message.content.config_records.get("config", {})
        judges = message.metadata.message_type == "evaluate" and asked["server-round"] == 3
        return ValueError("broken") if judges and node["partition-id"] == 1 else None

    result, _ = by_flower(keys, 3, {"fault": fault}, out=tmp_path / "flower")
    whole = by_engine(keys, out=tmp_path / "engine")
    text = [json.loads(line) for line in (tmp_path / "flower" / "clients.jsonl").read_text().splitlines()]
    right = read_clients(tmp_path / "engine").results
    assert [line["round"] for line in text[1:]] == [1, 2]
    for name, values in right[1].values.items():
        got, want = text[2][name], values.tolist()
        assert got[1] is None
        assert [got[0], got[2]] == pytest.approx([want[0], want[2]], rel=1e-10)
        assert None not in text[1][name]
        whose, _, measure = name.partition("_")
        mean = result.rounds[1][f"{whose}_mean_{measure}"]
        assert mean == pytest.approx((want[0] + want[2]) / 2, rel=1e-10)
    assert result.rounds[0]["own_mean_loss"] == pytest.approx(whole.rounds[0]["own_mean_loss"], rel=1e-10)
