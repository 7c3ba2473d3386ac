"""TODO."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fradique.data.dataset import Split, inputs_and_targets
from fradique.data.windows import Locations, Window, list_windows

# what a sampler reads at a time, at most: small batches take little more than half the time
PREFETCH_WINDOWS, PREFETCH_TOKENS = 1024, 1 << 19


class Sampler:
    """Which windows a training step sees: row r of step s is number s * rows + r in an endless sequence.

    A step has batch_size * accumulation rows, whatever the number of ranks that share them.

    The sequence runs through epochs. In each, every window is seen once, in an order of its own, and the grid
    of windows is shifted by a random number of tokens, so that words stand in every place of the context.
    """

    def __init__(self, split: Split, block_size: int, batch_size: int, accumulation: int, seed: int) -> None:
        self.split, self.block_size, self.seed = split, block_size, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.windows_per_epoch = split.count_windows(block_size)
        self._grid = split.grid(block_size)
        # the micro-batches that were read together last: which, of whom, and their rows (k B, T + 1)
        self._ahead: tuple[tuple[int, int, int], np.ndarray] | None = None

    def windows(self, first: int, count: int) -> list[Window]:
        """Windows number first, …, first + count - 1 of the sequence."""
        return list_windows(self.places(np.arange(first, first + count)), self.block_size)

    def places(self, numbers: np.ndarray) -> Locations:
        """Where the windows with `numbers` (B,) in the sequence are."""
        epochs, places = np.divmod(numbers, self.windows_per_epoch)  # (B,)
        keys = splitmix64(np.uint64(derive_seed(self.seed)) ^ epochs.astype(np.uint64))
        places = permute(places, self.windows_per_epoch, keys)
        shifts = (splitmix64(~keys) % np.uint64(self.block_size)).astype(np.int64)
        return self._grid.find(places, shifts)

    def share(self, world: int) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches, of each of `world` ranks.

        Raises ValueError where they cannot be shared evenly.
        """
        if self.accumulation % world == 0:
            return self.batch_size, self.accumulation // world
        if self.batch_size % world == 0:
            return self.batch_size // world, self.accumulation
        raise ValueError(
            f"{world} processes cannot share gradient_accumulation_steps = {self.accumulation} micro-batches "
            f"of batch_size = {self.batch_size}: make one of them a multiple of {world}"
        )

    def micro_batches(self, step: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """A rank's share of the rows of a step. All ranks together see the rows that one would see."""
        rows, count = self.share(world)
        together = max(1, min(PREFETCH_WINDOWS, PREFETCH_TOKENS // self.block_size) // rows)  # micro-batches
        for number in range(step * count, step * count + count):  # of this rank's in the whole run
            group, place = divmod(number, together)
            if self._ahead is None or self._ahead[0] != (group, rank, world):
                batches = np.arange(group * together, (group + 1) * together) * world + rank
                numbers = (batches[:, None] * rows + np.arange(rows)).ravel()
                self._ahead = (group, rank, world), self.split.rows(self.places(numbers), self.block_size)
            yield inputs_and_targets(self._ahead[1][place * rows : (place + 1) * rows])


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element: the finaliser of SplitMix64 (Steele et al. 2014), modulo 2^64."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*numbers: int) -> int:
    """A seed, 0 <= seed < 2^63, that differs wherever one of the numbers does."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where `places` (B,) stand in pseudo-random permutations of range(n), one a key (B,).

    A Feistel network of four rounds permutes the next power of four; what falls outside range(n) walks on
    until it is inside (Black & Rogaway 2002): fewer than four times, on average. No permutation is stored.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    places = places.astype(np.uint64)
    walking = np.ones(len(places), dtype=bool)
    while walking.any():
        left, right = places[walking] >> half, places[walking] & mask
        for turn in range(4):
            left, right = (
                right,
                left ^ (splitmix64(keys[walking] ^ splitmix64(right) + np.uint64(turn)) & mask),
            )
        places[walking] = left << half | right
        walking = places >= n
    return places.astype(np.int64)
