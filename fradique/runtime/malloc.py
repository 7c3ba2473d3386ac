"""TODO."""

import ctypes
import os
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed: a step wants the same memory again, and to get it anew from
    the kernel, page by page, takes up to half of the step's time. No such malloc: nothing happens.

    And ask torch for huge pages, which it looks for at its first tensor: weights are read a tenth faster.
    """
    if sys.platform.startswith("linux"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 1 << 26})


def return_freed_memory() -> None:
    """Tell glibc's malloc to give large tensors back at once: of a model in parts, what is gathered and let
    go among what is kept would leave holes, which take up to as much as the parts save.
    """
    set_malloc_options(
        {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 1 << 27, M_TOP_PAD: 1 << 17, M_MMAP_THRESHOLD: 4 << 20}
    )


def set_malloc_options(options: dict[int, int]) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another malloc
            for option, value in options.items():
                ctypes.CDLL(None).mallopt(option, value)
