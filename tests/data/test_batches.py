"""Minibatches are addressed: the same for whoever asks, in any order; every example once per pass."""

import numpy as np
import pytest
import torch

from fedmom.data.batches import Sampler, crop_flip, moves, normalised
from fedmom.data.partition import Partition, make_partition
from fedmom.method.randomness import integers, normal, random_bits, uniform
from laws import table


def sampler(sizes, batch_size=4, **options) -> Sampler:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    indices = np.random.default_rng(0).permutation(offsets[-1]).astype(np.int64)
    return Sampler(Partition(indices, offsets), batch_size, **options)


def draw(s: Sampler, clients, first, num_steps):
    return s.draw(torch.tensor(clients), torch.tensor(first), num_steps)


SIZES = [1, 2, 3, 7, 20, 64]
samplings = table("sampling", ["shuffle", "replacement"])


@samplings
def test_batches_do_not_depend_on_company_order_or_rounds(sampling):
    s = sampler(SIZES, sampling=sampling, seed=3)
    together = draw(s, [0, 1, 2, 3, 4, 5], [0] * 6, 12)
    for client in range(6):
        alone = torch.cat([draw(s, [client], [first], 3) for first in (0, 3, 6, 9)], dim=1)
        assert torch.equal(alone[0], together[client])
    some = draw(s, [5, 2], [4, 7], 2)
    assert torch.equal(some[0], together[5, 4:6])
    assert torch.equal(some[1], together[2, 7:9])


@samplings
def test_clients_draw_from_their_own_examples(sampling):
    s = sampler(SIZES, sampling=sampling)
    drawn = draw(s, list(range(6)), [5] * 6, 9)
    for client in range(6):
        own = s.indices[s.offsets[client] : s.offsets[client + 1]]
        assert torch.isin(drawn[client], own).all()


@table("client", range(6))
def test_shuffle_gives_every_example_once_per_pass(client):
    """A client with fewer examples than a batch wraps; passes differ."""
    s, n = sampler(SIZES), SIZES[client]
    stream = draw(s, [client], [0], 8 * n)[0].flatten()[: 32 * n // n * n].reshape(-1, n)
    own = s.indices[s.offsets[client] : s.offsets[client + 1]].sort().values
    assert all(torch.equal(p.sort().values, own) for p in stream)
    if n >= 7:
        assert len({tuple(p.tolist()) for p in stream}) == len(stream)


def test_permutations_are_uniform():
    """All 6 orders of 3 examples equally often: χ² with 5 degrees of freedom, 99.99 % quantile 25.7."""
    s = sampler([3], batch_size=3)
    orders = draw(s, [0], [0], 6000)[0]
    _, counts = torch.unique(orders, dim=0, return_counts=True)
    assert len(counts) == 6
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 25.7


def test_replacement_is_uniform():
    s = sampler([5], batch_size=10, sampling="replacement")
    counts = torch.bincount(torch.unique(draw(s, [0], [0], 1000), return_inverse=True)[1].flatten())
    assert len(counts) == 5
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 23.5


@samplings
def test_seeds_and_clients_differ(sampling):
    a, b = sampler([50, 50], sampling=sampling, seed=0), sampler([50, 50], sampling=sampling, seed=1)
    first = draw(a, [0, 1], [0, 0], 3)
    assert not torch.equal(first, draw(b, [0, 1], [0, 0], 3))
    place = torch.empty(100, dtype=torch.int64)
    place[a.indices] = torch.arange(100)  # where an example lies among all clients', 50 each
    assert not torch.equal(place[first[0]] % 50, place[first[1]] % 50)


def test_runs_with_different_intervals_see_the_same_data():
    s = sampler([30], batch_size=4)
    by_one = torch.cat([draw(s, [0], [t], 1) for t in range(12)], dim=1)
    by_four = torch.cat([draw(s, [0], [t], 4) for t in (0, 4, 8)], dim=1)
    assert torch.equal(by_one, by_four)


def test_many_clients_in_one_draw():
    labels = np.zeros(200_000, dtype=np.int64)
    s = Sampler(make_partition("iid", labels, 100_000), 2)
    drawn = s.draw(torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64), 1)
    assert torch.equal(drawn.flatten().sort().values, torch.arange(200_000))


def test_one_sort_and_two_give_the_same(monkeypatch):
    s = sampler(SIZES)
    numbers = list(range(len(SIZES))), [0, 5, 1, 9, 2, 3], 70
    once = draw(s, *numbers)
    monkeypatch.setattr("fedmom.data.batches._SEGMENTS", 0)
    assert torch.equal(draw(s, *numbers), once)


@pytest.mark.slow
def test_more_permutations_than_fit_beside_a_key():
    """Many clients of unequal sizes in one draw, 9 million permutations: each stays with its own examples."""
    sizes = np.where(np.arange(35_000) % 2, 3, 1)
    s = sampler(sizes, batch_size=64)
    drawn = draw(s, list(range(35_000)), [0] * 35_000, 6)
    place = torch.empty(int(s.offsets[-1]), dtype=torch.int64)
    place[s.indices] = torch.arange(len(place))
    owner = torch.searchsorted(s.offsets, place[drawn.reshape(35_000, -1)], right=True) - 1
    assert torch.equal(owner, torch.arange(35_000)[:, None].expand_as(owner))
    assert int((6 * 64 // torch.from_numpy(sizes)).sum()) + 35_000 > 2**23


def test_addressed_numbers_have_the_right_laws_and_work_under_vmap():
    place = torch.arange(200_000)
    u, z = uniform(1, 2, place), normal(7, place)
    assert abs(u.mean() - 0.5) < 0.004
    assert abs(u.var() - 1 / 12) < 0.002
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.15
    assert integers(3, 5, place).unique().tolist() == [0, 1, 2]
    assert len(random_bits(9, place).unique()) == 200_000
    assert abs(torch.corrcoef(torch.stack([uniform(1, place), uniform(2, place)]))[0, 1]) < 0.01
    keys = torch.arange(4)
    assert torch.equal(torch.vmap(lambda k: uniform(k, 3, place[:5]))(keys), uniform(keys[:, None], 3, place[:5]))


def test_numbers_of_an_address_never_change():
    """Runs on disk depend on them: pinned."""
    assert random_bits(1, 2, 3).item() == 2869315087210772132
    assert integers(10, 1, 2, torch.arange(5)).tolist() == [3, 1, 8, 1, 2]


def plain_crop_flip(image, down, right, flip, pad=4):
    """One image, the plain way: pad with zeros, crop, flip."""
    C, H, W = image.shape
    padded = torch.zeros(C, H + 2 * pad, W + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + H, pad : pad + W] = image
    cropped = padded[:, down : down + H, right : right + W]
    return cropped.flip(-1) if flip else cropped


def test_crop_flip_is_pad_crop_flip():
    images = torch.randint(1, 255, (3, 5, 2, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clients, steps = torch.tensor([4, 0, 9]), torch.tensor([11, 12, 13])

    def moved(*address):
        return crop_flip(images, moves(*address, batch_size=5))

    got = moved(1, clients, steps)
    flips = set()
    for k in range(3):
        for b in range(5):
            options = {
                (d, r, f): plain_crop_flip(images[k, b], d, r, f)
                for d in range(9)
                for r in range(9)
                for f in (False, True)
            }
            found = [at for at, image in options.items() if torch.equal(image, got[k, b])]
            assert len(found) == 1
            flips.add(found[0])
    assert len(flips) > 10  # images move differently
    assert torch.equal(moves(1, clients[1:2], steps[1:2], 5), moves(1, clients, steps, 5)[1:2])
    for other in ((2, clients, steps), (1, clients + 1, steps), (1, clients, steps + 1)):
        assert not torch.equal(moved(*other), got)  # another seed, client or step moves them otherwise


def test_crop_flip_offsets_are_uniform():
    images = torch.full((1, 20_000, 1, 1, 1), 255, dtype=torch.uint8)
    kept = crop_flip(images, moves(0, torch.tensor([0]), torch.tensor([0]), 20_000)) > 0
    # A 1 × 1 image survives only the central one of 9 × 9 crops.
    assert abs(kept.double().mean() - 1 / 81) < 0.003


def test_normalised():
    images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    torch.testing.assert_close(
        normalised(images, (0.5,), (0.25,), torch.float64), torch.tensor([[[[-2.0, 2.0]]]], dtype=torch.float64)
    )
    real = torch.tensor([[1.5]])
    assert normalised(real, (), (), torch.float64).dtype == torch.float64
