"""A client's own tensors in a model's places: for the forward pass, for the backward pass, and for nobody else.

torch.func.functional_call puts tensors in for one call. What autograd runs later (a checkpointed layer runs its forward
pass again, a hook reads a weight) must find the same ones, so the whole step happens inside one call.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, one_hot
from torch.overrides import TorchFunctionMode

from fedmom.errors import InputError
from fedmom.method.state import Tree
from fedmom.tasks.dropout import KEY
from fedmom.user_code import one_line

T = TypeVar("T")


class _Within(nn.Module):
    """Whose forward pass is any function of the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        return function(self.model)


class Places:
    """Where the tensors of a model stand, each under one name, however many modules or attributes share it.

    Trained parameters are x. A complex one is trained as its real and imaginary parts: real, with a last axis of 2, as
    torch.optim does it; so all that is sent, averaged and stored is real.
    """

    def __init__(self, model: nn.Module) -> None:
        self.within = _Within(model)
        first = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        buffers = dict(model.named_buffers())
        self.dropout_keys = [name for name in buffers if name.rpartition(".")[2] == KEY]
        # What has no mean over clients stays as it is (phases, a graph, a code book, a mask of −inf): {name: why}.
        # That no step changes it is looked at before the first round (engine/look.py).
        whys = {name: _no_mean(b) for name, b in buffers.items() if name not in self.dropout_keys}
        self.constant = {name: why for name, why in whys.items() if why}
        self.buffers = {name: buffers[name] for name, why in whys.items() if not why}
        self.complex = {name for name, p in self.params.items() if p.is_complex()}
        self.hooked = [name for name, p in self.params.items() if hooks_of(p)]
        # A module under two names is one place, a weight that two modules share is two.
        self.names: dict[str, list[str]] = {}
        for prefix, module in model.named_modules():
            for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    name = f"{prefix}.{own}" if prefix else own
                    if id(tensor) not in first:
                        raise InputError(
                            f"model.name: {name} is not among the model's named_parameters() or named_buffers(); "
                            "leave these as they are, and freeze what is not to be trained by requires_grad_(False)"
                        )
                    self.names.setdefault(first[id(tensor)], []).append(f"model.{name}")

    def start(self) -> tuple[Tree, Tree]:
        """Copies of x⁰ and of the buffers, in one layout: torch's fused steps want x, u and g in the same."""
        params = {name: (torch.view_as_real(p) if name in self.complex else p) for name, p in self.params.items()}
        return _contiguous(params), _contiguous(self.buffers)

    def run(self, params: Tree, buffers: Tree, function: Callable[[nn.Module], T], *, hooks: bool = False) -> T:
        """function(model) with these tensors in the model's places; what it assigns to buffers is put into `buffers`.

        hooks: call the parameters' own hooks on the gradients of the tensors in their places.
        """
        standing = {}
        for name, tensor in params.items():
            here = torch.view_as_complex(tensor) if name in self.complex else tensor
            if hooks and name in self.hooked:
                _hook(here, self.params[name])
            standing[name] = here
        given = {place: t for name, t in {**standing, **buffers}.items() for place in self.names[name]}
        found: T = torch.func.functional_call(self.within, given, (function,), tie_weights=False)
        # A module may also have been given another tensor for a buffer (self.mean = 0.9 * self.mean + …).
        buffers |= {name: given[self.names[name][0]] for name in buffers}
        return found


def _contiguous(tree: Tree) -> Tree:
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tree.items()}


_NO_SUMS = (torch.uint16, torch.uint32, torch.uint64)  # torch stores these, and hardly computes with them


def _no_mean(buffer: Tensor) -> str:
    """Why a buffer is not averaged over clients; "" where it is."""
    if buffer.layout != torch.strided:
        return "is sparse"
    if buffer.is_quantized or buffer.is_complex() or buffer.dtype in _NO_SUMS:
        return f"is {str(buffer.dtype).removeprefix('torch.')}"
    infinite = buffer.is_floating_point() and not bool(torch.isfinite(buffer).all())
    return "starts with numbers that are not finite" if infinite else ""


def hooks_of(parameter: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    """(how it is registered, the hook) of a parameter."""
    kinds = {"register_hook": "_backward_hooks", "register_post_accumulate_grad_hook": "_post_accumulate_grad_hooks"}
    return [(how, h) for how, kept in kinds.items() for h in (getattr(parameter, kept, None) or {}).values()]


def _hook(tensor: Tensor, parameter: Tensor) -> None:
    for how, hook in hooks_of(parameter):
        getattr(tensor, how)(hook)


def cast(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The model itself on `device`: real numbers in `dtype`, complex ones in the complex dtype that holds it."""
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, wide)
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    return model._apply(moved)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, hooks of parameters included; results that a forward pass left as attributes are cut off.

    memo: {id of a module inside: what stands for it in the copy}. Raises InputError for a model that cannot be copied.
    """
    instead = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors_in(value):
                if not tensor.is_leaf:
                    instead[id(tensor)] = tensor.detach().clone()
    try:
        twin = copy.deepcopy(model, instead)
    except Exception as error:  # a lock, a file, an object of the user's own
        advice = "keep what cannot be copied outside of its modules"
        raise InputError(f"model.name: the model cannot be copied ({one_line(error)}); {advice}") from error
    for one in [] if memo else model.parameters():
        if one.is_leaf and hooks_of(one):
            _hook(instead[id(one)], one)  # which Parameter.__deepcopy__ forgets
    return twin


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Of an attribute, and of the plain containers in it."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple | deque):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one, depth - 1)


def check_model(model: nn.Module, called: str) -> None:
    """Raise InputError, which begins with `called`, for a model in whose places no other tensors can be put."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            at = f"its part {name!r} is" if name else "it is"
            raise InputError(f"{called}: {at} scripted by torch.jit; give the nn.Module that was scripted")


def bounded(index: Tensor, size: int) -> Tensor:
    """The same index, but far out of every range where it is not one of 0 … size − 1."""
    return torch.where((index >= 0) & (index < size), index, torch.iinfo(index.dtype).max // 2)


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
    return embedding(bounded(input, weight.shape[0]), weight, *args, **kwargs)


def _torch_embedding(weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.embedding(weight, bounded(indices, weight.shape[0]), *args, **kwargs)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        return one_hot(tensor, num_classes)
    # torch.vmap gives a row of zeros for what is out of range.
    return torch.eye(num_classes, dtype=torch.int64, device=tensor.device)[bounded(tensor, num_classes)]


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:  # noqa: A002
    """By index_copy, which fails under torch.vmap where an index is out of range: index_fill goes on."""
    places, size = index.reshape(-1), input.shape[dim]
    shape = [*input.shape]
    shape[dim] = len(places)
    fill = torch.as_tensor(value, dtype=input.dtype, device=input.device).expand(shape)
    return input.index_copy(dim, torch.where(places < 0, places + size, places), fill)


def _index_fill_(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:  # noqa: A002
    return input.copy_(_index_fill(input, dim, index, value))


class BoundedGathers(TorchFunctionMode):
    """Within it an index out of an embedding's range fails under torch.vmap as it does alone.

    torch lays the tables of all clients one after the other there, and such an index would read another client's row.
    """

    bounded: ClassVar[dict[Any, Any]] = {
        embedding: _embedding,
        torch.embedding: _torch_embedding,
        one_hot: _one_hot,
        torch.index_fill: _index_fill,
        Tensor.index_fill: _index_fill,
        Tensor.index_fill_: _index_fill_,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.bounded.get(func, func)(*args, **(kwargs or {}))
