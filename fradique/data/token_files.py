"""Read windows from the token files of a split, in bounded memory and with a bounded number of open files.

A split of up to MAX_CACHED_BYTES is read once and kept in memory. In a larger split, each window is read from
its file when it is needed, with pread. A memory map would have two disadvantages: the resident memory of the
process grows with what it has read, and if a file is truncated during a run, SIGBUS kills the process.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from fradique.io.terminal import shell_command

assert sys.byteorder == "little", "token files are little-endian and are used without conversion"

TOKEN_FILE_NAME = re.compile(r"(train|val)(_[0-9]+)?\.bin")
MAX_CACHED_BYTES = 64 << 20  # a split up to this size is kept in memory: its windows are read twice as fast
SAMPLE_BYTES = 1 << 14  # of a file, to check its dtype
SAMPLES = 64  # of SAMPLE_BYTES, to recognise a file
MIN_CHECKED = 64  # with fewer tokens or bytes, chance could look like another dtype
CHUNK_TOKENS = 1 << 22  # tokens that `chunks` reads at a time


def find_token_files(folder: Path) -> list[Path]:
    """All token files of a corpus by their names: train.bin, val.bin, train_00000.bin, ..."""
    return sorted(path for path in folder.glob("*.bin") if TOKEN_FILE_NAME.fullmatch(path.name))


def sample_checksum(path: Path) -> str:
    """A SHA-256 of the size and of SAMPLES pieces of a file, spread evenly from its beginning to its end."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    last_start = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for start in dict.fromkeys(last_start * i // (SAMPLES - 1) for i in range(SAMPLES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_uint16(path: Path, vocab_size: int) -> None:
    """Raise ValueError if the first bytes of a token file show that it does not contain uint16 tokens.

    For token files without a meta.json, which would give their dtype.
    """
    with path.open("rb") as file:
        data = file.read(SAMPLE_BYTES)
    if content := _other_content(data, vocab_size):
        command = shell_command("data/custom/prepare.py", "--input", "book.txt", "--name", "my_book")
        raise ValueError(
            f"{path} has no meta.json beside it, so it must contain tokens of uint16 as nanoGPT writes them; "
            f"it contains {content}. Write the tokens with .astype(numpy.uint16).tofile(...), or prepare the "
            f"corpus from its text: {command}"
        )


def _other_content(data: bytes, vocab_size: int) -> str | None:
    """What the first bytes of a token file are if they are not uint16 tokens; None if they may be."""
    if data.startswith(b"\x93NUMPY"):
        return "a file of numpy.save, which begins with a header"
    tokens = np.frombuffer(data[: len(data) // 4 * 4], dtype="<u2")
    # the upper halves of ids below 65,536; three different lower halves: no text alternates so with token 0
    if len(tokens) >= MIN_CHECKED and not tokens[1::2].any() and len(np.unique(tokens[::2])) > 2:
        return "tokens of 32 or 64 bits"
    if len(data) < MIN_CHECKED or vocab_size <= 1 << 8:  # smaller ids have only zeros as upper bytes
        return None
    with contextlib.suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # may end within a character
        if all(char.isprintable() or char.isspace() for char in text):
            return "text"
    # the lower bytes of the ids of a large vocabulary have all values, and the upper bytes of small ids are 0
    has_upper_bytes = np.count_nonzero(np.frombuffer(data[1::2], dtype="u1")) > len(data) // 4
    if len(data) == SAMPLE_BYTES and max(data) < 1 << 7 and vocab_size > 1 << 14 and has_upper_bytes:
        return "tokens of 8 bits"
    return _float_content(data)


def _float_content(data: bytes) -> str | None:
    """The floating-point dtype of the first bytes of a file; None if not all of them are ids of such a dtype.

    Tokens of uint16 are not mistaken for one: ids below 15,360 would be fractions, and most ids are.
    """
    for dtype in ("<f2", "<f4", "<f8"):
        size = np.dtype(dtype).itemsize
        with np.errstate(invalid="ignore"):  # NaN
            values = np.frombuffer(data[: len(data) // size * size], dtype=dtype).astype(np.float64)
            is_id = (values >= 0) & (values < 1 << 16) & (values == np.floor(values))
        if len(values) < MIN_CHECKED // size:
            continue
        if is_id.all() and len(np.unique(values)) > 2:
            return f"floating-point numbers of {8 * size} bits"
    return None


class TokenFiles(Sequence[np.ndarray]):
    """A sequence of files of raw little-endian token ids; element i is a memory map of file i, (lengths[i],).

    `lengths` (n_files,) int64 is the number of tokens in each file. Raises ValueError if the size of a file
    is not a multiple of the size of a token, and OSError if a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], dtype: str) -> None:
        self.paths, self.dtype = list(paths), np.dtype(dtype).newbyteorder("<")
        sizes = np.array([path.stat().st_size for path in self.paths], dtype=np.int64)
        truncated = np.flatnonzero(sizes % self.dtype.itemsize)
        if truncated.size:
            i = truncated[0]
            raise ValueError(
                f"{self.paths[i]} has {sizes[i]} bytes, which is not a whole number of {dtype} tokens: the "
                "file is truncated or not a token file; prepare the corpus again"
            )
        self.lengths = sizes // self.dtype.itemsize
        self.nbytes = int(sizes.sum())
        self._starts = np.cumsum(self.lengths) - self.lengths  # (n_files,) tokens before each file
        self._cache: np.ndarray | None = None  # (n_tokens,) all tokens, if the split is small
        self._views: dict[int, np.ndarray] = {}  # length -> all windows of this length, a view of the cache
        # index of an open file -> its descriptor; the least recently used is first
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._max_open = _max_open_files()
        weakref.finalize(self, _close_all, self._descriptors)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        if not self.lengths[i]:
            return np.empty(0, dtype=self.dtype)
        return np.asarray(np.memmap(self.paths[i], dtype=self.dtype, mode="r"))

    def read(self, files: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Read B windows of `length` tokens: (B, length), dtype of the files.

        files: indices of the files (B,). starts: the first token in the file (B,). Raises ValueError if a
        file was truncated or replaced during the run.
        """
        if self.nbytes <= MAX_CACHED_BYTES:
            return self._sliding_windows(length)[self._starts[files] + starts]
        size = length * self.dtype.itemsize
        offsets = (starts * self.dtype.itemsize).tolist()
        descriptors = self._open_files(files)
        rows = [_read(fd, size, offset) for fd, offset in zip(descriptors, offsets, strict=True)]
        data = b"".join(rows)
        if len(data) < size * len(rows):
            incomplete = [len(row) < size for row in rows].index(True)
            self._raise_changed(int(files[incomplete]))
        return np.frombuffer(data, dtype=self.dtype).reshape(len(rows), length)

    def chunks(self, i: int) -> Iterator[np.ndarray]:
        """The tokens of file i from the first to the last, CHUNK_TOKENS at a time."""
        with self.paths[i].open("rb") as file:
            while len(chunk := np.fromfile(file, dtype=self.dtype, count=CHUNK_TOKENS)):
                yield chunk

    def _sliding_windows(self, length: int) -> np.ndarray:
        """A view of the cache: `length` tokens from each position on, (n_tokens - length + 1, length)."""
        if length not in self._views:
            self._views[length] = np.lib.stride_tricks.sliding_window_view(self._cached_tokens(), length)
        return self._views[length]

    def _cached_tokens(self) -> np.ndarray:
        """The tokens of all files, concatenated, (n_tokens,); read on the first call."""
        if self._cache is None:
            self._cache = np.concatenate([np.fromfile(path, dtype=self.dtype) for path in self.paths])
            if len(self._cache) != self.lengths.sum():
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
        # An iterator that opens a file only when its descriptor is needed. If the batch has more files than
        # may be open, it closes files of earlier windows, which have been read by then.
        return map(self._open_file, indices)

    def _open_file(self, i: int) -> int:
        """The descriptor of file i; closes the least recently used file if too many are open."""
        descriptor = self._descriptors.get(i)
        if descriptor is None:
            if len(self._descriptors) >= self._max_open:
                _, least_recent = self._descriptors.popitem(last=False)
                os.close(least_recent)
            descriptor = os.open(self.paths[i], os.O_RDONLY | getattr(os, "O_BINARY", 0))  # binary on Windows
            self._descriptors[i] = descriptor
            if os.fstat(descriptor).st_size != self.lengths[i] * self.dtype.itemsize:
                self._raise_changed(i)
        elif len(self.paths) > self._max_open:  # otherwise no file is ever closed, so the order is not needed
            self._descriptors.move_to_end(i)
        return descriptor

    def _raise_changed(self, i: int) -> NoReturn:
        raise ValueError(
            f"{self.paths[i]} was truncated or replaced during the run: it had {self.lengths[i]} tokens at "
            "the start. Restore the corpus, then resume the run"
        )


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread for Windows, which does not have it."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


_read = getattr(os, "pread", _seek_and_read)


def _max_open_files() -> int:
    """The number of files to keep open: a quarter of the limit of the process, but at most 4,096."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if limit == resource.RLIM_INFINITY else max(16, min(4096, limit // 4))


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        _, descriptor = descriptors.popitem()
        os.close(descriptor)
