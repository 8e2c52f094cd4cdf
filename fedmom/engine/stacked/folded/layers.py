"""Convolutions, normalisation, dropout and pooling for K clients: activations lie folded, [K·B, ...].

Whatever acts on single examples stays as it is; the weights that layers see are [K, ...], one set per client.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm

from fedmom.engine.stacked.convolutions import CONVOLUTIONS
from fedmom.engine.stacked.folded.clients import Clients, FoldError
from fedmom.engine.stacked.kernels import fused
from fedmom.method.state import Tree
from fedmom.tasks.dropout import AddressedDropout, kept

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
        return self.clients.param(self.names["bias"]) if "bias" in self.names else None

    def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """bias=False leaves it to the caller to add it."""
        c, name = self.clients, self.names["weight"]
        added = self.bias() if bias else None
        if name in c.frozen:  # one product for all clients
            y = torch.convolution(x, c.frozen[name], None, *self.options)
            return y if added is None else y + c.each(added).reshape(*y.shape[:2], *[1] * (y.ndim - 2))
        weight = c.params[name]
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
        affine = {part: c.param(name) for part, name in self.names.items() if part in ("weight", "bias")}
        B = len(x) // K
        # A backbone may stay in evaluation mode; without statistics a layer takes the batch's there too.
        by_batch = self.training or "running_mean" not in found
        if self.training and "num_batches_tracked" in found:
            found["num_batches_tracked"].add_(1)
        if by_batch and fused.on(x, K):
            running = found.get("running_mean"), found.get("running_var")
            own = affine.get("weight"), affine.get("bias"), residual, running
            return fused.Normalised.apply(x, *own, K, self.momentum, self.eps, relu)
        assert residual is None
        assert not relu
        if K > 1 and not x.is_cuda and x[0].numel() * B >= _LARGE:
            return self._one_by_one(x, found, affine, by_batch)
        # Channels of all clients side by side are the channels of one ordinary BatchNorm.
        side = x if K == 1 else x.reshape(K, B, *x.shape[1:]).transpose(0, 1).reshape(B, K * C, *x.shape[2:])
        mean, var = (found[part].view(K * C) if part in found else None for part in ("running_mean", "running_var"))
        weight, bias = (affine[part].reshape(K * C) if part in affine else None for part in ("weight", "bias"))
        y = batch_norm(side, mean, var, weight, bias, training=by_batch, momentum=self.momentum, eps=self.eps)
        return y if K == 1 else y.reshape(B, K, *x.shape[1:]).transpose(0, 1).reshape(x.shape)

    def _one_by_one(self, x: Tensor, found: Tree, affine: Tree, by_batch: bool) -> Tensor:
        """On a CPU large activations are better not moved: side by side they would have to be, four times."""
        K = self.clients.num
        known = {part: value.unbind() for part, value in (found | affine).items()}
        parts = ("running_mean", "running_var", "weight", "bias")
        rows = zip(x.chunk(K), *(known.get(part, [None] * K) for part in parts), strict=True)
        options = {"training": by_batch, "momentum": self.momentum, "eps": self.eps}
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
        apart = apart * clients.param(names["weight"]).reshape(-1, 1, *shape)
    if "bias" in names:
        apart = apart + clients.param(names["bias"]).reshape(-1, 1, *shape)
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
