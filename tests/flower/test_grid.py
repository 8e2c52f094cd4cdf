"""Laws of the Grid on Ray, on an app that knows nothing of fedmom: what Flower promises, without its costs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fedmom.actors.cluster import PoolOptions
from fedmom.errors import InputError
from fedmom.flower import grid as ray_grid
from fedmom.flower.app import load_components, simulate_app
from fedmom.flower.grid import RayGrid
from fedmom.flower.private import error_codes, identify
from laws import table

flwr_app = pytest.importorskip("flwr.app")
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402

# Ray itself is imported by the process that has its tests.
pytestmark = [
    pytest.mark.xdist_group("Ray: rounds"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
PLAIN = Path(__file__).parents[1] / "apps" / "plain_app"
OLDER = PLAIN.parent / "older_app"
OPTIONS = PoolOptions(num_workers=2, num_cpus=0.5, retries=1, straggler_seconds=2)
NUM_NODES = 6
ErrorCode = error_codes()


@pytest.fixture(scope="module")
def grid(one_ray):
    config = load_components(PLAIN).config
    with RayGrid("plain_app.client:app", app_dir=PLAIN, num_nodes=NUM_NODES, run_config=config, options=OPTIONS) as it:
        yield it


@pytest.fixture
def seen(grid):
    """Every reply, as `on_reply` sees it; and the store's cache is empty afterwards."""
    replies = []
    grid._on_reply = replies.append
    yield replies
    grid._on_reply = None
    assert not grid._pending
    assert not grid._queues
    assert not grid._arrived
    assert len(grid._data) == 0


def train_messages(nodes, size=30_000, **config):
    record = RecordDict({"arrays": ArrayRecord([np.ones(size, np.float32)]), "config": ConfigRecord(config)})
    return [Message(record, node_id, "train") for node_id in nodes]


def identity_here():
    before = identify(None, None, None)
    identify(*before)
    return before


def query(node_id, action="query", **records):
    return Message(RecordDict(records), node_id, action)


def partition(reply):
    return reply.metadata.src_node_id - ray_grid.FIRST_NODE_ID


def calls(grid, node_id):
    """How often the node was called before."""
    (reply,) = grid.send_and_receive([query(node_id)])
    return reply.content["who"]["calls"] - 1


@pytest.mark.slow
def test_it_is_a_grid_of_nodes_that_know_their_partition(grid, seen):
    assert isinstance(grid, Grid)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == NUM_NODES
    assert [info.node_id for info in grid.get_nodes()] == nodes
    replies = grid.send_and_receive([query(node_id) for node_id in nodes])
    assert {r.metadata.src_node_id: r.content["who"]["partition-id"] for r in replies} == {
        node_id: index for index, node_id in enumerate(nodes)
    }
    assert {reply.content["who"]["num-partitions"] for reply in replies} == {NUM_NODES}
    assert seen == replies


@pytest.mark.slow
@table("size", [3, 255, 30_000])
def test_arrays_go_and_come_back_writable(grid, seen, size):
    for _ in range(2):
        replies = grid.send_and_receive(train_messages(grid.get_node_ids(), size))
        assert len(replies) == NUM_NODES
        for reply in replies:
            (array,) = reply.content["arrays"].to_numpy_ndarrays()
            np.testing.assert_array_equal(array, np.full(size, 1 + partition(reply), np.float32))
            array += 1
            (again,) = reply.content["arrays"].to_numpy_ndarrays()
            assert again[0] == 1 + partition(reply)


@pytest.mark.slow
def test_shared_content_is_put_once_and_freed(grid, seen):
    before = grid._data.num_puts
    grid.send_and_receive(train_messages(list(grid.get_node_ids()) * 5))
    assert grid._data.num_puts == before + 1
    list(grid.stream(train_messages(list(grid.get_node_ids()) * 5), window=2))
    assert grid._data.num_puts == before + 2


def test_what_one_client_alone_gets_is_not_put(grid, seen):
    before = grid._data.num_puts
    messages = [m for node_id in grid.get_node_ids() for m in train_messages([node_id])]
    assert len(grid.send_and_receive(messages)) == NUM_NODES
    assert grid._data.num_puts == before


@table(
    "array",
    [
        np.arange(3000.0).reshape(30, 100),
        np.asfortranarray(np.arange(3000.0).reshape(30, 100)),
        np.zeros((0, 7)),
        np.array(3),
        np.arange(5000, dtype=np.int8),
        np.ones((2, 3, 500), np.float16),
        np.arange(2000, dtype=">i4"),
        np.ones(4000, bool),
    ],
)
def test_an_echo_is_the_array_however_it_travels(grid, seen, array):
    sent = ArrayRecord({"a": Array(array), "b": Array(array)})
    record = RecordDict({"arrays": sent, "looked-at": ConfigRecord(), "m": MetricRecord({"x": [1.5, 2.5]})})
    first, *_ = grid.get_node_ids()
    for reply in grid.send_and_receive([Message(record, first, "query.echo") for _ in range(3)]):
        came = reply.content["arrays"]
        data = sent["a"].data
        assert reply.content["looked-at"] == {
            "hash": reply.content["looked-at"]["hash"],
            "size": len(data),
            "start": data[:6],
        }
        assert reply.content["m"] == {"x": [1.5, 2.5]}
        assert list(came) == ["a", "b"]
        np.testing.assert_array_equal(came["a"].numpy(), array)
        assert came["a"].numpy().dtype == array.dtype
        assert came["a"].numpy().flags.writeable
        assert came["a"] == sent["a"] == came["b"]
        assert sent["a"] == came["a"]
        assert came.object_id == sent.object_id
        assert came["a"].deflate() == sent["a"].deflate()
        assert came.count_bytes() == sent.count_bytes()
        assert type(came["a"].data) is bytes
        assert ArrayRecord(dict(came))["a"].data == data
        # A reply's arrays are sent on.
        (again,) = grid.send_and_receive([Message(reply.content, first, "query.echo")])
        assert again.content["arrays"] == sent


def test_data_that_is_set_replaces_the_view(grid, seen):
    (reply,) = grid.send_and_receive(train_messages(grid.get_node_ids()[:1]))
    array = reply.content["arrays"]["0"]
    array.data = Array(np.zeros(2)).data
    np.testing.assert_array_equal(array.numpy(), np.zeros(2))


def test_state_is_kept_across_rounds_and_workers_and_messages_to_a_node_wait_for_one_another(grid, seen):
    node_id = grid.get_node_ids()[2]
    before = calls(grid, node_id)
    replies = grid.send_and_receive(train_messages([node_id] * 20, size=10))
    assert [reply.content["metrics"]["calls"] for reply in replies] == [before + 2 + k for k in range(20)]


def test_large_state_is_kept_and_sent_back_only_when_it_changed(grid, seen):
    node_id = grid.get_node_ids()[3]
    record = ArrayRecord([np.arange(10_000.0)])
    grid.send_and_receive([query(node_id, "query.memory", arrays=record)])
    kept = grid._states[node_id]
    for _ in range(3):
        (reply,) = grid.send_and_receive([query(node_id, "query.memory")])
        assert reply.content["arrays"] == record
        assert grid._states[node_id] is kept


@pytest.mark.slow
def test_state_after_a_kill_is_as_if_the_message_had_been_handled_once(grid, seen, tmp_path):
    nodes = grid.get_node_ids()
    before = [calls(grid, node_id) for node_id in nodes]
    killed = set(grid._pool.worker_pids())
    messages = [m for k, node_id in enumerate(nodes) for m in train_messages([node_id], do=str(tmp_path / str(k % 2)))]
    replies = grid.send_and_receive(messages)
    assert not any(reply.has_error() for reply in replies)
    assert [calls(grid, node_id) for node_id in nodes] == [count + 2 for count in before]
    assert killed != set(grid._pool.worker_pids())


@pytest.mark.slow
@table(
    "do, code, reason",
    [
        ("raise", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, r"ValueError: as told in two lines \(.*\.py:\d+\)"),
        ("die", ErrorCode.CLIENT_APP_CRASHED, "its Ray actor died 2 times"),
        ("hang", ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "no reply within 2 s"),
    ],
)
def test_a_client_that_fails_is_one_error_reply(grid, seen, do, code, reason):
    bad, *good = grid.get_node_ids()
    deadline = time.monotonic() + 60
    while not all(worker.warm for worker in list(grid._pool._workers)):  # before, the limit is a longer one
        assert time.monotonic() < deadline
        grid.send_and_receive(train_messages(good))
    seen.clear()
    before = calls(grid, bad)
    messages = [*train_messages(good), *train_messages([bad], do=do)]
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    failed = replies.pop(bad)
    assert failed.error.code == code
    assert re.fullmatch(reason, failed.error.reason)
    assert failed.metadata.reply_to_message_id == messages[-1].metadata.message_id
    assert len(replies) == NUM_NODES - 1
    assert not any(reply.has_error() for reply in replies.values())
    assert calls(grid, bad) == before + 1  # by the query: the failed call left nothing in the state


@table(
    "action, reason",
    [
        ("query.wrong", "TypeError: the ClientApp returned str, not a Message"),
        ("query.unknown", r"ValueError: No query function registered with name 'unknown' \(.*flwr.*\.py:\d+\)"),
    ],
)
def test_no_message_and_no_function_are_the_clients_errors(grid, seen, action, reason):
    (reply,) = grid.send_and_receive([query(grid.get_node_ids()[0], action)])
    assert re.fullmatch(reason, reply.error.reason)


def test_an_error_inside_a_library_says_where_too(grid, seen):
    (reply,) = grid.send_and_receive([query(grid.get_node_ids()[0], "query.library")])
    assert re.search(r"\(.*site-packages.*\.py:\d+\)$", reply.error.reason)


def test_what_a_client_printed_before_it_failed_is_found(grid, seen):
    node_id = grid.get_node_ids()[1]
    (reply,) = grid.send_and_receive(train_messages([node_id], do="print and raise"))
    found = re.fullmatch(r"ValueError: as told \(.*\.py:\d+\); it printed into (\S+)", reply.error.reason)
    assert "seen by nobody\n" in Path(found[1]).read_text()


def test_a_node_that_does_not_exist_is_an_error_reply(grid, seen):
    (reply,) = grid.send_and_receive([query(12345)])
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


@table("window", [1, 2, 7, 100])
def test_the_window_bounds_what_is_under_way(grid, seen, window):
    nodes = list(grid.get_node_ids()) * 5
    read = []

    def messages():
        for message in train_messages(nodes, size=10):
            read.append(message)
            yield message

    open_ids = []
    for count, reply in enumerate(grid.stream(messages(), window=window), start=1):
        open_ids = [m.metadata.message_id for m in read if m.metadata.message_id not in open_ids]
        assert len(read) - count <= window
        assert not reply.has_error()
    assert count == len(nodes)
    with pytest.raises(ValueError, match="window = 0"):
        grid.stream([], window=0)


def test_the_window_holds_for_the_oldest_message(grid, seen):
    slow, *others = grid.get_node_ids()
    seconds = ConfigRecord({"seconds": 0.7})
    messages = [query(slow, "query.slow", config=seconds), *[query(node_id) for node_id in others * 4]]
    ids = []

    def reading():
        for message in messages:
            ids.append(message)
            yield message

    for reply in grid.stream(reading(), window=4):
        if reply.metadata.src_node_id != slow:
            continue
        assert len(ids) <= 8  # 4 until the slow one answered
        break
    assert len(seen) < len(messages)


def test_a_stream_that_is_left_gives_up_the_rest_and_sends_in_between(grid, seen):
    nodes = grid.get_node_ids()
    stream = grid.stream(train_messages(list(nodes) * 4), window=10)
    next(stream)
    assert len(grid.send_and_receive([query(node_id) for node_id in nodes])) == NUM_NODES
    next(stream)
    stream.close()
    assert len(grid.send_and_receive(train_messages(nodes))) == NUM_NODES


def test_a_timeout_leaves_out_what_is_missing(grid, seen):
    while len(grid._pool.worker_pids()) < 2:  # or the slow one has the only worker
        time.sleep(0.05)
    slow, *others = grid.get_node_ids()
    before = calls(grid, slow)
    messages = [query(slow, "query.slow", config=ConfigRecord({"seconds": 1.2}))]
    messages += [query(node_id) for node_id in others]
    replies = grid.send_and_receive(messages, timeout=0.7)
    assert sorted(reply.metadata.src_node_id for reply in replies) == list(others)
    assert calls(grid, slow) == before + 1  # the message that was given up left nothing


def test_push_and_pull(grid, seen):
    nodes = grid.get_node_ids()
    ids = grid.push_messages(train_messages(nodes))
    assert len(set(ids)) == NUM_NODES
    replies = []
    while len(replies) < NUM_NODES:
        replies += grid.pull_messages(ids)
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
    assert grid.pull_messages(ids) == []


def sends_and_receives(grid, messages):
    return grid.send_and_receive(messages)


def streams(grid, messages):
    return grid.stream(messages, window=2)


def pushes_and_pulls(grid, messages):
    ids, replies = grid.push_messages(messages), []
    while len(replies) < len(ids):
        grid.wait(60, ids)
        replies += grid.pull_messages(ids)
    return replies


def test_every_thread_gets_its_own_replies(grid, seen):
    """Flower's older servers ask every client from a thread of its own."""
    nodes, ways = grid.get_node_ids(), (sends_and_receives, streams, pushes_and_pulls)

    def ask(number):
        asked = [query(nodes[(number + k) % NUM_NODES], "query.echo", own=ConfigRecord({"n": number})) for k in (0, 1)]
        replies = list(ways[number % len(ways)](grid, asked))
        assert {r.metadata.reply_to_message_id for r in replies} == {m.metadata.message_id for m in asked}
        return [reply.content["own"]["n"] for reply in replies]

    with ThreadPoolExecutor(24) as threads:
        answers = [threads.submit(ask, number) for number in range(60)]
        assert [one.result(timeout=60) for one in answers] == [[number] * 2 for number in range(60)]


def test_whoever_waits_is_told_when_the_grid_gives_up(grid):
    config = load_components(PLAIN).config
    options = PoolOptions(num_workers=1, num_cpus=0.1)
    with RayGrid("plain_app.client:app", app_dir=PLAIN, num_nodes=8, run_config=config, options=options) as own:
        slow = [query(node_id, "query.slow", config=ConfigRecord({"seconds": 60})) for node_id in own.get_node_ids()]
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(own.send_and_receive, [message]) for message in slow]
            while len(own._pending) < len(slow):
                time.sleep(0.01)
            own.give_up()
            for one in waiting:
                with pytest.raises(RuntimeError, match="interrupted"):
                    one.result(timeout=60)


@pytest.mark.slow
def test_a_whole_app_of_flowers_older_kind(grid, tmp_path):
    out = tmp_path / "seen.txt"
    options = PoolOptions(num_workers=2, num_cpus=0.1)
    shown = []

    def hear(*printed):
        shown.append(printed)

    simulate_app(OLDER, num_nodes=7, run_config={"out": str(out)}, options=options, on_output=hear)
    assert sorted(shown) == sorted([(node, f"fit of {node}\n") for node in range(7)] * 2)
    told = [json.loads(line) for line in out.read_text().splitlines()]
    for n, found in enumerate(told[1::2], start=1):
        assert found == pytest.approx([n, 1 + 3 * n, 3 * n])  # every round adds the mean partition
    assert told[2::2] == [list(range(7))] * 2


@pytest.mark.slow
def test_a_whole_app_that_knows_nothing_of_fedmom(one_ray):
    path, identity = list(sys.path), identity_here()
    grids = []
    overrides = {"model.size": 2000, "num-rounds": 3}
    options = PoolOptions(num_workers=1, num_cpus=0.1)
    replies = []
    context = simulate_app(
        PLAIN, num_nodes=4, run_config=overrides, options=options, grid_ready=grids.append, on_reply=replies.append
    )
    assert len(replies) == 4 * (1 + 2 * 3)
    state = context.state
    assert list(state["partitions"]["ids"]) == [0, 1, 2, 3]
    arrays = state["arrays"].to_numpy_ndarrays()
    np.testing.assert_allclose(arrays[0], np.full(2000, 1 + 3 * 1.5))  # every round adds the mean partition
    np.testing.assert_allclose(arrays[1], np.full(3, 3 * 1.5))
    assert state["evaluate"]["mean"] == pytest.approx(1 + 3 * 1.5)
    assert state["evaluate"]["calls"] == pytest.approx(1 + 2 * 3)  # one query, then train and evaluate
    assert sys.path == path
    assert identity_here() == identity
    (used,) = grids
    assert not used._pool.worker_pids()


def test_what_the_server_raises_comes_out_and_the_workers_end(grid):
    options = PoolOptions(num_workers=1, num_cpus=0.1)
    grids = []
    with pytest.raises(RuntimeError, match="the server is ill"):
        simulate_app(PLAIN, num_nodes=2, run_config={"mode": "ill"}, options=options, grid_ready=grids.append)
    assert not grids[0]._pool.worker_pids()


def write_app(folder, text):
    (folder / "pyproject.toml").write_text(text)
    return folder


COMPONENTS = '[tool.flwr.app.components]\nserverapp = "plain_app.server:app"\nclientapp = {!r}\n'


@table(
    "text, right",
    [
        ("[tool]\n", 'has no serverapp = "module:attribute"'),
        ("[tool\n", "pyproject.toml: "),
        ('[tool.flwr.app.components]\nserverapp = "a:b"\n', 'has no clientapp = "module:attribute"'),
        (COMPONENTS.format("a:b") + "[tool.flwr.app.config]\nx = [1]\n", "x is a list"),
    ],
)
def test_a_broken_pyproject_is_one_line(tmp_path, text, right):
    with pytest.raises(InputError) as caught:
        load_components(write_app(tmp_path, text))
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_pyproject_and_unknown_keys_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"pyproject.toml: No such file"):
        load_components(tmp_path)
    assert load_components(PLAIN).config == {"num-rounds": 2, "mode": "well", "model.size": 20}
    with pytest.raises(InputError, match="did you mean num-rounds"):
        simulate_app(PLAIN, num_nodes=2, run_config={"num-round": 1}, options=OPTIONS)


@pytest.mark.slow
@table("client", ["plain_app.client:nothing", "plain_app.nowhere:app", "plain_app.client:train", "x"])
def test_a_client_app_that_does_not_load_is_one_line(grid, tmp_path, client):
    (tmp_path / "plain_app").symlink_to(PLAIN / "plain_app")
    write_app(tmp_path, COMPONENTS.format(client) + '[tool.flwr.app.config]\nmode = "well"\nnum-rounds = 1\n')
    with pytest.raises(InputError, match=f"clientapp = '{client}'") as caught:
        simulate_app(tmp_path, num_nodes=2, run_config={}, options=PoolOptions(num_workers=1, num_cpus=0.1))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_killed_worker_of_an_idle_grid_is_replaced(grid, seen):
    for pid in grid._pool.worker_pids():
        os.kill(pid, signal.SIGKILL)
    replies = grid.send_and_receive(train_messages(grid.get_node_ids()))
    assert not any(reply.has_error() for reply in replies)


@pytest.mark.slow
def test_two_processes_may_each_have_their_own_ray():
    code = (
        "import sys; from fedmom.flower.app import simulate_app; from fedmom.actors.cluster import PoolOptions\n"
        f"simulate_app({str(PLAIN)!r}, num_nodes=3, run_config={{}}, options=PoolOptions(num_workers=1))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLAIN.parents[2])}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait(timeout=900) for run in runs] == [0, 0]
