"""What becomes of a pool's workers and messages when the nodes of a cluster end, disagree and join; without a Ray."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from fedmom.actors import cluster as ray_cluster
from fedmom.actors import workforce
from fedmom.actors.actor import Packed, Started
from fedmom.actors.cluster import PoolOptions
from fedmom.actors.dispatcher import Dispatcher
from fedmom.actors.nodes import Facts, RayNode, versions
from fedmom.actors.work import Submitted
from fedmom.errors import InputError, RayEndedError
from laws import table

SAME, OTHER = {"data.dataset = 'x.npz'": "1"}, {"data.dataset = 'x.npz'": "2"}


class Call(Future):
    """What Ray gives for a call."""

    def future(self):
        return self


class Actor:
    """On a node: answers when the test says so."""

    def __init__(self, scheduling_strategy=None):
        self.node, self.calls, self.killed = scheduling_strategy, [], False
        self.start, self.run = (SimpleNamespace(remote=self._call) for _ in range(2))

    def _call(self, *_):
        self.calls.append(Call())
        return self.calls[-1]

    def up(self, held=SAME, trouble=""):
        self.calls.pop(0).set_result(Started(1, False, trouble, [], held))

    def fails(self):
        self.calls.pop(0).set_exception(RuntimeError("no disk\nat all"))


class Cluster(Dispatcher):
    """A pool on nodes of four cores each, whose thread is this test: `turn` does what that does in one turn."""

    def __init__(self, monkeypatch, names, num_workers, agree=True):
        super().__init__(PoolOptions(num_workers=num_workers, retries=1))
        self.names, self.actors, self.asked = list(names), [], 0
        for name, found in {"ray_nodes": self.there, "on": lambda ray, node: node, "look_at": self.looked_at}.items():
            monkeypatch.setattr(workforce, name, found)
        monkeypatch.setattr(workforce, "SECONDS_BETWEEN_LOOKS", -1.0)  # it looks at every turn
        self._ray = SimpleNamespace(kill=lambda actor: setattr(actor, "killed", True), exceptions=SimpleNamespace(
            ObjectLostError=LookupError
        ))  # fmt: skip
        self._actor_class = SimpleNamespace(options=lambda **where: SimpleNamespace(remote=lambda: self.made(where)))
        self._watch = SimpleNamespace(head_answers=lambda: True, look=lambda error_seen: "")
        self._joined, self._here, self.num_workers = True, self.names[0], num_workers
        self._held, self._expected = (b"held", SAME) if agree else (b"", {})
        self._placement.nodes = {node.id: node for node in self.there(None)}
        self._known = set(self._placement.nodes)
        self._start_workers()

    def there(self, _):
        self.asked += 1
        return [RayNode(name, name, {"CPU": 4.0}, 4) for name in self.names]

    def looked_at(self, *_):
        call = Call()
        call.set_result(Facts(versions(), 4))
        return call

    def made(self, where):
        self.actors.append(Actor(**where))
        return self.actors[-1]

    def turn(self):
        while not self._events.empty():
            handle, *arguments = self._events.get()
            handle(*arguments)
        if not self._broken:
            self._look_for_workers()
            self._fill()

    def submit(self, count):
        for key in range(count):
            self._on_submit(Submitted(key, Packed.of(key), (), "", False))

    def alive(self, node):
        return [actor for actor in self.actors if actor.node == node and not actor.killed]

    def under_way(self):
        return sorted(m.key for worker in self._workers for batch in worker.batches for m in batch.messages)


@pytest.fixture
def cluster(monkeypatch):
    made = []

    def make(*arguments, **more):
        made.append(Cluster(monkeypatch, *arguments, **more))
        return made[-1]

    yield make
    for one in made:
        for worker in one._workers:
            worker.progress.close()
        one._folder.close()


def test_nodes_that_end_at_once_leave_their_messages_to_the_one_that_is_left(cluster):
    pool = cluster("abc", 3)
    for actor in pool.actors:
        actor.up()
    pool.submit(3)
    pool.turn()
    assert pool.under_way() == [0, 1, 2]
    pool.names = ["c"]
    pool.alive("a")[0].fails()  # of b nothing has been heard
    pool.turn()
    assert [actor.node for actor in pool.actors if not actor.killed] == ["c"] * 3
    for actor in pool.alive("c")[1:]:
        actor.up()
    pool.turn()
    assert pool.under_way() == [0, 1, 2]
    assert pool._broken is None


def test_a_node_on_which_no_worker_starts_is_left_to_itself(cluster, capsys):
    pool = cluster("ab", 2)
    pool.alive("a")[0].up()
    pool.alive("b")[0].up()
    pool.submit(4)
    pool.turn()
    pool.alive("b")[0].fails()  # it dies, and so do the next three before they are up
    for _ in range(workforce.MAX_FAILED_STARTS):
        pool.turn()
        (new,) = [actor for actor in pool.alive("b") if actor.calls]
        new.fails()
    pool.turn()
    assert [actor.node for actor in pool.actors if not actor.killed] == ["a", "a"]
    assert capsys.readouterr().err == (
        "fedmom: 3 Ray actors in a row did not start (on b): RuntimeError: no disk; the other nodes go on\n"
    )
    assert pool._broken is None


def test_no_message_is_given_before_every_node_has_told_what_it_holds(cluster, monkeypatch):
    """Not for ever: what others have of a node may keep its worker waiting."""
    pool = cluster("ab", 2)
    pool.submit(2)
    pool.alive("a")[0].up()
    pool.turn()
    assert not pool.under_way()
    pool.alive("b")[0].up(OTHER)
    pool.turn()
    assert isinstance(pool._broken, InputError)
    assert str(pool._broken).startswith("data.dataset = 'x.npz': names other contents on b than here")

    slow = cluster("ab", 2)
    slow.submit(2)
    slow.alive("a")[0].up()
    monkeypatch.setattr(workforce, "SECONDS_TO_OPEN", -1.0)
    slow.turn()
    assert slow.under_way() == [0, 1]


@table("trouble", ["data.dataset = 'x.npz': there is no such file", ""])
def test_a_node_that_cannot_start_is_named_before_anything_is_given(cluster, trouble):
    pool = cluster("ab", 2)
    pool.submit(1)
    pool.alive("a")[0].up()
    if trouble:
        pool.alive("b")[0].up({}, trouble)
        pool.turn()
        assert str(pool._broken) == (f"{trouble} (on b: every node needs what this one has, under the same path)")
    else:  # its workers die: the others do without
        for _ in range(workforce.MAX_FAILED_STARTS):
            pool.alive("b")[0].fails()
            pool.turn()
        assert pool._broken is None
        assert pool.under_way() == [0]


def test_a_node_that_joins_with_other_contents_works_on_nothing(cluster, capsys):
    pool = cluster("ab", 5)  # four fit on a
    for actor in pool.actors:
        actor.up()
    pool.turn()
    pool.names = ["a", "c"]
    pool.turn()
    pool.turn()  # it has told its cores
    for _ in range(workforce.MAX_FAILED_STARTS):
        for actor in pool.alive("c"):
            actor.up(OTHER)
        pool.turn()
    pool.submit(8)
    pool.turn()
    assert {actor.node for actor in pool.actors if not actor.killed} == {"a"}
    assert "names other contents on c than here" in capsys.readouterr().err
    assert len(pool.under_way()) >= 4
    assert pool._broken is None


def left_for_c(cluster):
    """A pool whose two nodes have ended at once, and c has come."""
    pool = cluster("ab", 2)
    for actor in pool.actors:
        actor.up()
    pool.turn()
    pool.names = ["c"]
    pool.turn()
    return pool


def test_a_pool_gives_up_where_no_node_is_left_and_not_while_workers_start(cluster, monkeypatch):
    starting = left_for_c(cluster)
    starting.turn()  # c has told its cores
    monkeypatch.setattr(workforce, "SECONDS_WITHOUT_WORKERS", -1.0)
    starting.turn()
    assert len(starting.alive("c")) == 2
    assert starting._broken is None
    assert isinstance(left_for_c(cluster)._broken, RayEndedError)  # there is no time to hear of c


def test_nothing_is_asked_of_a_head_that_is_away(cluster):
    """Ray's own calls to it would wait, one core at full load."""
    pool = cluster("ab", 2)
    pool._watch.head_answers = lambda: False
    asked = pool.asked
    pool.turn()
    assert pool.asked == asked
    pool._watch.head_answers = lambda: True
    pool.turn()
    assert pool.asked == asked + 1


def test_ray_s_thread_asks_an_ended_head_for_errors_without_haste(monkeypatch):
    """There its calls return at once, with nothing."""
    waited = []
    monkeypatch.setattr(ray_cluster.time, "sleep", waited.append)
    answers = iter([("key", {"job_id": None}), (None, None)])
    errors = ray_cluster._Errors(SimpleNamespace(poll=lambda: next(answers), close=lambda: "closed"))
    assert errors.poll() == ("key", {"job_id": None})
    assert waited == []
    assert errors.poll() == (None, None)
    assert waited == [ray_cluster._SECONDS_BETWEEN_POLLS]
    assert errors.close() == "closed"
