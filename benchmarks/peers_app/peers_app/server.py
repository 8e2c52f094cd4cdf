"""Stock FedAvg without evaluation; writes the time of every round."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from peers_app import common

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that notes when each round's aggregation is done."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.times: list[float] = []
        self.losses: list[float] = []

    def configure_train(self, *args, **kwargs):
        if not self.times:
            self.times.append(time.perf_counter())
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, *args, **kwargs):
        found = super().aggregate_train(*args, **kwargs)
        self.times.append(time.perf_counter())
        if found[1] is not None:
            self.losses.append(float(found[1]["loss"]))
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    load = json.loads(config["workload"])
    strategy = Timed(fraction_train=config["fraction"], fraction_evaluate=0.0)
    model = common.model_of(load)
    arrays = ArrayRecord(model.state_dict())
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=config["num-rounds"])
    seconds = [after - before for before, after in zip(strategy.times, strategy.times[1:], strict=False)]
    result = common.result(seconds, strategy.losses, common.num_parameters(model))
    Path(config["out"]).write_text(json.dumps(result))
