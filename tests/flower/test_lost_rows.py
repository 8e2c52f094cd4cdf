"""Nodes that keep what is their clients' own, and fail: no row is replaced in silence, and none that counts is lost."""

import pytest
import torch
from flwr.app import RecordDict
from test_at_nodes import CASES, KEYS, RARE, same_files

from both_sides import QUADRATIC, by_engine, by_flower, fails
from clients.kept import ContextStore
from fedmom.flower.wire import pack
from fedmom.records.files import CHECKPOINT, CLIENTS, FINAL
from fedmom.records.history import read_rounds
from fedmom.rounds import loop
from fedmom.rounds.plan import cohort
from grids import LocalGrid
from laws import table


def test_a_message_that_is_sent_again_finds_what_its_round_began_with(tmp_path):
    """The reply to round 2 is lost after client 1 has trained; it is asked once more."""
    keys = {**QUADRATIC, **KEYS, **RARE, "algorithm.cohort-size": 5, "server.on-failure": "retry"}
    lost = []

    def fault(message, node):
        second = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2
        if not second or node["partition-id"] != 1 or lost:
            return None

        def lose(reply):
            lost.append(reply)
            reply.content["metrics"]["num-examples"] = -1.0  # refused
            return reply

        return lose

    by_flower(keys, 5, {"fault": fault}, out=tmp_path / "nodes")
    assert lost
    by_engine(keys, out=tmp_path / "engine")
    same_files(tmp_path / "nodes", tmp_path / "engine")


@pytest.fixture
def forget(monkeypatch):
    """forget(node): the node, of those on Grids that the test makes, has nothing of what it kept."""
    made, begin = [], LocalGrid.__init__

    def remember(self, *args, **options):
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(LocalGrid, "__init__", remember)

    def forget(node):
        for context in made[-1].contexts.values():
            if context.node_config["partition-id"] == node:
                for name in [*context.state]:
                    del context.state[name]

    return forget


def test_a_node_that_has_lost_its_rows_ends_the_run_and_says_how_to_go_on(tmp_path, forget):
    """Nothing is trained from another row; the last checkpoint is whole, and a resumed run ends with the same bytes."""
    for case, lost in (("local", "what the client had of its own after"), ("codecs", "what all began with in")):
        whole, parts = tmp_path / case / "whole", tmp_path / case / "parts"
        keys = {**QUADRATIC, **KEYS, **CASES[case], "algorithm.cohort-size": 5, "algorithm.client-weights": "uniform"}
        if case == "codecs":  # to ask for ever would not bring it back
            keys |= {"server.on-failure": "retry", "server.retries": 1000}

        def forgets(message, node):
            if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 4:
                forget(3)

        result, _ = by_flower(keys, 5, {"fault": forgets}, out=parts)
        assert result.status == "failed"
        assert f"client 3: this node has not {lost} round 3" in result.message
        assert "resume the run from its last checkpoint" in result.message
        assert ("(3 tries)" in result.message) == (case == "codecs")
        assert len(read_rounds(parts)) == 3
        by_flower(keys, 5, resume=parts)
        by_flower(keys, 5, out=whole)
        for name in (FINAL, CLIENTS):
            assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_proceed_takes_up_what_the_server_had_where_a_node_has_lost_it(tmp_path, caplog, forget):
    """Client 3 fails in round 3 and its node starts anew: what it had is in the checkpoint of round 2."""
    keys = {**QUADRATIC, **KEYS, "algorithm.momentum-policy": "local", "algorithm.cohort-size": 5}
    keys |= {"server.on-failure": "proceed"}
    once = []

    def fault(message, node):
        train = message.metadata.message_type == "train"
        if train and message.content["config"]["server-round"] == 4 and not once:
            forget(once.append(4) or 3)
        return fails(3, ValueError("broken"), rounds=(3,))(message, node)

    with caplog.at_level("WARNING", "flwr"):
        by_flower(keys, 5, {"fault": fault}, out=tmp_path / "nodes")
    assert "client 3: its node had lost what the client had of its own after round 2" in caplog.text
    options = {"fault": fails(3, ValueError("broken"), rounds=(3,))}
    by_flower({**keys, "server.own-rows": "server"}, 5, options, out=tmp_path / "server")
    same_files(tmp_path / "nodes", tmp_path / "server")


def test_a_row_that_says_nothing_any_more_is_not_missed(tmp_path, forget):
    """u every 2: who trains in round 2 and not in round 3 has nothing newer than û of round 2."""
    keys = {**QUADRATIC, **KEYS, "algorithm.states": "u: average every 2", "run.num-rounds": 3}
    chosen = {number: set(cohort(5, 3, 0, number - 1).tolist()) for number in (2, 3)}
    idle = min(chosen[2] - chosen[3])

    def forgets(message, node):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 3:
            forget(idle)

    result, _ = by_flower(keys, 5, {"fault": forgets}, out=tmp_path / "nodes")
    assert result.status == "done", result.message
    by_engine(keys, out=tmp_path / "engine")
    same_files(tmp_path / "nodes", tmp_path / "engine")


def test_what_is_saved_of_a_round_is_not_of_the_next_one_that_clients_have_trained_meanwhile(tmp_path, monkeypatch):
    """Ctrl-C while round 3 is evaluated: the checkpoint is of round 2, and so are the rows that nodes bring for it."""
    keys = {**QUADRATIC, **KEYS, "algorithm.codecs": "x: bfloat16; u: bfloat16", "run.checkpoint-every": 5}
    by_flower(keys, 5, out=tmp_path / "whole")
    measured = loop._measured

    def broken_off(problem, plan, job, outcome, new):
        if new.round == 3:
            raise KeyboardInterrupt
        return measured(problem, plan, job, outcome, new)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_measured", broken_off)
        result, _ = by_flower(keys, 5, out=tmp_path / "parts")
    assert (result.status, len(result.rounds)) == ("interrupted", 2)
    by_flower(keys, 5, resume=tmp_path / "parts")
    for name in (FINAL, CHECKPOINT, CLIENTS):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def given_is_a_number(reply):
    reply.content["clients"]["given"] = 5


def states_that_nobody_asked_for(reply):
    reply.content["states"] = pack({"w": torch.zeros(7, 2)})


def a_mean_of_nothing(reply):
    if "mean" in reply.content:
        reply.content["mean"] = pack({})


@table(
    "kind, spoil, text",
    [
        ("train", given_is_a_number, "its record 'clients' has a given that is no list"),
        ("train", states_that_nobody_asked_for, "its clients' own states has an unknown w"),
        ("query", a_mean_of_nothing, "its mean lacks momentum/x"),
    ],
)
def test_a_reply_that_says_something_else_is_refused_in_one_line(kind, spoil, text):
    keys = {**QUADRATIC, **KEYS, "algorithm.name": "scaffold", "algorithm.cohort-size": 5, "run.num-rounds": 1}

    def fault(message, node):
        if message.metadata.message_type != kind or node["partition-id"] != 2:
            return None
        return lambda reply: (spoil(reply), reply)[1]

    result, _ = by_flower(keys, 5, {"fault": fault})
    assert result.status == "failed"
    assert "round 1: client 2, " in result.message
    assert text in result.message


def test_a_node_looks_at_no_other_record_for_one():
    """Flower's `array_records` is made anew of all records: 200 clients on one node took 1.7 s a round by it."""

    class Guarded(RecordDict):
        def items(self):
            raise AssertionError("all records were looked at")

    store = ContextStore(Guarded())
    store.write("own/1/1", {"x": torch.ones(2)})
    assert "own/1/1" in store
    assert "own/1/2" not in store
    assert [*store.names()] == ["own/1/1"]
    torch.testing.assert_close(store.read("own/1/1"), {"x": torch.ones(2)}, rtol=0, atol=0)


def test_proceed_goes_on_without_a_client_and_takes_its_row_up_where_it_was(tmp_path):
    keys = {
        **QUADRATIC,
        **KEYS,
        "algorithm.momentum-policy": "local",
        "algorithm.cohort-size": 5,
        "server.on-failure": "proceed",
    }
    for name, where in (("nodes", "nodes"), ("server", "server")):
        options = {"fault": fails(3, ValueError("broken"))}
        by_flower({**keys, "server.own-rows": where}, 5, options, out=tmp_path / name)
    same_files(tmp_path / "nodes", tmp_path / "server")
