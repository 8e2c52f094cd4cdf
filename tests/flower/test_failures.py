"""What a failure means wherever replies come from: also where Flower, or a wrapper of the strategy, collects them."""

import re
import time

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from both_sides import QUADRATIC, RESNET, by_engine, by_flower, fails
from clients.client_app import app as client_app
from fedmom.backends.trainer import warm_node
from fedmom.engine.gossip import mean_of
from fedmom.errors import ClientsFailedError, InputError
from fedmom.flower.private import push_error
from fedmom.flower.wire import pack, unpack
from fedmom.method.algorithms import Method
from fedmom.method.decentralized.topology import make_topology
from fedmom.method.state import flatten
from fedmom.runs.callbacks import Callback, Listener
from grids import LocalGrid, run_config
from laws import table
from strategies.dispatch import anew, exchange
from strategies.dsgdm import DSGDM
from strategies.fleet import learn_holders
from strategies.prsgdm import PRSGDM
from strategies.server_app import app as server_app

GOSSIP = {**QUADRATIC, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}


def of(changes, fault=None, num_nodes=5):
    """(the Grid, the start's arrays)."""
    keys = run_config(changes)
    return LocalGrid(client_app, num_nodes, keys, fault=fault), pack(flatten(warm_node(keys).problem.start()))


def a_round(strategy, grid, start, number=1):
    """As Flower's own Strategy.start does it: all replies are collected before the strategy sees them."""
    messages = strategy.configure_train(number, start, ConfigRecord(), grid)
    return strategy.aggregate_train(number, grid.send_and_receive(messages))


STRATEGIES = {
    "averaging": (QUADRATIC, lambda **keys: PRSGDM(5, **keys)),
    "gossip": (GOSSIP, lambda **keys: DSGDM(make_topology("ring", 5), Method(0.9), **keys)),
}
strategies = table("name", STRATEGIES)


@strategies
@table("policy", ["stop", "retry"])
def test_a_missing_reply_stops_a_round_that_somebody_else_collected(name, policy):
    changes, make = STRATEGIES[name]
    grid, start = of(changes, fails(3, "lose", rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=r"round 1: client 3, node \d+: no reply"):
        a_round(make(on_failure=policy), grid, start)


@strategies
def test_proceed_goes_on_without_it(name):
    changes, make = STRATEGIES[name]
    grid, start = of(changes, fails(3, "lose", rounds=(1,)))
    arrays, _ = a_round(make(on_failure="proceed"), grid, start)
    assert arrays is not None
    grid, start = of(changes, fails(3, "lose", rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=r"4 clients answered, server\.min-clients = 5"):
        a_round(make(on_failure="proceed", min_clients=5), grid, start)


@strategies
def test_a_refused_update_is_named_there_too(name):
    def spoil(reply):
        tensors = unpack(reply.content["arrays"])
        reply.content["arrays"] = pack({n: t * float("nan") for n, t in tensors.items()})
        return reply

    changes, make = STRATEGIES[name]
    grid, start = of(changes, fails(3, spoil, rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=r"round 1: client 3, node \d+: .*NaN or infinite"):
        a_round(make(), grid, start)


def test_a_wrapper_of_flowers_meets_the_same_policy():
    # From 0.5, for Flower's clipping divides by how far a client went.
    grid, start = of({**QUADRATIC, "data.start": "0.5"}, fails(2, "lose", rounds=(1,)))
    wrapped = DifferentialPrivacyServerSideFixedClipping(PRSGDM(5), 0.0, 1e6, num_sampled_clients=5)
    with pytest.raises(ClientsFailedError, match="client 2"):
        a_round(wrapped, grid, start)


def test_a_wrong_block_is_refused_by_name():
    """A node that answers for clients it was not asked for would be averaged in another's place."""

    def swap(reply):
        reply.content["clients"]["clients"] = [0]
        return reply

    grid, start = of(QUADRATIC, fails(3, swap, rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=r"client 3, .*of clients \[0\], which it was not asked for"):
        PRSGDM(5).start(grid, start, num_rounds=1)


@table("name", ["clients", "train-loss", "path"])
def test_a_number_in_the_place_of_a_list_is_refused_by_name(name):
    def one(reply):
        reply.content["clients"][name] = 3
        return reply

    grid, start = of(QUADRATIC, fails(3, one, rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=rf"client 3, node \d+: its record 'clients' has {name} = 3, must be"):
        PRSGDM(5).start(grid, start, num_rounds=1)


@strategies
def test_an_answer_that_comes_twice_is_not_averaged_twice(name):
    changes, make = STRATEGIES[name]
    grid, start = of(changes)
    strategy = make()
    messages = strategy.configure_train(1, start, ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    with pytest.raises(ClientsFailedError, match=r"round 1: node \d+: its reply answers nothing that it was asked"):
        strategy.aggregate_train(1, [*replies, replies[0]])


# Policy "local": every client's own momentum


LOCAL = {**QUADRATIC, "algorithm.momentum-policy": "local", "run.num-rounds": 6}


def test_local_by_itself_keeps_every_clients_momentum():
    grid, start = of(LOCAL)
    strategy = PRSGDM(5, momentum_policy="local")
    result = strategy.start(grid, start, num_rounds=6)
    torch.testing.assert_close(unpack(result.arrays)["params/x"], by_engine(LOCAL).state_dict["x"])
    grid, _ = of(LOCAL)
    again = PRSGDM(5, momentum_policy="local")
    first = again.start(grid, start, num_rounds=2)
    rest = again.start(grid, first.arrays, num_rounds=6, first_round=3)
    assert unpack(rest.arrays)["params/x"].equal(unpack(result.arrays)["params/x"])


def change_rows(change):
    def change_reply(reply):
        reply.content["own"] = pack(change(unpack(reply.content["own"])))
        return reply

    return change_reply


@table(
    "change, reason",
    [
        (lambda rows: {n: u * float("nan") for n, u in rows.items()}, "NaN or infinite numbers in momentum/x"),
        (
            lambda rows: {n: torch.zeros(3, 7, dtype=u.dtype) for n, u in rows.items()},
            r"momentum/x as \[3, 7\] float64, must be",
        ),
        (lambda rows: {n: u.float() for n, u in rows.items()}, r"momentum/x as \[1, 1\] float32"),
        (lambda rows: dict(zip(["momentum/y"], rows.values(), strict=True)), "lacks momentum/x|unknown momentum/y"),
    ],
)
def test_a_clients_own_momentum_is_checked(change, reason):
    grid, start = of(LOCAL, fails(3, change_rows(change), rounds=(1,)))
    with pytest.raises(ClientsFailedError, match=f"client 3, .*clients' own tensors.*({reason})"):
        PRSGDM(5, momentum_policy="local").start(grid, start, num_rounds=1)


def test_rows_go_to_their_clients_in_whatever_order_nodes_hold_them():
    """Nodes that hold every other client, so that answers in nodes' order are not in clients' order."""

    class Interleaved(LocalGrid):
        def _answer(self, message: Message):
            node = self.contexts[message.metadata.dst_node_id].node_config["partition-id"]
            reply = super()._answer(message)
            if message.metadata.message_type == "query":
                reply.content["config"]["clients"] = [c for c in range(5) if c % 2 == node]
            return reply

    keys = run_config(LOCAL)
    grid = Interleaved(client_app, 2, keys)
    grid.listener = Listener([Callback()])
    server_app(grid, Context(1, 0, {}, RecordDict(), keys))
    torch.testing.assert_close(grid.listener.result.state_dict["x"], by_engine(LOCAL).state_dict["x"])


@table(
    "content, reason",
    [
        ({}, "its reply must have one MetricRecord"),
        ({"metrics": MetricRecord({"loss": 1.0})}, "its weight 'num-examples' is None, must be >= 0"),
        ({"metrics": MetricRecord({"num-examples": -1.0, "loss": 1.0})}, "its weight 'num-examples' is -1.0"),
    ],
)
def test_an_evaluation_without_its_numbers_is_refused_by_name(content, reason):
    def strip(reply):
        return Message(RecordDict(content), reply_to=asked[reply.metadata.src_node_id])

    grid, start = of(QUADRATIC)
    strategy = PRSGDM(5, evaluate_clients=True)
    messages = strategy.configure_evaluate(1, start, ConfigRecord(), grid)
    asked = {message.metadata.dst_node_id: message for message in messages}
    replies = [strip(reply) for reply in grid.send_and_receive(messages)]
    with pytest.raises(ClientsFailedError, match=rf"round 1: client \d, node \d+: {re.escape(reason)}"):
        strategy.aggregate_evaluate(1, replies)


# Time


@pytest.mark.slow
def test_waiting_in_line_is_not_the_clients_time():
    """Twelve nodes of 0.15 s each behind one worker, and 0.5 s for an answer: nobody is late."""

    class Queue(LocalGrid):
        """One worker that takes one message after the other."""

        def push_messages(self, messages):
            ids = super().push_messages(messages)
            self.ready = getattr(self, "ready", {})
            for message_id in ids:
                self.free = max(getattr(self, "free", 0.0), time.monotonic()) + 0.15
                self.ready[message_id] = self.free
            return ids

        def pull_messages(self, message_ids):
            return super().pull_messages([m for m in message_ids if time.monotonic() >= self.ready[m]])

    changes = {"data.curvatures": ";".join(["1"] * 12), "data.centers": ";".join(map(str, range(12)))}
    keys = run_config({**QUADRATIC, **changes, "data.num-clients": 12})
    grid = Queue(client_app, 12, keys, shuffle=False)
    start = pack(flatten(warm_node(keys).problem.start()))
    result = PRSGDM(12, window=12).start(grid, start, num_rounds=1, timeout=0.5)
    assert set(result.train_metrics_clientapp) == {1}


def test_messages_that_a_restarted_superlink_forgot_are_sent_again():
    """They are nobody's fault, so no policy is asked; the numbers are those of an undisturbed run."""

    class Restarting(LocalGrid):
        pushes = 0

        def push_messages(self, messages):
            messages = list(messages)
            self.pushes += 1
            if self.pushes in (2, 3):  # the query comes first
                super().push_messages(messages[:1])  # an answer that nobody waits for
                raise push_error()("object", 1, "session")
            ids = list(super().push_messages(messages))
            assert len(set(ids)) == len(ids)
            return ids

    calm, start = of(QUADRATIC)
    grid = Restarting(client_app, 5, run_config(QUADRATIC))
    found = PRSGDM(5).start(grid, start, num_rounds=2)
    right = PRSGDM(5).start(calm, start, num_rounds=2)
    assert grid.pushes == 5  # the query, three times round 1, round 2
    for name, value in unpack(right.arrays).items():
        torch.testing.assert_close(unpack(found.arrays)[name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_nodes_that_never_answer_the_query_do_not_hold_a_run_up_for_ever():
    grid, _ = of(QUADRATIC, lambda message, node_config: "lose")
    with pytest.raises(InputError, match=r"server\.wait-seconds = 1: no node holds client 0 .*no reply in time"):
        learn_holders(grid, 5, wait_seconds=1)


class Lagging(LocalGrid):
    """A node whose replies to some messages each wait for the node's next one: Flower's SuperNode can get so."""

    kind, held = "train", None

    def push_messages(self, messages):
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message, message_id in zip(messages, ids, strict=True):
            if message.metadata.dst_node_id == self.ids[3] and message.metadata.message_type == self.kind:
                if self.held is not None:
                    self.replies[self.held.metadata.reply_to_message_id] = self.held
                self.held = self.replies.pop(message_id)
        return ids


def test_the_late_answer_to_an_earlier_try_counts():
    calm, start = of(QUADRATIC)
    grid = Lagging(client_app, 5, run_config(QUADRATIC))
    found = PRSGDM(5, on_failure="retry").start(grid, start, num_rounds=2, timeout=0.3)
    right = PRSGDM(5).start(calm, start, num_rounds=2)
    for name, value in unpack(right.arrays).items():
        torch.testing.assert_close(unpack(found.arrays)[name], value, rtol=0, atol=0)
    assert len(grid.pushed) == 5 + 2 * 6


def test_a_node_that_does_not_answer_the_query_is_asked_again():
    grid = Lagging(client_app, 5, run_config(QUADRATIC))
    grid.kind = "query"
    holders = learn_holders(grid, 5, wait_seconds=30, ask_again_after=0.2)
    assert [holder.clients for holder in holders] == [(0,), (1,), (2,), (3,), (4,)]
    assert len(grid.pushed) == 6


@pytest.mark.slow
def test_a_node_that_is_gone_is_not_asked_again():
    grid, _ = of(QUADRATIC, lambda message, node_config: "lose")

    def once(message):
        grid.ids.clear()
        return message

    grid._answer = once
    with pytest.raises(InputError, match=r"5 of 5 clients missing, 0 nodes connected"):
        learn_holders(grid, 5, wait_seconds=1, ask_again_after=0.1)
    assert len(grid.pushed) == 5


class Moving(LocalGrid):
    """Client 3's node goes in mid-round; if it `comes_back`, then under another id, with a reply that `change` made."""

    def __init__(self, changes, *, comes_back=True, change=lambda reply: reply):
        super().__init__(client_app, 5, run_config(changes))
        self.comes_back, self.change, self.moved = comes_back, change, 0

    def _answer(self, message):
        node_id = message.metadata.dst_node_id
        if message.metadata.message_type == "query" or node_id != self.ids[3]:
            return super()._answer(message)
        if self.moved:
            return self.change(super()._answer(message))
        self.moved, context = node_id + 1, self.contexts[node_id]
        self.ids[3:4] = [self.moved] if self.comes_back else []
        self.contexts[self.moved] = context
        return Message(Error(3, "gone"), reply_to=message)


RETRIED = {
    "averaging": (QUADRATIC, lambda **keys: PRSGDM(5, **keys)),
    "local": (LOCAL, lambda **keys: PRSGDM(5, momentum_policy="local", **keys)),
    "gossip": (GOSSIP, lambda **keys: DSGDM(make_topology("ring", 5), Method(0.9), **keys)),
}
retried = table("name", RETRIED)


@retried
def test_a_node_that_comes_back_under_another_id_is_the_same_node(name):
    changes, make = RETRIED[name]
    calm, start = of(changes)
    grid = Moving(changes)
    found = make(on_failure="retry").start(grid, start, num_rounds=2)
    right = make().start(calm, start, num_rounds=2)
    assert grid.moved
    for tensor, value in unpack(right.arrays).items():
        torch.testing.assert_close(unpack(found.arrays)[tensor], value, rtol=0, atol=0)


@pytest.mark.slow
def test_while_it_is_looked_for_another_may_fail_for_a_moment():
    """Such as on a full disk: it is asked again as long as the one that is gone is waited for."""

    class Stumbling(Moving):
        stumbles = 2

        def _answer(self, message):
            if self.moved and message.metadata.message_type == "query" and self.stumbles:
                self.stumbles -= 1
                return Message(Error(2, "OSError: No space left on device"), reply_to=message)
            return super()._answer(message)

    calm, start = of(QUADRATIC)
    grid = Stumbling(QUADRATIC)
    found = PRSGDM(5, on_failure="retry", wait_seconds=60).start(grid, start, num_rounds=2)
    right = PRSGDM(5).start(calm, start, num_rounds=2)
    assert (grid.stumbles, bool(grid.moved)) == (0, True)
    for tensor, value in unpack(right.arrays).items():
        torch.testing.assert_close(unpack(found.arrays)[tensor], value, rtol=0, atol=0)


nan = float("nan")


def spoil_all(reply):
    for record in ("arrays", "own"):
        if record in reply.content:
            reply.content[record] = pack({n: t * nan for n, t in unpack(reply.content[record]).items()})
    return reply


@table(
    "name, change",
    [
        *((name, spoil_all) for name in RETRIED),
        ("local", change_rows(lambda rows: {n: u / 0 for n, u in rows.items()})),
    ],
)
def test_what_it_answers_then_is_checked_as_before(name, change):
    changes, make = RETRIED[name]
    _, start = of(changes)
    with pytest.raises(ClientsFailedError, match=r"round 1: client 3, node \d+: .*NaN or infinite"):
        make(on_failure="retry").start(Moving(changes, change=change), start, num_rounds=1)


@retried
def test_a_node_that_never_comes_back_fails_the_run_by_name(name):
    """Asking who holds what is set-up, where its failure is bad input; in mid-run it ends the run as a failure does."""
    changes, make = RETRIED[name]
    _, start = of(changes)
    grid = Moving(changes, comes_back=False)
    with pytest.raises(ClientsFailedError, match=r"round 1: client 3, node \d+: gone; it did not come back: "):
        make(on_failure="retry", wait_seconds=0).start(grid, start, num_rounds=1)


class TwoTries(LocalGrid):
    """Nothing comes until a second try is out; then what `late(first, second, asked for)` makes of them."""

    def __init__(self, late):
        super().__init__(client_app, 1, run_config(QUADRATIC))
        self.late, self.forgotten = late, []

    def pull_messages(self, message_ids):
        return [self.late(*self.pushed, message_ids)] if len(self.pushed) > 1 else []

    def forget(self, message_ids):
        self.forgotten += message_ids

    def ask(self):
        """What came of one message."""
        message = Message(RecordDict({"config": ConfigRecord()}), self.ids[0], "query")
        (done,) = exchange(self, [message], window=4, timeout=0.1, again=lambda failed: anew(message, self.ids[0]))
        return done.failure, done.tries, done.answer.metadata.reply_to_message_id


def test_of_two_tries_the_newer_decides_on_a_failure():
    def late(first, second, asked):
        return (
            Message(Error(2, "too late"), reply_to=first) if "m0" in asked else Message(RecordDict(), reply_to=second)
        )

    grid = TwoTries(late)
    assert grid.ask() == ("", 2, "m1")
    assert grid.forgotten == []


def test_of_two_tries_the_first_answer_counts_and_the_other_is_forgotten():
    grid = TwoTries(lambda first, second, asked: Message(RecordDict(), reply_to=first))
    assert grid.ask() == ("", 2, "m0")
    assert grid.forgotten == ["m1"]


# Algorithm 2's relay


def test_the_relays_bookkeeping_is_of_this_round():
    """A round by hand before must not let a client of the next one pass for answered."""
    grid, start = of(GOSSIP, fails(3, "lose", rounds=(2,)))
    strategy = DSGDM(make_topology("ring", 5), Method(0.9), on_failure="proceed")
    a_round(strategy, grid, start)
    mixed = strategy.train_round(grid, 2, strategy.rows, ConfigRecord(), timeout=0.3)
    assert mixed.answered.tolist() == [True, True, True, False, True]
    for part in ("params", "momentum"):  # whose link's weight stays at home: W without it keeps the mean
        for name, rows in getattr(mixed.rows, part).items():
            torch.testing.assert_close(rows.mean(0), getattr(mixed.after, part)[name].mean(0))


def test_the_relay_starts_anew_where_it_is_asked_to():
    grid, start = of(GOSSIP)
    strategy = DSGDM(make_topology("ring", 5), Method(0.9))
    first, second = (strategy.start(grid, start, num_rounds=3) for _ in range(2))
    assert unpack(first.arrays)["params/x"].equal(unpack(second.arrays)["params/x"])


def test_the_relays_mean_takes_variances_as_it_is_told():
    changes = {**RESNET, "algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}
    found = {}
    for running_var in ("pooled", "mean"):
        grid, start = of(changes, num_nodes=3)
        strategy = DSGDM(make_topology("ring", 3), Method(0.9, running_var=running_var))
        arrays, _ = a_round(strategy, grid, start)
        want = mean_of(strategy.rows, running_var).buffers
        for name, value in want.items():
            torch.testing.assert_close(unpack(arrays)[f"buffers/{name}"], value)
        found[running_var] = next(value for name, value in want.items() if name.endswith("running_var"))
    assert bool((found["pooled"] > found["mean"]).all())


# A path that was given


MIXING = {"model.name": "tests.apps.models:mixing", "data.num-clients": 4, "run.num-rounds": 1, "run.dtype": "float64"}
GIVEN = {**MIXING, "engine.path": "stack", "engine.chunk-size": 4}


@table("num_nodes", [1, 2])
def test_a_given_path_is_compared_with_the_loop_under_flower(num_nodes):
    with pytest.raises(InputError, match=r"engine\.path = 'stack': .* after two steps"):
        by_flower(GIVEN, num_nodes)


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: messages")
@pytest.mark.parametrize("changes", [{}, {"algorithm.name": "d-sgd-m", "algorithm.topology": "ring"}], ids=str)
def test_a_given_path_is_compared_with_the_loop_on_actors(one_ray, changes):
    with pytest.raises(InputError, match=r"engine\.path = 'stack': .* after two steps"):
        by_engine({**GIVEN, "data.num-clients": 16, "engine.workers": 1, **changes})


@strategies
def test_a_strategy_that_is_told_to_stop_has_the_result_of_so_many_rounds(name):
    changes, make = STRATEGIES[name]
    grid, start = of(changes)
    seen = {}

    def should_stop(number, result):
        seen[number] = list(result.train_metrics_clientapp)
        return number == 2

    stopped = make().start(grid, start, num_rounds=4, should_stop=should_stop)
    whole = make().start(of(changes)[0], start, num_rounds=2, should_stop=lambda number, result: False)
    assert seen == {1: [1], 2: [1, 2]}
    assert unpack(stopped.arrays)["params/x"].equal(unpack(whole.arrays)["params/x"])
    assert list(stopped.train_metrics_clientapp) == list(whole.train_metrics_clientapp) == [1, 2]
