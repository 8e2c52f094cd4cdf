"""FedAvg or PRSGDM, without evaluation. Writes when the first client answered, when rounds ended, and memory peaks."""

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

app = ServerApp()


def model(num_params: int) -> dict[str, torch.Tensor]:
    """Four float32 tensors with `num_params` elements together, the largest with 7/10 of them."""
    sizes = [num_params * share // 10 for share in (7, 2, 1)]
    sizes.append(num_params - sum(sizes) + 1)
    sizes[0] -= 1
    return {f"params/layer{index}": torch.randn(size) for index, size in enumerate(sizes)}


def prsgdm(num_clients: int) -> Strategy:
    from strategies.prsgdm import PRSGDM  # fedmom's; the rest of this app knows nothing of it

    return PRSGDM(num_clients)


STRATEGIES = {"fedavg": lambda num_clients: FedAvg(fraction_evaluate=0.0), "prsgdm": prsgdm}


class Memory(threading.Thread):
    """Largest RssAnon (own memory) and RssShmem (mapped parts of Ray's store) of this process, in MB, every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0.0, "RssShmem": 0.0}
        self.start()

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]) / 1024)
            time.sleep(0.02)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    memory = Memory()
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.01)
    list(grid.send_and_receive([Message(RecordDict(), nodes[0], "query")]))
    first_answer = time.time()
    ends = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        ends.append(time.perf_counter())
        return MetricRecord({"round": server_round})

    start = ArrayRecord(model(int(config["num-params"])))
    make = STRATEGIES[str(config["strategy"])]
    make(len(nodes)).start(grid, start, int(config["num-rounds"]), evaluate_fn=evaluate)
    seconds = [after - before for before, after in pairwise(ends)]
    result = {"first_answer": first_answer, "round_seconds": seconds, "memory_mb": memory.peak}
    Path(str(config["out"])).write_text(json.dumps(result))
