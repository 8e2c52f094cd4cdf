"""Sums in parts: the mean of all clients, and the same bits wherever its parts were joined."""

import itertools

import numpy as np
import pytest
import torch

from fedmom.method.averaging import WeightedMean
from fedmom.method.partial_sums import PairwiseSum, Partial, aligned
from fedmom.method.state import ClientState, flatten
from laws import table

SIZES = (1, 2, 3, 7, 8, 13)


def clients(number, dtype=torch.float32):
    """States with a scalar, a matrix, BatchNorm's buffers and a counter, and unequal weights."""
    rng = np.random.default_rng(number)

    def drawn(*shape):
        return torch.from_numpy(rng.normal(size=shape)).to(dtype)

    states = []
    for place in range(number):
        params = {"w": drawn(3, 4), "s": drawn()}
        buffers = {"running_mean": drawn(4), "running_var": drawn(4) ** 2, "num_batches_tracked": torch.tensor(place)}
        states.append(ClientState(params, {name: drawn(*value.shape) for name, value in params.items()}, buffers))
    return states, rng.uniform(0.5, 3.0, number).tolist()


def joined(states, weights, cuts=()):
    """All in one sum, or those between cuts joined elsewhere first, so far as their places are aligned."""
    total, bounds = PairwiseSum(), [0, *cuts, len(states)]
    for begin, end in itertools.pairwise(bounds):
        for first, length in aligned(range(begin, end)):
            part = PairwiseSum()
            for place in range(first, first + length):
                part.add(Partial.of(states[place], weights[place]))
            total.add(Partial.unpacked(part.result().packed()), length)
    return total.result()


@table("number, running_var", itertools.product(SIZES, ["pooled", "mean"]))
def test_it_is_the_weighted_mean_and_its_spreads(number, running_var):
    states, weights = clients(number, torch.float64)
    right = WeightedMean(running_var)
    for state, weight in zip(states, weights, strict=True):
        right.add_one(state, weight)
    total = joined(states, weights)
    ours, theirs = flatten(total.mean(states[0], running_var)), flatten(right.mean())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-13)
    for part in ("params", "momentum"):
        assert total.spread(part) == pytest.approx(right.spread(part), rel=1e-10, abs=1e-13)


@table("number", SIZES)
def test_wherever_its_parts_are_joined_it_has_the_same_bits(number):
    states, weights = clients(number)
    right = joined(states, weights)
    for cuts in ([1], [number // 2], [number // 3, number // 2], range(1, number)):
        other = joined(states, weights, sorted({cut for cut in cuts if 0 < cut < number}))
        assert other.weight == right.weight
        assert all(torch.equal(other.totals[at], right.totals[at]) for at in right.totals)
        assert other.spread("params") == right.spread("params")
        for name, value in flatten(other.mean(states[0], "pooled")).items():
            assert torch.equal(value, flatten(right.mean(states[0], "pooled"))[name]), name


def test_clients_that_agree_have_no_spread_and_keep_their_value():
    states, weights = clients(1)
    total = joined(states * 7, weights * 7)
    assert total.spread("params") < 1e-28
    assert torch.equal(total.mean(states[0], "pooled").params["w"], states[0].params["w"])


def test_aligned_ranges_cover_their_places_and_are_few():
    assert aligned([]) == []
    assert aligned(range(8)) == [(0, 8)]
    assert aligned([1, 2, 3, 4, 5]) == [(1, 1), (2, 2), (4, 2)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = np.flatnonzero(rng.random(rng.integers(1, 40)) < 0.7).tolist()
        ranges = aligned(places)
        assert [place for first, length in ranges for place in range(first, first + length)] == places
        assert all(length & (length - 1) == 0 and first % length == 0 for first, length in ranges)
    for begin in range(20):  # of neighbours at most two for every power of two
        assert len(aligned(range(begin, begin + 64))) <= 2 * 7


def test_a_range_that_is_not_aligned_is_no_part():
    states, weights = clients(3)
    total = PairwiseSum()
    total.add(Partial.of(states[0], weights[0]))
    with pytest.raises(AssertionError, match="not aligned"):
        total.add(Partial.of(states[1], weights[1]), 2)
