"""Models by name, each built from a seed for any input shape and number of classes.

Every model must run under torch.func.functional_call and torch.vmap with stacked parameters and buffers, so
nothing here works in place or asks for a value of a tensor.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedmom.data.inputs import Inputs, Shapes, called_with, is_integer
from fedmom.errors import InputError, unknown
from fedmom.tasks.dropout import address_dropout
from fedmom.tasks.places import cast, check_model, copied
from fedmom.tasks.task import Task, make_task
from fedmom.user_code import is_spec, load_object, one_line

Shape = tuple[int, ...]  # of one example: (C, H, W) for images


def build_model(
    name: str,
    input_shape: Shapes,
    num_classes: int,
    *,
    seed: int,
    norm: str = "batch",
    hidden: int = 200,
    like: Inputs | None = None,
    task: Task | None = None,
    targets: Tensor | None = None,
) -> nn.Module:
    """A float32 model on the CPU, in training mode: [B, *input_shape] -> [B, num_classes] logits, or what the task has.

    The same seed gives the same parameters; torch's global random state is neither read nor changed. A user's
    "module:function" is called as f(input_shape, num_classes). `like`, `targets`: examples, and what is to be predicted
    of them; left out, real numbers and one label each. `task`: left out, classification.
    """
    if norm not in NORMS:
        raise unknown("model.norm", norm, NORMS)
    if hidden < 1:
        raise InputError(f"model.hidden = {hidden}: must be at least 1")
    if is_spec(name):
        function = load_object("model.name", name)
    elif name in MODELS:
        function = None
    else:
        raise unknown("model.name", name, [*MODELS, '"module:function"'])
    # default_generator, because torch.manual_seed would also reseed the GPUs, which fork_rng leaves out here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if function is None:
            assert isinstance(input_shape, tuple), "several inputs are for models of the user's own"
            model = MODELS[name].build(input_shape, num_classes, ModelOptions(norm, hidden))
        else:
            model = _call_user(name, function, input_shape, num_classes)
        check_model(model, f"model.name = {name!r}")
        _check_parameters(name, model)
        model = address_dropout(cast(model, "cpu", torch.float32))
        model.train()  # of which a user's own may forget to give the model back
        x = _two_like(torch.rand(2, *input_shape) if like is None else like)
        task = task or make_task("classification")
        shape = [2, *(targets.shape[1:] if targets is not None and task.targets == "tokens" else ())]
        _check_forward(name, model, x, task, shape, num_classes)
    return model


class ModelOptions(NamedTuple):
    """What a config says about a model besides its name."""

    norm: str
    hidden: int


def batch_norm(channels: int) -> nn.Module:
    """BatchNorm: running statistics are averaged with the model (algorithm.running-var)."""
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    """Two groups, as Reddi et al. (ICLR 2021) for their CIFAR ResNets: two divides 16, 32 and 64.

    Hsieh et al. (ICML 2020) propose it where clients' labels are skewed: BatchNorm's statistics then differ
    between clients and those of the averaged model fit none; GroupNorm (Wu, He, ECCV 2018) keeps none.
    """
    return nn.GroupNorm(2, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": batch_norm, "group": group_norm}


def logistic(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(input_shape), num_classes))


def mlp(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    """The 2NN of McMahan et al. (AISTATS 2017) at hidden = 200."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(_size(input_shape), options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, options.hidden),
        nn.ReLU(),
        nn.Linear(options.hidden, num_classes),
    )


def cnn(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    """pfl-research's CNN for CIFAR-10 (Granqvist et al., NeurIPS 2024), with its Glorot initialisation."""
    channels, height, width = _image("cnn", input_shape, smallest=6)
    # Two 3x3 convolutions without padding take 4 off each side, the pooling halves the rest.
    features = 64 * ((height - 4) // 2) * ((width - 4) // 2)
    model = nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


class ResidualBlock(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x)))))), x' being x subsampled and padded with zero channels.

    That is the shortcut without parameters, option A of He et al. (CVPR 2016), section 4.2.
    """

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        branch = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(x + branch)


class GlobalAveragePool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C]."""
        return x.mean(dim=(2, 3))


def resnet(name: str, blocks_per_stage: int, input_shape: Shape, num_classes: int, norm: str) -> nn.Module:
    """He et al. (CVPR 2016), section 4.2: 6n + 2 layers, n blocks each of 16, 32 and 64 channels."""
    channels, _, _ = _image(name, input_shape, smallest=1)
    make_norm = NORMS[norm]
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), make_norm(16), nn.ReLU()]
    width = 16
    for stage_width in (16, 32, 64):
        for _ in range(blocks_per_stage):
            layers.append(ResidualBlock(width, stage_width, make_norm))
            width = stage_width
    model = nn.Sequential(*layers, GlobalAveragePool(), nn.Linear(width, num_classes))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # He et al. (ICCV 2015), equation 10
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def resnet20(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return resnet("resnet20", 3, input_shape, num_classes, options.norm)


def resnet56(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    return resnet("resnet56", 9, input_shape, num_classes, options.norm)


class ModelEntry(NamedTuple):
    build: Callable[[Shape, int, ModelOptions], nn.Module]
    summary: str  # one line; parameters counted for 3x32x32 images and 10 classes
    images: bool = False  # whether it looks at neighbouring pixels, so that [C, H, W] must be that


MODELS: dict[str, ModelEntry] = {
    "logistic": ModelEntry(logistic, "multinomial logistic regression, 30,730 parameters on CIFAR-10"),
    "mlp": ModelEntry(mlp, "two hidden layers of 200 (model.hidden), 656,810 parameters on CIFAR-10"),
    "cnn": ModelEntry(cnn, "two convolutions, dropout, two dense layers; 1,626,442 parameters on CIFAR-10", True),
    "resnet20": ModelEntry(resnet20, "CIFAR ResNet of 20 layers, normalised by model.norm, 269,722 parameters", True),
    "resnet56": ModelEntry(resnet56, "CIFAR ResNet of 56 layers, normalised by model.norm, 853,018 parameters", True),
}


def _size(input_shape: Shape) -> int:
    return torch.Size(input_shape).numel()


def _image(name: str, input_shape: Shape, smallest: int) -> tuple[int, int, int]:
    """(C, H, W), or an error when the model cannot take examples of this shape."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        needs = f"images [C, H, W] of at least {smallest}x{smallest}"
        have = f"the examples have shape {list(input_shape)}; use mlp or logistic"
        raise InputError(f"model.name = {name!r}: needs {needs}, {have}")
    channels, height, width = input_shape
    return channels, height, width


def _call_user(name: str, function: Callable[..., object], input_shape: Shapes, num_classes: int) -> nn.Module:
    try:
        model = function(input_shape, num_classes)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        called = f"{name.partition(':')[2]}({input_shape}, {num_classes})"
        raise InputError(f"model.name = {name!r}: {called} raised {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name = {name!r}: must return an nn.Module, returned {type(model).__name__}")
    return model


def _check_parameters(name: str, model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise InputError(f"model.name = {name!r}: has lazy layers; give every layer its sizes")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model.name = {name!r}: has no trainable parameters")


def _two_like(x: Inputs) -> Inputs:
    """Two examples of the same shape: zeros where they are ids, else random numbers in [0, 1)."""

    def two(t: Tensor) -> Tensor:
        return torch.zeros(2, *t.shape[1:], dtype=torch.int64) if is_integer(t) else torch.rand(2, *t.shape[1:])

    found: Inputs = tree_map(two, x)
    return found


def _check_forward(name: str, model: nn.Module, x: Inputs, task: Task, shape: Sequence[int], num_classes: int) -> None:
    """Two examples through a copy in training mode, because BatchNorm would remember them."""
    before, twin = torch.get_rng_state(), copied(model)
    try:
        with torch.no_grad():
            outputs = called_with(twin, x)
    except Exception as error:
        raise InputError(f"model.name = {name!r}: fails on {_batch(x)}: {one_line(error)}") from error
    if not torch.equal(before, torch.get_rng_state()):
        advice = "use nn.Dropout layers, whose masks are addressed by (seed, client, step)"
        raise InputError(f"model.name = {name!r}: draws random numbers in its forward pass; {advice}")
    if want := task.check_outputs(outputs, shape, num_classes):
        if not isinstance(outputs, Tensor):
            raise InputError(f"model.name = {name!r}: must return logits, returned {type(outputs).__name__}")
        right = want.replace("[2", "[B", 1)
        raise InputError(f"model.name = {name!r}: must return {right}, made {list(outputs.shape)} of {_batch(x)}")


def _batch(x: Inputs) -> str:
    if isinstance(x, dict):
        return "a batch of " + ", ".join(f"{n} {list(t.shape)}" for n, t in x.items())
    return f"a batch of shape {list(x.shape)}"
