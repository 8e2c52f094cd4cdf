"""Turns the arrays it gets into torch tensors and sends them back. Stores, computes and prints nothing."""

import torch  # noqa: F401  to_torch_state_dict wants it imported
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    state = message.content["arrays"].to_torch_state_dict()
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}
    return Message(RecordDict(content), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this is, as fedmom's strategy asks it."""
    answer = ConfigRecord({"clients": [int(context.node_config["partition-id"])]})
    return Message(RecordDict({"config": answer}), reply_to=message)
