"""Number the windows of a split, and find the token file and the position of each window.

A window is a block of input tokens; its targets are the tokens one position later. Only a few integers for
each token file are kept in memory, for any number of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """`length` input tokens from position `start` of file `shard`; the targets are one position later."""

    shard: int
    start: int
    length: int


# (index of the token file (B,), position of the first token in the file (B,)) of B windows
Locations = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class WindowGroup:
    """`count` windows of the same length, numbered from 0."""

    length: int
    count: int
    locate: Callable[[np.ndarray], Locations]  # window numbers (B,) -> their locations


class WindowIndex:
    """Numbers the windows of `block_size` tokens of a split, which are adjacent in each file.

    A window and its last target are in one file. The last tokens of a file, which do not fill a window, are
    not in any.
    """

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        """`lengths` (n_files,): the number of tokens in each file."""
        self.block_size = block_size
        self.counts = np.maximum(lengths - 1, 0) // block_size  # (n_files,) windows in each file
        self.ends = np.cumsum(self.counts)  # (n_files,) windows up to the end of each file
        self.last_starts = lengths - 1 - block_size  # (n_files,) the last position where a window fits

    def locate(self, numbers: np.ndarray, shifts: np.ndarray | int = 0) -> Locations:
        """The locations of the windows `numbers` (B,), each moved by `shifts` tokens towards the end.

        A window that would go beyond the end of its file is moved as far as it fits.
        """
        shards = np.searchsorted(self.ends, numbers, side="right")  # (B,)
        first_numbers = self.ends[shards] - self.counts[shards]
        starts = (numbers - first_numbers) * self.block_size + shifts
        return shards, np.minimum(starts, self.last_starts[shards])


class Tiling(Sequence[Window]):
    """Adjacent windows whose targets are all tokens of a split once, except the first token of each file.

    The last window of a file may be shorter than `block_size`. The sequence has the windows of one length
    after those of another. A window is made when it is indexed, so memory does not grow with their number.
    """

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        """`lengths` (n_files,): the number of tokens in each file."""
        index = WindowIndex(lengths, block_size)
        last_starts = index.counts * block_size  # (n_files,) where the last, shorter window of a file begins
        last_lengths = (np.maximum(lengths - 1, 0) - last_starts).tolist()  # 0: no shorter window
        # length -> files with a shorter window of that length. The keys, which include block_size, are in the
        # order in which the lengths first occur in the files.
        shards_by_length: dict[int, list[int]] = {}
        for shard, last_length in enumerate(last_lengths):
            if index.counts[shard] > 0:
                shards_by_length.setdefault(block_size, [])
            if last_length > 0:
                shards_by_length.setdefault(last_length, []).append(shard)
        self.groups = []
        for length, shards in shards_by_length.items():
            if length == block_size:
                group = WindowGroup(block_size, int(index.ends[-1]), index.locate)
            else:
                shards_array = np.array(shards)
                group = WindowGroup(length, len(shards), _lookup(shards_array, last_starts[shards_array]))
            self.groups.append(group)

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __getitem__(self, number: int) -> Window:
        for group in self.groups:
            if 0 <= number < group.count:
                return list_windows(group.locate(np.array([number])), group.length)[0]
            number -= group.count
        raise IndexError(number)


def _lookup(shards: np.ndarray, starts: np.ndarray) -> Callable[[np.ndarray], Locations]:
    """The function that maps window numbers (B,) to their elements of `shards` and `starts` (n_windows,)."""
    return lambda numbers: (shards[numbers], starts[numbers])


def list_windows(locations: Locations, length: int) -> list[Window]:
    """The windows of `length` tokens at `locations` (B,), as B objects."""
    shards, starts = locations
    return [
        Window(shard, start, length) for shard, start in zip(shards.tolist(), starts.tolist(), strict=True)
    ]


def locations_of(windows: Sequence[Window]) -> Locations:
    """The locations of `windows`, the inverse of `list_windows`."""
    shards = np.array([window.shard for window in windows])
    return shards, np.array([window.start for window in windows], dtype=np.int64)


def group_by_length(windows: Sequence[Window]) -> list[WindowGroup]:
    """Group `windows` by length, in order of the first occurrence of each length."""
    if isinstance(windows, Tiling):
        return windows.groups
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(window.length, []).append(window)
    return [
        WindowGroup(length, len(group), _lookup(*locations_of(group))) for length, group in by_length.items()
    ]
