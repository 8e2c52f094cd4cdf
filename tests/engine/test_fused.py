"""Fused operators are what torch's own layers do client by client, by kernel and in plain torch, and in any model."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedmom.engine.stacked.folded.fold import fold
from fedmom.engine.stacked.fusing.modules import ConvReluPool, DroppedFlat, NormRelu
from fedmom.engine.stacked.fusing.patterns import fuse
from fedmom.engine.stacked.kernels import batch_norm, dropout, fused, pool, registry, weights
from fedmom.engine.stacked.steps import Stack
from fedmom.rounds.plan import beginning, round_job
from fedmom.tasks.dropout import AddressedDropout, address_dropout, kept
from laws import table
from pretend_cuda import pretend
from runs import F64, image_problem, simple_plan, tiny_images
from zoo import PATHS, ZOO, build

F32 = torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels are interpreted where there is no card
LAST, PLAIN = torch.channels_last, torch.contiguous_format


def drawn(*shape, dtype=F64, layout=PLAIN, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).contiguous(memory_format=layout)


def places(t):
    """How a tensor lies; a side of length one may be said to lie anyhow."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def same(found, want, dtype, factor=1):
    """Results of the kernel and of plain torch, in every number and in how they lie."""
    tolerance = factor * (1e-12 if dtype == F64 else 1e-5)
    for got, right in zip(found, want, strict=True):
        got = got.cpu()
        size = max(1.0, float(right.double().abs().nan_to_num().max())) if right.numel() else 1.0
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance * size, equal_nan=True)
        assert places(got) == places(right)


def on_device(*operands):
    """Copies for the kernel, which lie as the operands do."""
    return [t.to(DEVICE, copy=True) if isinstance(t, torch.Tensor) else t for t in operands]


# --- each kernel is its operator in plain torch -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # infinity · 0
@table(
    "K, shape, layout, p, channels, dtype",
    [
        (3, (2, 6, 5, 3), PLAIN, 0.25, False, F64),
        (3, (2, 6, 5, 3), LAST, 0.25, False, F32),
        (2, (2, 6, 5, 3), PLAIN, 0.5, True, F32),
        (2, (1, 5, 3, 3), LAST, 0.1, True, F64),
        (1, (1, 3, 1, 7), LAST, 0.0, False, F32),
        (2, (3, 7), PLAIN, 0.3, False, torch.float16),
        (2, (4,), PLAIN, 0.7, False, F64),
        (1, (2, 3, 4), PLAIN, 1.0, True, F32),
        (1, (33, 35), PLAIN, 0.5, False, F32),  # more than one program
    ],
)
def test_the_dropout_kernel_gives_the_same_bits(K, shape, layout, p, channels, dtype):
    keys = torch.tensor([5, -7, 1 << 62])[:K]
    x = drawn(K * shape[0], *shape[1:], dtype=dtype, layout=layout)
    x[(0,) * x.ndim] = float("inf")  # infinity · 0 is NaN in both
    for layer, turned in ((0, False), (1, x.ndim == 4), (40, False)):
        want = fused._dropout(x, keys, layer, p, channels, turned)
        found = dropout.dropout(*on_device(x, keys), layer, p, channels, turned).cpu()
        assert torch.equal(found.nan_to_num(nan=77.0), want.nan_to_num(nan=77.0))
        assert places(found) == places(want)


POOLINGS = [
    (2, 2, 5, (5, 4), (2, 2), LAST, F32, True),
    (2, 1, 2, (7, 4), (3, 2), PLAIN, F32, False),
    (1, 1, 35, (2, 3), (1, 1), LAST, F64, True),
    (2, 1, 3, (4, 5), (2, 2), PLAIN, F64, True),
    (1, 2, 1, (2, 2), (2, 2), LAST, F64, False),
]


@table("K, B, C, side, window, layout, dtype, has_bias", POOLINGS[:3])
def test_the_pooling_kernels_are_their_operators(K, B, C, side, window, layout, dtype, has_bias):
    check_poolings(K, B, C, side, window, layout, dtype, has_bias)


@pytest.mark.slow
@table("K, B, C, side, window, layout, dtype, has_bias", POOLINGS[3:])
def test_the_pooling_kernels_are_their_operators_in_more_shapes(K, B, C, side, window, layout, dtype, has_bias):
    check_poolings(K, B, C, side, window, layout, dtype, has_bias)


def check_poolings(K, B, C, side, window, layout, dtype, has_bias):
    x = (drawn(K * B, C, *side, dtype=dtype, layout=layout) * 2).round() / 2  # many are equal
    x[0, 0, 0, 0] = float("nan")
    bias = drawn(K, C, dtype=dtype).round() if has_bias else None
    want = fused._relu_pool(x, bias, K, list(window))
    same(pool.relu_pool(*on_device(x, bias), K, list(window)), want, dtype, factor=0)
    d = drawn(*want[0].shape, dtype=dtype, layout=layout)
    for rows in (0, 4):
        options = (K, list(side), list(window), rows)
        want_back = fused._relu_pool_back(d, want[1], *options)
        found = pool.relu_pool_back(*on_device(d, want[1]), *options)
        same(found, want_back, dtype)


NORMS = [
    ((4, 5, 3, 2), 2, 5, LAST, F32, True, "residual"),
    ((4, 2, 3, 2), 2, 12, PLAIN, F64, True, "relu"),
    ((2, 33, 2, 2), 1, 5, LAST, F64, False, "plain"),
    ((6, 4), 3, 2, PLAIN, F32, True, "relu"),
    ((4, 2, 5), 2, 4, PLAIN, F64, True, "residual"),
    ((2, 1, 1, 1), 1, 2, LAST, F32, False, "relu"),
]


@table("shape, K, rows, layout, dtype, affine, kind", NORMS[:3])
def test_the_norm_kernels_are_their_operators(shape, K, rows, layout, dtype, affine, kind):
    check_norms(shape, K, rows, layout, dtype, affine, kind)


@pytest.mark.slow
@table("shape, K, rows, layout, dtype, affine, kind", NORMS[3:])
def test_the_norm_kernels_are_their_operators_in_more_shapes(shape, K, rows, layout, dtype, affine, kind):
    check_norms(shape, K, rows, layout, dtype, affine, kind)


def check_norms(shape, K, rows, layout, dtype, affine, kind):
    C, relu = shape[1], kind != "plain"
    x = drawn(*shape, dtype=dtype, layout=layout) + 3
    weight, bias = (drawn(1, C, dtype=dtype, seed=s).expand(K, C) if affine else None for s in (1, 2))
    residual = drawn(*shape, dtype=dtype, layout=layout, seed=3) if kind == "residual" else None
    parts = fused._norm_sums(x, K, rows)
    same(batch_norm.norm_sums(*on_device(x), K, rows), parts, dtype, factor=10)
    stats = [drawn(K, C, dtype=dtype, seed=4), drawn(K, C, dtype=dtype, seed=5).abs()]
    given, options = on_device(x, *parts, weight, bias, *stats, residual), (K, rows, 0.1, 1e-5, relu)
    y, mean, scale = fused._norm_apply(x, *parts, weight, bias, *stats, residual, *options)
    found = batch_norm.norm_apply(*given, *options)
    same([*found, *given[5:7]], [y, mean, scale, *stats], dtype, factor=10)
    d = drawn(*shape, dtype=dtype, layout=layout, seed=6)
    back = (d, x, y if kind == "residual" else None, mean, scale, weight, bias)
    one, two, through = fused._norm_back_sums(*back, K, rows, relu)
    same(batch_norm.norm_back_sums(*on_device(*back), K, rows, relu), (one, two, through), dtype, factor=10)
    last = (d, x, mean, scale, weight, bias, one, two)
    want = fused._norm_back(*last, K, rows, kind == "relu")
    same(batch_norm.norm_back(*on_device(*last), K, rows, kind == "relu"), want, dtype, factor=10)


# --- the operators are torch's layers, client by client ------------------------------------------------------


def gradients(y, leaves):
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach() * 3))]


def close(found, want):
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12, equal_nan=True)


@table(
    "K, shape, layout, affine, tracks, added, relu",
    [
        (3, (4, 5, 3, 2), LAST, True, True, True, True),
        (3, (4, 5, 3, 2), PLAIN, True, True, False, True),
        (1, (2, 3, 1, 1), PLAIN, True, True, False, False),
        (2, (7, 3), PLAIN, True, True, True, True),
        (2, (2, 3, 5), PLAIN, False, True, False, True),
        (2, (2, 3, 2, 3, 2), PLAIN, True, False, False, False),
        (2, (1, 2, 20, 20), LAST, False, False, True, True),
    ],
)
def test_batch_norm_is_torchs_for_each_client(K, shape, layout, affine, tracks, added, relu):
    x = (drawn(K * shape[0], *shape[1:], layout=layout) + 100).requires_grad_()
    residual = drawn(*x.shape, layout=layout, seed=1).requires_grad_() if added else None
    weight, bias = (drawn(K, shape[1], seed=s).requires_grad_() if affine else None for s in (2, 3))
    running = [drawn(K, shape[1], seed=4), drawn(K, shape[1], seed=5).abs()] if tracks else [None, None]
    theirs = [[None] * K if t is None else list(t.clone().unbind()) for t in running]
    rows = zip(x.chunk(K), *theirs, *([None] * K if t is None else t for t in (weight, bias)), strict=True)
    want = torch.cat([functional.batch_norm(*row, training=True, momentum=0.3, eps=1e-3) for row in rows])
    want = want if residual is None else want + residual
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    want = gradients(torch.relu(want) if relu else want, leaves)
    y = fused.Normalised.apply(x, weight, bias, residual, tuple(running), K, 0.3, 1e-3, relu)
    close(gradients(y, leaves), want)
    if tracks:
        close(running, [torch.stack(rows) for rows in theirs])


def test_one_value_per_channel_has_no_variance():
    """As torch says it."""
    for shape in ((2, 3), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fused.Normalised.apply(drawn(*shape), None, None, None, (None, None), 2, 0.1, 1e-5, False)


@table(
    "K, B, C, side, window, layout, has_bias",
    [
        (3, 2, 4, (7, 6), (2, 2), LAST, True),
        (1, 1, 1, (2, 2), (2, 2), PLAIN, True),
        (2, 3, 5, (5, 7), (3, 2), PLAIN, False),
        (2, 1, 3, (4, 3), (1, 1), LAST, True),
    ],
)
def test_pooling_is_torchs_with_equal_and_missing_numbers(K, B, C, side, window, layout, has_bias):
    x = ((drawn(K * B, C, *side, layout=layout) * 2).round() / 2).requires_grad_()
    with torch.no_grad():
        x[0, 0, 1, 1] = float("nan")
    bias = drawn(K, C, seed=1).round().requires_grad_() if has_bias else None
    full = x if bias is None else x + bias.repeat_interleave(B, 0)[:, :, None, None]
    leaves = [t for t in (x, bias) if t is not None]
    want = gradients(functional.max_pool2d(torch.relu(full), window), leaves)
    close(gradients(fused.ReluPooled.apply(x, bias, K, window), leaves), want)


@table("channels, turned", [(False, False), (True, False), (False, True)])
def test_dropout_is_each_clients_own(channels, turned):
    layer, keys = AddressedDropout(0.3, 7, channels=channels), torch.tensor([3, -9, 1 << 50])
    x = drawn(6, 4, 5, 3, layout=LAST).requires_grad_()
    want = torch.cat(
        [torch.func.functional_call(layer, {"dropout_key": k}, h) for k, h in zip(keys, x.chunk(3), strict=True)]
    )
    close(gradients(fused.Dropped.apply(x, keys, 7, 0.3, channels, turned), [x]), gradients(want, [x]))
    mask = kept(keys, 7, 0.3, (2, 4, 5, 3), channels=channels, dtype=F64)
    assert 0.1 < float((mask == 0).double().mean()) < 0.6


@table(
    "K, shape, own, decay, nesterov, dtype",
    [
        (1, (1,), False, 0.0, False, F64),
        (3, (7, 5), True, 0.01, True, F64),
        (2, (33, 65), False, 0.1, True, F32),
        (4, (), True, 0.0, False, F32),
        (2, (40,), False, 0.1, True, torch.bfloat16),
    ],
)
def test_the_first_steps_kernel_is_the_first_step(K, shape, own, decay, nesterov, dtype):
    """Nor does it write into what all clients share."""
    x, u = drawn(*shape, dtype=dtype), drawn(*([K] if own else []), *shape, dtype=dtype, seed=1)
    g, lr = drawn(K, *shape, dtype=dtype, seed=2), torch.tensor(0.3, dtype=F64)
    wanted, got = [t.clone() for t in (g, x, u, lr)], on_device(g, x, u, lr)
    want = torch.ops.fedmom.first_step(*wanted, 0.9, decay, nesterov)
    found = weights.first_step(*got, 0.9, decay, nesterov)
    factor = 1000 if dtype == torch.bfloat16 else 1
    same([found, *got], [want, *wanted], dtype, factor)


@table("K, rows, C", [(1, 1, 1), (1, 4, 64), (50, 9000, 32), (8, 65536, 16), (3, 100, 2000)])
def test_parts_of_a_sum_are_neither_empty_nor_many(K, rows, C):
    each = fused.part_rows(K, rows, C)
    parts = -(-rows // each)
    assert 1 <= each <= rows
    assert parts <= 64
    assert (parts - 1) * each < rows


def test_a_kernel_that_cannot_run_is_done_without_and_named_once(monkeypatch):
    monkeypatch.setattr(registry, "failed", {})
    monkeypatch.setattr(dropout, "dropout", lambda *_: 1 / 0)
    x, keys = drawn(4, 3), torch.tensor([1, 2])
    run = registry.on_card("dropout", fused.OPERATORS["dropout"])
    with pytest.warns(UserWarning, match="fedmom::dropout runs without its kernel: ZeroDivisionError"):
        found = run(x, keys, 1, 0.5, False, False)
    assert torch.equal(found, fused._dropout(x, keys, 1, 0.5, False, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(x, keys, 1, 0.5, False, False), found)
        monkeypatch.setattr(registry, "failed", {})
        monkeypatch.setattr(registry, "wanted", False)  # FEDMOM_FUSED=0
        assert torch.equal(run(x, keys, 1, 0.5, False, False), found)


# --- any model ----------------------------------------------------------------------------------------------


def conv(channels=3, **options):
    return nn.Conv2d(channels, 3, 3, padding=1, **options)


class Body(nn.Module):
    """Two convolutions, two norms and what a function makes of them."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.other = conv(), conv(bias=False)
        self.norm, self.again = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.calls, self.does, self.drop = 0, forward, AddressedDropout(0.4, 1)
        self.scale = torch.tensor(2.0, dtype=F64)

    def forward(self, x, extra=None):
        return self.does(self, x) if extra is None else extra


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return -d


def counts(m, x):
    m.calls += 1
    return torch.relu(m.conv(x)) * m.calls


def writes_into_a_new_tensor(m, x):
    total = torch.zeros((), dtype=F64)
    total += torch.relu(m.conv(x)).mean().detach()
    return torch.relu(m.other(x)) + total


def without_gradients(m, x):
    with torch.no_grad():
        h = torch.relu(m.conv(x))
    return torch.relu(m.other(x)) * h


def writes_to_what_others_hold(m, x):
    held = h = torch.relu(m.conv(x)) * 2.0
    h += x
    return torch.sigmoid(m.norm(m.other(held)) + held)


def writes_to_the_other(m, x):
    h = m.conv(x) * 2.0
    held = h.view_as(h)
    h += m.norm(x)
    return torch.relu(h) + held


def norms_twice(m, x):
    first = m.norm(m.conv(x))
    return torch.relu(first + m.norm(m.other(x)))


# {what: (forward function, convolutions and norms that are fused)}
FORWARDS = {
    "conv relu": (lambda m, x: torch.relu(m.conv(x)), (1, 0)),
    "in place": (lambda m, x: functional.relu(m.conv(x), inplace=True), (1, 0)),
    "method": (lambda m, x: m.conv(x).relu_() + m.other(x).relu(), (2, 0)),
    "without a bias": (lambda m, x: torch.relu(m.other(x)), (1, 0)),
    "no relu": (lambda m, x: torch.tanh(m.conv(x)), (0, 0)),
    "result used twice": (lambda m, x: torch.relu(h := m.conv(x)) + h, (0, 0)),
    "one layer twice": (lambda m, x: torch.relu(m.conv(torch.relu(m.conv(x)))) + torch.tanh(m.conv(x)), (2, 0)),
    "norm relu": (lambda m, x: torch.relu(m.norm(m.conv(x))), (0, 1)),
    "block": (lambda m, x: torch.relu(x + m.again(m.other(torch.relu(m.norm(m.conv(x)))))), (0, 2)),
    "norm first": (lambda m, x: torch.relu(m.norm(m.conv(x)) + x), (0, 1)),
    "torch.add": (lambda m, x: torch.relu(torch.add(m.norm(m.conv(x)), x)), (0, 1)),
    "torch.add with a factor": (lambda m, x: torch.relu(torch.add(m.norm(m.conv(x)), x, alpha=2)), (0, 0)),
    "add_": (lambda m, x: m.norm(m.conv(x)).add_(x).relu_(), (0, 1)),
    "two norms": (lambda m, x: torch.relu(m.norm(m.conv(x)) + m.again(m.other(x))), (0, 1)),
    "one norm twice": (norms_twice, (0, 1)),
    "twice itself": (lambda m, x: torch.relu((h := m.norm(x)) + h), (0, 0)),
    "residual used twice": (lambda m, x: torch.relu(m.norm(x) + (h := m.conv(x))) * h, (0, 1)),
    "a number is added": (lambda m, x: torch.relu(m.norm(x) + 1.0), (0, 0)),
    "broadcast": (lambda m, x: torch.relu(m.norm(m.conv(x)) + x[:, :1]), (0, 1)),
    "writes to the other": (writes_to_the_other, (0, 0)),
    "writes to what others hold": (writes_to_what_others_hold, (1, 0)),
    "sizes in the graph": (lambda m, x: torch.relu(m.conv(x)).view(x.shape[0], -1), (1, 0)),
    "sizes decide": (lambda m, x: torch.relu(m.conv(x)) * (2 if x.shape[0] > 3 else 1), None),
    "values decide": (lambda m, x: torch.relu(m.conv(x)) * (2 if float(x.detach().sum()) > -1e9 else 1), None),
    "asks what it is": (lambda m, x: torch.relu(m.conv(x)) * (2 if isinstance(x, torch.Tensor) else 1), None),
    "is_tensor": (lambda m, x: torch.relu(m.conv(x)) * (2 if torch.is_tensor(x) else 1), None),
    "counts": (counts, None),
    "a new tensor": (writes_into_a_new_tensor, None),
    "a held tensor": (lambda m, x: torch.relu(m.conv(x)) * m.scale, (1, 0)),
    "no_grad": (without_gradients, None),
    "a Function": (lambda m, x: torch.relu(m.conv(Reverse.apply(torch.relu(m.other(x))))), None),
    "checkpoint": (lambda m, x: torch.tanh(checkpoint(lambda h: torch.relu(m.conv(h)), x, use_reentrant=False)), None),
    "re-entry": (lambda m, x: torch.tanh(checkpoint(lambda h: torch.relu(m.conv(h)), x, use_reentrant=True)), None),
}
POOLS = {
    "2": (nn.MaxPool2d(2), True),
    "pairs": (nn.MaxPool2d((2, 3), (2, 3)), True),
    "overlaps": (nn.MaxPool2d(3, 2), False),
    "padded": (nn.MaxPool2d(2, padding=1), False),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), False),
    "dilated": (nn.MaxPool2d(2, dilation=2), False),
    "large": (nn.MaxPool2d(5), False),
}
MODELS = {name: (lambda f=f: Body(f), n) for name, (f, n) in FORWARDS.items()}
MODELS |= {f"pool {n}": (lambda p=p: nn.Sequential(conv(), nn.ReLU(), p), (1, 0)) for n, (p, _) in POOLS.items()}
MODELS |= {
    "pool, then relu": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.ReLU(inplace=True)), (1, 0)),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(3)), nn.Sequential(nn.ReLU())), (0, 1)),
    "dropout": (lambda: address_dropout(nn.Sequential(conv(), nn.ReLU(), nn.Dropout(0.4), nn.Dropout2d(0.4))), (1, 0)),
    "flat": (lambda: address_dropout(nn.Sequential(conv(), nn.Dropout(0.4), nn.Flatten())), (0, 0)),
    "flat by function": (lambda: Body(lambda m, x: torch.flatten(m.drop(m.conv(x)), 1)), (0, 0)),
    "1d": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU()), (1, 1)),
    "no affine": (lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False), nn.ReLU()), (0, 1)),
}


def folded(made, on, K=3, steps=2, shape=(3, 5, 6)):
    """Results, gradients and buffers of some steps of K clients through a folded model, and the model."""
    fused.enabled = on
    torch.manual_seed(0)
    plain = made().double().train()
    model, clients = fold(plain)
    model.train()
    model = fuse(model) if on else model
    clients.num, clients.dropout_keys, found = K, torch.arange(K) * 77, []
    spread = {n: drawn(K, *t.shape, seed=len(n)) * 0.3 + t.detach() for n, t in plain.named_parameters()}
    clients.params = {n: t.requires_grad_() for n, t in spread.items()}
    clients.buffers = {n: torch.stack([b] * K) for n, b in plain.named_buffers() if not n.endswith("dropout_key")}
    for step in range(steps):
        if shape:
            x = drawn(K * 2, *shape, layout=LAST, seed=step).requires_grad_()
            y = model(x * 1.0)
        else:
            x = torch.arange(K * 12).reshape(K * 2, 6) * (step + 2) % 11
            y = model(x)
        torch.cos(y).sum().backward()
        found += [y.detach(), *([x.grad] if shape else [])]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in clients.params.values()]
    return [*found, *grads, *clients.buffers.values()], model


@pytest.fixture
def switch(monkeypatch):
    monkeypatch.setattr(fused, "enabled", fused.enabled)


@table("name", MODELS)
def test_a_fused_model_is_the_plain_one(name, switch):
    made, number = MODELS[name]
    found, model = folded(made, True)
    want, _ = folded(made, False)
    close(found, want)
    kinds = [type(m) for m in model.modules()]
    assert (kinds.count(ConvReluPool), kinds.count(NormRelu)) == (number or (0, 0))
    assert kinds.count(DroppedFlat) == name.startswith("flat")
    if name.startswith("pool ") and "pool" not in name[5:]:
        fuses = next(m for m in model.modules() if isinstance(m, ConvReluPool)).pool is not None
        assert fuses == POOLS[name[5:]][1]


def test_hooks_are_called_and_evaluation_is_left_alone(switch):
    seen = []

    def made():
        model = nn.Sequential(conv(), nn.ReLU())
        model[1].register_forward_hook(lambda m, args, y: seen.append(1) or y * 2)
        return model

    close(folded(made, True)[0], folded(made, False)[0])
    assert len(seen) == 4
    model, _ = fold(nn.Sequential(conv(), nn.ReLU()))
    assert fuse(model.eval()) is model


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, made in ZOO.items() if len(made.refused) < len(PATHS)])
def test_every_model_that_can_be_folded_can_be_fused(name, switch):
    """To its logits, gradients and buffers after two steps. What is refused on every path may hide what it changes."""
    x = None if ZOO[name].data == "tokens" else (2, 8, 8)
    try:
        want, _ = folded(lambda: address_dropout(build(name)), False, shape=x)
    except Exception:  # it takes another path
        pytest.skip("it cannot be folded")
    close(folded(lambda: address_dropout(build(name)), True, shape=x)[0], want)


# --- on a card that is not there ----------------------------------------------------------------------------


def on_a_card(name, side, on):
    """State after a round of two clients, and the card."""
    fused.enabled = on
    with pretend() as card:
        problem, plan = (
            image_problem(name, 2, data=tiny_images(side=side), device="cuda"),
            simple_plan(2, num_local_steps=2),
        )
        begin = beginning(problem, plan)
        stack = Stack(problem, plan.method, convolution="grouped")
        before = card.launches.copy()
        job = round_job(problem, plan, begin)
        ends = [stack.run(begin.state, job) for _ in range(1)]
        tensors = {n: v.to("cpu") for tree in ends[-1][:3] for n, v in tree.items()}
    return tensors, SimpleNamespace(launches=card.launches - before, troubles=card.troubles())


@pytest.mark.slow
@table("name, side, most", [("cnn", 8, 0.75), ("resnet20", 8, 0.9)])
def test_a_cards_rounds_are_the_same_with_fewer_launches(name, side, most, switch):
    want, plain = on_a_card(name, side, False)
    found, card = on_a_card(name, side, None)
    assert card.troubles == plain.troubles == {}
    assert sum(card.launches.values()) < most * sum(plain.launches.values())
    used = {n.removeprefix("fedmom::") for n in card.launches if "::" in n}
    norms = {"norm_sums", "norm_apply", "norm_back_sums", "norm_back"}
    assert used == (norms if name == "resnet20" else {"dropout", "relu_pool", "relu_pool_back"})
    for n, value in want.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[n], value, rtol=1e-12, atol=1e-12 * size, msg=n)
