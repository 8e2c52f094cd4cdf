"""The SuperNode of the image: no reply waits for the next message, none for ever, and none is ahead of its app."""

import functools
import importlib.util
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

RUN = 7
pytestmark = pytest.mark.xdist_group("a node's own process")


@functools.cache
def flowers():
    """What of Flower a node is made of. It comes with a database's drivers, which other tests' processes do without."""
    names = {
        "inflatable": "flwr.supercore.inflatable.inflatable_object",
        "object_store": "flwr.supercore.object_store",
        "task_identity": "flwr.supercore.task_identity",
        "start": "flwr.supernode.start_client_internal",
        "nodestate": "flwr.supernode.nodestate",
    }
    return SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})


@pytest.fixture
def mended():
    """Flower's own functions, with the changes, in a namespace of their own."""
    path = Path(__file__).parents[2] / "deploy" / "image" / "node.py"
    spec = importlib.util.spec_from_file_location("image_node", path)
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    flower = SimpleNamespace(**vars(flowers().start))
    assert node.mend(flower) == []
    return SimpleNamespace(node=node, flower=flower)


class Supernode:
    """A node's state, and the two halves of one turn of Flower's loop."""

    def __init__(self, flower):
        self.flower, self.sent = flower, []
        stores = flowers().object_store.ObjectStoreFactory()
        self.store = stores.store()
        self.state = flowers().nodestate.NodeStateFactory(stores).state()

    def reply(self, text, *, contents=True):
        """What an app leaves for the SuperLink."""
        inflatable, identity = flowers().inflatable, flowers().task_identity.TaskIdentity
        identity.run_id, identity.node_id, identity.task_id = RUN, 0, 1
        asked = Message(RecordDict({"c": ConfigRecord({"text": text})}), 1, "query")
        asked.metadata.__dict__["_message_id"] = f"asked-{text}"
        reply = Message(RecordDict({"c": ConfigRecord({"text": text})}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with inflatable.no_object_id_recompute():
            self.store.preregister(RUN, inflatable.get_object_tree(reply))
            objects = {key: one.deflate() for key, one in inflatable.get_all_nested_objects(reply).items()}
        for key, content in objects.items() if contents else ():
            self.store.put(key, content)
        self.state.store_message(reply)

    def pull(self):
        """No message comes."""
        nothing = dict.fromkeys(
            ("node_config", "get_run", "get_fab", "pull_object", "confirm_message_received", "trusted_entities")
        )
        return self.flower._pull_and_store_message(
            state=self.state, object_store=self.store, receive=lambda: None, **nothing
        )

    def push(self):
        def send(message, tree, seconds):
            self.sent.append(message.metadata.reply_to_message_id)
            return {tree.object_id, *(child.object_id for child in tree.children)}, "session"

        self.flower._push_messages(
            state=self.state, object_store=self.store, send=send, push_object=lambda *words: None
        )


def test_a_reply_that_is_ready_goes_out_although_no_message_came(mended):
    supernode = Supernode(mended.flower)
    assert supernode.pull() is None
    supernode.reply("an error of an app whose time is over")
    supernode.push()  # Flower's turn ends here, with the first reply that it finds
    supernode.reply("the answer")
    assert supernode.pull() is not None
    supernode.push()
    assert supernode.sent == ["asked-an error of an app whose time is over", "asked-the answer"]
    assert supernode.pull() is None


def test_flower_itself_leaves_it_until_a_message_comes():
    """Where this fails, Flower has mended its loop, and `prompt` can go."""
    supernode = Supernode(flowers().start)
    supernode.reply("the answer")
    assert supernode.pull() is None


def test_a_reply_whose_content_never_comes_is_given_up(mended, monkeypatch):
    monkeypatch.setattr(mended.node, "SECONDS_FOR_AN_OBJECT", 0.6)
    supernode = Supernode(mended.flower)
    supernode.reply("half", contents=False)
    begin = time.monotonic()
    supernode.push()
    assert 0.5 < time.monotonic() - begin < 10
    supernode.reply("whole")
    supernode.push()
    assert supernode.sent == ["asked-half", "asked-whole"]


def running(supernode):
    """An app at work on a message."""
    task = supernode.state.create_task("flwr-clientapp", RUN)
    assert supernode.state.claim_task(task)
    assert supernode.state.activate_task(task)
    return task


def test_a_reply_waits_until_its_app_has_handed_over_what_it_keeps(mended):
    """Which Flower takes in the call that finishes the app's task."""
    supernode, other = Supernode(mended.flower), Supernode(flowers().start)
    for one in (supernode, other):
        task = running(one)
        one.reply("the answer")
        ends = threading.Timer(0.4, lambda one=one, task=task: one.state.finish_task(task, "completed", ""))
        ends.start()
        one.push()
        one.ended = not one.state.get_tasks(statuses=["running"])
        ends.join()
        assert one.sent == ["asked-the answer"]
    assert supernode.ended
    assert not other.ended  # where this fails, Flower has mended it, and `once_the_app_has_ended` can go


def test_a_reply_does_not_wait_for_an_app_that_never_ends_nor_for_another_runs(mended, monkeypatch):
    supernode = Supernode(mended.flower)
    supernode.state.claim_task(supernode.state.create_task("flwr-clientapp", RUN + 1))
    monkeypatch.setattr(mended.node, "SECONDS_TO_END", 0.3)
    running(supernode)
    supernode.reply("the answer")
    supernode.push()
    assert supernode.sent == ["asked-the answer"]


def test_what_apps_kept_of_earlier_runs_is_let_go(mended):
    """But of the last few that messages came of, whichever began first."""
    supernode, runs = Supernode(mended.flower), [1, 2, 3, 4, 5, 6, 3, 7, 8]
    supernode.state.get_run = lambda number: SimpleNamespace(series_id=10 * number)
    for run in {*runs}:
        context = Context(run, 0, {}, RecordDict({"fedmom/own": ConfigRecord({"run": run})}), {})
        supernode.state.set_run_series_context(10 * run, context)
    pull = mended.node.of_few_runs(lambda state: runs.pop(0) if runs else None)
    for _ in range(10):
        pull(state=supernode.state)
    held = [run for run in range(1, 9) if supernode.state.get_run_series_context(10 * run).state]
    assert held == [3, 6, 7, 8]
