"""A Flower app in thirty lines: every client pulls the model halfway to its own number, FedAvg averages."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    own = float(context.node_config["partition-id"])
    x = message.content["arrays"].to_numpy_ndarrays()[0]  # type: ignore[union-attr]
    arrays = ArrayRecord([x + 0.5 * (own - x)])
    metrics = MetricRecord({"num-examples": 1, "distance": float(np.abs(own - x).mean())})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    rounds = int(context.run_config["num-server-rounds"])
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord([np.zeros(4)]), num_rounds=rounds)
    x = result.arrays.to_numpy_ndarrays()[0]
    print(f"x = {x[0]:.3f} after {rounds} rounds")
