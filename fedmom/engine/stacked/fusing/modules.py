"""The modules that stand for several."""

from typing import Any

import torch
from torch import Tensor, nn

from fedmom.engine.stacked.folded.layers import FoldedBatchNorm, FoldedConv, FoldedDropout, FoldedPool
from fedmom.engine.stacked.kernels import fused

_MOST_PLACES = 16  # of a window: the kernel writes its loop out


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


class DroppedFlat(nn.Module):
    """Dropout, and each example's numbers in a row: activations in channels-last memory turn round on the way."""

    def __init__(self, dropout: FoldedDropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        turns = x.ndim == 4 and fused.on(x, self.dropout.clients.num) and not x.is_contiguous()
        y: Tensor = self.dropout(x, turned=turns and x.is_contiguous(memory_format=torch.channels_last))
        return y.flatten(1)


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
