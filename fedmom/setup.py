"""A resolved configuration becomes a task, a plan and an engine: what any backend does before its first round."""

import math

import numpy as np
import torch

from fedmom.algorithms import ALGORITHMS, Correction
from fedmom.choice import choose
from fedmom.config import Config, EngineConfig, replace
from fedmom.cores import usable_cores
from fedmom.datasets import Dataset, load_dataset
from fedmom.engine import Engine
from fedmom.errors import InputError
from fedmom.executors import PoolOptions
from fedmom.gossip import GossipRounds
from fedmom.imports import is_spec, load_object, one_line
from fedmom.local_data import everything
from fedmom.memory import free_bytes
from fedmom.models import build_model
from fedmom.objective import Classification, Task
from fedmom.parsing import parse_numbers, parse_table
from fedmom.partition import Partition, make_partition
from fedmom.quadratic import Quadratic
from fedmom.rounds import Method, Rounds
from fedmom.schedules import LearningRate
from fedmom.state import ClientState, Tree, num_bytes
from fedmom.topology import Options, Topology, make_topology
from fedmom.train import Plan, beginning, round_job


def load_task_data(config: Config) -> tuple[Dataset, Partition]:
    """The data set and who holds which example; InputError where a client would hold none."""
    data = config.data
    if data.dataset == "local":
        return everything(data.data_dir, data.num_clients, data.classes)
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
    return classification(config, device, *load_task_data(config))


def classification(
    config: Config, device: str, dataset: Dataset, partition: Partition, kind: type[Classification] = Classification
) -> Classification:
    """The clients' objectives on these examples."""
    data, run = config.data, config.run
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
    return kind(
        dataset,
        model,
        partition,
        batch_size=data.batch_size,
        sampling=data.sampling,
        augment=augment,
        seed=run.seed,
        dtype=getattr(torch, run.dtype),
        device=device,
        name=config.model.name,
    )


def _check_memory(config: Config, dataset: Dataset, device: str) -> None:
    """One client's minibatches of a round must fit; a system without memory would kill the process and say nothing."""
    batch, steps = config.data.batch_size, max(1, config.algorithm.num_local_steps)
    # The indices of all steps; the examples of one, as they are stored, normalised, and once more for the first layer.
    needed = batch * (8 * steps + math.prod(dataset.input_shape) * (1 + 2 * getattr(torch, config.run.dtype).itemsize))
    free = free_bytes(torch.device(device))
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
            correction=_correction(algorithm.correction),
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
        topology=topology_of(config),
        eval_clients=config.run.eval_clients,
    )


def _correction(spec: str) -> Correction | None:
    """The user's function, watched over: it must give every gradient back, in its shape."""
    if not is_spec(spec):
        return None
    function = load_object("algorithm.correction", spec)

    def correction(grads: Tree, params: Tree, start: Tree) -> Tree:
        try:
            found = function(dict(grads), params, start)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"algorithm.correction = {spec!r}: the function raised {one_line(error)}") from error
        if not isinstance(found, dict) or set(found) != set(grads):
            raise InputError(f"algorithm.correction = {spec!r}: must return a dict of the gradients it was given")
        wrong = next((name for name, g in grads.items() if getattr(found[name], "shape", None) != g.shape), None)
        if wrong is not None:
            shape = list(grads[wrong].shape)
            raise InputError(f"algorithm.correction = {spec!r}: the gradient of {wrong} must keep its shape {shape}")
        return found

    return correction


def topology_of(config: Config) -> Topology | None:
    """W_t of a resolved configuration; None where the algorithm is not decentralized."""
    algorithm = config.algorithm
    if not ALGORITHMS[algorithm.name].decentralized:
        return None
    options = Options(algorithm.topology_degree, algorithm.topology_p, config.run.seed)
    return make_topology(algorithm.topology, config.data.num_clients, weights=algorithm.mixing_weights, options=options)


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


def set_up_torch(keys: EngineConfig) -> None:
    """Threads, and how exactly a GPU multiplies float32, for the whole process."""
    # torch counts the cores of the affinity, but knows no cgroup's limit.
    torch.set_num_threads(keys.threads or min(torch.get_num_threads(), usable_cores()))
    torch.backends.cuda.matmul.allow_tf32 = keys.matmul == "tf32"
    torch.backends.cudnn.allow_tf32 = keys.matmul == "tf32"  # torch's own default is True


def make_engine(config: Config, task: Task, plan: Plan) -> tuple[Config, Rounds, list[str]]:
    """The engine, and the configuration with what `auto` chose, so that a resume takes the same."""
    wanted = config.engine
    set_up_torch(wanted)
    begin = beginning(task, plan)
    choice = choose(
        task,
        plan.method,
        begin.state,
        round_job(task, plan, begin)._replace(rows=None),
        path=wanted.path,
        chunk_size=wanted.chunk_size,
        own_rows=plan.topology is not None,
        compared=plan.compared,
    )
    engine = Engine(task, plan.method, path=choice.path, chunk_size=choice.chunk_size)
    # A chunk size that was given stays in the record, though larger than needed: a resume compares the two.
    chunk_size = wanted.chunk_size or choice.chunk_size
    settled = replace(config, "engine", path=choice.path, chunk_size=chunk_size, threads=torch.get_num_threads())
    notes = [f"engine: {choice.trouble}"] if choice.trouble else []
    if choice.measured:
        tried = ", ".join(f"{way} {rate:,.0f}" for way, rate in choice.measured.items())
        notes.append(f"engine: {choice.path} × {choice.chunk_size} (client-steps/s measured: {tried})")
    if choice.note:
        notes.append(f"engine: {choice.note}")
    if plan.topology is None:
        return settled, engine, notes
    home = rows_home(task, begin.state)
    if home != task.device:
        notes.append("the clients' rows do not fit on the device: they stay in main memory and visit it by chunks")
    return settled, GossipRounds(engine, plan.topology, home), notes


def rows_home(task: Task, start: ClientState) -> torch.device:
    """Where N rows are kept: on the device if they fit three times (before, after the steps, mixed), else in memory."""
    each = sum(map(num_bytes, start))
    fits = 3 * len(task.sizes) * each < 0.6 * free_bytes(task.device)
    return task.device if fits else torch.device("cpu")
