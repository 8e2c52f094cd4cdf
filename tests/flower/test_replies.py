"""What a client's reply says: numbers that no client can have are that client's failure, and never the server's."""

import re
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from both_sides import DIGITS, QUADRATIC, RESNET, by_engine, by_flower, fails
from fedmom.flower.wire import pack, unpack
from fedmom.method.state import flatten
from laws import table
from strategies.replies import MEASURES, accept, mean_metrics

PROCEED = {**QUADRATIC, "server.on-failure": "proceed", "run.num-rounds": 2}
ADAM = {**PROCEED, "algorithm.optimizer": "adamw"}
RING = {**PROCEED, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}
NORMED = {**RESNET, "server.on-failure": "proceed", "run.num-rounds": 1, "algorithm.num-local-steps": 1}


def told(name, value, *, record="clients"):
    """A reply that says `value` of its clients; None: nothing."""

    def change(reply):
        if value is None:
            del reply.content[record][name]
        else:
            reply.content[record][name] = value
        return reply

    return change


def measured(name, value):
    """The same of its metrics."""
    return told(name, value, record="metrics")


def filled(part, value, record="arrays"):
    """A reply whose tensors with `part` in their names are all `value`."""

    def change(reply):
        tensors = unpack(reply.content[record])
        assert any(part in name for name in tensors)
        filled = {n: torch.full_like(t, value) if part in n else t for n, t in tensors.items()}
        reply.content[record] = pack(filled)
        return reply

    return change


def with_text(reply):
    """A reply that has text for a tensor."""
    file, array, record = BytesIO(), np.array(["a"]), reply.content["arrays"]
    np.save(file, array)
    text = Array(dtype=str(array.dtype), shape=array.shape, stype="numpy.ndarray", data=file.getvalue())
    reply.content["arrays"] = ArrayRecord(dict.fromkeys(record, text))
    return reply


LOCAL = {**ADAM, "algorithm.momentum-policy": "local"}
WRONG = {
    "text": (PROCEED, with_text, "an array has numpy's dtype '<U1'"),
    "text, relayed": (RING, with_text, "an array has numpy's dtype '<U1'"),
    "v": (ADAM, filled("/v/", -1e3), "its update has numbers below 0 in momentum/v/x, must be at least 0"),
    "v of its own": (LOCAL, filled("/v/", -1e3, "own"), "clients' own tensors has numbers below 0 in momentum/v/x"),
    "clock": (ADAM, filled("m.clock/", 2.0), "numbers above 1 in momentum/m.clock/x, must be at most 1"),
    "clock below": (ADAM, filled("v.clock/", -0.5), "numbers below 0 in momentum/v.clock/x"),
    "variance": (NORMED, filled("running_var", -1.0), r"numbers below 0 in buffers/\S*running_var"),
    "metric": (PROCEED, measured("lr", float("nan")), "its metric lr is nan, must be finite"),
    "no loss": (PROCEED, measured("train_loss", None), "its metrics lack train_loss, which must be one number"),
    "weight": (PROCEED, measured("num-examples", 1e308), r"is 1e\+308, must be at most 2\*\*53"),
    "losses of text": (PROCEED, told("train-loss", ["a"]), "has 'a' in train-loss, must be finite numbers"),
    "losses": (PROCEED, told("train-loss", [1.0, 2.0]), "must have train-loss, one number for each of its clients"),
    "infinite loss": (RING, told("train-loss", [float("inf")]), "has inf in train-loss"),
    "steps": (PROCEED, told("client-steps", "many"), "has client-steps = 'many', must be a number of steps"),
    "steps, relayed": (RING, told("client-steps", "many"), "has client-steps = 'many'"),
    "path": (PROCEED, told("path", [1.0]), "has a path of 1 numbers, must be 3"),
    "no path, relayed": (RING, told("path", None), "has a path of 0 numbers, must be 3"),
}


@table("name", WRONG)
def test_a_wrong_reply_is_its_clients_failure_and_the_round_goes_on(name, monkeypatch):
    changes, change, reason = WRONG[name]
    num_nodes, client = changes.get("data.num-clients", 5), 3 if "data.num-clients" not in changes else 4
    said = []
    monkeypatch.setattr("strategies.fleet.log", lambda level, text, *values: said.append(text % values))
    keys = {"fault": fails(client, change, rounds=(1,)), "shares_memory": True}
    result, _ = by_flower({**changes, "run.num-rounds": 1}, num_nodes, keys)
    assert (result.status, [record["num_failed"] for record in result.rounds]) == ("done", [1])
    (line,) = said
    assert re.fullmatch(rf"round 1: client .*{reason}.*", line), line  # one line


def test_a_relayed_client_needs_no_path_where_nobody_reads_it():
    changes = {**DIGITS, "run.num-rounds": 1, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}
    result, _ = by_flower(changes, 5, {"fault": fails(3, told("path", None), rounds=(1,))})
    assert result.status == "done"
    assert result.rounds[0]["train_loss"] == pytest.approx(by_engine(changes).rounds[0]["train_loss"])


def test_a_metrics_mean_is_of_those_who_tell_it():
    assert mean_metrics([(1.0, {"a": 2.0}), (3.0, {"a": 4.0, "b": 5.0})]) == {"a": 3.5, "b": 5.0}
    assert mean_metrics([(0.0, {"a": 2.0})]) is None


def test_bounds_are_of_what_has_them_alone():
    """u may be negative, also of a parameter called v; a clock may be 1 and a rounding more."""
    tensors = {name: torch.tensor([-2.0]) for name in ("params/v", "momentum/v", "momentum/m/v", "buffers/mean")}
    tensors |= {"momentum/m.clock/v": torch.tensor(1 + 1e-6), "buffers/a.running_var": torch.zeros(0)}
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    metrics = MetricRecord({"num-examples": 2**53, **dict.fromkeys(MEASURES, 0.0)})
    reply = Message(RecordDict({"arrays": pack(tensors), "metrics": metrics}), reply_to=asked)
    update = accept(reply, tensors, measures=MEASURES)
    assert flatten(update.state).keys() == tensors.keys()
    assert update.weight == 2**53
