"""What a model's calls of torch tell: in how few digits it computes, and whether it keeps a batch's examples apart.

A folded model gets the examples of K clients as one batch. What it does with them must not depend on their values, for
a branch would be taken for all clients together, nor on how many they are: a batch that is worked on in pieces of 128
examples has other pieces when it is K times as long. A forward pass says so without any values.
"""

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fedmom.data.inputs import Inputs, called_with, num_examples
from fedmom.tasks.places import copied


class Precision(TorchFunctionMode):
    """The unit of rounding of the roundest real dtype that a call of torch gives back, and whether autocast acted."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.autocast = torch.finfo(torch.float64).eps, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and (found.is_floating_point() or found.is_complex()):
            self.eps = max(self.eps, torch.finfo(found.dtype).eps)
            self.autocast = self.autocast or torch.is_autocast_enabled(found.device.type)
        return found


class _Call(NamedTuple):
    """One call of torch: what must be the same for any number of examples, and the counts that may grow with it."""

    fixed: tuple[Any, ...]
    counts: tuple[int, ...]


class _Calls(TorchFunctionMode):
    """Writes down every call of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fixed: list[Any] = [getattr(func, "__name__", "")]
        counts: list[int] = []
        _take_apart((args, kwargs or {}), fixed, counts)
        self.seen.append(_Call(tuple(fixed), tuple(counts)))
        return func(*args, **(kwargs or {}))


def _take_apart(value: Any, fixed: list[Any], counts: list[int]) -> None:
    if isinstance(value, Tensor):
        fixed += [value.dtype, value.ndim]
        counts += value.shape
    elif isinstance(value, bool | float | complex | str | None):
        fixed.append(repr(value))
    elif isinstance(value, int):
        counts.append(value)
    elif isinstance(value, list | tuple):
        fixed.append(len(value))
        for one in value:
            _take_apart(one, fixed, counts)
    elif isinstance(value, dict):
        for name, one in value.items():
            fixed.append(name)
            _take_apart(one, fixed, counts)
    elif isinstance(value, slice):
        _take_apart((value.start, value.stop, value.step), fixed, counts)
    else:
        fixed.append(type(value))


def _calls(empty: nn.Module, x: Inputs, K: int) -> list[_Call]:
    """Of a forward pass of a model without values with K minibatches like x in one."""
    batch = tree_map(lambda t: torch.empty((K * len(t), *t.shape[1:]), dtype=t.dtype, device="meta"), x)
    with torch.device("meta"), torch.no_grad(), _Calls() as seen:
        called_with(empty, batch)
    return seen.seen


def work_of(model: nn.Module, x: Inputs) -> str:
    """What a forward pass of `model` with one client's minibatch x [B, ...] asks of torch, in a few digits.

    Two models of equal layers that use them in other ways differ in it. "" where it cannot be seen without values.
    """
    try:
        empty = copied(model).to("meta").train()
        _calls(empty, x, 1)  # what is made at first use is made
        seen = _calls(empty, x, 1)
    except Exception:  # a user's model may raise anything
        return ""
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _unasked(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """With is_causal set, nn.TransformerEncoder does not ask whether its mask [T, T] is the causal one: a hint."""
    return (
        (args, kwargs)
        if len(args) > 3 or kwargs.get("is_causal") is not None
        else (args, kwargs | {"is_causal": False})
    )


def mixes_by(model: nn.Module, x: Inputs, sizes: Collection[int]) -> str:
    """Why a forward pass of `model` cannot take the examples of several clients as one batch, or "".

    x: one client's minibatch [B, ...]. sizes: numbers of clients that may be put together. The calls of torch must be
    the same ones for all of them, and every whole number in them (of a shape, an argument) must grow evenly with how
    many clients there are, if it grows at all. Tensors without values (torch's meta device) show it at little cost.
    """
    empty = copied(model).to("meta").train()
    for layer in empty.modules():
        if isinstance(layer, nn.TransformerEncoder):
            layer.register_forward_pre_hook(_unasked, with_kwargs=True)

    def calls(K: int) -> list[_Call]:
        return _calls(empty, x, K)

    try:
        calls(1), calls(2)  # what is made at first use is made
        one, two = calls(1), calls(2)
        grown = [[b - a for a, b in zip(c.counts, d.counts, strict=False)] for c, d in zip(one, two, strict=False)]

        def fits(K: int) -> bool:
            found = calls(K)
            return [c.fixed for c in found] == [c.fixed for c in one] and all(
                c.counts == tuple(a + (K - 1) * by for a, by in zip(first.counts, each, strict=True))
                for first, each, c in zip(one, grown, found, strict=True)
            )

        for K in sorted({2, *sizes} - {1}):
            if not fits(K) and not fits(K):  # once more: something may be made at the first use of each shape
                B = num_examples(x)
                return f"its forward pass does something else with {K * B} examples than with {B}"
    except Exception as error:  # a user's model may raise anything
        return " ".join(f"its forward pass asks for values ({type(error).__name__}: {error}".split())[:200] + ")"
    return ""
