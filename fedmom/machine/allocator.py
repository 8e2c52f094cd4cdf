"""The C allocator of processes that are ours: memory that was freed is kept, since the next step asks for as much."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep large blocks in the heap instead of returning each to the system and having every page of it zeroed again.

    A step's activations and gradients come and go: on a CPU a cnn takes 10 to 15 % more steps this way (docs/log.md).
    The process stays as large as it once was. Nothing happens without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)
