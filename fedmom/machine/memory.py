"""How much memory is free, and how much a forward pass makes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now on `device`; in a container, of what the container may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30  # no Linux: a guess that any machine of today has
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def most_bytes(device: torch.device) -> int:
    """The most that this process has used so far: of the card's memory by tensors, or of main memory in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # pragma: no cover - not a POSIX system
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def sizes_made(made: list[int]) -> Iterator[None]:
    """Within it `made` takes the bytes of what every module gives back, in order."""

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        made.append(sum(t.nbytes for t in tree_leaves(outputs) if isinstance(t, Tensor)))

    hook = register_module_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
