"""Options of glibc's malloc for training on a CPU. Process-wide: only device.configure_process sets them."""

import ctypes
import os
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # from malloc.h
FORDBLKS = 8  # index of a counter in struct mallinfo2


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the kernel.

    Every step needs the same memory again, and fetching it page by page takes up to half of the step time.
    Also ask torch for huge pages, with which weights are read 10% faster; torch reads the environment
    variable when it allocates its first tensor. Does nothing with other malloc implementations.
    """
    if sys.platform.startswith("linux"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 1 << 26})


def return_freed_memory() -> None:
    """Make malloc return large tensors to the kernel at once, for sharded models.

    Gathered parameters are freed between tensors that stay; the heap fragmentation would take up to as much
    memory as sharding saves.
    """
    set_malloc_options(
        {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 1 << 27, M_TOP_PAD: 1 << 17, M_MMAP_THRESHOLD: 4 << 20}
    )


def set_malloc_options(options: dict[int, int]) -> None:
    """Call glibc's mallopt for each {option: value}."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # no glibc
            for option, value in options.items():
                ctypes.CDLL(None).mallopt(option, value)


class _MallInfo2(ctypes.Structure):
    """struct mallinfo2 of malloc.h (glibc 2.33): ten counters, of which FORDBLKS is the free bytes."""

    _fields_ = (("counters", ctypes.c_size_t * 10),)


def free_heap_bytes() -> int:
    """Bytes that malloc holds and can still hand out; 0 if this malloc does not say."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # no glibc, or an older one
            mallinfo2 = ctypes.CDLL(None).mallinfo2
            mallinfo2.restype = _MallInfo2
            return mallinfo2().counters[FORDBLKS]
    return 0
