"""The ClientApp: unpack a message, make one call into fedmom, pack the answer.

Node p of P (Flower's partition-id and num-partitions) holds the clients c with ⌊c·P/N⌋ = p. Arrays travel in one
ArrayRecord under the names `params/…`, `momentum/…` and `buffers/…`, so Flower's own strategies average model and
momentum alike; they weigh by `num-examples`, which is the sum of the clients' weights (algorithm.client-weights).
"""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedmom.node import held_clients, settled, warm_node
from fedmom.state import Tree, flatten, unflatten
from fedmom.wire import array_bytes, from_npy, to_npy

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which clients this node holds and, where it is asked for, how its engine would run them."""
    answer = ConfigRecord({"clients": _held(context).tolist()})
    asked = message.content.config_records.get("config", {})
    if asked.get("engine", False):
        answer["path"], answer["chunk-size"] = warm_node(context.run_config).choose(_held(context))
    return Message(RecordDict({"config": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """I local steps of the clients that the message names (without names: all that the node holds)."""
    asked = message.content.config_records["config"]
    clients = asked.get("clients", _held(context).tolist())
    arrays, rows = message.content.array_records["arrays"], message.content.array_records.get("rows")
    trained = warm_node(context.run_config).train(
        clients,
        asked["server-round"] - 1,
        unflatten(_tensors(arrays)),
        None if rows is None else _tensors(rows),
        path=asked.get("path", ""),
        chunk_size=asked.get("chunk-size", 0),
    )
    outcome = trained.outcome
    metrics = {
        "num-examples": trained.weight,
        "lr": trained.lr,
        "train_loss": outcome.train_loss,
        "consensus_distance": outcome.consensus_distance,
        "momentum_spread": outcome.momentum_spread,
    }
    about = ConfigRecord({"clients": sorted(clients), "client-steps": trained.client_steps})
    about["train-loss"] = outcome.losses.tolist()
    about["path"] = torch.cat([point.reshape(-1) for point in outcome.path]).tolist() if outcome.path else []
    mean = flatten(outcome.mean)
    # In the order of what came: some of Flower's strategies pair arrays by their places.
    content = {
        "arrays": _record({name: mean[name] for name in arrays}),
        "metrics": MetricRecord(metrics),
        "clients": about,
    }
    if outcome.momentum is not None:
        content["rows"] = _record(outcome.momentum)
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy of a model on the node's own training examples."""
    state = unflatten(_tensors(message.content.array_records["arrays"]))
    measured, num_examples = warm_node(context.run_config).evaluate(_held(context).tolist(), state)
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": num_examples, **measured})}), reply_to=message)


def _held(context: Context) -> Tensor:
    node, num_nodes = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return held_clients(node, num_nodes, settled(context.run_config).data.num_clients)


def _tensors(record: Mapping[str, Array]) -> Tree:
    return {name: from_npy(array_bytes(array)) for name, array in record.items()}


def _record(tensors: Tree) -> ArrayRecord:
    arrays = {}
    for name, value in tensors.items():
        dtype = str(value.dtype).removeprefix("torch.")
        arrays[name] = Array(dtype=dtype, shape=tuple(value.shape), stype="numpy.ndarray", data=to_npy(value))
    return ArrayRecord(arrays)
