"""Layers for K clients at once: activations lie folded, [K·B, ...], so whatever acts on single examples stays as it is.

Only layers with parameters or statistics must know that there are clients; `fold` puts such layers in their place in
any model made of known ones. The weights that layers see are [K, ...], one set per client; in a round's first step all
rows are one point, expanded, and the forward pass is an ordinary one over K·B examples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm, embedding, group_norm, layer_norm

from fedmom.engine.stacked.convolutions import CONVOLUTIONS, Ways
from fedmom.engine.stacked.factors import Factors, factored
from fedmom.engine.stacked.kernels import fused
from fedmom.method.state import Tree
from fedmom.tasks.dropout import KEY, AddressedDropout, kept
from fedmom.tasks.places import bounded, copied, hooks_of


class FoldError(Exception):
    """Why a model must take a slower path."""


class Clients:
    """What the layers of a folded model share during a pass."""

    def __init__(self) -> None:
        self.num = 1  # K
        self.shared = False  # whether all rows of `params` are one point
        self.params: Tree = {}  # [K, ...]
        self.buffers: Tree = {}  # [K, ...], written by the pass
        self.dropout_keys: Tensor = torch.zeros(1, dtype=torch.int64)  # [K]
        self.factors: dict[str, Factors] = {}  # of dense weights that are nowhere written out, by name
        self.convolution = ""  # one of CONVOLUTIONS; "": by layer, as `ways` finds
        self.ways = Ways()


# --- dense ----------------------------------------------------------------------------------------------------


class _Dense(torch.autograd.Function):
    """y = h Wᵀ per client: h [K, M, in], W [K, out, in] -> [K, M, out]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, shared: bool) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.shared = shared
        return h @ weight[0].T if shared else torch.bmm(h, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (d,), (h, weight) = grads, ctx.saved_tensors
        before = None
        if ctx.needs_input_grad[0]:
            before = d @ weight[0] if ctx.shared else torch.bmm(d, weight)
        return before, torch.bmm(d.transpose(1, 2), h), None


class FoldedLinear(nn.Module):
    """nn.Linear."""

    def __init__(self, clients: Clients, layer: nn.Linear, names: dict[str, str]) -> None:
        super().__init__()
        self.clients, self.names = clients, names

    def forward(self, x: Tensor) -> Tensor:
        c, name = self.clients, self.names["weight"]
        h = x.reshape(c.num, -1, x.shape[-1])
        y = factored(h, c.factors[name]) if name in c.factors else _Dense.apply(h, c.params[name], c.shared)
        if "bias" in self.names:
            y = y + c.params[self.names["bias"]][:, None]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class FoldedEmbedding(nn.Module):
    """nn.Embedding without options."""

    def __init__(self, clients: Clients, layer: nn.Embedding, names: dict[str, str]) -> None:
        super().__init__()
        if layer.padding_idx is not None or layer.max_norm is not None or layer.sparse:
            raise FoldError("an Embedding with padding_idx, max_norm or sparse")
        self.clients, self.names = clients, names

    def forward(self, x: Tensor) -> Tensor:
        weight = self.clients.params[self.names["weight"]]
        K, V, _ = weight.shape
        first = (torch.arange(K, device=x.device) * V).reshape(K, *[1] * x.ndim)
        own = bounded(x, V).reshape(K, -1, *x.shape[1:])  # an index too large must not reach the next client's rows
        return embedding((own + first).reshape(x.shape), weight.reshape(K * V, -1))


# --- convolutions ---------------------------------------------------------------------------------------------


class FoldedConv(nn.Module):
    """nn.Conv1d, 2d and 3d with zero padding."""

    def __init__(self, clients: Clients, layer: nn.Conv2d, names: dict[str, str]) -> None:
        super().__init__()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise FoldError(f"{type(layer).__name__} with padding {layer.padding!r}, mode {layer.padding_mode!r}")
        self.clients, self.names = clients, names
        nothing = [0] * len(layer.stride)
        self.options = (layer.stride, layer.padding, layer.dilation, False, nothing, layer.groups)

    def bias(self) -> Tensor | None:
        """[K, out]."""
        return self.clients.params[self.names["bias"]] if "bias" in self.names else None

    def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """bias=False leaves it to the caller to add it."""
        c, weight = self.clients, self.clients.params[self.names["weight"]]
        added = self.bias() if bias else None
        if c.num == 1:  # plain autograd: a Function in Python costs more than some small convolutions
            return torch.convolution(x, weight.squeeze(0), None if added is None else added.squeeze(0), *self.options)
        way = c.convolution or c.ways.way(x, weight, added, c.shared, self.options)
        return CONVOLUTIONS[way](x, weight, added, c.shared, self.options)


_LARGE = 1 << 14  # numbers of one client's activations (measured: docs/log.md)


# --- normalisation and dropout --------------------------------------------------------------------------------


class FoldedBatchNorm(nn.Module):
    """nn.BatchNorm1d, 2d and 3d in training: every client by its own batch, statistics [K, C] of its own."""

    def __init__(self, clients: Clients, layer: nn.BatchNorm2d, names: dict[str, str]) -> None:
        super().__init__()
        if layer.momentum is None and layer.track_running_stats:
            raise FoldError(f"{type(layer).__name__} with momentum None")
        self.clients, self.names, self.eps, self.momentum = clients, names, layer.eps, layer.momentum or 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """More than the normalised x, relu(it + residual), is for where fused operators are used."""
        c, K, C = self.clients, self.clients.num, x.shape[1]
        found = {part: c.buffers[name] for part, name in self.names.items() if name in c.buffers}
        affine = {part: c.params[name] for part, name in self.names.items() if name in c.params}
        B = len(x) // K
        if "num_batches_tracked" in found:
            found["num_batches_tracked"].add_(1)
        if fused.on(x, K):
            running = found.get("running_mean"), found.get("running_var")
            own = affine.get("weight"), affine.get("bias"), residual, running
            return fused.Normalised.apply(x, *own, K, self.momentum, self.eps, relu)
        assert residual is None
        assert not relu
        if K > 1 and not x.is_cuda and x[0].numel() * B >= _LARGE:
            return self._one_by_one(x, found, affine)
        # Channels of all clients side by side are the channels of one ordinary BatchNorm.
        side = x if K == 1 else x.reshape(K, B, *x.shape[1:]).transpose(0, 1).reshape(B, K * C, *x.shape[2:])
        mean, var = (found[part].view(K * C) if part in found else None for part in ("running_mean", "running_var"))
        weight, bias = (affine[part].reshape(K * C) if part in affine else None for part in ("weight", "bias"))
        y = batch_norm(side, mean, var, weight, bias, training=True, momentum=self.momentum, eps=self.eps)
        return y if K == 1 else y.reshape(B, K, *x.shape[1:]).transpose(0, 1).reshape(x.shape)

    def _one_by_one(self, x: Tensor, found: Tree, affine: Tree) -> Tensor:
        """On a CPU large activations are better not moved: side by side they would have to be, four times."""
        K = self.clients.num
        known = {part: value.unbind() for part, value in (found | affine).items()}
        parts = ("running_mean", "running_var", "weight", "bias")
        rows = zip(x.chunk(K), *(known.get(part, [None] * K) for part in parts), strict=True)
        options = {"training": True, "momentum": self.momentum, "eps": self.eps}
        return torch.cat([batch_norm(own, m, v, w, b, **options) for own, m, v, w, b in rows])  # type: ignore[arg-type]


class FoldedGroupNorm(nn.Module):
    """nn.GroupNorm."""

    def __init__(self, clients: Clients, layer: nn.GroupNorm, names: dict[str, str]) -> None:
        super().__init__()
        self.clients, self.names, self.groups, self.eps = clients, names, layer.num_groups, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        y = group_norm(x, self.groups, None, None, self.eps)
        return _affine(y, self.clients, self.names, (x.shape[1], *[1] * (x.ndim - 2)))


class FoldedLayerNorm(nn.Module):
    """nn.LayerNorm."""

    def __init__(self, clients: Clients, layer: nn.LayerNorm, names: dict[str, str]) -> None:
        super().__init__()
        self.clients, self.names, self.shape, self.eps = clients, names, layer.normalized_shape, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        y = layer_norm(x, self.shape, None, None, self.eps)
        return _affine(y, self.clients, self.names, (*[1] * (x.ndim - 1 - len(self.shape)), *self.shape))


def _affine(y: Tensor, clients: Clients, names: dict[str, str], shape: tuple[int, ...]) -> Tensor:
    """Each client's weight and bias, of `shape` beside one example, on y [K·B, ...]."""
    apart = y.reshape(clients.num, -1, *y.shape[1:])
    if "weight" in names:
        apart = apart * clients.params[names["weight"]].reshape(-1, 1, *shape)
    if "bias" in names:
        apart = apart + clients.params[names["bias"]].reshape(-1, 1, *shape)
    return apart.reshape(y.shape)


class FoldedDropout(nn.Module):
    """AddressedDropout: the same masks as each client alone."""

    def __init__(self, clients: Clients, layer: AddressedDropout, names: dict[str, str]) -> None:
        super().__init__()
        self.clients, self.p, self.layer, self.channels = clients, layer.p, layer.layer, layer.channels

    def forward(self, x: Tensor, turned: bool = False) -> Tensor:
        """turned: from channels-last memory to plain, by the operator."""
        if self.p == 0:
            return x
        keys, one = self.clients.dropout_keys, (len(x) // self.clients.num, *x.shape[1:])
        if fused.on(x, self.clients.num):
            return fused.Dropped.apply(x, keys, self.layer, self.p, self.channels, turned)
        mask = kept(keys, self.layer, self.p, one, channels=self.channels, dtype=x.dtype)  # [K, B, ...]
        return x * mask.flatten(0, 1)


class FoldedPool(nn.Module):
    """nn.MaxPool2d, with gradients in the layout of the activations: torch's is ten times slower where they differ."""

    def __init__(self, clients: Clients, layer: nn.MaxPool2d, names: dict[str, str]) -> None:
        super().__init__()
        if layer.return_indices:
            raise FoldError("a MaxPool2d with return_indices")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if y.requires_grad and y.is_contiguous(memory_format=torch.channels_last):
            y.register_hook(lambda d: d.contiguous(memory_format=torch.channels_last))
        return y


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
    nn.MaxPool2d: FoldedPool,
    AddressedDropout: FoldedDropout,
}


def fold(model: nn.Module) -> tuple[nn.Module, Clients]:
    """A copy of `model` for folded batches, [K·B, ...] -> [K·B, ...], whose layers take their weights from `Clients`.

    Buffers of other modules stay as they are: constants, such as a mask. Raises FoldError, with the reason, for a model
    with parameters outside of the layers in FOLDED. Whether its forward function mixes examples, or writes buffers,
    cannot be seen from here: compare it with the plain path.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    names |= {id(b): name for name, b in model.named_buffers() if name.rpartition(".")[2] != KEY}
    for name, parameter in model.named_parameters():
        if hooks_of(parameter):
            raise FoldError(f"a hook on the parameter {name} is written for one client")
    clients = Clients()
    memo: dict[int, Any] = {}
    for name, layer in model.named_modules():
        if make := FOLDED.get(type(layer)):
            if own := _made_special(layer):
                raise FoldError(f"the {type(layer).__name__} {name!r} has {own} of its own")
            tensors = {**layer._parameters, **layer._buffers}
            mine = {part: names[id(t)] for part, t in tensors.items() if t is not None and id(t) in names}
            frozen = [p for p in layer._parameters.values() if p is not None and not p.requires_grad]
            if frozen:
                raise FoldError(f"a {type(layer).__name__} with parameters that are not trained")
            memo[id(layer)] = make(clients, layer, mine)
        elif "forward" in vars(layer) and type(layer).__name__ != "OptimizedModule":  # torch.compile's makes it anew
            # Its function may hold the layers that are replaced here.
            raise FoldError(f"{type(layer).__name__} {name!r} has a forward function of its own")
        elif held := [part for part, t in layer._parameters.items() if t is not None]:
            raise FoldError(f"{type(layer).__name__} holds {held[0]} itself")
    return copied(model, memo), clients


def _made_special(layer: nn.Module) -> str:
    """What a layer has that its folded form would leave out, or ""."""
    if "forward" in vars(layer):
        return "a forward function"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return next((kind.strip("_").replace("_", " ") for kind in kinds if vars(layer).get(kind)), "")
