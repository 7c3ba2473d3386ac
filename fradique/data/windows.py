"""Windows: stretches of tokens to predict, found by number on the grid of a split's shards.

All that is kept is a number or two a shard, however many windows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A stretch of tokens to predict: `length` inputs from `start` in `shard`, targets one further on."""

    shard: int
    start: int
    length: int


Locations = tuple[np.ndarray, np.ndarray]  # of windows: the shard (B,) and the first token in it (B,)


@dataclass(frozen=True)
class WindowRun:
    """Windows of one length, `count` of them; `find` tells where those with some numbers (B,) are."""

    length: int
    count: int
    find: Callable[[np.ndarray], Locations]


class WindowIndex:
    """The whole windows of a split side by side: `block_size` tokens each, and one more of the same shard."""

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        self.block_size = block_size
        self.counts = np.maximum(lengths - 1, 0) // block_size  # (n_shards,)
        self.ends = np.cumsum(self.counts)  # windows up to the end of each shard
        self.lasts = lengths - 1 - block_size  # where the last window of a shard may begin

    def find(self, numbers: np.ndarray, shift: np.ndarray | int = 0) -> Locations:
        """Where the windows with `numbers` (B,) are, moved on by `shift` tokens."""
        shards = np.searchsorted(self.ends, numbers, side="right")  # (B,)
        firsts = self.ends[shards] - self.counts[shards]
        starts = (numbers - firsts) * self.block_size + shift
        return shards, np.minimum(starts, self.lasts[shards])  # the last has all its targets


class Tiling(Sequence[Window]):
    """Windows that predict each token of a split once (but a shard's first); what ends a shard may be short.

    It is as small for a terabyte as for a page: windows are found when they are asked for. Those of one
    length come one after another.
    """

    def __init__(self, lengths: np.ndarray, block_size: int) -> None:
        grid = WindowIndex(lengths, block_size)
        rests = np.maximum(lengths - 1, 0) - grid.counts * block_size  # (n_shards,)
        by_length: dict[int, list[int]] = {}  # the shards that hold windows of a length, as they come
        for shard, (count, rest) in enumerate(zip(grid.counts.tolist(), rests.tolist(), strict=True)):
            if count:
                by_length.setdefault(block_size, [])
            if rest:
                by_length.setdefault(rest, []).append(shard)

        def at_the_end(shards: np.ndarray) -> Callable[[np.ndarray], Locations]:
            return lambda numbers: (shards[numbers], grid.counts[shards[numbers]] * block_size)

        self.runs = [
            WindowRun(block_size, int(grid.ends[-1]), grid.find)
            if length == block_size
            else WindowRun(length, len(shards), at_the_end(np.array(shards)))
            for length, shards in by_length.items()
        ]

    def __len__(self) -> int:
        return sum(run.count for run in self.runs)

    def __getitem__(self, number: int) -> Window:
        for run in self.runs:
            if 0 <= number < run.count:
                return list_windows(run.find(np.array([number])), run.length)[0]
            number -= run.count
        raise IndexError(number)


def list_windows(places: Locations, length: int) -> list[Window]:
    """The windows at `places` (B,), one by one."""
    shards, starts = places
    return [Window(i, start, length) for i, start in zip(shards.tolist(), starts.tolist(), strict=True)]


def locations_of(windows: Sequence[Window]) -> Locations:
    """Where `windows` are."""
    return np.array([w.shard for w in windows]), np.array([w.start for w in windows], dtype=np.int64)


def group_by_length(windows: Sequence[Window]) -> list[WindowRun]:
    """`windows` of one length together, in the order in which the lengths come."""
    if isinstance(windows, Tiling):
        return windows.runs
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(window.length, []).append(window)

    def listed(shards: np.ndarray, starts: np.ndarray) -> Callable[[np.ndarray], Locations]:
        return lambda numbers: (shards[numbers], starts[numbers])

    return [WindowRun(length, len(same), listed(*locations_of(same))) for length, same in by_length.items()]
