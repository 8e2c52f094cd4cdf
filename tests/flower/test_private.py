"""Flower's private names: each still is what fedmom relies on, and a failure says which has moved and who uses it."""

import ast
import importlib
import importlib.util
import inspect
import logging
import operator
import re
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from flwr.app import Message, RecordDict

from fedmom.flower import private
from fedmom.flower.messages import message_of, metadata_values

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy" / "image"
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
VALUES = (5, "id", 7, 8, "asked", "group", 1.5, 60.0, "query", 3, 4)  # what flwr.app.Metadata is made of


class Relied(NamedTuple):
    """One name of Flower's, and what must be true of it."""

    name: str  # module:attribute
    user: str  # a function of fedmom/flower/private.py, or a file
    what: str
    holds: Callable[[Any], bool]


def takes(*words: object, **named: object) -> Callable[[Any], bool]:
    """Whether a function can be called so; TypeError says why not."""
    return lambda function: bool(inspect.signature(function).bind(*words, **named))


def image(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"image_{name}", IMAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_mended(change: str, name: str = "") -> Callable[[Any], bool]:
    """Whether a change of the image's finds all that it changes; on a subclass, so that Flower stays as it is."""

    def holds(found: Any) -> bool:
        copy = SimpleNamespace(**({name: type(name, (found,), {})} if name else vars(found)))
        file, _, function = change.partition(":")
        return getattr(image(file), function)(copy) == []

    return holds


def makes_the_sender(_: Any) -> bool:
    before = private.identify(5, 7, 9)
    try:
        made = Message(RecordDict(), 8, "query").metadata
    finally:
        private.identify(*before)
    return (made.run_id, made.src_node_id, made.src_task_id) == (5, 7, 9)


def has_its_new_id(_: Any) -> bool:
    message = message_of(VALUES, RecordDict())
    private.set_message_id(message, "another")
    return bool(message.metadata.message_id == "another")


def keeps_replies(factory: Any) -> bool:
    stores = importlib.import_module("flwr.supercore.object_store").ObjectStoreFactory
    return image("node").has_reply(factory(stores()).state()) is False


def we_take_the_same(start: Any) -> bool:
    from strategies.dsgdm import DSGDM  # here, as they need names of the list themselves
    from strategies.prsgdm import PRSGDM

    flowers = list(inspect.signature(start).parameters)
    return all(list(inspect.signature(ours.start).parameters)[: len(flowers)] == flowers for ours in (PRSGDM, DSGDM))


NODE = "flwr.supernode.start_client_internal"
CODES = "LOAD_CLIENT_APP_EXCEPTION CLIENT_APP_RAISED_EXCEPTION INVALID_FAB CLIENT_APP_CRASHED NODE_UNAVAILABLE"
RELIED = [
    Relied("flwr.supercore.task_identity:TaskIdentity", "identify", "says who sends a Message", makes_the_sender),
    Relied(
        "flwr.app.message:make_message",
        "build_message",
        "makes a Message of any metadata",
        lambda _: metadata_values(message_of(VALUES, RecordDict())) == VALUES,
    ),
    Relied("flwr.app:Metadata", "fedmom/flower/messages.py", "takes these eleven values in order", takes(*VALUES)),
    Relied("flwr.app:Message", "set_message_id", "keeps its id in metadata._message_id", has_its_new_id),
    Relied(
        "flwr.common.constant:ErrorCode",
        "error_codes",
        f"has {CODES} REPLY_MESSAGE_UNAVAILABLE",
        lambda codes: all(isinstance(getattr(codes, n), int) for n in (*CODES.split(), "REPLY_MESSAGE_UNAVAILABLE")),
    ),
    Relied(
        "flwr.common.constant:SUPERLINK_NODE_ID", "server_node_id", "is a number", lambda found: isinstance(found, int)
    ),
    Relied("flwr.supercore.object_ref:load_app", "load_object", "takes these", takes("a:b", LookupError, Path())),
    Relied(
        "flwr.supercore.run:Run", "empty_run", "has create_empty(run_id)", lambda run: run.create_empty(5).run_id == 5
    ),
    Relied("flwr.proto.node_pb2:NodeInfo", "node_info", "has a node_id", lambda node: node(node_id=5).node_id == 5),
    Relied(
        "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
        "push_error",
        "is an exception",
        lambda error: issubclass(error, Exception),
    ),
    Relied(
        "flwr.serverapp:ServerApp",
        "log",
        "comes with a logger 'flwr'",
        lambda _: bool(logging.getLogger("flwr").handlers),
    ),
    Relied(
        "flwr.serverapp.strategy:Strategy.start",
        "strategies/prsgdm.py and strategies/dsgdm.py",
        "has arguments that our strategies take too, in this order",
        we_take_the_same,
    ),
    Relied(f"{NODE}:time", "deploy/image/node.py", "is the module, whose sleep it calls", lambda found: found is time),
    Relied(
        f"{NODE}:_pull_and_store_message",
        "deploy/image/node.py",
        "has an argument `state`",
        lambda pull: "state" in inspect.signature(pull).parameters,
    ),
    Relied(
        f"{NODE}:_push_messages",
        "deploy/image/node.py",
        "has an argument `object_store`",
        lambda push: "object_store" in inspect.signature(push).parameters,
    ),
    Relied("flwr.supernode:start_client_internal", "deploy/image/node.py", "can be mended", is_mended("node:mend")),
    Relied(
        "flwr.supernode.nodestate:NodeStateFactory", "deploy/image/node.py", "makes what has_reply reads", keeps_replies
    ),
    Relied(
        "flwr.supercore.retry.retry_invoker:RetryInvoker",
        "deploy/image/links.py",
        "takes should_giveup",
        lambda found: (
            is_mended("links:try_cut_handshakes_again", "RetryInvoker")(found)
            and "should_giveup" in inspect.signature(found).parameters
        ),
    ),
    Relied(
        "flwr.supercore.protobuf.client:ProtobufClient",
        "deploy/image/links.py",
        "asks by _send",
        is_mended("links:leave_marks", "ProtobufClient"),
    ),
    Relied(
        "flwr.supercore.heartbeat:HeartbeatSender",
        "deploy/image/links.py",
        "beats by _run",
        is_mended("links:end_where_heartbeats_end", "HeartbeatSender"),
    ),
    Relied(
        "flwr.supercore.exit.exit:FORCE_EXIT_TIMEOUT_SECONDS",
        "deploy/image/links.py",
        "is how long an app may take to end",
        lambda found: isinstance(found, int | float),
    ),
    Relied("flwr.supernode.cli.flwr_clientapp:flwr_clientapp", "deploy/image/warm.py", "is a command", takes()),
    Relied("flwr.superlink.cli.flwr_serverapp:flwr_serverapp", "deploy/image/warm.py", "is a command", takes()),
    Relied("flwr.supercore.cli:flower_superexec", "deploy/image/bin/flower-superexec", "is a command", takes()),
    Relied(
        "flwr.supernode.cli.flower_supernode:flower_supernode",
        "deploy/image/bin/flower-supernode",
        "is a command",
        takes(),
    ),
]


def who(user: str) -> str:
    """The files behind a user: those that import it, where it is a function of fedmom/flower/private.py."""
    if "/" in user:
        return user
    folders = (ROOT / name for name in ("fedmom", "strategies", "clients"))
    texts = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    files = [
        path.relative_to(ROOT).as_posix()
        for path, text in sorted(texts.items())
        if re.search(rf"flower\.private import .*\b{user}\b|\bprivate\.{user}\b", text)
    ]
    assert files, f"nobody uses {user} of fedmom/flower/private.py"
    return f"fedmom/flower/private.py ({user}, for {', '.join(files)})"


def moved(relied: Iterable[Relied]) -> list[str]:
    """A line for each name that is not what we rely on."""
    lines = []
    for row in relied:
        module, _, attribute = row.name.partition(":")
        try:
            why = "" if row.holds(operator.attrgetter(attribute)(importlib.import_module(module))) else "it is another"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            lines.append(f"{row.name} {row.what}, relies {who(row.user)}; not in flwr {version('flwr')}: {why}")
    return lines


def test_flower_has_what_we_rely_on():
    assert not (lines := moved(RELIED)), "\n".join(lines)


def test_what_has_moved_is_named():
    gone = Relied("flwr.gone:x", "push_error", "is there", lambda _: True)
    less = Relied("flwr.app:Less", "deploy/image/node.py", "is there", lambda _: True)
    other = Relied("flwr.app:Metadata", "deploy/image/node.py", "takes one", takes(1))
    false = Relied("flwr.app:Metadata", "deploy/image/node.py", "is no class", lambda found: not inspect.isclass(found))
    lines = moved([gone, RELIED[0], less, other, false])
    assert len(lines) == 4, lines
    assert lines[0] == (
        "flwr.gone:x is there, relies fedmom/flower/private.py (push_error, for strategies/dispatch.py); "
        f"not in flwr {version('flwr')}: ModuleNotFoundError: No module named 'flwr.gone'"
    )
    assert "flwr.app:Less" in lines[1]
    assert "missing a required argument: 'message_id'" in lines[2]
    assert "it is another" in lines[3]


def test_every_private_name_is_among_them():
    tree = ast.parse(Path(private.__file__).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assert ast.get_docstring(function), function.name
    imported = {
        f"{node.module}:{node.names[0].name}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
    }
    users = {function.name for function in functions}
    named = {row.name for row in RELIED if row.user in users} - {"flwr.app:Message"}
    assert named == imported
    assert {row.user for row in RELIED if row.user in users} == users

    files = [path for path in IMAGE.rglob("*") if path.suffix == ".py" or path.parent.name == "bin"]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    said: set[str] = set()
    for path, text in texts.items():
        if path.suffix == ".py" or "python" in text.partition("\n")[0]:
            nodes = list(ast.walk(ast.parse(text)))
            said |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            said |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said = {name for name in said if re.fullmatch(r"flwr(\.\w+)+", name)} - set(PUBLIC)
    assert len(said) >= 8
    assert said <= {row.name.partition(":")[0] for row in RELIED if row.user.startswith("deploy/")}
