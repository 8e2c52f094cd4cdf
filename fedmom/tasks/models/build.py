"""Models by name, each built from a seed for any input shape and number of classes.

Every model must run under torch.func.functional_call and torch.vmap with stacked parameters and buffers, so
nothing here works in place or asks for a value of a tensor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedmom.data.inputs import Inputs, Shapes, called_with, is_integer
from fedmom.errors import InputError, unknown
from fedmom.tasks.dropout import address_dropout
from fedmom.tasks.kinds import make_task
from fedmom.tasks.models.adapters import adapted
from fedmom.tasks.models.images import NORMS
from fedmom.tasks.models.options import ModelOptions
from fedmom.tasks.models.start import begin_from
from fedmom.tasks.models.table import MODELS
from fedmom.tasks.places import cast, check_model, copied
from fedmom.tasks.task import Task
from fedmom.user_code import is_spec, load_object, one_line


def build_model(
    name: str,
    input_shape: Shapes,
    num_classes: int,
    *,
    seed: int,
    norm: str = "batch",
    hidden: int = 200,
    layers: int = 2,
    heads: int = 4,
    lora_rank: int = 0,
    start: str = "",
    like: Inputs | None = None,
    task: Task | None = None,
    targets: Tensor | None = None,
) -> nn.Module:
    """A float32 model on the CPU, in training mode: [B, *input_shape] -> [B, num_classes] logits, or what the task has.

    The same seed gives the same parameters; torch's global random state is neither read nor changed. A user's
    "module:function" is called as f(input_shape, num_classes). `like`, `targets`: examples, and what is to be predicted
    of them; left out, real numbers and one label each. `task`: left out, classification. `start`: a safetensors file
    that the model begins from, before adapters of `lora_rank` are put beside its layers (adapters.py).
    """
    options, function = _options(norm, hidden, layers, heads, lora_rank), _function(name)
    # default_generator, because torch.manual_seed would also reseed the GPUs, which fork_rng leaves out here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if function is None:
            assert isinstance(input_shape, tuple), "several inputs are for models of the user's own"
            model = MODELS[name].build(input_shape, num_classes, options)
        else:
            model = _call_user(name, function, input_shape, num_classes)
        check_model(model, f"model.name = {name!r}")
        _check_parameters(name, model)
        model = cast(model, "cpu", torch.float32)
        if start:
            begin_from(model, start)
        model = address_dropout(adapted(name, model, lora_rank))
        model.train()  # of which a user's own may forget to give the model back
        _check_task(name, model, task, input_shape, num_classes, like, targets)
    return model


def _options(norm: str, hidden: int, layers: int, heads: int, lora_rank: int) -> ModelOptions:
    if norm not in NORMS:
        raise unknown("model.norm", norm, NORMS)
    sizes = {"hidden": (hidden, 1), "layers": (layers, 1), "heads": (heads, 1), "lora-rank": (lora_rank, 0)}
    for key, (size, least) in sizes.items():
        if size < least:
            raise InputError(f"model.{key} = {size}: must be at least {least}")
    return ModelOptions(norm, hidden, layers, heads)


def _function(name: str) -> Callable[..., object] | None:
    """The user's own; None for one of MODELS."""
    if is_spec(name):
        found: Callable[..., object] = load_object("model.name", name)
        return found
    if name not in MODELS:
        raise unknown("model.name", name, [*MODELS, '"module:function"'])
    return None


def _check_task(
    name: str,
    model: nn.Module,
    task: Task | None,
    input_shape: Shapes,
    num_classes: int,
    like: Inputs | None,
    targets: Tensor | None,
) -> None:
    """Whether it takes such examples, and gives what the task asks for."""
    tokens = name in MODELS and MODELS[name].tokens
    task = task or make_task("per-token" if tokens else "classification")
    if tokens and task.targets != "tokens":
        raise InputError(f"model.name = {name!r}: tells each token's successor; give data.task = 'per-token'")
    if like is None:
        like = torch.zeros(2, *input_shape, dtype=torch.int64) if tokens else torch.rand(2, *input_shape)
    x, shape = _two_like(like), [2]
    if task.targets == "tokens":  # what is predicted for each of T tokens
        shape += targets.shape[1:] if targets is not None else x.shape[1:] if isinstance(x, Tensor) else ()
    _check_forward(name, model, x, task, shape, num_classes)


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
