"""Process-wide options of glibc's malloc for training on a CPU. Only device.configure_process sets them."""

import ctypes
import os
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # from malloc.h
FORDBLKS = 8  # index of the counter of free bytes in struct mallinfo2


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the kernel.

    Every step allocates the same memory again; getting it from the kernel, page by page, takes up to half of
    the step time. This function also makes torch use huge pages, with which reading weights is 10% faster:
    torch reads the environment variable when it allocates its first tensor. Without glibc only the latter
    has an effect.
    """
    if sys.platform.startswith("linux"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # no separate mmap for large tensors; never return memory; request 64 MiB more than needed
    set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20})


def return_freed_memory() -> None:
    """Make malloc return large tensors to the kernel as soon as they are freed, for sharded models.

    Sharded models often allocate and free gathered parameters between tensors that remain. The resulting heap
    fragmentation would take up to as much memory as sharding saves.
    """
    # tensors of 4 MiB and more get their own mmap; the heap is trimmed when 128 MiB at its end are free; the
    # other two are glibc's defaults
    set_malloc_options(
        {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 << 20, M_TOP_PAD: 128 << 10, M_MMAP_THRESHOLD: 4 << 20}
    )


def set_malloc_options(options: dict[int, int]) -> None:
    """Call glibc's mallopt for each {option: value}; does nothing without glibc."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # no glibc
            for option, value in options.items():
                ctypes.CDLL(None).mallopt(option, value)


class _MallInfo2(ctypes.Structure):
    """struct mallinfo2 of malloc.h (glibc 2.33): ten counters."""

    _fields_ = (("counters", ctypes.c_size_t * 10),)


def free_heap_bytes() -> int:
    """Bytes that malloc holds and that are free; 0 if this malloc implementation does not report them."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # no glibc, or an older one
            mallinfo2 = ctypes.CDLL(None).mallinfo2
            mallinfo2.restype = _MallInfo2
            return mallinfo2().counters[FORDBLKS]
    return 0
