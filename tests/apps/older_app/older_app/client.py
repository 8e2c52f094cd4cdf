"""A client of Flower's older kind: it adds its partition to the model, and says so."""

import time

from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp


class Adding(NumPyClient):
    def __init__(self, partition: int, fault: str) -> None:
        self.partition, self.fault = partition, fault

    def fit(self, parameters, config):
        print(f"fit of {self.partition}")
        if self.fault == "hang" and self.partition:
            time.sleep(600)
        return [array + self.partition for array in parameters], 1, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].mean()), 1, {"partition": self.partition}


def client_fn(context: Context):
    return Adding(int(context.node_config["partition-id"]), str(context.run_config["fault"])).to_client()


app = ClientApp(client_fn=client_fn)
