"""The exchange: weighted means, pooled BatchNorm variances, integers, chunks in any split."""

import pytest
import torch

from fedmom.method.averaging import WeightedMean
from fedmom.method.state import ClientState
from laws import table

F64 = torch.float64


def rows_of(num_rows: int, dtype=F64, seed=0) -> ClientState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(num_rows, *shape, generator=generator, dtype=F64).to(dtype)

    buffers = {
        "bn.running_mean": draw(4),
        "bn.running_var": draw(4) ** 2 + 0.1,
        "bn.num_batches_tracked": torch.arange(num_rows) + 7,
        "other": draw(2),
    }
    return ClientState({"w": draw(2, 3), "b": draw()}, {"w": draw(2, 3), "b": draw()}, buffers)


def average(rows: ClientState, weights, sizes=(100,), **options) -> WeightedMean:
    mean, begin = WeightedMean(**options), 0
    weights = torch.tensor(weights, dtype=F64)
    for size in [*sizes, 100]:
        part = slice(begin, begin + size)
        if len(weights[part]):
            mean.add(ClientState(*({n: v[part] for n, v in tree.items()} for tree in rows)), weights[part])
        begin += size
    return mean


@table("num_rows, sizes", [(1, (100,)), (2, (1,)), (3, (1, 1, 2)), (7, (2, 3)), (7, (100,))])
def test_means_and_spreads_are_the_textbook_ones_however_rows_are_split(num_rows, sizes):
    rows, weights = rows_of(num_rows), [1.0 + (3 * i) % 5 for i in range(num_rows)]
    p = torch.tensor(weights, dtype=F64) / sum(weights)
    got = average(rows, weights, sizes)
    for part in ("params", "momentum"):
        for name, value in getattr(rows, part).items():
            want = torch.tensordot(p, value, 1)
            torch.testing.assert_close(getattr(got.mean(), part)[name], want, rtol=1e-13, atol=1e-13)
        flat = torch.cat([v.reshape(num_rows, -1) for v in getattr(rows, part).values()], 1)
        spread = float(p @ ((flat - p @ flat) ** 2).sum(1))
        assert got.spread(part) == pytest.approx(spread, rel=1e-12, abs=1e-28)


def test_pooled_variance_is_the_variance_of_all_activations_together():
    """Clients with equally many activations, whose statistics are known from the activations themselves."""
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(3, 50, 4, generator=generator, dtype=F64) + torch.arange(3)[:, None, None]
    buffers = {"running_mean": activations.mean(1), "running_var": activations.var(1, correction=0)}
    rows = ClientState({"w": torch.zeros(3, 1, dtype=F64)}, {"w": torch.zeros(3, 1, dtype=F64)}, buffers)
    pooled = average(rows, [1, 1, 1], (2,)).mean().buffers
    together = activations.reshape(-1, 4)
    torch.testing.assert_close(pooled["running_mean"], together.mean(0))
    torch.testing.assert_close(pooled["running_var"], together.var(0, correction=0))
    plain = average(rows, [1, 1, 1], running_var="mean").mean().buffers
    torch.testing.assert_close(plain["running_var"], buffers["running_var"].mean(0))
    assert bool((plain["running_var"] < pooled["running_var"] - 0.5).all())


@table("sizes", [(100,), (1,)])
def test_pooled_variance_formula_with_weights(sizes):
    rows, weights = rows_of(4), [1.0, 4.0, 2.0, 3.0]
    p = torch.tensor(weights, dtype=F64)[:, None] / 10
    mean, var = rows.buffers["bn.running_mean"], rows.buffers["bn.running_var"]
    want = (p * var).sum(0) + (p * mean**2).sum(0) - (p * mean).sum(0) ** 2
    torch.testing.assert_close(average(rows, weights, sizes).mean().buffers["bn.running_var"], want)


def test_integers_stay_integers_and_take_the_largest():
    rows = rows_of(5)
    turned = ClientState(*({n: v.flip(0) for n, v in tree.items()} for tree in rows))
    for state in (rows, turned):  # the largest comes with the last chunk, and with the first
        got = average(state, [1, 1, 1, 1, 1], (2,)).mean().buffers["bn.num_batches_tracked"]
        assert got.dtype == torch.int64
        assert int(got) == 11


@table("dtype", [torch.float32, F64])
def test_dtypes_are_kept_and_clones_average_to_themselves_exactly(dtype):
    one = rows_of(1, dtype)
    clones = ClientState(*({n: v.expand(7, *v.shape[1:]).contiguous() for n, v in tree.items()} for tree in one))
    mean = average(clones, [1.0] * 7, (3,))
    for before, after in zip(one, mean.mean(), strict=True):
        for name, value in after.items():
            assert value.dtype == before[name].dtype
            if dtype == torch.float32:
                assert torch.equal(value, before[name][0]), name
    assert mean.spread("params") < 1e-30


def test_order_of_names_and_no_lost_tensor():
    rows = rows_of(2)
    mean = average(rows, [1, 1]).mean()
    assert [set(tree) for tree in mean] == [set(tree) for tree in rows]


@table("num_rows, running_var", [(1, "pooled"), (2, "mean"), (7, "pooled")])
def test_one_by_one_gives_the_same(num_rows, running_var):
    rows, weights = rows_of(num_rows), [1.0 + (3 * i) % 5 for i in range(num_rows)]
    together = average(rows, weights, running_var=running_var)
    single = WeightedMean(running_var)
    for k, weight in enumerate(weights):
        single.add_one(ClientState(*({n: v[k] for n, v in tree.items()} for tree in rows)), weight)
    for part, tree in together.mean()._asdict().items():
        assert list(getattr(single.mean(), part)) == list(tree)
        for name, value in tree.items():
            torch.testing.assert_close(getattr(single.mean(), part)[name], value, rtol=1e-13, atol=1e-13)
    for part in ("params", "momentum"):
        assert single.spread(part) == pytest.approx(together.spread(part), rel=1e-12, abs=1e-28)


def test_one_by_one_the_spread_of_equal_clients_is_zero_and_of_close_ones_exact():
    far = torch.full((1000,), 1e4)
    mean = WeightedMean()
    for k in range(5):
        mean.add_one(ClientState({"w": far}, {"w": far + k / 1024}, {}), 1.0)
    assert mean.spread("params") == 0
    assert mean.spread("momentum") == pytest.approx(1000 * 2 / 1024**2, rel=1e-6)
