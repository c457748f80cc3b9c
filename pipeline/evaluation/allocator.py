"""The memory that a worker process keeps between the tensors of a tower on a CPU."""

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2
"""Numbers of the parameters in ``malloc.h``."""
KEPT = 1 << 30
"""Free bytes at the end of the heap that are kept; blocks of this size or more are always given back."""
STEP = 64 << 20
"""Bytes by which the heap grows."""


def keep_freed_memory() -> bool:
    """Let malloc keep the memory of freed tensors for the next ones, for the rest of the process.

    glibc gives blocks of megabytes, such as activations, back to the system when they are freed. Each page of the next
    one is then mapped and filled with zeros again, which is up to a fifth of a small tower's time. The process keeps
    about its peak instead, so this is for workers that encode batch after batch.

    Returns whether it applies; with other C libraries (macOS, musl) it does nothing.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    limits = ((MMAP_THRESHOLD, KEPT), (TRIM_THRESHOLD, KEPT), (TOP_PAD, STEP))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in limits)
