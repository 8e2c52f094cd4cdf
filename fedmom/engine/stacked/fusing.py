"""Which layers of a folded model go through one operator together: convolution, ReLU, pooling; BatchNorm, sum, ReLU.

The model's forward function is traced once. A trace keeps what it saw, so a model that might do another thing in
another step stays as it is: one that asks what a value is, changes an attribute, makes tensors of its own, has hooks,
or computes within a context (no_grad, autocast, a checkpoint, an autograd.Function of its own).
"""

import copy
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn, overrides
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedmom.engine.stacked.kernels import fused
from fedmom.engine.stacked.layers import FOLDED, FoldedBatchNorm, FoldedConv, FoldedPool

_LAYERS: Any = tuple(set(FOLDED.values()))
_MOST_PLACES = 16  # of a window: the kernel writes its loop out

# --- modules that stand for several ---------------------------------------------------------------------------


class ConvReluPool(nn.Module):
    """Max-pooling of relu(conv(x)); the bias is added where the result of the convolution is next read."""

    def __init__(self, conv: FoldedConv, pool: FoldedPool | None) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool
        self.size = (1, 1) if pool is None else window(pool)

    def forward(self, x: Tensor) -> Tensor:
        K = self.conv.clients.num
        if x.ndim != 4 or not fused.on(x, K):
            y = torch.relu(self.conv(x))
            return y if self.pool is None else self.pool(y)
        y = self.conv(x, bias=False)
        if any(n < k for n, k in zip(y.shape[2:], self.size, strict=True)):
            raise RuntimeError(f"no window of {self.size} fits into activations of {list(y.shape[2:])}")
        found: Tensor = fused.ReluPooled.apply(y, self.conv.bias(), K, self.size)
        return found


class NormRelu(nn.Module):
    """relu(norm(x) + residual)."""

    def __init__(self, norm: FoldedBatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        together = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        if together and fused.on(x, self.norm.clients.num):
            return self.norm(x, residual, relu=True)
        y = self.norm(x)
        return torch.relu(y if residual is None else y + residual)


def window(pool: FoldedPool) -> tuple[int, int]:
    """Of a MaxPool2d whose windows lie side by side; (0, 0) for any other."""
    layer = pool.layer
    size, stride, padding, dilation = (
        _pair(n) for n in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    simple = size == stride and padding == (0, 0) and dilation == (1, 1) and not layer.ceil_mode
    return size if simple and size[0] * size[1] <= _MOST_PLACES else (0, 0)


def _pair(n: Any) -> tuple[int, int]:
    first, second = (n, n) if isinstance(n, int) else n
    return int(first), int(second)


# --- tracing --------------------------------------------------------------------------------------------------


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


_WRITES = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
for _name in _WRITES:
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


def _traced(root: nn.Module) -> fx.Graph:
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


# --- patterns -------------------------------------------------------------------------------------------------

_RELU = (functional.relu, torch.relu, torch.relu_)
_ADD = (torch.add, operator.add, operator.iadd)


class _Patterns:
    """The chains of nodes of a graph that one module can stand for."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.nodes = list(graph.nodes)

    def layer(self, node: fx.Node | None, kind: type[nn.Module]) -> Any:
        """The module that a node calls on one value, if it is such a one."""
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        found = self.root.get_submodule(str(node.target))
        return found if type(found) is kind else None

    def is_relu(self, node: fx.Node | None) -> bool:
        if node is None or set(node.kwargs) - {"inplace"}:
            return False
        by_function = node.op == "call_function" and node.target in _RELU
        by_method = node.op == "call_method" and node.target in ("relu", "relu_")
        return self.layer(node, nn.ReLU) is not None or ((by_function or by_method) and len(node.args) == 1)

    def next(self, node: fx.Node | None) -> fx.Node | None:
        """The one node that reads this one."""
        return next(iter(node.users)) if node is not None and len(node.users) == 1 else None

    def residual(self, node: fx.Node | None, y: fx.Node) -> fx.Node | None:
        """What the node adds to y, without writing into it."""
        if node is None or node.kwargs or len(node.args) != 2:
            return None
        by_function = node.op == "call_function" and node.target in _ADD
        if not (by_function or (node.op == "call_method" and node.target in ("add", "add_"))):
            return None
        first, second = node.args
        writes = node.target in (operator.iadd, "add_")
        other = second if first is y else first
        return other if isinstance(other, fx.Node) and other is not y and not (writes and first is not y) else None

    def found(self) -> Iterator[tuple[list[fx.Node], nn.Module]]:
        """(chain, the module for it); of two that end in one sum the later one comes first."""
        for node in reversed(self.nodes):
            after = self.next(node)
            if conv := self.layer(node, FoldedConv):
                chain, pool = self.after_conv(node, after)
                if chain and self.may_move(chain):
                    yield chain, ConvReluPool(conv, pool)
            elif norm := self.layer(node, FoldedBatchNorm):
                chain = [node]
                if after is not None and self.residual(after, node) is not None:
                    chain, after = [node, after], self.next(after)
                if after is not None and self.is_relu(after) and self.may_move([*chain, after]):
                    yield [*chain, after], NormRelu(norm)

    def after_conv(self, node: fx.Node, after: fx.Node | None) -> tuple[list[fx.Node], FoldedPool | None]:
        """ReLU and pooling commute, in their gradients too."""
        second = self.next(after)
        first_pool, second_pool = (self.pool(n) for n in (after, second))
        if after is not None and second is not None:
            if self.is_relu(after) and second_pool:
                return [node, after, second], second_pool
            if first_pool and self.is_relu(second):
                return [node, after, second], first_pool
        return ([node, after], None) if after is not None and self.is_relu(after) else ([], None)

    def pool(self, node: fx.Node | None) -> FoldedPool | None:
        found = self.layer(node, FoldedPool)
        return found if found and window(found) != (0, 0) else None

    def may_move(self, chain: list[fx.Node]) -> bool:
        """Whether all of it may happen where it ends: nothing between is written to, and no layer's turn passes."""
        between = self.nodes[self.nodes.index(chain[0]) : self.nodes.index(chain[-1])]
        others = [node for node in between if node not in chain]
        layers = [self.root.get_submodule(str(n.target)) for n in others if n.op == "call_module"]
        first = self.root.get_submodule(str(chain[0].target))
        return all(layer is not first for layer in layers) and not any(self.may_write(node) for node in others)

    def may_write(self, node: fx.Node) -> bool:
        if any(a is True for a in node.args) or "out" in node.kwargs or node.kwargs.get("inplace"):
            return True
        if node.op == "call_module":
            return bool(getattr(self.root.get_submodule(str(node.target)), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        if node.op != "call_function":
            return False
        name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or "torch"
        known = module.partition(".")[0] in ("torch", "_operator", "builtins", "math")
        return not known or name.endswith("_") or name in (*_WRITES, "setitem")


def fuse(model: nn.Module) -> nn.Module:
    """A folded model in training with one module in the place of several; the model itself where nothing is to do.

    They share their layers. On a device where the operators are not used the new modules do what the old ones did.
    """
    root = nn.Sequential(model)  # which calls it on one value: its other arguments have their defaults
    try:
        graph = _traced(root)
    except Exception:  # a model may do anything
        return model
    patterns, taken = _Patterns(root, graph), set[fx.Node]()
    for number, (chain, module) in enumerate(list(patterns.found())):
        if taken & set(chain):
            continue
        taken |= set(chain)
        added = patterns.residual(chain[1], chain[0]) if len(chain) > 2 else None
        operands = (chain[0].args[0], *([] if added is None else [added]))
        root.add_module(f"fused_{number}", module)
        with graph.inserting_before(chain[-1]):
            chain[-1].replace_all_uses_with(graph.call_module(f"fused_{number}", operands))
        for node in reversed(chain):
            graph.erase_node(node)
    return fx.GraphModule(root, graph) if taken else model
