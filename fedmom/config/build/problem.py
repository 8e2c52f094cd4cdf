"""A resolved configuration becomes a problem: examples, who holds which, a model and a task; or a formula."""

import numpy as np
import torch
from torch import Tensor

from fedmom.config.examples import load_data
from fedmom.config.goals import task_of
from fedmom.config.keys import Config
from fedmom.config.numbers import parse_numbers, parse_table
from fedmom.data.arrays import channel_axis, check_cast, kind_of
from fedmom.data.datasets import Dataset
from fedmom.data.given.held_out import OwnTests
from fedmom.data.inputs import is_integer, numbers_in
from fedmom.data.partition import Partition
from fedmom.errors import InputError
from fedmom.machine.memory import free_bytes
from fedmom.tasks.models import MODELS, build_model
from fedmom.tasks.problem import Problem, data_kind
from fedmom.tasks.quadratic import Quadratic
from fedmom.tasks.supervised import Supervised
from fedmom.user_code import one_line


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
    check_own(config, None if held.own is None else held.own.partition.sizes)
    return supervised(config, device, held.dataset, held.partition, own=held.own)


def check_own(config: Config, own_sizes: np.ndarray | None) -> None:
    """Raise InputError where every client is to be judged on its own test examples, and none has any."""
    if config.run.client_eval_every and (own_sizes is None or not own_sizes.any()):
        raise InputError(
            f"run.client-eval-every = {config.run.client_eval_every}: no client has test examples of its own; set "
            "data.client-test-share = 0.2, or bring test examples: natural clients by their ids, local ones as x_test"
        )


def supervised(
    config: Config,
    device: str,
    dataset: Dataset,
    partition: Partition,
    kind: type[Supervised] = Supervised,
    *,
    own: OwnTests | None = None,
) -> Supervised:
    """The clients' objectives on these examples; `own`: the clients' test examples, where they have some."""
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
        own=own,
        personal=config.algorithm.personal,
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
