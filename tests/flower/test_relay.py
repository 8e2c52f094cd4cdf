"""Algorithm 2 under Flower, the server relaying: the engine's rounds, and failures that are never silent."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message

import fedmom
from both_sides import QUADRATIC, RESNET, assert_same, by_engine, by_flower
from clients.client_app import app as client_app
from fedmom.backends.trainer import warm_node
from fedmom.errors import ClientsFailedError, InputError
from fedmom.flower.wire import pack, unpack
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.state import flatten
from fedmom.records.history import read_rounds
from grids import LocalGrid, run_config
from laws import table
from strategies.dsgdm import DSGDM

GOSSIP = {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}
QUADRATIC = {**QUADRATIC, **GOSSIP}
DIGITS = {
    **GOSSIP,
    "data.num-clients": 5,
    "model.name": "mlp",
    "model.hidden": 16,
    "run.dtype": "float64",
    "run.num-rounds": 3,
    "engine.path": "loop",
}


@table(
    "changes, num_nodes",
    [
        (QUADRATIC, 1),
        ({**RESNET, **GOSSIP, "algorithm.num-local-steps": 2, "run.num-rounds": 2}, 2),
    ],
)
def test_the_relay_gives_the_engines_rounds(changes, num_nodes):
    relayed, _ = by_flower(changes, min(num_nodes, changes.get("data.num-clients", 5)))
    assert_same(by_engine(changes), relayed)


def test_a_relayed_run_resumes_to_the_same_bytes(tmp_path):
    changes = {**DIGITS, "run.num-rounds": 4}
    by_flower(changes, 5, out=tmp_path / "whole")
    by_flower({**changes, "run.num-rounds": 2}, 5, out=tmp_path / "parts")
    by_flower(changes, 2, resume=tmp_path / "parts")
    for name in ("final.safetensors", "clients.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def fails(client):
    def fault(message: Message, node_config):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            return ValueError("disk full") if node_config["partition-id"] == client else None
        return None

    return fault


def test_stop_names_the_client():
    result, _ = by_flower(DIGITS, 5, {"fault": fails(3)})
    assert result.status == "failed"
    assert "round 2: client 3, node" in result.message
    assert "disk full" in result.message


@table("policy", ["average", "quasi-global"])
def test_proceed_lets_a_client_stand_still(tmp_path, policy):
    """Round 2 without client 3: its row stays, whatever the policy would make of its momentum."""
    keys = {**DIGITS, "algorithm.momentum-policy": policy, "server.on-failure": "proceed", "run.num-rounds": 2}
    by_flower({**keys, "run.num-rounds": 1}, 5, out=tmp_path / "one")
    result, _ = by_flower(keys, 5, {"fault": fails(3)}, out=tmp_path / "two")
    assert result.status == "done"
    assert [r.get("num_failed") for r in read_rounds(tmp_path / "two")] == [None, 1]
    from fedmom.records.files import read_tensors

    one, two = (read_tensors(tmp_path / name / "clients.safetensors")[0] for name in ("one", "two"))
    for name in one:
        assert torch.equal(one[name][3], two[name][3])
        assert not torch.equal(one[name][0], two[name][0])


def test_proceed_needs_a_symmetric_matrix():
    with pytest.raises(InputError, match=r"on-failure = 'proceed': topology 'directed-ring' is directed"):
        by_flower({**DIGITS, "algorithm.topology": "directed-ring", "server.on-failure": "proceed"}, 5)


def test_a_node_that_answers_for_others_is_refused():
    def lies(message, node_config):
        def change(reply):
            if "clients" in reply.content.config_records and message.metadata.message_type == "train":
                reply.content["clients"]["clients"] = [(node_config["partition-id"] + 1) % 5]
            return reply

        return change

    result, _ = by_flower(DIGITS, 5, {"fault": lies})
    assert result.status == "failed"
    assert "of clients [0], which it was not asked for" in result.message


def test_the_strategy_runs_by_itself():
    """As in any ServerApp: start with one model, ask for the mean."""
    keys = run_config(DIGITS)
    grid = LocalGrid(client_app, 5, keys)
    start = flatten(warm_node(keys).problem.start())
    strategy = DSGDM(make_topology("ring", 5), Method(0.9))
    result = strategy.start(grid, pack(start), num_rounds=3)
    want = by_engine(DIGITS)
    got = unpack(result.arrays)
    for name, value in want.state_dict.items():
        torch.testing.assert_close(got[f"params/{name}"], value, rtol=1e-10, atol=1e-10)
    losses = [record["train_loss"] for record in want.rounds]
    np.testing.assert_allclose([m["train_loss"] for m in result.train_metrics_clientapp.values()], losses)
    again = DSGDM(make_topology("ring", 5), Method(0.9))
    messages = again.configure_train(1, pack(start), {}, grid)
    replies = grid.send_and_receive(messages)
    arrays, metrics = again.aggregate_train(1, replies)
    assert isinstance(arrays, ArrayRecord)
    assert metrics["train_loss"] == pytest.approx(losses[0])


def test_too_few_answers_stop_the_run():
    def all_fail(message, node_config):
        return ValueError("no") if message.metadata.message_type == "train" else None

    grid = LocalGrid(client_app, 5, run_config(DIGITS), fault=all_fail)
    strategy = DSGDM(make_topology("ring", 5), Method(0.9), on_failure="proceed")
    with pytest.raises(ClientsFailedError, match="0 clients answered"):
        strategy.start(grid, pack(flatten(warm_node(run_config(DIGITS)).problem.start())), num_rounds=1)


def test_stock_strategies_are_refused():
    with pytest.raises(InputError, match=r"server\.strategy = 'fedavg'"):
        fedmom.run({**DIGITS, "server.strategy": "fedavg", "run.backend": "simulation"})
