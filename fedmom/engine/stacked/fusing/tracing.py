"""A folded model's forward function, traced once, where the trace would do the same in every step.

A trace keeps what it saw, so a model that might do another thing in another step is not traced: one that asks what a
value is, changes an attribute, makes tensors of its own, has hooks, or computes within a context (no_grad, autocast, a
checkpoint, an autograd.Function of its own).
"""

import copy
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn, overrides
from torch.utils._python_dispatch import TorchDispatchMode

from fedmom.engine.stacked.folded.fold import FOLDED

_LAYERS: Any = tuple(set(FOLDED.values()))


class _UnsafeError(Exception):
    """Why a trace is not used."""


class _Value(fx.Proxy):
    """A value of the trace. `x += y` writes into x, which fx alone takes for x = x + y."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Asked for by isinstance: a model that does so would be told that its input is no tensor."""
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if not asks.startswith("torch."):
            raise _UnsafeError(f"{asks} asks what a value is")
        return _Value


def _in_place(name: str) -> Any:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return write


WRITES = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
for _name in WRITES:
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Of whose nodes all are made in the surroundings that the tracing began in."""

    def __init__(self) -> None:
        super().__init__()
        self.surroundings = _surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.surroundings:
            raise _UnsafeError("a context that a trace does not keep")
        return super().create_node(*args, **kwargs)


def _surroundings() -> tuple[Any, ...]:
    """What an operator's meaning depends on besides its operands."""
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    casts = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return *modes, *casts, hooks, torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


@contextmanager
def _without_modes() -> Iterator[None]:
    """What watches torch's functions need not see those that are only traced."""
    held = []
    while torch._C._len_torch_function_stack():
        held.append(overrides._pop_mode())
    try:
        yield
    finally:
        for mode in reversed(held):
            overrides._push_mode(mode)


class _NothingReal(TorchDispatchMode):
    """A trace computes nothing: what would come of it, or be written to, would stay as it was then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _UnsafeError(f"{func} of tensors that do not come from the input")


class _Held:
    """All attributes of all modules, and what is in plain containers among them."""

    def __init__(self, model: nn.Module) -> None:
        self.held: list[tuple[Any, Any]] = []  # (a container, a copy of it)
        for module in model.modules():
            inside = [v for v in vars(module).values() if isinstance(v, dict | list | set)]
            self.held += [(one, copy.copy(one)) for one in (vars(module), *inside)]

    def put_back(self) -> bool:
        """Whether there was something that had changed."""
        changed = False
        for here, kept in self.held:
            if _parts(here) != _parts(kept):
                changed = True
                here.clear()
                here.extend(kept) if isinstance(here, list) else here.update(kept)
        return changed


def _parts(container: Any) -> list[int]:
    """Who is in it; not what they say of being equal."""
    values = container.values() if isinstance(container, dict) else ()
    return [id(one) for one in (*container, *values)]


def traced(root: nn.Module) -> fx.Graph:
    """Raises _UnsafeError, or whatever the model raises on a value that is none."""
    for module in root.modules():
        if any("hooks" in name and value for name, value in vars(module).items()):
            raise _UnsafeError("hooks")
        if not module.training:
            raise _UnsafeError("a module in evaluation mode")
    held = _Held(root)
    try:
        with _without_modes(), _NothingReal():
            graph = _Tracer().trace(root)
    finally:
        changed = held.put_back()
    if changed:
        raise _UnsafeError("an attribute changes")
    return graph
