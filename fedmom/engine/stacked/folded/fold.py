"""A copy of a model for the examples of K clients in one batch, [K·B, ...] -> [K·B, ...].

Only layers with parameters or statistics must know that there are clients; `fold` puts such layers in their place in
any model made of known ones. In a round's first step all rows of the weights are one point, expanded, and the forward
pass is an ordinary one over K·B examples. What is not trained is the same for all clients, and one product for all.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from fedmom.data.inputs import Inputs
from fedmom.engine.stacked.folded.attention import FoldedAttention
from fedmom.engine.stacked.folded.clients import Clients, FoldError
from fedmom.engine.stacked.folded.dense import FoldedLinear
from fedmom.engine.stacked.folded.embeddings import FoldedEmbedding, common_indexes
from fedmom.engine.stacked.folded.layers import (
    FoldedBatchNorm,
    FoldedConv,
    FoldedDropout,
    FoldedGroupNorm,
    FoldedLayerNorm,
    FoldedPool,
)
from fedmom.tasks.dropout import KEY, AddressedDropout
from fedmom.tasks.places import copied, hooks_of

FOLDED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: FoldedLinear,
    nn.Embedding: FoldedEmbedding,
    nn.Conv1d: FoldedConv,
    nn.Conv2d: FoldedConv,
    nn.Conv3d: FoldedConv,
    nn.BatchNorm1d: FoldedBatchNorm,
    nn.BatchNorm2d: FoldedBatchNorm,
    nn.BatchNorm3d: FoldedBatchNorm,
    nn.GroupNorm: FoldedGroupNorm,
    nn.LayerNorm: FoldedLayerNorm,
    nn.MultiheadAttention: FoldedAttention,
    nn.MaxPool2d: FoldedPool,
    AddressedDropout: FoldedDropout,
}


_BY_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # which no two clients may share, trained or not
_WITH_ATTENTION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def fold(model: nn.Module, x: Inputs | None = None) -> tuple[nn.Module, Clients]:
    """A copy of `model` for folded batches, [K·B, ...] -> [K·B, ...], whose layers take their weights from `Clients`.

    x: three examples, by which embeddings of positions are told from those of words; left out, there are none of
    positions. Frozen parameters are the model's own, and buffers of other modules stay as they are: constants, such as
    a mask. Raises FoldError, with the reason, for a model with trained parameters outside of the layers in FOLDED that
    are not [1, ...], as beside a batch. Whether its forward function mixes examples, or writes buffers, cannot be seen
    from here: compare it with the plain path.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    names |= {id(b): name for name, b in model.named_buffers() if name.rpartition(".")[2] != KEY}
    for name, parameter in model.named_parameters():
        if hooks_of(parameter):
            raise FoldError(f"a hook on the parameter {name} is written for one client")
    clients, common = Clients(), set() if x is None else common_indexes(model, x)
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    held: list[tuple[str, str, str]] = []  # (module, its own name of a parameter, the name in the model)
    inside: set[int] = set()  # modules of layers that are replaced as a whole
    for name, layer in model.named_modules():
        make, given = FOLDED.get(type(layer)), [*layer.parameters()]
        trained = [p for p in given if p.requires_grad]
        if id(layer) in inside:
            continue
        if make and (trained or not given or isinstance(layer, _BY_BATCH)):
            if own := _made_special(layer):
                raise FoldError(f"the {type(layer).__name__} {name!r} has {own} of its own")
            tensors = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers()]
            mine = {part: names[id(t)] for part, t in tensors if id(t) in names}
            clients.frozen |= {names[id(p)]: p for p in given if not p.requires_grad}
            memo[id(layer)] = folded = make(clients, layer, mine)
            inside |= {id(inner) for inner in layer.modules()}
            if isinstance(folded, FoldedEmbedding):
                folded.common = name in common
        elif "forward" in vars(layer) and type(layer).__name__ != "OptimizedModule":  # torch.compile's makes it anew
            # Its function may hold the layers that are replaced here.
            raise FoldError(f"{type(layer).__name__} {name!r} has a forward function of its own")
        else:
            held += [(name, part, names[id(p)]) for part, p in _held(layer).items()]
    twin = copied(model, memo)
    clients.held = [(twin.get_submodule(at), part, name) for at, part, name in held]
    clients.clear()
    return twin, clients


def _held(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters that a module holds itself, each [1, ...]: one for a whole batch.

    Raises FoldError for others, and for layers of torch's own that have the batch elsewhere.
    """
    trained = any(p.requires_grad for p in layer.parameters())
    if trained and isinstance(layer, _WITH_ATTENTION) and not layer.self_attn.batch_first:
        raise FoldError(f"a {type(layer).__name__} with batch_first=False has the examples second")
    found = {part: p for part, p in layer._parameters.items() if p is not None and p.requires_grad}
    for part, parameter in found.items():
        if parameter.ndim < 2 or len(parameter) != 1:
            raise FoldError(f"{type(layer).__name__} holds {part} itself")
    return found


def _made_special(layer: nn.Module) -> str:
    """What a layer has that its folded form would leave out, or ""."""
    if "forward" in vars(layer):
        return "a forward function"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return next((kind.strip("_").replace("_", " ") for kind in kinds if vars(layer).get(kind)), "")
