"""A configuration's examples, and who holds which: by a rule of ours, by the user's own, or by the data's ids."""

from typing import Any, NamedTuple

import numpy as np

from fedmom.config.goals import task_of
from fedmom.config.keys import Config
from fedmom.data.datasets import Dataset, load_dataset
from fedmom.data.given.held_out import OwnSplit, OwnTests, split
from fedmom.data.given.known import all_clients
from fedmom.data.given.natural import is_natural, natural_partition
from fedmom.data.given.own_rule import own_partition
from fedmom.data.local import everything
from fedmom.data.partition import PARTITIONS, Partition, make_partition
from fedmom.data.targets import classes_of
from fedmom.errors import InputError
from fedmom.tasks.problem import data_kind
from fedmom.user_code import is_spec


class Held(NamedTuple):
    """A data set and its clients."""

    dataset: Dataset
    partition: Partition  # of the training examples
    own: OwnTests | None = None  # the clients' own test examples, where they have some
    ids: np.ndarray | None = None  # [N] the natural clients' own names


def load_data(config: Config) -> Held:
    """The data set of a resolved configuration and who holds which example.

    Raises InputError where the data are not right, or a client would hold none.
    """
    data, seed = config.data, config.run.seed
    targets = task_of(config).targets
    if data_kind(data.dataset).own_data:
        if data.context:
            raise InputError(f"data.context = {data.context}: cuts the stream of one data set; 'local' has examples")
        return Held(*everything(data.data_dir, data.num_clients, data.classes, targets, own_split(config)))
    dataset = load_dataset(
        data.dataset, data.data_dir, data.clients, data.classes, targets=targets, context=data.context
    )
    if is_natural(data.partition):
        assert dataset.ids is not None
        found = natural_partition(dataset.ids, data.clients, data.num_clients, min_size=data.min_size, seed=seed)
        tests = found.test_partition
        if tests is None:
            return _parted(config, Held(dataset, found.partition, ids=found.ids))
        if data.client_test_share:
            raise InputError(
                f"data.client-test-share = {data.client_test_share:g}: data.clients = {data.clients!r} has test "
                "examples of each client already; leave it 0"
            )
        return Held(dataset, found.partition, OwnTests(dataset.x_test, dataset.y_test, tests, found.ids), found.ids)
    return _parted(config, Held(dataset, _by_rule(config, dataset, targets)))


def own_split(config: Config) -> OwnSplit:
    """How clients that bring their own data hold some of them out."""
    return OwnSplit(config.data.client_test_share, config.run.seed)


def _parted(config: Config, held: Held) -> Held:
    """The same, where every client holds a share of its examples out."""
    share = config.data.client_test_share
    if not share:
        return held
    training, tests = split(held.partition, share, config.run.seed)
    data = held.dataset
    return held._replace(partition=training, own=OwnTests(data.x_train, data.y_train, tests, held.ids))


def _by_rule(config: Config, dataset: Dataset, targets: str) -> Partition:
    """Who holds which training example, by data.partition."""
    data, seed = config.data, config.run.seed
    numbers: dict[str, Any] = {
        "alpha": data.alpha,
        "shards_per_client": data.shards_per_client,
        "sigma": data.sigma,
    }
    labels, num_clients, min_size = _labels(config, dataset, targets), data.num_clients, data.min_size
    if is_spec(data.partition):
        more = {**numbers, "min_size": min_size, "dataset": dataset}
        return own_partition(data.partition, labels, num_clients, seed=seed, min_size=min_size, more=more)
    partition = make_partition(
        data.partition,
        labels,
        num_clients,
        min_size=min_size,
        quantity_law=data.quantity_law,
        seed=seed,
        **numbers,
    )
    empty = np.flatnonzero(partition.sizes == 0)
    if len(empty):
        raise InputError(
            f"data.partition = {data.partition!r}: client {empty[0]} has no examples ({len(empty)} such clients); "
            "raise data.min-size or data.alpha, or lower data.num-clients"
        )
    return partition


def _labels(config: Config, dataset: Dataset, targets: str) -> np.ndarray:
    """[n] int64 labels by which the partition may skew clients. InputError where it would, and there are none."""
    found, rule = classes_of(targets, dataset.y_train.numpy()), config.data.partition
    if found is not None:
        return found
    if is_spec(rule):  # the user's own rule sees the data set, too
        return np.zeros(len(dataset.y_train), dtype=np.int64)
    if PARTITIONS[rule].skews:
        others = [name for name, other in PARTITIONS.items() if not other.skews]
        raise InputError(
            f"data.partition = {rule!r}: skews clients by one label of each example, which data.task = "
            f"{config.data.task!r} has not; take {', '.join(others)} or natural"
        )
    return np.zeros(len(dataset.y_train), dtype=np.int64)


def shown_classes(config: Config, dataset: Dataset) -> tuple[np.ndarray, int]:
    """([n] labels by which a partition is drawn, how many there are); one class where examples have none."""
    targets = task_of(config).targets
    found = classes_of(targets, dataset.y_train.numpy())
    if targets == "labels" and found is not None:
        return found, dataset.num_classes
    found = np.zeros(len(dataset.y_train), dtype=np.int64) if found is None else found
    return found, int(found.max()) + 1


def is_given(config: Config) -> bool:
    """Whether who holds what comes from ids in the data or a rule of the user's own: the keys alone do not say it."""
    return is_natural(config.data.partition) or is_spec(config.data.partition)


def count_clients(config: Config) -> int:
    """N of a configuration whose data.num-clients = 0 takes all natural clients: the data are looked at for it."""
    data = config.data
    more: dict[str, Any] = {"targets": task_of(config).targets, "context": data.context, "columns": data.columns}
    return len(all_clients(data.dataset, data.data_dir, data.clients, data.classes, **more))
