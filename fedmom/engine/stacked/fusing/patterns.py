"""Which layers of a folded model go through one operator together: convolution, ReLU, pooling; BatchNorm, sum, ReLU.

Dropout turns what is to be flattened round. The model's forward function is traced once (tracing.py).
"""

import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional

from fedmom.engine.stacked.folded.layers import FoldedBatchNorm, FoldedConv, FoldedDropout, FoldedPool
from fedmom.engine.stacked.fusing.modules import ConvReluPool, DroppedFlat, NormRelu, window
from fedmom.engine.stacked.fusing.tracing import WRITES, traced

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

    def flattens(self, node: fx.Node | None) -> TypeGuard[fx.Node]:
        """Whether it puts each example's numbers in a row."""
        if node is None:
            return False
        layer = self.layer(node, nn.Flatten)
        by_layer = layer is not None and (layer.start_dim, layer.end_dim) == (1, -1)
        by_name = (node.op, node.target) in (("call_function", torch.flatten), ("call_method", "flatten"))
        return by_layer or (by_name and node.args[1:] == (1,) and not node.kwargs)

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
            elif (dropout := self.layer(node, FoldedDropout)) and self.flattens(after) and self.may_move([node, after]):
                yield [node, after], DroppedFlat(dropout)

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
        return not known or name.endswith("_") or name in (*WRITES, "setitem")


def fuse(model: nn.Module) -> nn.Module:
    """A folded model in training with one module in the place of several; the model itself where nothing is to do.

    They share their layers. On a device where the operators are not used the new modules do what the old ones did.
    """
    root = nn.Sequential(model)  # which calls it on one value: its other arguments have their defaults
    try:
        graph = traced(root)
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
