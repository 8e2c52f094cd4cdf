"""fedmom's engine on a workload of benchmarks/peers.py, where torch and numpy are all that is installed.

    python benchmarks/peers_engine.py WORKLOAD.json ROUNDS OUT.json DEVICE

Path and chunk as `auto` chooses them; no files, no Flower.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers_app")]

from peers_app import common  # noqa: E402

from fedmom.data.datasets import Dataset  # noqa: E402
from fedmom.data.partition import make_partition  # noqa: E402
from fedmom.engine.auto import choose  # noqa: E402
from fedmom.engine.engine import Engine  # noqa: E402
from fedmom.machine.allocator import keep_freed_memory  # noqa: E402
from fedmom.method.algorithms import Method  # noqa: E402
from fedmom.method.schedules import LearningRate  # noqa: E402
from fedmom.rounds.loop import run_rounds  # noqa: E402
from fedmom.rounds.plan import Plan, beginning, round_job  # noqa: E402
from fedmom.tasks.models import build_model  # noqa: E402
from fedmom.tasks.supervised import Supervised  # noqa: E402


def main() -> None:
    load, rounds, device = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[4]
    keep_freed_memory()
    with np.load(load["data"]) as file:
        x, y = torch.from_numpy(file["x"]).flatten(0, 1), torch.from_numpy(file["y"]).long().flatten()
    data = Dataset(x, y, x[:100], y[:100], 10, tuple(load["mean"]), tuple(load["std"]), "none")
    net = build_model(load["model"], tuple(load["shape"]), 10, seed=0, hidden=load.get("hidden", 200))
    partition = make_partition("iid", y.numpy(), load["clients"], seed=0)
    problem = Supervised(data, net, partition, batch_size=load["batch"], device=device)
    method, rate = Method(load["momentum"]), LearningRate(load["lr"])
    plan = Plan(
        method, rate, rounds, load["cohort"], load["batch"], num_local_steps=load["steps"], eval_every=rounds + 1
    )
    begin = beginning(problem, plan)
    choice = choose(problem, method, begin.state, round_job(problem, plan, begin), path="auto", chunk_size=0)
    print(choice, file=sys.stderr)
    engine = Engine(problem, method, path=choice.path, chunk_size=choice.chunk_size)
    seconds, losses, last = [], [], time.perf_counter()
    for _, record in run_rounds(problem, plan, engine, begin):
        seconds.append(time.perf_counter() - last)
        losses.append(record["train_loss"])
        last = time.perf_counter()
    # The last round is evaluated.
    result = common.result(seconds[:-1], losses, sum(p.numel() for p in net.parameters()))
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
