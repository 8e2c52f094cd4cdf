"""Addressed dropout: the mask depends on the key, the layer and the place, and on nothing else."""

import math

import torch
from torch import nn

from fedmom.tasks.dropout import KEY, AddressedDropout, address_dropout
from laws import table


def mask(layer: AddressedDropout, shape: tuple[int, ...], key: int = 0) -> torch.Tensor:
    """Which places survive, from what the layer makes of ones."""
    layer.dropout_key = torch.tensor(key)
    return layer(torch.ones(shape)) != 0


@table("p, key", [(0.1, 0), (0.25, 7), (0.5, -(2**63)), (0.9, 2**63 - 1)])
def test_keep_rate_and_scale(p, key):
    layer = AddressedDropout(p, layer=1)
    layer.dropout_key = torch.tensor(key)
    out = layer(torch.full((100, 200), 3.0))
    kept = out != 0
    five_sigma = 5 * math.sqrt(p * (1 - p) / 20_000)
    assert abs(kept.double().mean().item() - (1 - p)) < five_sigma
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 3.0 / (1 - p)))


@table("p", [0.1, 0.9])
def test_the_scale_is_exact_in_float64(p):
    out = AddressedDropout(p, layer=1)(torch.ones(50, 50, dtype=torch.float64))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)), rtol=1e-15, atol=0)


@table("channels", [False, True])
def test_masks_differ_between_keys_layers_and_examples(channels):
    shape = (64, 64, 2)
    reference = mask(AddressedDropout(0.5, layer=0, channels=channels), shape)
    again = mask(AddressedDropout(0.5, layer=0, channels=channels), shape)
    assert torch.equal(reference, again)
    other_key = mask(AddressedDropout(0.5, layer=0, channels=channels), shape, key=1)
    other_layer = mask(AddressedDropout(0.5, layer=1, channels=channels), shape)
    # Independent masks agree in half of the places: 4,096 draws at least, so five sigma are 0.04.
    for other in (other_key, other_layer, reference.roll(1, 0), reference.roll(1, 1)):
        assert abs((reference == other).double().mean().item() - 0.5) < 0.04


def test_the_key_of_layer_n_is_not_the_next_key_of_layer_n_minus_1():
    """Addresses are hashed word by word: (key, layer) = (1, 0) and (0, 1) are different streams."""
    one, other = mask(AddressedDropout(0.5, 0), (4096,), key=1), mask(AddressedDropout(0.5, 1), (4096,), key=0)
    assert abs((one == other).double().mean().item() - 0.5) < 0.04


@table("channels, num_clients", [(False, 1), (True, 2), (False, 5)])
def test_vmap_equals_a_loop(channels, num_clients):
    layer = AddressedDropout(0.3, layer=4, channels=channels)
    x = torch.randn(num_clients, 6, 8, 3, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(num_clients) * 11

    def one(key, x):
        return torch.func.functional_call(layer, {KEY: key}, (x,))

    stacked = torch.vmap(one)(keys, x)
    assert torch.equal(stacked, torch.stack([one(key, row) for key, row in zip(keys, x, strict=True)]))
    if num_clients > 1:
        assert not torch.equal(stacked[0] != 0, stacked[1] != 0)


@table("shape", [(50, 40, 3), (50, 40, 3, 2), (50, 40, 2, 2, 2)])
def test_channels_drop_whole_maps(shape):
    kept = mask(AddressedDropout(0.5, layer=0, channels=True), shape).flatten(2)
    assert torch.equal(kept.any(2), kept.all(2))
    assert abs(kept.all(2).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(2000)


def test_evaluation_is_the_identity():
    x = torch.randn(4, 5)
    for p in (0.0, 0.5, 1.0):
        assert torch.equal(AddressedDropout(p, 0).eval()(x), x)


def test_extreme_rates():
    x = torch.randn(4, 5)
    assert torch.equal(AddressedDropout(0.0, 0)(x), x)
    assert torch.equal(AddressedDropout(1.0, 0)(x), torch.zeros_like(x))


def test_the_gradient_is_the_mask():
    layer = AddressedDropout(0.5, layer=0)
    x = torch.randn(30, 30, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, 2.0 * mask(layer, (30, 30)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    AddressedDropout(0.5, 0)(torch.ones(9, 9))
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_mask_in_float32_and_float64():
    layer = AddressedDropout(0.3, layer=2)
    x = torch.ones(100, 100)
    assert torch.equal(layer(x) != 0, layer(x.double()) != 0)


def test_addressing_replaces_nested_layers():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(0.1))
    model = nn.Sequential(block, nn.Sequential(nn.Sequential(nn.Dropout(0.2))), nn.Dropout3d(0.3), nn.Dropout1d(0.4))
    assert address_dropout(model) is model
    layers = [layer for layer in model.modules() if isinstance(layer, AddressedDropout)]
    assert sorted((layer.p, layer.channels) for layer in layers) == [
        (0.1, True),
        (0.2, False),
        (0.3, True),
        (0.4, True),
    ]
    assert len({layer.layer for layer in layers}) == 4
    assert not [layer for layer in model.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
    assert isinstance(block[0], nn.Conv2d)


def test_addressed_keys_are_buffers_that_files_do_not_hold():
    model = address_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    assert [name for name, _ in model.named_buffers()] == [f"1.{KEY}"]
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
