"""Operators of torch that are one kernel on a CUDA device and plain torch elsewhere, which says what they compute.

Whatever watches operators, counts them or records them sees the kernels too. Triton is imported with the first kernel.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fedmom.user_code import one_line

failed: dict[tuple[str, torch.dtype], str] = {}  # {(operator, of what): why its kernel is not used any more}
wanted = os.environ.get("FEDMOM_FUSED") != "0"  # whether these kernels are used at all


class Fused(NamedTuple):
    """An operator `fedmom::name`."""

    schema: str  # as torch.library has it, without the name
    file: str  # of this package, in which a function of the same name launches the kernel
    plain: Callable[..., Any]  # what it computes


def register(operators: Mapping[str, Fused]) -> None:
    """Make them known to torch, under the namespace `fedmom`."""
    for name, operator in operators.items():
        _LIBRARY.define(name + operator.schema)
        _LIBRARY.impl(name, operator.plain, "CPU")
        _LIBRARY.impl(name, operator.plain, "Meta")
        _LIBRARY.impl(name, on_card(name, operator), "CUDA")


def on_card(name: str, operator: Fused) -> Callable[..., Any]:
    """The operator by its kernel; by plain torch from the first time on that the kernel cannot run."""

    def run(*args: Any) -> Any:
        kind = name, args[0].dtype
        if wanted and kind not in failed:
            try:
                kernels = importlib.import_module(f"{__package__}.{operator.file}")
                with torch.cuda.device_of(args[0]):
                    return getattr(kernels, name)(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no Triton, no compiler, a card that it does not know
                if "out of memory" in str(error).lower():  # Triton's own word for it, where a kernel is loaded
                    raise torch.OutOfMemoryError(one_line(error)) from error
                failed[kind] = one_line(error)
                warnings.warn(f"fedmom::{name} runs without its kernel: {failed[kind]}", stacklevel=2)
        return operator.plain(*args)

    return run


_LIBRARY = torch.library.Library("fedmom", "FRAGMENT")
