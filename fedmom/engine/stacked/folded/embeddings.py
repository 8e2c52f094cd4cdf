"""nn.Embedding for K clients, of words that each example has, and of places that all examples have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fedmom.data.inputs import Inputs, called_with, num_examples, rows_of_inputs
from fedmom.engine.stacked.folded.clients import Clients, FoldError
from fedmom.tasks.places import bounded, copied


class FoldedEmbedding(nn.Module):
    """nn.Embedding without max_norm and sparse gradients."""

    def __init__(self, clients: Clients, layer: nn.Embedding, names: dict[str, str]) -> None:
        super().__init__()
        if layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq:
            raise FoldError("an Embedding with max_norm, sparse or scale_grad_by_freq")
        self.clients, self.names, self.padding = clients, names, layer.padding_idx
        self.common = False  # whether its index has no axis of examples, and is every example's

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, by which it may be called
        x, K = input, self.clients.num
        if not self.common:
            return self.rows(x.reshape(K, -1, *x.shape[1:])).flatten(0, 1)
        own = x[0] if x.ndim > 1 and len(x) == 1 else x  # [1, T]: the first axis is the batch's
        return self.clients.each(self.rows(own.expand(K, *own.shape)))

    def rows(self, index: Tensor) -> Tensor:
        """[K, ..., d] of each client's weights, by an index [K, ...]."""
        weight = self.clients.params[self.names["weight"]]
        K, V, _ = weight.shape
        first = (torch.arange(K, device=index.device) * V).reshape(K, *[1] * (index.ndim - 1))
        # An index too large must not reach the next client's rows.
        y = embedding(bounded(index, V) + first, weight.reshape(K * V, -1))
        if self.padding is None:
            return y
        return torch.where((index == self.padding)[..., None], y.detach(), y)  # that row is not trained by its use


def common_indexes(model: nn.Module, x: Inputs) -> set[str]:
    """The names of trained nn.Embedding whose index is the same however many examples there are: of positions.

    x: three examples. The model itself, of one client, is run on two of them and on three. Raises FoldError for an
    index that has the examples elsewhere than first, and for a layer that is used in both ways.
    """
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Embedding and m.weight.requires_grad}
    if not layers:
        return set()
    twin, seen = copied(model).train(), dict[str, list[torch.Size]]()

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.setdefault(name, []).append((*args, *kwargs.values())[0].shape)

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True)
    found = []
    for count in (2, 3):
        seen.clear()
        with torch.no_grad():
            called_with(twin, rows_of_inputs(x, slice(count)))
        found.append({name: list(shapes) for name, shapes in seen.items()})
    assert num_examples(x) == 3
    return {name for name in found[0] if _is_common(name, found[0][name], found[1].get(name, []))}


def _is_common(name: str, two: list[torch.Size], three: list[torch.Size]) -> bool:
    """By the shapes of an embedding's indexes, of two examples and of three."""
    kinds = {_kind(a, b) for a, b in zip(two, three, strict=False)} if len(two) == len(three) else {""}
    if "" in kinds:
        raise FoldError(f"the Embedding {name!r} has an index whose first axis is not the examples'")
    if len(kinds) > 1:
        raise FoldError(f"the Embedding {name!r} is used both for each example and for all in common")
    return kinds == {"common"}


def _kind(two: torch.Size, three: torch.Size) -> str:
    if two == three:
        return "common"
    grows = two[1:] == three[1:] and len(two) > 0 and 3 * two[0] == 2 * three[0]
    return "each" if grows else ""
