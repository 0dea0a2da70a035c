"""The C library's allocator while something is measured."""

from __future__ import annotations

import ctypes
import functools
import sys

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of mallopt, see malloc.h
DEFAULT, KEPT = "default", "glibc, freed memory kept"


def in_use() -> str:
    """The result of :func:`keep_memory`, for the row."""
    return keep_memory() if keep_memory.cache_info().currsize else DEFAULT


@functools.cache
def keep_memory() -> str:
    """Have the allocator of this process keep memory that is freed, from now on.

    glibc returns tensors above 32 MB to the system at once, and the next one of that size is cleared page by page while
    it is written: up to a millisecond per MB in a virtual machine, more than most kernels take, and in every variant
    alike. Allocators that PyTorch's tuning guide recommends (jemalloc, tcmalloc) keep such memory. Peaks of memory come
    from processes of their own, with the allocator's defaults.
    """
    return KEPT if _mallopt((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)) else DEFAULT


def return_memory() -> bool:
    """Have the allocator of this process give memory back as soon as it is freed; whether it does.

    glibc keeps freed tensors of up to 32 MB in its heap, whose holes depend on the order of everything before. Where
    all of them go back, the peak of a process is that of its live tensors, as on a device.
    """
    return _mallopt((_MMAP_THRESHOLD, 1 << 16))


def _mallopt(*settings: tuple[int, int]) -> bool:
    """Whether the C library is glibc and took them all."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another C library has none
        return sys.platform == "linux" and all(library.mallopt(*setting) for setting in settings)
    except (AttributeError, OSError, TypeError):
        return False
