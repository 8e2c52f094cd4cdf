"""A ClientApp in a worker: any node's message with that node's state, through the app, to the reply."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmom.errors import InputError
from fedmom.flower.messages import (
    AppCall,
    AppReply,
    Content,
    RecordDict,
    State,
    message_of,
    metadata_values,
    pack,
    unpack,
)
from fedmom.flower.private import identify, load_object
from fedmom.user_code import one_line


def load_component(kind: str, spec: str, app_dir: Path) -> Any:
    """The `ClientApp` or `ServerApp` that "module:attribute" names, looked for in `app_dir` first."""
    where = f"{kind.lower()} = {spec!r} in {app_dir}"
    try:
        app = load_object(spec, LookupError, app_dir)
    except (Exception, SystemExit) as error:
        cause = (
            " ".join(str(error.args[0]).split("\n\n")[0].split())
            if isinstance(error, LookupError) and error.args
            else ""
        )
        raise InputError(f"{where}: {cause or f'loading it raised {one_line(error)}'}") from error
    if type(app).__name__ != kind:
        raise InputError(f"{where}: is not a {kind} but of type {type(app).__name__}")
    return app


def serve_client(spec: str, app_dir: Path, num_nodes: int, run_config: dict[str, Any]) -> Callable[..., AppReply]:
    """The handler of a worker: any node's message with that node's state, through the ClientApp, to the reply."""
    from flwr.app import Context, RecordDict
    from flwr.app import Message as FlowerMessage

    app = load_component("ClientApp", spec, app_dir)

    def handle(work: AppCall, *shared: Sequence[Any]) -> AppReply:
        message = message_of(work.metadata, unpack(work.content, shared))
        run_id, message_id, node_id = message.metadata.run_id, message.metadata.message_id, message.metadata.dst_node_id
        identify(run_id, node_id, 0)
        node_config: dict[str, Any] = {"partition-id": work.partition_id, "num-partitions": num_nodes}
        state = unpack(Content(pickle.loads(work.state.head), work.state.buffers)) if work.state else RecordDict()
        context = Context(run_id, node_id, node_config, state, dict(run_config))
        reply = app(message=message, context=context)
        if not isinstance(reply, FlowerMessage):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
        if reply.metadata.reply_to_message_id != message_id:
            raise ValueError("the ClientApp returned a Message without reply_to=message")
        content = pack(reply.content) if reply.has_content() else None
        error = (reply.error.code, reply.error.reason) if reply.has_error() else None
        return AppReply(metadata_values(reply), content, error, _changed(context.state, work.state))

    return handle


def _changed(state: RecordDict, before: State | None) -> State | None:
    """The state to keep, or None if it is as before. Large data counts as changed once it is another object."""
    if not state and before is None:
        return None
    records, buffers = pack(state)
    head = pickle.dumps(records, protocol=5)
    if before and head == before.head and len(buffers) == len(before.buffers):
        pairs = zip(buffers, before.buffers, strict=True)
        if all(_address(new) == _address(old) for new, old in pairs):
            return None
    return State(head, buffers)


def _address(buffer: Any) -> tuple[int, int]:
    array = np.frombuffer(buffer, np.uint8)
    return array.ctypes.data, array.size
