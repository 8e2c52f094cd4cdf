"""What a resolved configuration says of the machine: the device, torch's threads and precision, Ray's actors."""

import math

import torch

from fedmom.actors.cluster import PoolOptions
from fedmom.config.keys import Config, EngineConfig
from fedmom.config.load import replace
from fedmom.errors import InputError
from fedmom.machine.cores import usable_cores
from fedmom.machine.precision import allow_tf32


def pool_options(config: Config) -> PoolOptions:
    """The actors that [simulation] describes; engine.workers is their number where it is given.

    Ray hides the GPUs from an actor that asks for none, so on a GPU each gets its share, if none was named.
    """
    keys, workers = config.simulation, config.engine.workers
    num_workers = workers or keys.num_actors
    return PoolOptions(
        num_workers=num_workers,
        count_key="engine.workers" if workers else "simulation.num-actors",
        num_cpus=keys.num_cpus,
        num_gpus=keys.num_gpus or share_of_gpus(config, num_workers),
        # Other machines of a cluster may have more GPUs than this one, or fewer.
        share_gpus=bool(keys.ray_address and not keys.num_gpus and share_of_gpus(config, num_workers)),
        ray_address=keys.ray_address,
        retries=keys.retries,
        straggler_seconds=keys.straggler_seconds,
    )


def share_of_gpus(config: Config, num_workers: int) -> float:
    """GPUs per actor, as large as lets all have one (0 actors: as many as there are GPUs); 0 on a CPU."""
    if resolve_device(config).engine.device == "cpu":
        return 0.0
    together = math.ceil(max(1, num_workers) / max(1, torch.cuda.device_count()))  # actors on one GPU
    return math.floor(1e4 / together) / 1e4  # Ray counts ten-thousandths


def actors_device(options: PoolOptions) -> str:
    """Where the actors' tensors live."""
    return "cuda" if options.num_gpus else "cpu"


def resolve_device(config: Config) -> Config:
    """engine.device = "auto" becomes cuda where there is one; InputError for a cuda that is not there."""
    device, there = config.engine.device, torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("engine.device = 'cuda': torch finds no CUDA device here; use cpu or auto")
    device = ("cuda" if there else "cpu") if device == "auto" else device
    return replace(config, "engine", device=device)


def set_up_torch(keys: EngineConfig) -> None:
    """Threads, and how exactly a GPU multiplies float32, for the whole process."""
    # torch counts the cores of the affinity, but knows no cgroup's limit.
    torch.set_num_threads(keys.threads or min(torch.get_num_threads(), usable_cores()))
    allow_tf32(keys.matmul == "tf32")
