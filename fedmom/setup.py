"""A resolved configuration becomes a task, a plan and an engine: what any backend does before its first round."""

import numpy as np
import torch

from fedmom import engine as engines
from fedmom.config import Config, replace
from fedmom.datasets import Dataset, load_dataset
from fedmom.engine import Engine, Method
from fedmom.errors import InputError
from fedmom.executors import PoolOptions
from fedmom.models import build_model
from fedmom.objective import Classification, Task
from fedmom.parsing import parse_numbers, parse_table
from fedmom.partition import Partition, make_partition
from fedmom.quadratic import Quadratic
from fedmom.schedules import LearningRate
from fedmom.train import Plan, beginning, round_job


def load_task_data(config: Config) -> tuple[Dataset, Partition]:
    """The data set and who holds which example; InputError where a client would hold none."""
    data = config.data
    dataset = load_dataset(data.dataset, data.data_dir)
    partition = make_partition(
        data.partition,
        dataset.y_train.numpy(),
        data.num_clients,
        alpha=data.alpha,
        min_size=data.min_size,
        shards_per_client=data.shards_per_client,
        quantity_law=data.quantity_law,
        sigma=data.sigma,
        seed=config.run.seed,
    )
    empty = np.flatnonzero(partition.sizes == 0)
    if len(empty):
        raise InputError(
            f"data.partition = {data.partition!r}: client {empty[0]} has no examples ({len(empty)} such clients); "
            "raise data.min-size or data.alpha, or lower data.num-clients"
        )
    return dataset, partition


def make_task(config: Config, device: str) -> Task:
    """The clients' objectives of a resolved configuration, on `device`."""
    data, run = config.data, config.run
    dtype = getattr(torch, run.dtype)
    if data.dataset == "quadratic":
        return Quadratic(
            parse_table("data.curvatures", data.curvatures),
            parse_table("data.centers", data.centers),
            parse_numbers("data.start", data.start),
            noise_sigma=data.noise_sigma,
            seed=run.seed,
            dtype=dtype,
            device=device,
        )
    dataset, partition = load_task_data(config)
    augment = dataset.augment if data.augment == "auto" else data.augment
    if augment != "none" and dataset.x_train.ndim != 4:
        raise InputError(f"data.augment = {augment!r}: needs images, data.dataset = {data.dataset!r} has none")
    _check_memory(config, dataset, device)
    model = build_model(
        config.model.name,
        tuple(dataset.x_train.shape[1:]),
        dataset.num_classes,
        seed=run.seed,
        norm=config.model.norm,
        hidden=config.model.hidden,
    )
    return Classification(
        dataset,
        model,
        partition,
        batch_size=data.batch_size,
        sampling=data.sampling,
        augment=augment,
        seed=run.seed,
        dtype=dtype,
        device=device,
    )


def _check_memory(config: Config, dataset: Dataset, device: str) -> None:
    """One client's minibatches of a round must fit; a system without memory would kill the process and say nothing."""
    batch, steps = config.data.batch_size, max(1, config.algorithm.num_local_steps)
    # The indices of all steps; the examples of one, as they are stored, normalised, and once more for the first layer.
    needed = batch * (8 * steps + dataset.x_train[0].numel() * (1 + 2 * getattr(torch, config.run.dtype).itemsize))
    free = engines.free_bytes(torch.device(device))
    if needed > free:
        raise InputError(
            f"data.batch-size = {batch}: with {steps} local steps it takes {needed / 1e9:,.1f} GB per client, "
            f"and {free / 1e9:,.1f} GB are free"
        )


def make_plan(config: Config) -> Plan:
    """The plain numbers of a resolved configuration."""
    algorithm = config.algorithm
    rate = LearningRate(
        lr=algorithm.lr,
        schedule=algorithm.lr_schedule,
        milestones=parse_numbers("algorithm.lr-milestones", algorithm.lr_milestones),
        decay=algorithm.lr_decay,
        unit=algorithm.lr_unit,
        warmup=algorithm.lr_warmup,
        minimum=algorithm.lr_min,
    )
    return Plan(
        method=Method(
            beta=algorithm.beta,
            nesterov=algorithm.nesterov,
            weight_decay=algorithm.weight_decay,
            momentum_policy=algorithm.momentum_policy,
            running_var=algorithm.running_var,
        ),
        rate=rate,
        num_rounds=config.run.num_rounds,
        cohort_size=algorithm.cohort_size,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        num_local_steps=algorithm.num_local_steps,
        local_epochs=algorithm.local_epochs,
        client_weights=algorithm.client_weights,
        eval_every=config.run.eval_every,
        num_steps=config.run.num_steps,
        slow_momentum=algorithm.slow_momentum,
        slow_lr=algorithm.slow_lr,
    )


def pool_options(config: Config) -> PoolOptions:
    """The actors that [simulation] describes."""
    keys = config.simulation
    return PoolOptions(
        num_workers=keys.num_actors,
        num_cpus=keys.num_cpus,
        num_gpus=keys.num_gpus,
        ray_address=keys.ray_address,
        retries=keys.retries,
        straggler_seconds=keys.straggler_seconds,
    )


def resolve_device(config: Config) -> Config:
    """engine.device = "auto" becomes cuda where there is one; InputError for a cuda that is not there."""
    device, there = config.engine.device, torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("engine.device = 'cuda': torch finds no CUDA device here; use cpu or auto")
    device = ("cuda" if there else "cpu") if device == "auto" else device
    return replace(config, "engine", device=device)


def make_engine(config: Config, task: Task, plan: Plan) -> tuple[Config, Engine, list[str]]:
    """The engine, and the configuration with what `auto` chose, so that a resume takes the same."""
    wanted = config.engine
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    begin = beginning(task, plan)
    choice = engines.choose(
        task,
        plan.method,
        begin.state,
        round_job(task, plan, begin),
        path=wanted.path,
        chunk_size=wanted.chunk_size,
    )
    engine = Engine(task, plan.method, path=choice.path, chunk_size=choice.chunk_size)
    # A chunk size that was given stays in the record, though larger than needed: a resume compares the two.
    chunk_size = wanted.chunk_size or choice.chunk_size
    settled = replace(config, "engine", path=choice.path, chunk_size=chunk_size, threads=torch.get_num_threads())
    notes = [f"engine: {choice.trouble}"] if choice.trouble else []
    if choice.measured:
        tried = ", ".join(f"{way} {rate:,.0f}" for way, rate in choice.measured.items())
        notes.append(f"engine: {choice.path} × {choice.chunk_size} (client-steps/s measured: {tried})")
    return settled, engine, notes
