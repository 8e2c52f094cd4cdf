"""A client as in Flower's PyTorch template: model from the message, a loop over its own minibatches, model back."""

import json
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from peers_app import common

app = ClientApp()


@lru_cache
def prepared(workload: str):
    torch.set_num_threads(1)
    load = json.loads(workload)
    return load, common.data_of(load)


@app.train()
def train(message: Message, context: Context) -> Message:
    load, data = prepared(context.run_config["workload"])
    model = common.model_of(load)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    loss = common.local_steps(model, common.optimizer_of(model, load), data, load, client)
    metrics = MetricRecord({"num-examples": load["batch"] * load["steps"], "loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
