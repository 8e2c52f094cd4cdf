"""A server of Flower's older kind, which asks its clients from a pool of threads."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


def server_fn(context: Context) -> ServerAppComponents:
    out = Path(str(context.run_config["out"]))

    def judge(number, parameters, config):
        with out.open("a") as file:
            file.write(json.dumps([number, *(float(array.mean()) for array in parameters)]) + "\n")
        return 0.0, {}

    def seen(metrics):
        with out.open("a") as file:
            file.write(json.dumps(sorted(one["partition"] for _, one in metrics)) + "\n")
        return {}

    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters([np.ones(40_000, np.float32), np.zeros(3)]),
        evaluate_fn=judge,
        evaluate_metrics_aggregation_fn=seen,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-rounds"])))


app = ServerApp(server_fn=server_fn)
