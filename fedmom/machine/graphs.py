"""CUDA graphs: what a function launches, recorded once and launched again as a whole; and what comes of it."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def cuda_graph(run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What `run` gave, and a function that does it again, into the same memory.

    `run` is called twice, and recorded the second time. The recording reads the memory that `run` read, which whoever
    replays it has to keep. Raises RuntimeError where it cannot be recorded.
    """
    main, side, pool = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    captures = False
    try:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run()  # whatever is made at first use must not be recorded
        main.wait_stream(side)
        torch.cuda.synchronize()
        # cuBLAS keeps one workspace for all captures, in the memory of whichever made it: each must make its own, or
        # a recording that goes takes away what another one's replays write to (pytorch issue 193402).
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        captures = True
        with torch.cuda.graph(graph, pool=pool):
            found = run()
        captures = False
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves its own stream behind
        if captures:
            _forget(pool)
    return found, graph.replay


def _forget(pool: Any) -> None:
    """After a capture that failed: torch 2.11 leaves the allocator as if it went on, and frees nothing any more."""
    with contextlib.suppress(RuntimeError):  # of the versions that have ended it themselves
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def sendable(here: Tensor, device: torch.device) -> Tensor:
    """In memory from which the device reads while the host goes on: of other memory it would wait for the copy."""
    return here.pin_memory() if device.type == "cuda" and not here.is_cuda else here


def sent(here: Tensor, device: torch.device) -> Tensor:
    """`here` on the device, for which the host does not wait."""
    return sendable(here, device).to(device, non_blocking=True)


def coming(there: Tensor) -> Callable[[], Tensor]:
    """A function that waits until `there` is in main memory: not for what the device is given to do after this."""
    if not there.is_cuda:
        return lambda: there
    here = torch.empty(there.shape, dtype=there.dtype).pin_memory()  # into other memory the copy itself would wait
    here.copy_(there, non_blocking=True)
    arrival = torch.cuda.current_stream().record_event()

    def arrived() -> Tensor:
        arrival.synchronize()
        return here

    return arrived
