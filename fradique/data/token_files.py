"""Token files: any number of files of token ids, read window by window in bounded memory.

A split of up to MAX_CACHED_BYTES is read once and kept in memory. In a larger one, each window is read from
its file when it is needed. Files are not memory-mapped for this: the resident memory of the process would
grow with what it has read, and a file that is truncated during a run would raise SIGBUS instead of an error.
No more files are open at a time than the system allows.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import NoReturn

import numpy as np

assert sys.byteorder == "little", "token files are little-endian and are used without conversion"

MAX_CACHED_BYTES = 64 << 20  # a split up to this size is kept in memory, which reads windows twice as fast
CHUNK_TOKENS = 1 << 22  # tokens read at a time by `chunks`


class TokenFiles(Sequence[np.ndarray]):
    """Files of raw little-endian token ids; files[i] is the content of file i, memory-mapped, (lengths[i],).

    `lengths` (n_files,) int64 is the number of tokens in each file. Raises ValueError if a file ends within a
    token, and OSError if a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], dtype: str) -> None:
        self.paths, self.dtype = list(paths), np.dtype(dtype).newbyteorder("<")
        sizes = np.array([path.stat().st_size for path in self.paths], dtype=np.int64)
        for i in np.flatnonzero(sizes % self.dtype.itemsize)[:1]:
            raise ValueError(
                f"{self.paths[i]} has {sizes[i]} bytes, which is not a whole number of {dtype} tokens: the "
                "file is truncated or not a token file; prepare the corpus again"
            )
        self.lengths = sizes // self.dtype.itemsize
        self.nbytes = int(sizes.sum())
        self._ends = np.cumsum(self.lengths)  # (n_files,) tokens up to the end of each file
        self._cache: np.ndarray | None = None  # (n_tokens,) all tokens, if the split is small
        self._views: dict[int, np.ndarray] = {}  # length -> sliding windows over the cache
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # file -> descriptor, last used last
        self._max_open = _max_open_files()
        weakref.finalize(self, _close_all, self._descriptors)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        if not self.lengths[i]:
            return np.empty(0, dtype=self.dtype)
        return np.asarray(np.memmap(self.paths[i], dtype=self.dtype, mode="r"))

    def read(self, files: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Read `length` tokens of each of `files` (B,) from `starts` (B,): (B, length), dtype of the files.

        Raises ValueError if a file was truncated or replaced since it was opened.
        """
        if self.nbytes <= MAX_CACHED_BYTES:
            positions = self._ends[files] - self.lengths[files] + starts
            return self._sliding_windows(length)[positions]
        size = length * self.dtype.itemsize
        offsets = (starts * self.dtype.itemsize).tolist()
        rows = list(map(_read, self._open_files(files), repeat(size), offsets))
        data = b"".join(rows)
        if len(data) < size * len(rows):
            self._raise_changed(int(files[next(i for i, row in enumerate(rows) if len(row) < size)]))
        return np.frombuffer(data, dtype=self.dtype).reshape(len(rows), length)

    def chunks(self, i: int) -> Iterator[np.ndarray]:
        """The tokens of file i from the first to the last, CHUNK_TOKENS at a time."""
        with self.paths[i].open("rb") as file:
            while len(chunk := np.fromfile(file, dtype=self.dtype, count=CHUNK_TOKENS)):
                yield chunk

    def _sliding_windows(self, length: int) -> np.ndarray:
        """A view of the cache: `length` tokens from each position, (n_tokens - length + 1, length)."""
        if length not in self._views:
            self._views[length] = np.lib.stride_tricks.sliding_window_view(self._cached_tokens(), length)
        return self._views[length]

    def _cached_tokens(self) -> np.ndarray:
        """The tokens of all files, concatenated, (n_tokens,); read on the first call."""
        if self._cache is None:
            self._cache = np.concatenate([np.fromfile(path, dtype=self.dtype) for path in self.paths])
            if len(self._cache) != self._ends[-1]:
                raise ValueError(
                    f"{self.paths[0]} or another file of its split changed while it was read: start again"
                )
        return self._cache

    def _open_files(self, files: np.ndarray) -> Iterable[int]:
        """The descriptors of `files` (B,), in this order."""
        indices = files.tolist()
        descriptors = list(map(self._descriptors.get, indices))
        if None not in descriptors and len(self.paths) <= self._max_open:
            return descriptors
        # lazily, so that each is used before the next is opened: a batch may need more than may be open
        return map(self._open_file, indices)

    def _open_file(self, i: int) -> int:
        """The descriptor of file i; closes the least recently used file if too many are open."""
        descriptor = self._descriptors.get(i)
        if descriptor is None:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = os.open(self.paths[i], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._descriptors[i] = descriptor
            if os.fstat(descriptor).st_size != self.lengths[i] * self.dtype.itemsize:
                self._raise_changed(i)
        elif len(self.paths) > self._max_open:
            self._descriptors.move_to_end(i)
        return descriptor

    def _raise_changed(self, i: int) -> NoReturn:
        raise ValueError(
            f"{self.paths[i]} was truncated or replaced during the run: it had {self.lengths[i]} tokens at "
            "the start. Restore the corpus, then resume the run"
        )


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    """Replacement for os.pread, which Windows lacks."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


_read = getattr(os, "pread", _seek_and_read)


def _max_open_files() -> int:
    """How many files to keep open at most: a quarter of the process's limit, and no more than 4,096."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if limit == resource.RLIM_INFINITY else max(16, min(4096, limit // 4))


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
