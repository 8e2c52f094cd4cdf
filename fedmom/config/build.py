"""A resolved configuration becomes a problem, a plan and an engine: what any backend does before its first round."""

import inspect
import math

import torch
from torch import Tensor

from fedmom.actors.cluster import PoolOptions
from fedmom.config.examples import load_data
from fedmom.config.goals import task_of
from fedmom.config.keys import Config, EngineConfig
from fedmom.config.load import replace
from fedmom.config.numbers import parse_numbers, parse_table
from fedmom.config.strategies import OURS
from fedmom.data.arrays import channel_axis, check_cast, kind_of
from fedmom.data.datasets import Dataset
from fedmom.data.inputs import is_integer, numbers_in
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.machine.cores import usable_cores
from fedmom.machine.memory import free_bytes
from fedmom.machine.precision import allow_tf32
from fedmom.method.algorithms import ALGORITHMS, Correct, Correction, Method, takes_key
from fedmom.method.graphs import GraphOptions
from fedmom.method.randomness import CORRECTION, random_bits
from fedmom.method.schedules import LearningRate
from fedmom.method.state import Tree
from fedmom.method.topology import Topology, make_topology
from fedmom.rounds.loop import Plan
from fedmom.rounds.watched import watched_class
from fedmom.tasks.models import MODELS, build_model
from fedmom.tasks.problem import Problem, data_kind
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import is_spec, load_object, one_line


def make_problem(config: Config, device: str) -> Problem:
    """The clients' objectives of a resolved configuration, on `device`."""
    data, run = config.data, config.run
    dtype = getattr(torch, run.dtype)
    if not data_kind(data.dataset).has_examples:
        return Quadratic(
            parse_table("data.curvatures", data.curvatures),
            parse_table("data.centers", data.centers),
            parse_numbers("data.start", data.start),
            noise_sigma=data.noise_sigma,
            seed=run.seed,
            dtype=dtype,
            device=device,
        )
    held = load_data(config)
    return supervised(config, device, held.dataset, held.partition)


def supervised(
    config: Config, device: str, dataset: Dataset, partition: Partition, kind: type[Supervised] = Supervised
) -> Supervised:
    """The clients' objectives on these examples."""
    data, run, task = config.data, config.run, task_of(config)
    augment = dataset.augment if data.augment == "auto" else data.augment
    _check_examples(config, dataset, augment)
    _check_memory(config, dataset, device)
    try:
        model = build_model(
            config.model.name,
            dataset.input_shape,
            dataset.num_classes,
            seed=run.seed,
            norm=config.model.norm,
            hidden=config.model.hidden,
            layers=config.model.layers,
            heads=config.model.heads,
            lora_rank=config.model.lora_rank,
            start=config.model.start,
            like=dataset.x_train,
            task=task,
            targets=dataset.y_train,
        )
    except RuntimeError as error:  # of torch's allocator
        sizes = f"{dataset.num_classes} outputs and examples of {kind_of(dataset.x_train)}"
        raise InputError(
            f"model.name = {config.model.name!r}: cannot be made for {sizes}: {one_line(error)}"
        ) from error
    return kind(
        dataset,
        model,
        partition,
        batch_size=data.batch_size,
        task=task,
        sampling=data.sampling,
        augment=augment,
        seed=run.seed,
        dtype=getattr(torch, run.dtype),
        device=device,
        name=config.model.name,
    )


def _check_examples(config: Config, dataset: Dataset, augment: str) -> None:
    """What the keys make of these examples must be what they are."""
    key, x = f"data.dataset = {config.data.dataset!r}", dataset.x_train
    for split, examples in (("train", x), ("test", dataset.x_test)):
        check_cast(key, split, examples, getattr(torch, config.run.dtype))
    ours = MODELS.get(config.model.name)
    if isinstance(x, dict):
        if ours or augment != "none":
            asks = f"model.name = {config.model.name!r}" if ours else f"data.augment = {augment!r}"
            raise InputError(f"{asks}: takes one input, and {key} has {', '.join(x)}; give a model of your own")
        return
    real = x.is_floating_point()
    if ours and ours.tokens:
        _check_tokens(config, dataset)
    elif ours and is_integer(x):
        raise InputError(
            f"{key}: x_train has integers, and model.name = {config.model.name!r} takes real numbers: give float32 "
            "features or uint8 images; a model of your own gets integers as they are"
        )
    if augment != "none" and (x.ndim != 4 or is_integer(x)):
        raise InputError(f"data.augment = {augment!r}: needs images, {key} has none")
    if real and x.ndim == 4 and channel_axis(x.shape[1:]) == 2 and ((ours and ours.images) or augment != "none"):
        asks = f"data.augment = {augment!r}" if augment != "none" else f"model.name = {config.model.name!r}"
        raise InputError(f"{asks}: {key} has x_train {list(x.shape)}, must be [n, C, H, W]: x.transpose(0, 3, 1, 2)")


def _check_tokens(config: Config, dataset: Dataset) -> None:
    """A model of token ids [T] needs those that it has words for."""
    key, name = f"data.dataset = {config.data.dataset!r}", config.model.name
    for split, x in (("x_train", dataset.x_train), ("x_test", dataset.x_test)):
        assert isinstance(x, Tensor)
        if not is_integer(x) or x.ndim != 2:
            what = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            raise InputError(f"{key}: {split} is {what}, and model.name = {name!r} takes token ids [n, T] of int64")
        low, top = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        if low < 0 or top >= dataset.num_classes:
            right = f"0 to {dataset.num_classes - 1}, as many as there are classes"
            raise InputError(f"{key}: {split} has a token {low if low < 0 else top}; model.name = {name!r} has {right}")


def _check_memory(config: Config, dataset: Dataset, device: str) -> None:
    """One client's minibatches of a round must fit; a system without memory would kill the process and say nothing."""
    batch, steps = config.data.batch_size, max(1, config.algorithm.num_local_steps)
    # The indices of all steps; the examples of one, as they are stored, normalised, and once more for the first layer.
    needed = batch * (8 * steps + numbers_in(dataset.x_train) * (1 + 2 * getattr(torch, config.run.dtype).itemsize))
    free = free_bytes(torch.device(device))
    if needed > free:
        raise InputError(
            f"data.batch-size = {batch}: with {steps} local steps it takes {needed / 1e9:,.1f} GB per client, "
            f"and {free / 1e9:,.1f} GB are free"
        )


def make_plan(config: Config) -> Plan:
    """The plain numbers of a resolved configuration."""
    algorithm = config.algorithm
    _check_numbers(config)
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
            correction=_correction_of(config),
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


def _check_numbers(config: Config) -> None:
    """What the method multiplies by must be a number of the dtype in which it is done."""
    largest = torch.finfo(getattr(torch, config.run.dtype)).max
    for key in ("lr", "weight_decay", "slow_lr"):
        value = getattr(config.algorithm, key)
        if value > largest:
            name, dtype = key.replace("_", "-"), config.run.dtype
            raise InputError(f"algorithm.{name} = {value:g}: in run.dtype = {dtype!r} it must be at most {largest:.3g}")


def _correction_of(config: Config) -> Correct | Correction | None:
    """The user's function or an object of the user's class, watched over."""
    spec = config.algorithm.correction
    found = load_object("algorithm.correction", spec) if is_spec(spec) else None
    if isinstance(found, Correction):
        raise InputError(f"algorithm.correction = {spec!r}: is an object; name its class, {type(found).__name__}")
    if not isinstance(found, type):
        return _correction(spec, config.run.seed)
    said, algorithm, strategy = f"algorithm.correction = {spec!r}", config.algorithm.name, config.server.strategy
    if ALGORITHMS[algorithm].decentralized:
        raise InputError(f"{said}: a correction with state needs a server, and {algorithm} has none")
    if strategy != OURS:
        raise InputError(f"server.strategy = {strategy!r}: a correction with state needs {OURS}; {said}")
    return watched_class(said, found, config.run.seed)


def _correction(spec: str, seed: int) -> Correct | None:
    """The user's function, watched over.

    It must give every gradient back, in its shape and dtype, and leave x alone.
    """
    if not is_spec(spec):
        return None
    function = load_object("algorithm.correction", spec)
    said, keyed = f"algorithm.correction = {spec!r}", takes_key(function)

    def correction(grads: Tree, params: Tree, start: Tree, key: Tensor | None = None) -> Tree:
        more = {"key": random_bits(CORRECTION, seed, key)} if keyed and key is not None else {}
        versions = [t._version for tree in (params, start) for t in tree.values()]
        try:
            found = function(dict(grads), dict(params), dict(start), **more)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{said}: the function raised {one_line(error)}") from error
        if not isinstance(found, dict) or set(found) != set(grads):
            raise InputError(f"{said}: must return a dict of the gradients it was given")
        for name, g in grads.items():
            got, form = found[name], f"its shape {list(g.shape)}, dtype {g.dtype} and device {g.device}"
            kept = isinstance(got, Tensor) and (got.shape, got.dtype, got.device) == (g.shape, g.dtype, g.device)
            if not kept:
                raise InputError(f"{said}: the gradient of {name} must keep {form}")
        if versions != [t._version for tree in (params, start) for t in tree.values()]:
            raise InputError(f"{said}: the function writes into the parameters it was given; return other gradients")
        return found

    if keyed:
        watched: Correct = correction
    else:
        watched = lambda grads, params, start: correction(grads, params, start)  # noqa: E731
    watched.__wrapped__ = inspect.unwrap(function)  # type: ignore[attr-defined]  # for who looks at its file
    return watched


def topology_of(config: Config) -> Topology | None:
    """W_t of a resolved configuration; None where the algorithm is not decentralized."""
    algorithm = config.algorithm
    if not ALGORITHMS[algorithm.name].decentralized:
        return None
    options = GraphOptions(algorithm.topology_degree, algorithm.topology_p, config.run.seed)
    return make_topology(algorithm.topology, config.data.num_clients, weights=algorithm.mixing_weights, options=options)


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
