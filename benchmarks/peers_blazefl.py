"""BlazeFL's FedAvg on a workload of benchmarks/peers.py; runs in BlazeFL's own environment.

    python benchmarks/peers_blazefl.py WORKLOAD.json ROUNDS OUT.json WORKERS processes|threads

Its server handler and client trainers as they are, but for the local optimiser, which has momentum here, made anew for
every client.
"""

import copy
import json
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch
from blazefl.contrib import FedAvgBaseServerHandler, FedAvgProcessPoolClientTrainer, FedAvgThreadPoolClientTrainer
from blazefl.contrib.fedavg import FedAvgProcessPoolUplinkPackage, FedAvgUplinkPackage
from blazefl.core import IPCMode, deserialize_model, serialize_model
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent / "peers_app"))
from peers_app import common

LOAD = json.loads(Path(sys.argv[1]).read_text())


@lru_cache
def data():
    return common.data_of(LOAD)


@lru_cache
def template():
    return common.model_of(LOAD)


class Models:
    def select_model(self, name):
        return copy.deepcopy(template())


class Clients:
    """BlazeFL's partitioned data set. Workers are forked: the data are theirs without a copy."""

    def get_dataset(self, type_, cid):
        x, y = data()
        return TensorDataset(x[cid], y[cid])

    def set_dataset(self, type_, cid, dataset):
        pass

    def get_dataloader(self, type_, cid, batch_size, generator):
        return DataLoader(self.get_dataset(type_, cid), batch_size=batch_size, shuffle=True, generator=generator)


def trained(model, start, loader, cid, package):
    """One client's epoch, which is the workload's number of steps; as BlazeFL's own `train`."""
    deserialize_model(model, start)
    optimizer, losses = common.optimizer_of(model, LOAD), []
    model.train()
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert len(losses) == LOAD["steps"]
    return package(cid, serialize_model(model), LOAD["size"], {"loss": float(torch.stack(losses).mean())})


class Processes(FedAvgProcessPoolClientTrainer):
    def prepare_uplink_package_buffer(self):
        package = super().prepare_uplink_package_buffer()
        package.metadata = {"loss": 0.0}  # of the form that comes back
        return package


def train_in_process(model, model_parameters, train_loader, device, epochs, lr, stop_event, cid):
    return trained(model, model_parameters, train_loader, cid, FedAvgProcessPoolUplinkPackage)


FedAvgProcessPoolClientTrainer.train = staticmethod(train_in_process)  # its worker calls it by this name


class Threads(FedAvgThreadPoolClientTrainer):
    def train(self, model, model_parameters, train_loader, device, epochs, lr, stop_event, cid):
        return trained(model, model_parameters, train_loader, cid, FedAvgUplinkPackage)

    def uplink_package(self):
        package, self.cache = self.cache, []
        return package


def trainer_of(workers: int, way: str, folder: Path):
    options = {
        "model_selector": Models(),
        "model_name": LOAD["model"],
        "dataset": Clients(),
        "device": "cpu",
        "num_clients": LOAD["clients"],
        "epochs": 1,
        "batch_size": LOAD["batch"],
        "lr": LOAD["lr"],
        "seed": 0,
        "num_parallels": workers,
    }
    if way == "threads":
        return Threads(**options)
    return Processes(**options, share_dir=folder / "share", state_dir=folder / "state", ipc_mode=IPCMode.SHARED_MEMORY)


def main() -> None:
    rounds, workers, way = int(sys.argv[2]), int(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    data()
    server = FedAvgBaseServerHandler(
        Models(), LOAD["model"], Clients(), rounds, LOAD["clients"], LOAD["cohort"] / LOAD["clients"], "cpu", 1, 0
    )
    seconds, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(workers, way, Path(folder))
        while not server.if_stop():
            begin = time.perf_counter()
            trainer.local_process(server.downlink_package(), server.sample_clients())
            found = trainer.uplink_package()
            assert len(found) == LOAD["cohort"]
            losses.append(sum(package.metadata["loss"] for package in found) / len(found))
            for package in found:
                server.load(package)
            seconds.append(time.perf_counter() - begin)
    result = common.result(seconds, losses, common.num_parameters(server.model))
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
