"""Flower's own partitioners: any of them is a rule here, and those that have a law of ours agree with it."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")

from flwr_datasets.partitioner import (
    DirichletPartitioner,
    ExponentialPartitioner,
    IidPartitioner,
    LinearPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
    ShardPartitioner,
    SizePartitioner,
    SquarePartitioner,
)

from fedmom.config.examples import load_data
from fedmom.config.load import load
from fedmom.config.resolve import resolve
from fedmom.data.given.natural import natural_partition, pick_ids
from fedmom.data.given.own_rule import own_partition
from fedmom.data.partition import make_partition

pytestmark = pytest.mark.slow
# 360 = 6 clients × 2 shards × 30: the two cut what is no multiple in different ways.
LABELS = np.random.default_rng(0).choice(5, size=360, p=np.arange(1, 6) / 15)


@pytest.fixture(scope="module")
def parts_of():
    """The example's adapter."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import flower_partitioner
    finally:
        sys.path.pop(0)
    return flower_partitioner.parts_of


def test_any_of_them_is_a_rule(parts_of, monkeypatch):
    made = {
        "iid": lambda n: IidPartitioner(n),
        "linear": lambda n: LinearPartitioner(n),
        "square": lambda n: SquarePartitioner(n),
        "exponential": lambda n: ExponentialPartitioner(n),
        "sizes": lambda n: SizePartitioner([3] * n),
        "dirichlet": lambda n: DirichletPartitioner(n, "label", 0.5, min_partition_size=1),
        "shards": lambda n: ShardPartitioner(n, "label", num_shards_per_partition=2),
        "pathological": lambda n: PathologicalPartitioner(n, "label", 2),
    }
    module = sys.modules["flower_partitioner"]
    for name, make in made.items():
        rule = lambda labels, num_clients, seed, make=make: parts_of(make(num_clients), labels)  # noqa: E731
        monkeypatch.setattr(module, name, rule, raising=False)
        for n in (1, 2, 5):
            found = own_partition(f"flower_partitioner:{name}", LABELS, n, more={})
            expected = rule(LABELS, n, 0)
            for client in range(n):
                assert found.of(client).tolist() == sorted(expected[client].tolist()), (name, n, client)


def test_the_example_is_named_by_a_configuration(parts_of):
    keys = {"data": {"partition": "flower_partitioner:dirichlet", "num-clients": 4, "alpha": 1.0}}
    found = load_data(resolve(load(keys)).config)
    assert found.partition.sizes.sum() == 1437


def test_natural_clients_are_theirs(parts_of):
    from datasets import Dataset

    for ids in (np.array(["b", "a", "c", "a", "b", "b"]), np.array([7, -3, 7, 20])):
        theirs = NaturalIdPartitioner("who")
        theirs.dataset = Dataset.from_dict({"who": ids, "example": np.arange(len(ids))})
        ours = natural_partition(pick_ids("", "who", {"who": ids}, ["who"], None), "who", theirs.num_partitions)
        for client in range(theirs.num_partitions):
            assert ours.partition.of(client).tolist() == theirs.load_partition(client)["example"]
            assert ours.ids[client] == theirs.partition_id_to_natural_id[client]


def test_iid_has_the_same_sizes(parts_of):
    for n in (1, 2, 7):
        ours = make_partition("iid", LABELS, n).sizes
        assert sorted(ours) == sorted(map(len, parts_of(IidPartitioner(n), LABELS)))


def features(parts):
    """Of one split: smallest and largest size, mean share of a client's largest class, mean number of classes."""
    counts = np.array([np.bincount(LABELS[part], minlength=5) for part in parts])
    sizes = counts.sum(1)
    return [sizes.min(), sizes.max(), (counts.max(1) / sizes).mean(), (counts > 0).sum(1).mean()]


@pytest.mark.parametrize("law", ["dirichlet-class", "shards"])
def test_laws_that_both_have_give_the_same_splits_on_average(parts_of, law):
    """Four numbers of 150 splits of each: their means differ by less than five standard errors."""
    ours, theirs = [], []
    for seed in range(150):
        split = make_partition(law, LABELS, 6, alpha=0.5, min_size=5, shards_per_client=2, seed=seed)
        ours.append(features([split.of(client) for client in range(6)]))
        if law == "shards":
            made = ShardPartitioner(6, "label", num_shards_per_partition=2, seed=seed)
        else:
            made = DirichletPartitioner(6, "label", 0.5, min_partition_size=5, self_balancing=False, seed=seed)
        theirs.append(features(parts_of(made, LABELS)))
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / len(ours))
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 5 * error + 1e-9).all(), (
        ours.mean(0),
        theirs.mean(0),
        error,
    )
