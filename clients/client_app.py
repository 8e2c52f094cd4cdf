"""The ClientApp: unpack a message, make one call into fedmom, pack the answer.

Node p of P (Flower's partition-id and num-partitions) holds the clients c with ⌊c·P/N⌋ = p. Arrays travel in one
ArrayRecord under the names `params/…`, `momentum/…` and `buffers/…` (`correction/…` for what a correction with state
sends), so Flower's own strategies average model and momentum alike; they weigh by `num-examples`, which is the sum of
the clients' weights (algorithm.client-weights).
A message whose arrays came bundled (`fedmom.flower.wire.bundle`) is answered in bundles.
Where nodes keep what is their clients' own (server.own-rows), it lies in Context.state between two messages.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmom.backends.at_nodes.node import Asked, begun, keep, mean_of_round, row_of_round, told
from fedmom.backends.trainer import Local, Node, TrainedBlock, held_clients, settled, warm_node
from fedmom.config.examples import own_split
from fedmom.config.goals import task_of
from fedmom.data.given.own_files import client_source, read_client
from fedmom.data.local import facts_of, from_record
from fedmom.errors import InputError
from fedmom.flower.wire import is_bundle, pack, unpack
from fedmom.machine.files import at_home
from fedmom.method.schedules import Span
from fedmom.method.state import ClientState, Tree, flatten, unflatten
from fedmom.tasks.problem import data_kind

from .kept import ContextStore

Metric = int | float | list[int] | list[float]
AnyRecord = ArrayRecord | MetricRecord | ConfigRecord

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which clients this node holds and, where it is asked for, how its engine would run them."""
    answer = ConfigRecord({"clients": _held(context).tolist()})
    asked = _asked(message)
    if "since" in asked:
        return _bring(message, context)
    if asked.get("facts", False):
        config = settled(context.run_config).config
        with _of_own_data(context):
            targets = task_of(config).targets
            place, keys = _own_source(context), (config.data.classes, targets, own_split(config))
            held = read_client(place, int(_held(context)[0]), *keys)
            facts = facts_of(held, config.run.dtype, targets)
        for name, value in facts._asdict().items():
            answer[name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
    elif asked.get("engine", False) or not _is_local(context):
        # Data are read and the model is built here, so that a limit on the time of a round is one on its training.
        node = _node(context, asked)
        if asked.get("engine", False):
            answer["path"], answer["chunk-size"] = node.choose(_held(context))
    return Message(RecordDict({"config": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """I local steps of the clients that the message names (without names: all that the node holds)."""
    asked = _asked(message)
    clients: list[int] = asked.get("clients", _held(context).tolist())
    if asked.get("rows", False):
        return _train_rows(message, context, clients)
    if "since" in asked:
        return _train_kept(message, context)
    arrays = message.content.array_records["arrays"]
    start = unpack(arrays)
    trained = _trained(_node(context, asked), asked, clients, unflatten(start), *_own(message))
    outcome, mean = trained.outcome, flatten(trained.outcome.mean)
    # In the order of what came: some of Flower's strategies pair arrays by their places. A correction's message is new.
    names = [*(name for name in start if name in mean), *(name for name in mean if name not in start)]
    content = _answer(trained, clients, {name: mean[name] for name in names}, arrays)
    if outcome.own is not None:
        content["own"] = _record(flatten(outcome.own), arrays)
    if outcome.correction is not None:
        content["states"] = _record(outcome.correction, arrays)
    return Message(RecordDict(content), reply_to=message)


def _trained(
    node: Node,
    asked: Mapping[str, Any],
    clients: list[int],
    start: ClientState,
    own: ClientState | None,
    states: Tree | None,
    messages: Tree | None = None,
) -> TrainedBlock:
    return node.train(
        clients,
        asked["server-round"] - 1,
        start,
        own,
        states,
        span=_span(asked),
        path=asked.get("path", ""),
        chunk_size=asked.get("chunk-size", 0),
        messages=messages,
    )


def _answer(trained: TrainedBlock, clients: list[int], sent: Tree, arrays: Mapping[str, Array]) -> dict[str, AnyRecord]:
    """The records of a reply: what is sent, in the form in which `arrays` came, and what is told of the clients."""
    outcome = trained.outcome
    metrics: dict[str, Metric] = {
        "num-examples": trained.weight,
        "lr": trained.lr,
        "train_loss": outcome.train_loss,
        "consensus_distance": outcome.consensus_distance,
        "momentum_spread": outcome.momentum_spread,
    }
    about = ConfigRecord({"clients": sorted(clients), "client-steps": trained.client_steps})
    about["train-loss"] = outcome.losses.tolist()
    points = [point.reshape(-1) for point in outcome.trajectory]
    about["path"] = torch.cat(points).tolist() if points else []
    return {"arrays": _record(sent, arrays), "metrics": MetricRecord(metrics), "clients": about}


def _train_kept(message: Message, context: Context) -> Message:
    """A round of clients whose own rows this node keeps; what is sent is what the method says."""
    asked, arrays = _asked(message), message.content.array_records["arrays"]
    node, store = _node(context, asked), ContextStore(context.state)
    clients: list[int] = sorted(asked["clients"])
    since = dict(zip(asked["clients"], asked["since"], strict=True))
    round_asked = Asked(asked["server-round"], clients, [since[c] for c in clients], _given(message))
    said = told(node.turns, round_asked, unpack(arrays), asked.get("reference", 0), store)
    start = begun(node.turns, round_asked, said, store)
    # A block of clients sends its mean, and one client what it has encoded.
    messages: Tree | None = {} if len(clients) == 1 and node.plan.method.codecs else None
    trained = _trained(node, asked, clients, start.start, start.own, start.states, messages)
    broken = keep(node.turns, round_asked, trained.outcome, store)
    mean = flatten(trained.outcome.mean)
    names = [*node.turns.up(round_asked.number), *(name for name in mean if name.startswith("correction/"))]
    sent = {name: value[0] for name, value in (messages or {}).items()}
    rules = {} if messages is None else node.plan.method.codecs
    sent |= {name: mean[name] for name in names if not node.turns.is_encoded(rules, name)}
    content = _answer(trained, clients, sent, arrays)
    about = cast(ConfigRecord, content["clients"])
    about["broken"], about["given"] = broken, start.given
    return Message(RecordDict(content), reply_to=message)


def _given(message: Message) -> dict[int, Tree]:
    """{client: its row as the server has it}, where the server sends some."""
    records, given = message.content.array_records, _asked(message).get("given", [])
    if not given:
        return {}
    rows = unpack(records["given"])
    return {client: {name: value[place] for name, value in rows.items()} for place, client in enumerate(given)}


def _bring(message: Message, context: Context) -> Message:
    """What this node keeps of its clients, for a checkpoint or an evaluation."""
    asked, store = _asked(message), ContextStore(context.state)
    pairs = zip(asked["clients"], asked["since"], strict=True)
    content: dict[str, AnyRecord] = {
        f"own/{client}": pack(row_of_round(store, client, since), bundled=True) for client, since in pairs
    }
    if asked["mean"]:
        content["mean"] = pack(mean_of_round(store, asked["mean"]), bundled=True)
    return Message(RecordDict(content), reply_to=message)


def _train_rows(message: Message, context: Context, clients: list[int]) -> Message:
    """Algorithm 2: every client goes on from its own row, and the rows [k, ...] go back."""
    asked, arrays = _asked(message), message.content.array_records["arrays"]
    start = unpack(arrays)
    trained = _node(context, asked).train_rows(
        clients,
        asked["server-round"] - 1,
        unflatten(start),
        path=asked.get("path", ""),
        chunk_size=asked.get("chunk-size", 0),
    )
    after = flatten(trained.rows)
    about = ConfigRecord({"clients": sorted(clients), "client-steps": trained.client_steps})
    about["train-loss"] = trained.losses.tolist()
    about["path"] = torch.cat([point.reshape(-1) for point in trained.path]).tolist() if trained.path else []
    content: dict[str, AnyRecord] = {
        "arrays": _record({name: after[name] for name in start}, arrays),
        "metrics": MetricRecord({"num-examples": float(len(clients)), "lr": trained.lr}),
        "clients": about,
    }
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy of a model on the node's own training examples (with local data: on its test examples)."""
    state = unflatten(unpack(message.content.array_records["arrays"]))
    asked = _asked(message)
    node = _node(context, asked)
    measured, num_examples = node.evaluate(_held(context).tolist(), state)
    metrics: dict[str, Any] = {"num-examples": num_examples, **measured}
    if _is_local(context):
        metrics |= {f"sums-{name}": sums for name, sums in node.test_totals(state).items()}
        if asked.get("own", False):
            metrics |= node.own_results(state)
        if asked.get("own-models", False):
            metrics |= node.personal_results(
                state, asked["server-round"] - 1, asked["lr"], *_own(message), _span(asked)
            )
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _is_local(context: Context) -> bool:
    return data_kind(settled(context.run_config).config.data.dataset).own_data


def _node(context: Context, asked: Mapping[str, Any]) -> Node:
    """The warm node; where the data are this node's own, with what the server says of everybody's."""
    if not _is_local(context):
        node = warm_node(context.run_config)
    else:
        with _of_own_data(context):
            (client,) = _held(context).tolist()
            node = warm_node(context.run_config, Local(str(_own_source(context)), client, from_record(asked)))
    if asked.get("model-start", node.begun_from) != node.begun_from:
        raise InputError(f"model.start = {node.config.model.start!r}: is another file here than at the server")
    return node


@contextmanager
def _of_own_data(context: Context) -> Iterator[None]:
    """Errors of data that only this node has name its client: nobody else knows whose they are."""
    try:
        yield
    except (InputError, PermissionError) as error:
        held = _held(context).tolist()
        text = (
            str(error) if isinstance(error, InputError) else f"{error.filename}: may not be read by user {os.getuid()}"
        )
        whose = f"client {held[0]}: " if len(held) == 1 and not re.search(rf"\bclient {held[0]}\b", text) else ""
        raise InputError(f"{whose}{text}") from error


def _own_source(context: Context) -> Path:
    """Where this node's examples lie: its own `data-dir` (of --node-config), else below the run's data.data-dir."""
    held = _held(context).tolist()
    if len(held) != 1:
        raise InputError(f"data.dataset = 'local': a node holds one client, this one {len(held)}: {held}")
    own = context.node_config.get("data-dir")
    if not own:
        return client_source(settled(context.run_config).config.data.data_dir, held[0])
    place = at_home(str(own))
    _check_readable(place)
    return place


def _check_readable(place: Path) -> None:
    """PermissionError for what another user has put there for himself; it would pass for missing, or for broken."""
    for path in (place, *(place.iterdir() if place.is_dir() and os.access(place, os.R_OK | os.X_OK) else ())):
        if path.exists() and not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _asked(message: Message) -> Mapping[str, Any]:
    """What the message says besides its tensors; the server and fedmom's tests hold it to what is read here."""
    return message.content.config_records.get("config", ConfigRecord())


def _held(context: Context) -> np.ndarray:
    """The clients of this node, in ascending order."""
    node, num_nodes = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return held_clients(node, num_nodes, settled(context.run_config).config.data.num_clients)


def _own(message: Message) -> tuple[ClientState | None, Tree | None]:
    """[k, ...] what the clients have of their own, where it came along, and their states of a correction."""
    records = message.content.array_records
    own, states = (unpack(records[name]) if name in records else None for name in ("own", "states"))
    return None if own is None else unflatten(own), states


def _span(asked: Mapping[str, Any]) -> Span | None:
    """The round's steps, which the server tells where I changes in the run."""
    return Span(asked["first-step"], asked["num-steps"]) if "first-step" in asked else None


def _record(tensors: Tree, asked: Mapping[str, Array]) -> ArrayRecord:
    """In bundles where the message's arrays came so."""
    return pack(tensors, bundled=any(map(is_bundle, asked)))
