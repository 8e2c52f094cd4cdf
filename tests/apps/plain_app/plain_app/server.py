"""Stock FedAvg over a model of ones, after a query of all nodes."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    if context.run_config["mode"] == "ill":
        raise RuntimeError("the server is ill")
    if context.run_config["mode"] == "done":
        raise SystemExit("there is no data folder")
    messages = [Message(RecordDict(), node_id, "query") for node_id in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    partitions = sorted(int(reply.content["who"]["partition-id"]) for reply in replies)
    start = ArrayRecord([np.ones(int(context.run_config["model.size"]), dtype=np.float32), np.zeros(3)])
    result = FedAvg().start(grid, start, num_rounds=int(context.run_config["num-rounds"]))
    context.state["arrays"] = result.arrays
    last = max(result.evaluate_metrics_clientapp)
    context.state["train"] = result.train_metrics_clientapp[last]
    context.state["evaluate"] = result.evaluate_metrics_clientapp[last]
    context.state["partitions"] = ConfigRecord({"ids": partitions})
