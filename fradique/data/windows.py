"""Windows of tokens to predict: how they are numbered, and where each is in the token files of a split.

A split may have any number of windows; only a few integers per token file are kept in memory.
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


Locations = tuple[np.ndarray, np.ndarray]  # of B windows: index of the file (B,), first token in it (B,)


@dataclass(frozen=True)
class WindowGroup:
    """`count` windows of equal length; `locate` maps window numbers (B,) to their locations."""

    length: int
    count: int
    locate: Callable[[np.ndarray], Locations]


class WindowIndex:
    """Numbers the adjacent full windows of a split.

    A window is `block_size` inputs and one more token, the last target, all from one file.
    """

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        """`lengths` (n_files,): the number of tokens in each file."""
        self.block_size = block_size
        self.counts = np.maximum(lengths - 1, 0) // block_size  # (n_files,) windows in each file
        self.ends = np.cumsum(self.counts)  # (n_files,) windows up to the end of each file
        self.last_starts = lengths - 1 - block_size  # (n_files,) the largest start that leaves a full window

    def locate(self, numbers: np.ndarray, shifts: np.ndarray | int = 0) -> Locations:
        """The locations of the windows `numbers` (B,), each moved `shifts` tokens later within its file."""
        shards = np.searchsorted(self.ends, numbers, side="right")  # (B,)
        first_numbers = self.ends[shards] - self.counts[shards]
        starts = (numbers - first_numbers) * self.block_size + shifts
        return shards, np.minimum(starts, self.last_starts[shards])


class Tiling(Sequence[Window]):
    """Adjacent windows that predict each token of a split once, except the first token of each file.

    The last window of a file may be shorter. Windows of equal length are adjacent in the sequence. A window
    is computed when it is indexed, so memory does not grow with the split.
    """

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        """`lengths` (n_files,): the number of tokens in each file."""
        index = WindowIndex(lengths, block_size)
        remainders = np.maximum(lengths - 1, 0) - index.counts * block_size  # (n_files,)
        # length -> the files whose last window is that short; lengths are in order of first occurrence
        shards_by_length: dict[int, list[int]] = {}
        for shard, (count, remainder) in enumerate(
            zip(index.counts.tolist(), remainders.tolist(), strict=True)
        ):
            if count:
                shards_by_length.setdefault(block_size, [])
            if remainder:
                shards_by_length.setdefault(remainder, []).append(shard)

        def locate_last(shards: np.ndarray) -> Callable[[np.ndarray], Locations]:
            return lambda numbers: (shards[numbers], index.counts[shards[numbers]] * block_size)

        self.groups = [
            WindowGroup(block_size, int(index.ends[-1]), index.locate)
            if length == block_size
            else WindowGroup(length, len(shards), locate_last(np.array(shards)))
            for length, shards in shards_by_length.items()
        ]

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __getitem__(self, number: int) -> Window:
        for group in self.groups:
            if 0 <= number < group.count:
                return list_windows(group.locate(np.array([number])), group.length)[0]
            number -= group.count
        raise IndexError(number)


def list_windows(locations: Locations, length: int) -> list[Window]:
    """The windows at `locations` (B,) as B objects."""
    shards, starts = locations
    return [
        Window(shard, start, length) for shard, start in zip(shards.tolist(), starts.tolist(), strict=True)
    ]


def locations_of(windows: Sequence[Window]) -> Locations:
    """The locations of `windows` as two arrays; the inverse of `list_windows`."""
    shards = np.array([window.shard for window in windows])
    return shards, np.array([window.start for window in windows], dtype=np.int64)


def group_by_length(windows: Sequence[Window]) -> list[WindowGroup]:
    """Group `windows` by length, in order of the first occurrence of each length."""
    if isinstance(windows, Tiling):
        return windows.groups
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(window.length, []).append(window)

    def lookup(shards: np.ndarray, starts: np.ndarray) -> Callable[[np.ndarray], Locations]:
        return lambda numbers: (shards[numbers], starts[numbers])

    return [
        WindowGroup(length, len(group), lookup(*locations_of(group))) for length, group in by_length.items()
    ]
