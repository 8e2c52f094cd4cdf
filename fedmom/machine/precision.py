"""How exactly float32 products are taken, for the whole process: the one place that reads and sets it.

torch has two ways to say it, `allow_tf32` and (since 2.9) `fp32_precision`. Where a user took one of them, reading the
other may raise, and setting the old one may change nothing. So both are set, and the new one is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_CUBLAS: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 on a GPU may be TF32 (ten bits); all others are float32.

    torch's own default is TF32 in convolutions alone.
    """
    torch.set_float32_matmul_precision("highest")  # on a CPU too, where a user's "medium" may mean bfloat16
    _CUBLAS.allow_tf32 = _CUDNN.allow_tf32 = allowed
    for kind in (_CUBLAS, _CUDNN.conv, _CUDNN.rnn):
        kind.fp32_precision = "tf32" if allowed else "ieee"


def tf32_allowed() -> bool:
    """Whether float32 products on a GPU may be TF32 now."""
    return bool(_CUDNN.conv.fp32_precision == "tf32")


@contextmanager
def exactly() -> Iterator[None]:
    """Within it float32 products are float32, whatever the run allows."""
    before = tf32_allowed()
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(before)


def convolves_in_tf32(x: Tensor) -> bool:
    """Whether torch's own convolutions of x would be TF32."""
    return bool(x.is_cuda and x.dtype == torch.float32 and tf32_allowed())


def multiplies_in_tf32(x: Tensor) -> bool:
    """Whether torch's own matrix products of x would be TF32."""
    return bool(x.is_cuda and x.dtype == torch.float32 and _CUBLAS.fp32_precision == "tf32")
