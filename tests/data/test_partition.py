"""The laws of every partition rule, on the smallest sizes, odd labels and extreme alphas."""

import itertools
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmom.data import drawing, partition
from fedmom.data.partition import PARTITIONS, QUANTITY_LAWS, Partition, make_partition
from fedmom.errors import InputError
from laws import table

FIXED_SIZE = ["iid", "dirichlet-client", "dirichlet-balanced"]
DIRICHLET = ["dirichlet-client", "dirichlet-class", "dirichlet-balanced"]
ALPHAS = [5e-324, 1e-4, 1e-3, 0.3, 1.0, 100.0, 1.7e308]


def skewed_labels(num_examples, num_classes=10, seed=0):
    """Class k in proportion to k + 1."""
    prior = np.arange(1, num_classes + 1) / (num_classes * (num_classes + 1) / 2)
    return np.random.default_rng(seed).choice(num_classes, size=num_examples, p=prior)


def split(name, labels, num_clients, **kwargs):
    """make_partition where few examples must do: one shard a client, and empty clients in dirichlet-class."""
    kwargs = {"shards_per_client": 1, "min_size": 0 if name == "dirichlet-class" else 1} | kwargs
    return make_partition(name, labels, num_clients, **kwargs)


def assert_partition(part: Partition, num_examples: int, num_clients: int) -> None:
    assert part.indices.dtype == part.offsets.dtype == np.int64
    assert part.num_clients == num_clients == len(part.sizes)
    assert part.offsets[0] == 0
    assert part.offsets[-1] == num_examples
    assert (part.sizes >= 0).all()
    np.testing.assert_array_equal(np.sort(part.indices), np.arange(num_examples))  # disjoint and covering
    inside = np.ones(num_examples, bool)  # where an example and the one before it are of one client
    inside[part.offsets[:-1][part.sizes > 0]] = False
    assert (np.diff(part.indices, prepend=-1)[inside] > 0).all()


def same(a: Partition, b: Partition) -> bool:
    return np.array_equal(a.indices, b.indices) and np.array_equal(a.offsets, b.offsets)


def mix(part: Partition, labels) -> np.ndarray:
    """[N, C], class shares of each client that has any."""
    counts = part.class_counts(labels, int(labels.max()) + 1)[part.sizes > 0]
    return counts / counts.sum(axis=1, keepdims=True)


def skew(part: Partition, labels) -> float:
    """Mean share of a client's largest class."""
    return float(mix(part, labels).max(axis=1).mean())


# Laws of every rule


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(list(PARTITIONS)),
    labels=st.lists(st.integers(-3, 12), min_size=1, max_size=60),
    where=st.floats(0, 1),
    alpha=st.sampled_from(ALPHAS),
    sigma=st.sampled_from([0.0, 1.0, 1000.0]),
    law=st.sampled_from(list(QUANTITY_LAWS)),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_example_has_one_client_and_the_seed_says_which(name, labels, where, alpha, sigma, law, seed):
    labels = np.array(labels)
    num_clients = 1 + round(where * (len(labels) - 1))
    kwargs = {"alpha": alpha, "sigma": sigma, "quantity_law": law, "seed": seed}
    part = split(name, labels, num_clients, **kwargs)
    assert_partition(part, len(labels), num_clients)
    if name in FIXED_SIZE:
        assert np.ptp(part.sizes) <= 1
    if name != "dirichlet-class":
        assert part.sizes.min() >= 1
    assert same(part, split(name, labels, num_clients, **kwargs))


@table("name", PARTITIONS)
def test_small_sizes_and_odd_labels(name):
    one_class, absent, all_different = np.full(50, 7), np.repeat([1, 4, 9], [3, 7, 40]), np.arange(50)
    for labels, num_clients in itertools.product((one_class, absent, all_different), (1, 2, 3, 50)):
        part = split(name, labels, num_clients)
        assert_partition(part, 50, num_clients)
        if num_clients == 1:
            np.testing.assert_array_equal(part.of(0), np.arange(50))
        if num_clients == 50 and name != "dirichlet-class":
            assert (part.sizes == 1).all()


@table("name", PARTITIONS)
def test_another_seed_is_another_partition(name):
    labels = skewed_labels(300)
    assert not same(split(name, labels, 7, seed=0), split(name, labels, 7, seed=1))


def test_rules_do_not_share_a_stream():
    firsts = []

    def probe(request):
        firsts.append(request.rng.random())
        return np.zeros(len(request.classes), np.int64)

    with mock.patch.dict(PARTITIONS, {name: partition.PartitionRule(probe, "") for name in PARTITIONS}):
        for name in PARTITIONS:
            make_partition(name, np.zeros(5, np.int64), 1)
    assert len(set(firsts)) == len(PARTITIONS)


@table("name", PARTITIONS)
def test_min_size_holds_for_every_rule(name):
    for min_size in (2, 5):
        part = make_partition(name, skewed_labels(600), 20, alpha=1.0, min_size=min_size, sigma=3.0)
        assert part.sizes.min() >= min_size


def test_class_counts_count():
    labels = skewed_labels(200)
    part = make_partition("dirichlet-client", labels, 6)
    counts = part.class_counts(labels, 12)
    assert counts.shape == (6, 12)
    for client in range(6):
        np.testing.assert_array_equal(counts[client], np.bincount(labels[part.of(client)], minlength=12))
    with pytest.raises(ValueError, match=r"0\.\.4"):
        part.class_counts(labels, 5)


def test_there_is_no_such_client():
    for client in (-1, 6):
        with pytest.raises(IndexError, match="there are 6"):
            make_partition("iid", skewed_labels(200), 6).of(client)


# What each rule keeps


@settings(max_examples=80, deadline=None)
@given(
    class_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    where=st.floats(0, 1),
    alpha=st.sampled_from(ALPHAS),
    seed=st.integers(0, 1000),
)
def test_balanced_counts_keep_both_margins(class_sizes, where, alpha, seed):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    num_clients = 1 + round(where * (len(labels) - 1))
    # The counts before they are dealt out: afterwards every partition has the class totals.
    with mock.patch.object(partition, "deal", wraps=partition.deal) as deal:
        part = make_partition("dirichlet-balanced", labels, num_clients, alpha=alpha, seed=seed)
    counts = deal.call_args.args[0]
    np.testing.assert_array_equal(counts.sum(axis=0), class_sizes)
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert counts.min() >= 0
    np.testing.assert_array_equal(part.class_counts(labels, len(class_sizes)), counts)


@pytest.mark.parametrize("name", DIRICHLET)
def test_what_was_counted_is_what_is_dealt(name):
    labels = skewed_labels(500)
    for alpha in (1e-3, 0.3, 1e6):
        with mock.patch.object(partition, "deal", wraps=partition.deal) as deal:
            part = split(name, labels, 30, alpha=alpha)
        np.testing.assert_array_equal(part.class_counts(labels, 10), deal.call_args.args[0])


def test_settling_keeps_rows_and_reaches_columns_from_anywhere():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts, target = rng.integers(0, 4, (6, 5)), rng.integers(0, 4, (6, 5))
        class_sizes = rng.multinomial(counts.sum(), target.sum(axis=0) / target.sum())
        rows = counts.sum(axis=1)
        drawing.settle_columns(counts, target, class_sizes)
        np.testing.assert_array_equal(counts.sum(axis=0), class_sizes)
        np.testing.assert_array_equal(counts.sum(axis=1), rows)
        assert (counts >= 0).all()


def test_sinkhorn_balances_the_shares():
    labels = skewed_labels(5000)
    class_sizes, sizes = np.bincount(labels), drawing.equal_sizes(5000, 200)
    log_gamma = drawing.log_gamma(0.3, (200, 10), np.random.default_rng(0))
    shares = drawing.sinkhorn(log_gamma, sizes, class_sizes, num_halvings=2)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(sizes @ shares, class_sizes, rtol=0.011)
    # Scaled and nothing else: log shares less log weights are a row term plus a column term.
    rest = np.log(shares) - log_gamma
    rest -= rest.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rest, np.broadcast_to(rest[0], rest.shape), atol=1e-6)


def test_rounding_is_up_or_down_and_right_on_average():
    shares = np.random.default_rng(0).dirichlet(np.ones(6), size=3)
    totals, rng = np.array([1, 7, 100]), np.random.default_rng(1)
    counts = np.stack([drawing.round_shares(shares, totals, rng) for _ in range(4000)])
    assert (counts.sum(axis=2) == totals).all()
    assert (np.abs(counts - totals[:, None] * shares) < 1 + 1e-9).all()
    np.testing.assert_allclose(counts.mean(axis=0), totals[:, None] * shares, atol=0.04)  # 5 standard errors


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-53])  # the ends of what random() may return
def test_rounding_adds_up_where_floats_do_not(offset):
    rng = mock.Mock(random=lambda shape: np.full(shape, offset))
    for shares in ([0.1] * 10, [1.0, 0.0], [0.0, 1.0], [1.0]):  # 3 = 0.3 x 10 = 2.9999999999999996
        counts = drawing.round_shares(np.array([shares, shares]), np.array([1, 3]), rng)
        np.testing.assert_array_equal(counts.sum(axis=1), [1, 3])
        assert counts.min() >= 0


@pytest.mark.parametrize("alpha", [1e-4, 0.5, 1000.0])
def test_log_gamma_is_the_logarithm_of_a_gamma(alpha):
    x, a = drawing.log_gamma(alpha, (100_000,), np.random.default_rng(0)), torch.tensor(alpha).double()
    mean, variance = torch.special.digamma(a).item(), torch.special.polygamma(1, a).item()
    assert abs(x.mean() - mean) < 5 * np.sqrt(variance / 100_000)
    assert abs(x.var() / variance - 1) < 0.05


def test_dirichlet_client_draws_from_its_law():
    # Half of the clients, so that no class runs out: counts of a client are Dirichlet-multinomial, whose mean is
    # m p_k and whose variance is m p_k (1 - p_k) (m + alpha) / (1 + alpha). Standard errors: 1.3 % and 1.5 %.
    p, alpha, m, num_clients = np.array([0.1, 0.3, 0.6]), 2.0, 20, 40_000
    labels = np.repeat(np.arange(3), (p * m * num_clients).round().astype(int))
    part = make_partition("dirichlet-client", labels, num_clients, alpha=alpha)
    counts = part.class_counts(labels, 3)[: num_clients // 2]
    np.testing.assert_allclose(counts.mean(axis=0), m * p, rtol=0.06)
    np.testing.assert_allclose(counts.var(axis=0), m * p * (1 - p) * (m + alpha) / (1 + alpha), rtol=0.08)


def one_by_one(class_sizes, sizes, alpha, rng):
    """dirichlet-client as its paper says it: example by example. Returns [N, C] counts."""
    remaining, prior = class_sizes.copy(), class_sizes / class_sizes.sum()
    counts = np.zeros((len(sizes), len(class_sizes)), np.int64)
    for client, size in enumerate(sizes):
        q = rng.dirichlet(alpha * prior)
        for _ in range(size):
            left = np.where(remaining > 0, q, 0)
            k = rng.choice(len(left), p=left / left.sum())
            counts[client, k] += 1
            remaining[k] -= 1
    return counts


def test_dirichlet_client_equals_drawing_one_by_one_when_classes_run_out():
    class_sizes, num_repeats = np.array([3, 5, 10]), 2000
    labels = np.repeat(np.arange(3), class_sizes)
    rng = np.random.default_rng(0)
    plain = np.stack([one_by_one(class_sizes, [6, 6, 6], 3.0, rng) for _ in range(num_repeats)])
    quick = np.stack(
        [
            make_partition("dirichlet-client", labels, 3, alpha=3.0, seed=seed).class_counts(labels, 3)
            for seed in range(num_repeats)
        ]
    )
    # 5 standard errors of a difference of two means of counts with a standard deviation below 2
    np.testing.assert_allclose(quick.mean(axis=0), plain.mean(axis=0), atol=5 * 2 * np.sqrt(2 / num_repeats))
    np.testing.assert_allclose(quick.std(axis=0), plain.std(axis=0), atol=0.15)


def test_exhausted_classes_leave_the_last_clients_what_remains():
    labels = np.repeat([0, 1], [4, 396])
    for seed in range(20):
        part = make_partition("dirichlet-client", labels, 100, alpha=1e-3, seed=seed)
        assert_partition(part, 400, 100)
        assert (part.class_counts(labels, 2).sum(axis=0) == [4, 396]).all()
        assert (part.sizes == 4).all()


@pytest.mark.parametrize("name", DIRICHLET)
def test_a_huge_alpha_is_near_the_prior(name):
    labels = skewed_labels(20_000)
    part = make_partition(name, labels, 20, alpha=1e6)
    prior = np.bincount(labels) / len(labels)
    # dirichlet-client draws (standard error 0.012 at p = 0.18), its last client gets what the other 19 left;
    # the others round.
    near = mix(part, labels)[:-1] if name == "dirichlet-client" else mix(part, labels)
    np.testing.assert_allclose(near, np.broadcast_to(prior, near.shape), atol=0.06 if len(near) == 19 else 0.004)
    np.testing.assert_allclose(part.sizes, 1000, atol=20)


@pytest.mark.parametrize("name", ["dirichlet-client", "dirichlet-balanced"])
def test_a_tiny_alpha_is_nearly_one_class_a_client(name):
    labels = skewed_labels(4000)
    for alpha in (1e-300, 1e-3):
        assert skew(make_partition(name, labels, 200, alpha=alpha), labels) > 0.93


@pytest.mark.parametrize("alpha", [1e-300, 1e-7])
def test_a_tiny_alpha_gives_every_class_to_one_client(alpha):
    labels = skewed_labels(4000)
    part = split("dirichlet-class", labels, 200, alpha=alpha)
    assert ((part.class_counts(labels, 10) > 0).sum(axis=0) == 1).all()


@pytest.mark.parametrize("name", DIRICHLET)
def test_a_smaller_alpha_is_more_skewed(name):
    labels = skewed_labels(10_000)
    skews = [skew(split(name, labels, 100, alpha=alpha), labels) for alpha in [0.01, 0.1, 1.0, 10.0, 1000.0]]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] - skews[-1] > 0.5


def test_the_three_dirichlets_are_three_laws():
    labels = skewed_labels(10_000)
    parts = {name: split(name, labels, 100, alpha=0.3) for name in DIRICHLET}
    # Ten Gamma(0.3) shares of 10 each: sizes have a coefficient of variation of sqrt(sum p^2 / 0.3) = 0.65.
    variation = {name: part.sizes.std() / part.sizes.mean() for name, part in parts.items()}
    assert variation["dirichlet-client"] == variation["dirichlet-balanced"] == 0
    assert 0.4 < variation["dirichlet-class"] < 0.9
    # Dir(0.3 p) is concentrated on fewer classes than ten times Dir(0.3).
    skews = {name: skew(part, labels) for name, part in parts.items()}
    assert skews["dirichlet-client"] > skews["dirichlet-class"] + 0.1
    assert skews["dirichlet-client"] > skews["dirichlet-balanced"] + 0.1


def test_dirichlet_client_leaves_leftovers_and_balanced_does_not():
    labels = skewed_labels(10_000)
    prior = np.bincount(labels) / len(labels)

    def distance(name, alpha):  # of the class mix of the last 5 % of clients from the prior, mean of 10 seeds
        parts = [make_partition(name, labels, 100, alpha=alpha, seed=seed) for seed in range(10)]
        return np.mean([abs(mix(part, labels)[95:].mean(axis=0) - prior).sum() for part in parts])

    # 3.0 and 0.3: about equally skewed, by the two rules' meanings of alpha
    assert distance("dirichlet-client", 3.0) > 1.5 * distance("dirichlet-balanced", 0.3)


@pytest.mark.parametrize("shards_per_client", [1, 5])
def test_shards_hold_few_classes(shards_per_client):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))  # as McMahan et al., a tenth
    part = make_partition("shards", labels, 100, shards_per_client=shards_per_client)
    # 600 is a multiple of the shard size, so that no shard has two labels.
    assert ((part.class_counts(labels, 10) > 0).sum(axis=1) <= shards_per_client).all()
    assert (part.sizes == 60).all()


def test_uneven_shards_are_equal_within_one():
    part = make_partition("shards", skewed_labels(1437), 20, shards_per_client=3)
    assert np.ptp(part.sizes) <= 3


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_log_normal_sizes_have_the_spread_asked_for(sigma):
    part = make_partition("quantity", skewed_labels(400_000), 400, sigma=sigma)
    assert abs(np.log(part.sizes).std() - sigma) < 0.05 + 0.1 * sigma


def test_dirichlet_sizes_have_the_spread_asked_for():
    part = make_partition("quantity", skewed_labels(400_000), 400, quantity_law="dirichlet", alpha=4.0)
    assert abs(part.sizes.std() / part.sizes.mean() - 0.5) < 0.08  # 1 / sqrt(alpha)


def test_quantity_keeps_the_class_mix():
    labels = skewed_labels(20_000)
    part = make_partition("quantity", labels, 20, sigma=1.0)
    large = part.sizes > 300
    assert large.sum() >= 5
    prior = np.bincount(labels) / len(labels)
    np.testing.assert_allclose(mix(part, labels)[large], np.tile(prior, (large.sum(), 1)), atol=0.12)


def test_quantity_clients_above_min_size_stay_in_proportion():
    labels = np.zeros(100_000, np.int64)
    free = make_partition("quantity", labels, 50, sigma=1.0, min_size=0)
    floored = make_partition("quantity", labels, 50, sigma=1.0, min_size=500)
    held = floored.sizes == 500  # the same weights: a floor draws nothing
    assert 0 < held.sum() < 50
    ratio = floored.sizes[~held] / free.sizes[~held]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=0.01)


# Bad input


@table(
    "kwargs, words",
    [
        ({"name": "dirichlet"}, ["data.partition = 'dirichlet'", "dirichlet-client"]),
        (
            {"name": "quantity", "quantity_law": "lognormal"},
            ["data.quantity-law = 'lognormal'", "log-normal"],
        ),
        ({"num_clients": 0}, ["data.num-clients = 0: must be >= 1"]),
        ({"num_clients": 101}, ["data.num-clients = 101: only 100 examples; each client needs at least one"]),
        ({"num_clients": 101, "min_size": 0}, ["data.num-clients = 101: only 100 examples"]),
        ({"num_clients": 101, "name": "dirichlet-class"}, ["data.num-clients = 101: only 100 examples"]),
        (
            {"labels": np.zeros(0, np.int64), "name": "dirichlet-class", "min_size": 0},
            ["data.num-clients = 10: only 0 examples"],
        ),
        ({"alpha": 0.0}, ["data.alpha = 0.0: must be > 0"]),
        ({"alpha": float("nan")}, ["data.alpha = nan: must be > 0"]),
        ({"alpha": float("inf")}, ["data.alpha = inf: must be > 0"]),
        ({"sigma": -0.5}, ["data.sigma = -0.5: must be >= 0"]),
        ({"sigma": float("inf")}, ["data.sigma = inf: must be >= 0"]),
        ({"min_size": -1}, ["data.min-size = -1: must be >= 0"]),
        ({"min_size": 11}, ["data.min-size = 11: 10 clients need 110 examples", "at most 10"]),
        ({"shards_per_client": 0}, ["data.shards-per-client = 0: must be >= 1"]),
        (
            {"name": "shards", "shards_per_client": 11},
            ["data.shards-per-client = 11", "110 shards", "most 10"],
        ),
        ({"name": "shards", "shards_per_client": 7, "min_size": 10}, ["data.min-size = 10", "fewer shards"]),
        (
            {"name": "dirichlet-class", "alpha": 1e-3, "min_size": 5},
            [
                "data.min-size = 5",
                "1000 draws",
                "data.alpha = 0.001",
                "fewer clients",
                "dirichlet-client",
            ],
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(kwargs, words):
    with pytest.raises(InputError) as error:
        make_partition(**({"name": "iid", "labels": skewed_labels(100), "num_clients": 10} | kwargs))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_dirichlet_class_may_leave_clients_empty():
    part = make_partition("dirichlet-class", skewed_labels(100), 101, min_size=0)
    assert_partition(part, 100, 101)
    assert part.sizes.min() == 0


def test_dirichlet_class_rounds_every_class_at_random():
    # Equal shares of half an example: who gets a whole one is not every other client.
    labels = np.repeat([0, 1], 10)
    part = make_partition("dirichlet-class", labels, 20, alpha=1e9, min_size=0)
    holders = [np.flatnonzero(column) for column in part.class_counts(labels, 2).T]
    assert [len(held) for held in holders] == [10, 10]
    assert all(np.ptp(held % 2) == 1 for held in holders)


def test_dirichlet_class_draws_again_until_all_have_enough():
    labels = skewed_labels(200)
    free = [make_partition("dirichlet-class", labels, 10, min_size=0, seed=seed).sizes.min() for seed in range(20)]
    assert min(free) < 5  # so that there is something to draw again
    for seed in range(20):
        assert make_partition("dirichlet-class", labels, 10, min_size=5, seed=seed).sizes.min() >= 5


def test_labels_are_one_dimensional():
    with pytest.raises(ValueError, match=r"\(10, 2\)"):
        make_partition("iid", np.zeros((10, 2), np.int64), 2)


# Many clients


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_hundred_thousand_clients(name):
    labels = skewed_labels(200_000)
    begin = time.perf_counter()
    part = split(name, labels, 100_000)
    assert time.perf_counter() - begin < 5  # 0.5 s on two shared cores
    assert_partition(part, 200_000, 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRICHLET)
def test_a_million_clients(name):
    labels = skewed_labels(2_000_000)
    begin = time.perf_counter()
    part = split(name, labels, 1_000_000, alpha=0.3)
    assert time.perf_counter() - begin < 120  # 5 s on two shared cores
    assert_partition(part, 2_000_000, 1_000_000)
