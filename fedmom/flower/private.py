"""All of Flower that its documentation does not name and fedmom uses, each behind one function.

Public are the names of flwr.app, flwr.clientapp, flwr.serverapp and flwr.serverapp.strategy; any other module of flwr
may move with its next version. tests/flower/test_private.py says which has. The image of `fedmom deploy` has no fedmom:
what deploy/image changes of Flower stands there, and the same test looks at it.

flwr is imported when a function here runs.
"""

import logging
from pathlib import Path
from typing import Any

# Flower's logger, by its name: what is logged here looks like Flower's own lines and obeys its level.
log = logging.getLogger("flwr").log


def identify(run_id: int | None, node_id: int | None, task_id: int | None) -> tuple[int | None, ...]:
    """Say to Flower who makes messages in this process, as its own processes do at start; gives who did before."""
    from flwr.supercore.task_identity import TaskIdentity

    identity: Any = TaskIdentity  # whose properties refuse None
    before = (identity._run_id, identity._node_id, identity._task_id)
    identity._run_id, identity._node_id, identity._task_id = run_id, node_id, task_id
    return before


def build_message(metadata: Any, content: Any, error: Any) -> Any:
    """A Message with the metadata of another process; Message's own arguments give it those of this one."""
    from flwr.app.message import make_message

    return make_message(metadata, content, error)


def set_message_id(message: Any, message_id: str) -> None:
    """Give a message its id, which whoever sends it does; the property of the metadata cannot be set."""
    message.metadata.__dict__["_message_id"] = message_id


def error_codes() -> Any:
    """The class ErrorCode: the numbers that an error reply may have, with their names."""
    from flwr.common.constant import ErrorCode

    return ErrorCode


def server_node_id() -> int:
    """The node id of the server in every run: who sends what a ServerApp sends."""
    from flwr.common.constant import SUPERLINK_NODE_ID

    return int(SUPERLINK_NODE_ID)


def load_object(spec: str, error: type[Exception], folder: str | Path) -> Any:
    """The app that "module:attribute" names, found as Flower finds it: in `folder` first. Raises `error`."""
    from flwr.supercore.object_ref import load_app

    return load_app(spec, error, folder)


def empty_run(run_id: int) -> Any:
    """The Run that a Grid tells its ServerApp of: a number, and no bundle."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)


def node_info(node_id: int) -> Any:
    """What `Grid.get_nodes` gives of each node."""
    from flwr.proto.node_pb2 import NodeInfo

    return NodeInfo(node_id=node_id)


def push_error() -> type[Exception]:
    """What `Grid.push_messages` raises where the SuperLink has forgotten half of a message: it restarted meanwhile."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    return ObjectPushError
