"""The Flower app on a Grid in this process: its rounds are the engine's, and a failure is never silent."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from both_sides import DIGITS, QUADRATIC, RESNET, assert_same, by_engine, by_flower, fails
from clients.client_app import app as client_app
from fedmom.backends.trainer import Node, held_clients, warm_node
from fedmom.config.load import load
from fedmom.errors import ClientsFailedError, InputError
from fedmom.flower.wire import pack, unpack
from fedmom.method.state import flatten
from fedmom.records.files import read_tensors
from fedmom.records.history import read_rounds
from grids import LocalGrid, run_config
from laws import table
from strategies.flower_strategies import STOCK
from strategies.prsgdm import PRSGDM
from strategies.replies import is_bundled
from strategies.server_app import app as server_app


def test_blocks_are_contiguous_nearly_equal_and_hold_every_client_once():
    for num_clients, num_nodes in itertools.product((1, 2, 3, 7, 10, 1000), (1, 2, 3, 7, 10)):
        blocks = [held_clients(p, num_nodes, num_clients) for p in range(num_nodes)]
        assert np.concatenate(blocks).tolist() == list(range(num_clients))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
        for p, block in enumerate(blocks):
            assert all(c * num_nodes // num_clients == p for c in block)


@table("changes, nesterov, num_nodes", [(QUADRATIC, False, 1), (DIGITS, True, 5)])
def test_rounds_are_the_engines(changes, nesterov, num_nodes):
    changes = {**changes, "algorithm.nesterov": nesterov}
    result, _ = by_flower(changes, num_nodes)
    assert_same(result, by_engine(changes))


@table(
    "changes",
    [
        {"algorithm.lr-schedule": "cosine", "algorithm.weight-decay": 0.01},
        {"algorithm.slow-momentum": 0.5, "algorithm.slow-lr": 0.7},
        {"engine.path": "vmap", "engine.chunk-size": 2},
        {"engine.path": "auto"},
    ],
)
def test_every_option_means_the_same(changes):
    """On two nodes, whose blocks are of 2 and 3 clients."""
    result, _ = by_flower({**DIGITS, **changes}, 2)
    assert_same(result, by_engine({**DIGITS, **changes}), 1e-9)


@table("num_nodes, running_var", [(2, "pooled"), (3, "mean"), (3, "pooled")])
def test_batch_norm_statistics_too(num_nodes, running_var):
    changes = {**RESNET, "algorithm.running-var": running_var}
    ours = by_engine(changes)
    assert any("running_var" in name for name in ours.state_dict)
    assert_same(by_flower(changes, num_nodes)[0], ours, 1e-9)


def test_no_update_is_moved_by_the_order_of_replies():
    changes = {**DIGITS, "run.num-rounds": 2}
    one, _ = by_flower(changes, 5, {"shuffle": True})
    other, _ = by_flower(changes, 5, {"shuffle": False})
    for name, value in one.state_dict.items():
        assert torch.equal(value, other.state_dict[name])


WIRED = {
    "momentum average": DIGITS,
    "momentum local": {**DIGITS, "algorithm.momentum-policy": "local"},
    "batch norm": RESNET,
    "algorithm 2": {**DIGITS, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"},
    **{name: {**DIGITS, "server.strategy": name} for name in STOCK},
}


@pytest.mark.slow
@table("name", WIRED)
def test_one_array_per_dtype_travels_or_every_tensor_by_its_name_to_the_same_end(name):
    changes = {**WIRED[name], "server.num-malicious": 1, "server.noise-multiplier": 0.0, "run.num-rounds": 2}
    num_nodes = changes["data.num-clients"]
    (bundled, wire), (apart, memory) = (
        by_flower(changes, num_nodes, {"shuffle": False, "shares_memory": shared}) for shared in (False, True)
    )
    for a, b in ((bundled.state_dict, apart.state_dict), (bundled.momentum, apart.momentum)):
        for key in a.keys() | b.keys():  # a norm's sum over tensors may be taken in another order
            torch.testing.assert_close(a[key], b[key], rtol=1e-13, atol=1e-13)
    for grid, bundles in ((wire, True), (memory, False)):
        messages = [message for message in grid.pushed if message.metadata.message_type == "train"]
        records = [record for message in messages for record in message.content.array_records.values()]
        assert len(messages) == 2 * num_nodes
        assert {is_bundled(record) for record in records} == {bundles}
        dtypes = {array.dtype for array in records[0].values()}
        assert (len(records[0]) == len(dtypes)) == bundles


# The run folder


@table("policy", ["average", "local"])
def test_a_run_resumes_to_the_same_bytes(tmp_path, policy):
    changes = {**DIGITS, "algorithm.momentum-policy": policy, "run.checkpoint-every": 1, "algorithm.slow-momentum": 0.3}
    by_flower({**changes, "run.num-rounds": 4}, 5, out=tmp_path / "whole")
    by_flower({**changes, "run.num-rounds": 2}, 5, out=tmp_path / "parts")
    result, grid = by_flower({**changes, "run.num-rounds": 4}, 5, resume=tmp_path / "parts")
    assert [record["round"] for record in result.rounds] == [1, 2, 3, 4]
    rounds = [m.content["config"]["server-round"] for m in grid.pushed if m.metadata.message_type == "train"]
    assert rounds == [3] * 5 + [4] * 5  # absolute ones
    for name in ("checkpoint.safetensors", "final.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert result.config.run.backend == "simulation"


def test_a_resume_with_another_key_is_refused_by_name(tmp_path):
    by_flower({**DIGITS, "run.num-rounds": 1}, 5, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"algorithm\.lr = 0\.2: the run in .* has 0\.05"):
        by_flower({**DIGITS, "run.num-rounds": 2, "algorithm.lr": 0.2}, 5, resume=tmp_path / "run")


# Failures


def changed(part, name, change):
    """A reply with one array changed."""

    def change_one(arrays):
        key = f"{part}/{name}"
        return {**arrays, key: torch.from_numpy(np.asarray(change(arrays[key].numpy())))}

    return with_arrays(change_one)


def without(name):
    return with_arrays(lambda arrays: {n: a for n, a in arrays.items() if n != name})


def renamed(old, new):
    return with_arrays(lambda arrays: {new if n == old else n: array for n, array in arrays.items()})


def with_arrays(change):
    """A reply with other arrays, bundled as they came."""

    def change_reply(reply):
        record = reply.content["arrays"]
        reply.content["arrays"] = pack(change(unpack(record)), bundled=is_bundled(record))
        return reply

    return change_reply


def weighing(weight):
    def change_reply(reply):
        reply.content["metrics"]["num-examples"] = weight
        return reply

    return change_reply


FAULTS = {
    "raises": (ValueError("no more disk"), "ValueError: no more disk"),
    "is silent": ("lose", "no reply in time"),
    "NaN": (changed("params", "x", lambda a: a * np.nan), "NaN or infinite numbers in params/x"),
    "infinite momentum": (changed("momentum", "x", lambda a: a + np.inf), "NaN or infinite numbers in momentum/x"),
    "shape": (changed("momentum", "x", lambda a: np.zeros(2)), r"momentum/x as \[2\] float64, must be \[1\] float64"),
    "dtype": (changed("params", "x", lambda a: a.astype(np.float32)), r"params/x as \[1\] float32, must be"),
    "lacks": (without("momentum/x"), "its update lacks momentum/x"),
    "unknown": (renamed("momentum/x", "params/y"), "its update (lacks|has an unknown) "),
    "weight": (weighing(-1.0), "its weight 'num-examples' is -1.0"),
}
FAST = {**QUADRATIC, "run.num-rounds": 3, "server.timeout-seconds": 0.2}


@table("fault", FAULTS)
def test_stop_names_the_round_the_client_and_the_reason(fault, tmp_path):
    what, reason = FAULTS[fault]
    keys = {**FAST, "run.checkpoint-every": 1}
    result, grid = by_flower(keys, 5, {"fault": fails(3, what)}, out=tmp_path / "run")
    assert result.status == "failed"
    assert result.message.startswith(f"round 2: client 3, node {grid.ids[3]}: ")
    assert re.search(reason, result.message), result.message
    assert "\n" not in result.message
    # What was done is there, and the run goes on from it.
    assert len(read_rounds(tmp_path / "run")) == 1
    again, _ = by_flower(keys, 5, resume=tmp_path / "run")
    assert_same(again, by_engine({**keys, "server.timeout-seconds": 3600.0}))


@table("fault", ["raises", "NaN"])
def test_retry_gives_the_whole_result(fault):
    retry_gives_the_whole_result(fault)


@pytest.mark.slow
def test_retry_gives_the_whole_result_of_a_client_that_is_silent():
    retry_gives_the_whole_result("is silent")


def retry_gives_the_whole_result(fault):
    what, _ = FAULTS[fault]
    keys = {**FAST, "server.on-failure": "retry", "server.retries": 2}
    result, _ = by_flower(keys, 5, {"fault": fails(3, what, tries=2)})
    assert_same(result, by_engine(keys))
    result, _ = by_flower(keys, 5, {"fault": fails(3, what, tries=3)})
    assert result.status == "failed"
    assert result.message.endswith("(3 tries)")


@table("fault, policy", itertools.product(["raises", "is silent", "NaN"], ["average", "local"]))
def test_proceed_averages_the_others_and_says_so(fault, policy):
    """One round without client 3 is one round over a cohort of the others."""
    what, _ = FAULTS[fault]
    keys = {**FAST, "algorithm.momentum-policy": policy, "server.on-failure": "proceed", "run.num-rounds": 1}
    result, _ = by_flower(keys, 5, {"fault": fails(3, what, rounds=(1,))})
    (record,) = result.rounds
    assert (record["num_clients"], record["num_failed"]) == (4, 1)
    others = {
        **keys,
        "data.curvatures": "1;3;2;1.5",
        "data.centers": "4;-2;1;3",
    }
    right = by_engine(others)
    torch.testing.assert_close(result.state_dict["x"], right.state_dict["x"])
    torch.testing.assert_close(result.momentum["x"], right.momentum["x"])
    assert record["train_loss"] == pytest.approx(right.rounds[0]["train_loss"])
    assert record["consensus_distance"] == pytest.approx(right.rounds[0]["consensus_distance"])


def test_under_local_a_client_that_failed_keeps_the_momentum_it_had(tmp_path):
    keys = {**FAST, "algorithm.momentum-policy": "local", "server.on-failure": "proceed", "run.num-rounds": 2}
    by_flower({**keys, "run.num-rounds": 1}, 5, out=tmp_path / "one")
    by_flower(keys, 5, {"fault": fails(3, ValueError("x"))}, out=tmp_path / "two")
    before, after = (read_tensors(tmp_path / name / "clients.safetensors")[0]["momentum/x"] for name in ("one", "two"))
    same = (before == after).all(1).tolist()
    assert same == [False, False, False, True, False]


def test_proceed_stops_below_the_fewest_clients():
    keys = {**FAST, "server.on-failure": "proceed", "server.min-clients": 5}
    result, _ = by_flower(keys, 5, {"fault": fails(3, ValueError("x"))})
    assert result.status == "failed"
    assert result.message == "round 2: 4 clients answered, server.min-clients = 5"


def test_a_block_fails_as_one_and_is_named_whole():
    result, grid = by_flower(FAST, 2, {"fault": fails(3, ValueError("x"))})
    assert result.message.startswith(f"round 2: clients 3, 4, node {grid.ids[1]}: ")


def test_no_more_messages_are_under_way_than_the_window():
    keys = run_config({**FAST, "server.window": 2})
    grid = LocalGrid(client_app, 5, keys)
    strategy = PRSGDM(5, window=2)
    strategy.fleet.learn(grid)
    grid.most_in_flight = 0
    start = flatten(warm_node(keys).problem.start())
    strategy.start(grid, pack(start), num_rounds=2)
    assert grid.most_in_flight <= 2


# As a strategy of its own


def test_prsgdm_by_itself_as_flower_calls_it():
    keys = run_config(QUADRATIC)
    grid = LocalGrid(client_app, 5, keys)
    start, heard = pack(flatten(warm_node(keys).problem.start())), []
    strategy = PRSGDM(5, evaluate_clients=True)
    result = strategy.start(
        grid,
        start,
        num_rounds=20,
        evaluate_fn=lambda number, arrays: MetricRecord({"round": number}),
        on_round=lambda number, arrays, metrics: heard.append(number),
    )
    right = by_engine(QUADRATIC)
    torch.testing.assert_close(unpack(result.arrays)["params/x"], right.state_dict["x"])
    torch.testing.assert_close(unpack(result.arrays)["momentum/x"], right.momentum["x"])
    assert heard == list(range(1, 21))
    assert list(result.evaluate_metrics_serverapp) == list(range(21))
    assert result.train_metrics_clientapp[20]["train_loss"] == pytest.approx(right.rounds[-1]["train_loss"])
    assert result.evaluate_metrics_clientapp[20]["loss"] == pytest.approx(right.rounds[-1]["loss"])
    first = PRSGDM(5).start(grid, start, num_rounds=12)
    rest = PRSGDM(5).start(grid, first.arrays, num_rounds=20, first_round=13)
    assert unpack(rest.arrays)["params/x"].equal(unpack(result.arrays)["params/x"])


def test_slow_momentum_is_the_formula_and_its_zero_changes_nothing():
    plain = by_engine({**QUADRATIC, "run.num-rounds": 2})
    same = by_engine({**QUADRATIC, "run.num-rounds": 2, "algorithm.slow-momentum": 0.0, "algorithm.slow-lr": 1.0})
    assert same.state_dict["x"].equal(plain.state_dict["x"])
    keys = {**QUADRATIC, "algorithm.slow-momentum": 0.4, "algorithm.slow-lr": 0.5, "run.num-rounds": 1}
    lr, alpha, eta = 0.05, 0.4, 0.5
    mean = by_engine({**QUADRATIC, "run.num-rounds": 1})
    slow = (0.0 - mean.state_dict["x"]) / lr
    x = 0.0 - eta * lr * slow
    one = by_engine(keys)
    torch.testing.assert_close(one.state_dict["x"], x)
    # The second round: from x and the mean momentum, by the engine on a problem that starts there.
    two = by_engine({**keys, "run.num-rounds": 2})
    keys_flat = run_config(QUADRATIC)
    node = warm_node(keys_flat)
    state = node.problem.start()._replace(params={"x": x}, momentum=mean.momentum)
    ahead = node.train(range(5), 1, state).outcome.mean.params["x"]
    slow = alpha * slow + (x - ahead) / lr
    torch.testing.assert_close(two.state_dict["x"], x - eta * lr * slow)
    strategy = PRSGDM(5, slow_momentum=alpha, slow_lr=eta)
    result = strategy.start(LocalGrid(client_app, 5, keys_flat), pack(flatten(node.problem.start())), num_rounds=2)
    torch.testing.assert_close(unpack(result.arrays)["params/x"], two.state_dict["x"])


def test_slow_momentum_divides_by_the_clients_lr():
    """Where γ changes between rounds, u_s keeps what was divided by the γ of its own round."""
    changes = {**QUADRATIC, "run.num-rounds": 4, "algorithm.lr-schedule": "step", "algorithm.lr-milestones": "0.5"}
    right = by_engine({**changes, "algorithm.slow-momentum": 0.4, "algorithm.slow-lr": 0.5})
    grid, start = LocalGrid(client_app, 5, run_config(changes)), warm_node(run_config(changes)).problem.start()
    found = PRSGDM(5, slow_momentum=0.4, slow_lr=0.5).start(grid, pack(flatten(start)), num_rounds=4)
    torch.testing.assert_close(unpack(found.arrays)["params/x"], right.state_dict["x"])


# Flower's own strategies on our clients


@pytest.mark.slow
@table("name", STOCK)
def test_a_stock_strategy_runs_unchanged_and_learns(name):
    keys = {**DIGITS, "data.partition": "iid", "server.strategy": name, "run.num-rounds": 6}
    keys |= {"server.noise-multiplier": 0.001}
    keys |= {"server.lr": 0.02} if name == "fedadam" else {"server.clipping-norm": 10.0, "server.momentum": 0.3}
    result, _ = by_flower(keys, 5)
    assert result.status == "done"
    assert result.rounds[-1]["train_loss"] < result.rounds[0]["train_loss"]
    assert result.rounds[-1]["test_accuracy"] > result.rounds[0]["test_accuracy"]


def test_fedavg_is_our_average_and_takes_blocks():
    for num_nodes in (5, 2):
        result, _ = by_flower({**DIGITS, "server.strategy": "fedavg"}, num_nodes)
        assert_same(result, by_engine(DIGITS), 1e-6)  # it adds up in the arrays' own dtype


def test_fedavg_of_flower_itself_takes_our_client_app():
    keys = run_config({**QUADRATIC, "run.num-rounds": 5})
    grid = LocalGrid(client_app, 5, keys)
    start = pack(flatten(warm_node(keys).problem.start()))
    result = FedAvg().start(grid, start, num_rounds=5, train_config=ConfigRecord({}))
    right = by_engine({**QUADRATIC, "run.num-rounds": 5})
    assert unpack(result.arrays)["params/x"].item() == pytest.approx(right.state_dict["x"].item())
    assert result.evaluate_metrics_clientapp[5]["loss"] == pytest.approx(right.rounds[-1]["loss"])


def test_a_stock_strategy_sees_the_rounds_cohort():
    keys = {**DIGITS, "server.strategy": "fedavg", "algorithm.cohort-size": 2}
    assert_same(by_flower(keys, 5)[0], by_engine({**DIGITS, "algorithm.cohort-size": 2}), 1e-6)


@table(
    "changes, num_nodes, message",
    [
        ({"server.strategy": "krum"}, 2, r"'krum': node \d+ holds \d clients and answers with their mean"),
        ({"server.strategy": "fedtrimmedavg"}, 2, "'fedtrimmedavg': node"),
        ({"server.strategy": "dp-fedavg"}, 2, "'dp-fedavg': node"),
        ({"server.strategy": "fedavg", "algorithm.cohort-size": 2}, 2, r"cohort-size = 2 needs one client per node"),
        ({"server.strategy": "fedavgm", **RESNET}, 3, "'fedavgm': its step could make a running variance negative"),
        ({"server.strategy": "fedadam", **RESNET}, 3, "'fedadam': its step could"),
        ({"server.strategy": "dp-fedavg", **RESNET}, 3, "'dp-fedavg': its step could"),
    ],
)
def test_where_a_stock_strategy_would_be_wrong_it_is_refused(changes, num_nodes, message):
    with pytest.raises(InputError, match=message):
        by_flower({**DIGITS, **changes}, num_nodes)


def test_a_stock_strategy_meets_failures_as_ours_does():
    keys = {**FAST, "server.strategy": "fedavg"}
    result, _ = by_flower(keys, 5, {"fault": fails(3, ValueError("no more disk"))})
    assert (result.status, "client 3" in result.message) == ("failed", True)
    result, _ = by_flower({**keys, "server.on-failure": "proceed"}, 5, {"fault": fails(3, ValueError("x"))})
    assert result.rounds[1]["num_failed"] == 1


def test_a_stock_strategy_refuses_resume(tmp_path):
    keys = {**DIGITS, "server.strategy": "fedadam", "run.num-rounds": 1}
    by_flower(keys, 5, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"run\.resume = .*: Flower's fedadam keeps state"):
        by_flower({**keys, "run.num-rounds": 2}, 5, resume=tmp_path / "run")


# Who holds what


def test_two_nodes_with_one_client_are_refused():
    keys = run_config(QUADRATIC)
    grid = LocalGrid(client_app, 5, keys)
    grid.contexts[grid.ids[1]].node_config["partition-id"] = 0
    with pytest.raises(InputError, match=r"client 0: nodes .* both hold it"):
        server_app(grid, Context(1, 0, {}, RecordDict(), keys))


def test_clients_without_a_node_are_named_after_the_wait():
    keys = run_config({**QUADRATIC, "server.wait-seconds": 0.1})
    grid = LocalGrid(client_app, 5, keys)
    grid.ids = grid.ids[:3]
    with pytest.raises(InputError, match=r"server\.wait-seconds = 0\.1: no node holds client 3 \(2 of 5"):
        server_app(grid, Context(1, 0, {}, RecordDict(), keys))


def test_a_client_app_that_raises_at_the_query_stops_at_once():
    grid_options = {"fault": lambda message, node_config: ValueError("no such data")}
    with pytest.raises(InputError, match="ValueError: no such data"):
        by_flower(QUADRATIC, 5, grid_options)


def test_more_nodes_than_clients_leave_some_idle():
    result, _ = by_flower(QUADRATIC, 9)
    assert_same(result, by_engine(QUADRATIC))


def test_one_message_to_one_client_by_hand():
    keys = run_config(QUADRATIC)
    grid = LocalGrid(client_app, 5, keys)
    node = warm_node(keys)
    content = {"arrays": pack(flatten(node.problem.start())), "config": ConfigRecord({"server-round": 1})}
    reply = grid._answer(Message(RecordDict(content), message_type="train", dst_node_id=grid.ids[2]))
    assert reply.content["clients"]["clients"] == [2]
    assert reply.content["metrics"]["num-examples"] == 1
    assert math.isclose(reply.content["metrics"]["lr"], 0.05)
    assert len(reply.content.array_records) == len(reply.content.metric_records) == 1
    assert isinstance(ClientsFailedError("x"), RuntimeError)


@table("keys", [{"on_failure": "stopp"}, {"cohort_size": 6}, {"min_clients": 6}, {"min_clients": 0}])
def test_a_strategy_that_cannot_work_is_refused(keys):
    with pytest.raises(InputError, match=next(iter(keys))):
        PRSGDM(5, **keys)


def test_more_clients_wanted_than_take_part_is_a_wrong_key():
    with pytest.raises(InputError, match=r"server\.min-clients = 3: only 2 clients take part"):
        by_flower({**QUADRATIC, "algorithm.cohort-size": 2, "server.min-clients": 3}, 5)


def test_where_the_nodes_train_is_left_to_them_in_the_record_too(tmp_path):
    result, _ = by_flower({**QUADRATIC, "run.num-rounds": 1}, 5, out=tmp_path / "run")
    assert result.config.engine.device == "auto"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["device"] in ("cpu", "cuda")


def test_a_run_that_goes_on_keeps_what_a_node_once_chose(tmp_path, monkeypatch):
    """Whatever that node finds the fastest now: another way is another run."""
    changes = {**DIGITS, "engine.path": "auto", "run.num-rounds": 2, "run.checkpoint-every": 1}
    by_flower(changes, 2, out=tmp_path / "run")
    chosen = load(tmp_path / "run" / "config.toml").config.engine
    other = ("vmap" if chosen.path == "loop" else "loop", chosen.chunk_size + 1)
    monkeypatch.setattr(Node, "choose", lambda self, clients: other)
    result, _ = by_flower({**changes, "run.num-rounds": 4}, 2, resume=tmp_path / "run")
    assert (result.config.engine.path, result.config.engine.chunk_size) == (chosen.path, chosen.chunk_size)
    assert_same(result, by_engine({**changes, "run.num-rounds": 4}), 1e-9)
