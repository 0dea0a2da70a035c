"""Keeping the C library's allocator out of the timings."""

from __future__ import annotations

import ctypes
import functools
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt, see malloc.h


DEFAULT, KEPT = "default", "glibc, freed memory kept"


def in_use() -> str:
    """What :func:`keep_memory` came to, for the row."""
    return keep_memory() if keep_memory.cache_info().currsize else DEFAULT


@functools.cache
def keep_memory() -> str:
    """Have the allocator of this process keep memory that is freed, from now on.

    glibc returns tensors above 32 MB to the system at once, and the next one of that size is cleared page by page while
    it is written: up to a millisecond per MB in a virtual machine, more than most kernels take, and in every variant
    alike. Allocators that PyTorch's tuning guide recommends (jemalloc, tcmalloc) keep such memory. Peaks of memory come
    from processes of their own, where the allocator is as the user finds it.
    """
    if sys.platform != "linux":
        return DEFAULT
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another C library has none
        kept = library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1)
    except (AttributeError, OSError):
        return DEFAULT
    return KEPT if kept else DEFAULT
