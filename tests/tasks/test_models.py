"""Every model: built from its seed alone, checked when built, and equal stacked under torch.vmap and in a loop."""

import sys
import textwrap

import pytest
import torch
from torch import nn

from fedmom.errors import InputError
from fedmom.tasks.dropout import KEY, AddressedDropout
from fedmom.tasks.models import MODELS, NORMS, ResidualBlock, build_model
from laws import table

CASES = [(name, "batch") for name, entry in MODELS.items() if not entry.tokens] + [
    ("resnet20", "group"),
    ("resnet56", "group"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, much slower when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module of the user's into the current directory; gone again after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed twice in a second would be taken from it
    names = []

    def write(source: str, name: str = "fedmom_test_user_models") -> str:
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(source))
        names.append(name)
        sys.modules.pop(name, None)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def refused(name: str, *words: str, shape: tuple[int, ...] = (4,), **options) -> str:
    with pytest.raises(InputError) as caught:
        build_model(name, shape, 3, seed=0, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@table(
    "name, parameters",
    [("logistic", 30_730), ("mlp", 656_810), ("cnn", 1_626_442), ("resnet20", 269_722), ("resnet56", 853_018)],
)
def test_published_sizes_on_cifar10(name, parameters):
    for norm in NORMS:
        assert count(build_model(name, (3, 32, 32), 10, seed=0, norm=norm)) == parameters, norm
    assert f"{parameters:,}" in MODELS[name].summary


def test_the_2nn_of_mcmahan_has_199210_parameters_on_mnist():
    assert count(build_model("mlp", (1, 28, 28), 10, seed=0)) == 199_210


@pytest.mark.parametrize("hidden", [1, 7])
def test_hidden_is_the_width_of_both_layers(hidden):
    assert count(build_model("mlp", (5,), 3, seed=0, hidden=hidden)) == 6 * hidden + (hidden + 1) * (hidden + 3)


@table("name, norm", CASES)
def test_any_image_shape(name, norm):
    for shape in ((1, 8, 8), (3, 9, 7)):
        model = build_model(name, shape, 4, seed=0, norm=norm)
        assert model.training
        assert model(torch.rand(3, *shape)).shape == (3, 4)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["logistic", "mlp"])
@pytest.mark.parametrize("shape", [(1,), (1, 2, 3, 4)])
def test_features_of_any_shape(name, shape):
    assert build_model(name, shape, 2, seed=0)(torch.rand(3, *shape)).shape == (3, 2)


@table("name, norm", CASES)
def test_the_seed_alone_decides_the_parameters(name, norm):
    def build(seed):
        return dict(build_model(name, (1, 8, 8), 3, seed=seed, norm=norm).named_parameters())

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = build(seed=5), build(seed=6)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if key.endswith("weight") and first[key].ndim > 1]
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("norm", NORMS)
def test_resnet_normalises_as_asked(norm):
    kinds = {type(layer) for layer in build_model("resnet20", (3, 8, 8), 2, seed=0, norm=norm).modules()}
    assert (nn.BatchNorm2d in kinds, nn.GroupNorm in kinds) == (norm == "batch", norm == "group")


def test_building_leaves_batchnorm_as_it_starts():
    model = build_model("resnet20", (3, 8, 8), 2, seed=0)
    for name, buffer in model.named_buffers():
        start = 1.0 if name.endswith("running_var") else 0.0
        assert torch.equal(buffer, torch.full_like(buffer, start)), name


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_resnet_depth_and_he_initialisation(name):
    model = build_model(name, (3, 8, 8), 10, seed=0)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))
    # The widest convolutions have 36,864 weights, whose standard deviation is known to 0.4 %.
    wide = [layer.weight for layer in layers if layer.weight.shape == (64, 64, 3, 3)]
    assert wide
    for weight in wide:
        assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_option_a_shortcut_subsamples_and_pads_with_zero_channels():
    model = build_model("resnet20", (3, 8, 8), 2, seed=0)
    block = next(layer for layer in model if isinstance(layer, ResidualBlock) and layer.stride == 2)
    nn.init.zeros_(block.norm2.weight)  # the branch contributes nothing
    x = torch.rand(2, 16, 5, 7)
    out = block(x)
    assert out.shape == (2, 32, 3, 4)
    torch.testing.assert_close(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()


def test_the_cnn_drops_out_by_address_a_quarter_and_a_half():
    layers = [m for m in build_model("cnn", (1, 8, 8), 2, seed=0).modules() if isinstance(m, AddressedDropout)]
    assert [layer.p for layer in layers] == [0.25, 0.5]


@pytest.mark.parametrize("num_clients", [3])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_vmap_equals_a_loop(name, norm, num_clients):
    """Stacked parameters and buffers, training mode: logits, gradients and new buffers of every client."""
    shape, num_classes = (2, 7, 6), 3
    models = [build_model(name, shape, num_classes, seed=k, norm=norm, hidden=5).double() for k in range(num_clients)]
    for k, model in enumerate(models):
        for key, buffer in model.named_buffers():
            if key.endswith(KEY):
                buffer.fill_(k)
    params, buffers = torch.func.stack_module_state(models)
    params = {key: value.detach() for key, value in params.items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(num_clients, 4, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(num_classes, (num_clients, 4), generator=generator)

    def loss(params, buffers, x, y):
        after = {key: buffer.clone() for key, buffer in buffers.items()}
        logits = torch.func.functional_call(models[0], {**params, **after}, (x,))
        return nn.functional.cross_entropy(logits, y), (logits, after)

    step = torch.func.grad(loss, has_aux=True)
    stacked = torch.vmap(step)(params, buffers, x, y)
    rows = [
        step({key: p[k] for key, p in params.items()}, {key: b[k] for key, b in buffers.items()}, x[k], y[k])
        for k in range(num_clients)
    ]
    looped = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)
    torch.testing.assert_close(stacked, looped, rtol=1e-10, atol=1e-10)

    grads, (_, after) = stacked
    assert all(grad.abs().amax() > 0 for grad in grads.values())
    counts = [buffer for key, buffer in after.items() if key.endswith("num_batches_tracked")]
    assert bool(counts) == (name.startswith("resnet") and norm == "batch")
    assert all(torch.equal(number, torch.ones_like(number)) for number in counts)
    # and functional_call equals calling the module itself
    torch.testing.assert_close(rows[0][1][0], models[0](x[0]), rtol=1e-10, atol=1e-10)


def test_unknown_names_say_what_is_meant():
    refused("resnet57", "model.name = 'resnet57'", "did you mean resnet56", *MODELS)
    refused("mlp", "model.norm = 'layer'", "batch, group", norm="layer")
    refused("mlp", "model.hidden = 0", hidden=0)


@pytest.mark.parametrize("name", ["cnn", "resnet56"])
@pytest.mark.parametrize("shape", [(12,), (1, 2, 3, 4)])
def test_image_models_refuse_other_data(name, shape):
    refused(name, f"model.name = {name!r}", str(list(shape)), "[C, H, W]", shape=shape)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 32, 5)])
def test_images_too_small_for_the_cnn(shape):
    refused("cnn", "model.name = 'cnn'", str(list(shape)), "6x6", shape=shape)
    assert build_model("cnn", (3, 6, 6), 2, seed=0)(torch.rand(2, 3, 6, 6)).shape == (2, 2)


def test_a_users_model(user_module):
    module = user_module("""
        def net(input_shape, num_classes):
            return nn.Sequential(nn.Linear(input_shape[0], num_classes), nn.Dropout(0.5)).double().eval()
    """)
    torch.manual_seed(3)
    first = build_model(f"{module}:net", (4,), 3, seed=0)
    torch.manual_seed(4)
    again = build_model(f"{module}:net", (4,), 3, seed=0)
    assert torch.equal(first[0].weight, again[0].weight)
    assert first.training
    assert first[0].weight.dtype == torch.float32
    assert isinstance(first[1], AddressedDropout)


@table(
    "body, words",
    [
        ("return nn.Linear(4, 7)", ["must return logits [B, 3]", "[2, 7]"]),
        ("return nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))", ["must return logits [B, 3]", "[6]"]),
        ("return nn.Linear(5, 3)", ["fails on a batch of shape [2, 4]", "RuntimeError"]),
        ("return nn.Identity()", ["no trainable parameters"]),
        ("return nn.Linear(4, 3).requires_grad_(False)", ["no trainable parameters"]),
        ("return nn.LazyLinear(3)", ["lazy"]),
        ("return 'net'", ["must return an nn.Module", "str"]),
        ("raise OSError('two\\nlines')", ["net((4,), 3) raised OSError: two lines"]),
        ("return nn.LSTM(4, 3)", ["must return logits", "tuple"]),
        ("return nn.Sequential(nn.Linear(4, 3), nn.AlphaDropout(0.5))", ["nn.Dropout", "random"]),
        ("return Noisy()", ["nn.Dropout", "random"]),
    ],
)
def test_users_models_that_cannot_work(user_module, body, words):
    module = user_module(f"""
        class Noisy(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)

            def forward(self, x):
                return nn.functional.dropout(super().forward(x), 0.5, self.training)

        def net(input_shape, num_classes):
            {body}
    """)
    before = torch.get_rng_state()
    refused(f"{module}:net", f"model.name = '{module}:net'", *words)
    assert torch.equal(before, torch.get_rng_state())


@table(
    "spec, words",
    [
        ("fedmom_no_such:net", ["no module named 'fedmom_no_such'", "sys.path"]),
        ("fedmom_test_found:nett", ["module 'fedmom_test_found' has no attribute 'nett'"]),
        ("fedmom_test_found:size", ["not a function", "int"]),
        (":net", ["package.module:function"]),
        ("../a:net", ["package.module:function"]),
        ("fedmom_test_broken:net", ["importing 'fedmom_test_broken' raised ZeroDivisionError"]),
        ("fedmom_test_typo:net", ["importing 'fedmom_test_typo' raised SyntaxError"]),
        ("fedmom_test_needs:net", ["raised ModuleNotFoundError", "'fedmom_no_such_dependency'"]),
        ("fedmom_test_script:net", ["raised SystemExit: 3"]),
    ],
)
def test_names_that_lead_nowhere(user_module, spec, words):
    user_module("size = 3", "fedmom_test_found")
    user_module("1 / 0", "fedmom_test_broken")
    user_module("def net(:", "fedmom_test_typo")
    user_module("import fedmom_no_such_dependency", "fedmom_test_needs")
    user_module("raise SystemExit(3)", "fedmom_test_script")
    path = list(sys.path)
    refused(spec, f"model.name = {spec!r}", *words)
    assert sys.path == path
