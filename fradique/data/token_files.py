"""Files of token ids, any number of them, read window by window in memory that does not grow with them.

Up to HELD_BYTES are read at once and kept. Of more, each window is read from its file when it is asked for:
nothing is mapped, so the process does not grow by what it has seen, a file cut short while a run goes on is
an error and not a SIGBUS, and no more files are open than the system allows.
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

MAX_CACHED_BYTES = 64 << 20  # of a split that is kept in memory: its windows come twice as fast
CHUNK_TOKENS = 1 << 22  # of a scan from end to end, at a time


class TokenFiles(Sequence[np.ndarray]):
    """Raw little-endian token ids in files; files[i] is what the i-th holds, mapped, (lengths[i],).

    `lengths` (n_files,) int64 are their tokens. Raises ValueError where a file cannot be whole, and OSError
    where it cannot be read.
    """

    def __init__(self, paths: Sequence[Path], dtype: str) -> None:
        self.paths, self.dtype = list(paths), np.dtype(dtype).newbyteorder("<")
        sizes = np.array([path.stat().st_size for path in self.paths], dtype=np.int64)
        for i in np.flatnonzero(sizes % self.dtype.itemsize)[:1]:
            raise ValueError(
                f"{self.paths[i]} has {sizes[i]} bytes, which is no whole number of {dtype} tokens: the file "
                "is truncated or not a token file; prepare the corpus again"
            )
        self.lengths = sizes // self.dtype.itemsize
        self.nbytes = int(sizes.sum())
        self._ends = np.cumsum(self.lengths)  # (n_files,) tokens up to the end of each
        self._held: np.ndarray | None = None
        self._views: dict[int, np.ndarray] = {}  # of what is held, for a length
        self._open: OrderedDict[int, int] = OrderedDict()  # file -> descriptor; the last used is the last
        self._most_open = _files_allowed()
        weakref.finalize(self, _close_all, self._open)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        if not self.lengths[i]:
            return np.empty(0, dtype=self.dtype)
        return np.asarray(np.memmap(self.paths[i], dtype=self.dtype, mode="r"))

    def read(self, files: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens of each of `files` (B,) from `starts` (B,) on: (B, length), of the files' dtype."""
        if self.nbytes <= MAX_CACHED_BYTES:
            places = self._ends[files] - self.lengths[files] + starts
            return self._windows(length)[places]
        size = length * self.dtype.itemsize
        read = list(
            map(_read, self._descriptors(files), repeat(size), (starts * self.dtype.itemsize).tolist())
        )
        rows = b"".join(read)
        if len(rows) < size * len(read):
            self._refuse(int(files[next(i for i, row in enumerate(read) if len(row) < size)]))
        return np.frombuffer(rows, dtype=self.dtype).reshape(len(read), length)

    def chunks(self, i: int) -> Iterator[np.ndarray]:
        """The tokens of the i-th file from its beginning to its end, CHUNK_TOKENS at a time."""
        with self.paths[i].open("rb") as file:
            while len(chunk := np.fromfile(file, dtype=self.dtype, count=CHUNK_TOKENS)):
                yield chunk

    def _windows(self, length: int) -> np.ndarray:
        """Each `length` tokens in a row of all files, (n_tokens - length + 1, length): a view, made once."""
        if length not in self._views:
            self._views[length] = np.lib.stride_tricks.sliding_window_view(self._hold(), length)
        return self._views[length]

    def _hold(self) -> np.ndarray:
        """All tokens, one file after another."""
        if self._held is None:
            self._held = np.concatenate([np.fromfile(path, dtype=self.dtype) for path in self.paths])
            if len(self._held) != self._ends[-1]:
                raise ValueError(
                    f"the files beside {self.paths[0]} changed while they were read: start again"
                )
        return self._held

    def _descriptors(self, files: np.ndarray) -> Iterable[int]:
        """Those of `files` (B,), one after another."""
        names = files.tolist()
        there = list(map(self._open.get, names))
        if None not in there and len(self.paths) <= self._most_open:
            return there
        # each is looked up when it is read: a batch may need more files than may be open
        return map(self._descriptor, names)

    def _descriptor(self, i: int) -> int:
        """The i-th file, opened; the one that was used longest ago is closed where there are too many."""
        descriptor = self._open.get(i)
        if descriptor is None:
            if len(self._open) >= self._most_open:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[i] = os.open(self.paths[i], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            if os.fstat(descriptor).st_size != self.lengths[i] * self.dtype.itemsize:
                self._refuse(i)
        elif len(self.paths) > self._most_open:
            self._open.move_to_end(i)
        return descriptor

    def _refuse(self, i: int) -> NoReturn:
        raise ValueError(
            f"{self.paths[i]} was cut or replaced while it was in use: it had {self.lengths[i]} tokens "
            "when the run began. Resume the run once the corpus is as it was"
        )


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread where there is none (Windows)."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


_read = getattr(os, "pread", _seek_and_read)


def _files_allowed() -> int:
    """How many files to keep open at most: a quarter of what this process may, and 4,096."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 256
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if allowed == resource.RLIM_INFINITY else max(16, min(4096, allowed // 4))


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


assert sys.byteorder == "little", "tokens are little-endian and are used as they are"
