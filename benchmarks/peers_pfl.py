"""pfl-research's FederatedAveraging on a workload of benchmarks/peers.py; runs in pfl's own environment.

    python benchmarks/peers_pfl.py LOAD.json ROUNDS OUT.json
    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node P benchmarks/peers_pfl.py LOAD.json ROUNDS OUT.json

One client at a time on one resident model in each process, as pfl does. Its local optimiser is made anew for every
client, so that its momentum starts from 0 in every round. More processes than there are cards share them, and sum by
gloo, through the host's memory. (--local-addr: otherwise they meet at the machine's own name, which not every machine
can look up.)
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

# pfl gives the process of local rank r the card r and asks for NCCL, which refuses two processes on one card. It does
# so while it is imported: this comes first.
if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
    cards = torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % cards)
    if int(os.environ["LOCAL_WORLD_SIZE"]) > cards:
        begin = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda backend=None, **rest: begin("gloo", **rest)

from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.model.pytorch import PyTorchModel
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent / "peers_app"))
from peers_app import common


class Timer(TrainingProcessCallback):
    """Times of all central iterations."""

    def __init__(self, losses: list[torch.Tensor]) -> None:
        self.times: list[float] = []
        self.losses, self.steps = losses, [0]  # how many losses there were after each

    def on_train_begin(self, *, model):
        self.times.append(time.perf_counter())
        return super().on_train_begin(model=model)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a round ends when the card has done it, not when it was asked to
        self.times.append(time.perf_counter())
        self.steps.append(len(self.losses))
        return super().after_central_iteration(aggregate_metrics, model, central_iteration=central_iteration)


def main() -> None:
    torch.set_num_threads(1)
    load, rounds = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    device = get_default_device()
    x, y = (part.to(device) for part in common.data_of(load))
    net = common.model_of(load).to(device)
    losses: list[torch.Tensor] = []  # of this process's clients, a step each

    def loss(inputs, targets, **_):
        found = cross_entropy(net(inputs), targets)
        losses.append(found.detach())
        return found

    net.loss = loss
    net.metrics = lambda inputs, targets: {}
    model = PyTorchModel(
        net,
        local_optimizer_create=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=load["momentum"]),
        central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    )
    sampler = get_user_sampler("random", list(range(load["clients"])))
    users = FederatedDataset(lambda user: Dataset([x[user], y[user]]), sampler)
    params = NNAlgorithmParams(rounds, 10**6, load["cohort"], None)
    local = NNTrainHyperParams(
        local_num_epochs=None,
        local_num_steps=load["steps"],
        local_learning_rate=load["lr"],
        local_batch_size=load["batch"],
    )
    timer = Timer(losses)
    FederatedAveraging().run(
        algorithm_params=params,
        backend=SimulatedBackend(training_data=users, val_data=None),
        model=model,
        model_train_params=local,
        callbacks=[timer],
        send_metrics_to_platform=False,
    )
    means = [float(torch.stack(losses[a:b]).mean()) for a, b in pairwise(timer.steps)]
    if get_ops().distributed.global_rank == 0:
        result = common.result(np.diff(timer.times).tolist(), means, common.num_parameters(net))
        Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
