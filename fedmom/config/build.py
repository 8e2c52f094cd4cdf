"""A resolved configuration becomes a problem, a plan and an engine: what any backend does before its first round."""

import inspect

import numpy as np
import torch
from torch import Tensor

from fedmom.config.goals import task_of
from fedmom.config.keys import Config
from fedmom.config.numbers import parse_numbers, parse_table
from fedmom.data.arrays import channel_axis, check_cast, kind_of
from fedmom.data.datasets import Dataset, load_dataset
from fedmom.data.inputs import is_integer, numbers_in
from fedmom.data.local import everything
from fedmom.data.partition import Partition, make_partition
from fedmom.data.targets import classes_of
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes
from fedmom.method.algorithms import ALGORITHMS, Correction, Method, takes_key
from fedmom.method.graphs import GraphOptions
from fedmom.method.randomness import CORRECTION, random_bits
from fedmom.method.schedules import LearningRate
from fedmom.method.state import Tree
from fedmom.method.topology import Topology, make_topology
from fedmom.rounds.loop import Plan
from fedmom.tasks.models import MODELS, build_model
from fedmom.tasks.problem import Problem, data_kind
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import is_spec, load_object, one_line

UNSKEWED = ("iid", "quantity")  # partitions that look at no label


def load_data(config: Config) -> tuple[Dataset, Partition]:
    """The data set and who holds which example; InputError where a client would hold none."""
    data = config.data
    targets = task_of(config).targets
    if data_kind(data.dataset).own_data:
        if data.context:
            raise InputError(f"data.context = {data.context}: cuts the stream of one data set; 'local' has examples")
        return everything(data.data_dir, data.num_clients, data.classes, targets)
    dataset = load_dataset(data.dataset, data.data_dir, targets, context=data.context, columns=data.columns)
    partition = make_partition(
        data.partition,
        _classes(config, dataset, targets),
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


def _classes(config: Config, dataset: Dataset, targets: str) -> np.ndarray:
    """[n] int64 labels by which the partition may skew clients. InputError where it would, and there are none."""
    found = classes_of(targets, dataset.y_train.numpy())
    if found is None and config.data.partition not in UNSKEWED:
        raise InputError(
            f"data.partition = {config.data.partition!r}: skews clients by one label of each example, which "
            f"data.task = {config.data.task!r} has not; take {' or '.join(UNSKEWED)}"
        )
    return np.zeros(len(dataset.y_train), dtype=np.int64) if found is None else found


def shown_classes(config: Config, dataset: Dataset) -> tuple[np.ndarray, int]:
    """([n] labels by which a partition is drawn, how many there are); one class where examples have none."""
    targets = task_of(config).targets
    found = classes_of(targets, dataset.y_train.numpy())
    if targets == "labels" and found is not None:
        return found, dataset.num_classes
    found = np.zeros(len(dataset.y_train), dtype=np.int64) if found is None else found
    return found, int(found.max()) + 1


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
    return supervised(config, device, *load_data(config))


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
    if ours and is_integer(x):
        raise InputError(
            f"{key}: x_train has integers, and model.name = {config.model.name!r} takes real numbers: give float32 "
            "features or uint8 images; a model of your own gets integers as they are"
        )
    if augment != "none" and (x.ndim != 4 or is_integer(x)):
        raise InputError(f"data.augment = {augment!r}: needs images, {key} has none")
    if real and x.ndim == 4 and channel_axis(x.shape[1:]) == 2 and ((ours and ours.images) or augment != "none"):
        asks = f"data.augment = {augment!r}" if augment != "none" else f"model.name = {config.model.name!r}"
        raise InputError(f"{asks}: {key} has x_train {list(x.shape)}, must be [n, C, H, W]: x.transpose(0, 3, 1, 2)")


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
            correction=_correction(algorithm.correction, config.run.seed),
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


def _correction(spec: str, seed: int) -> Correction | None:
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
        watched: Correction = correction
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
