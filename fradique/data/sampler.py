"""The training batches: a pure function of (seed, step, rank).

The windows of an epoch are read in the order of a keyed permutation, which is computed for any index without
being stored. Training can therefore resume at any step, on any number of ranks, without a saved position.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fradique.data.dataset import Split, inputs_and_targets
from fradique.data.windows import Locations

# Windows are read many at a time, up to these limits: for small batches that takes about half the time.
PREFETCH_WINDOWS, PREFETCH_TOKENS = 1024, 1 << 19


class Sampler:
    """Chooses the windows of each training step.

    Row r of step s is number s * n + r of an infinite sequence of windows, where n = batch_size *
    accumulation is the number of rows in a step, whatever the number of ranks.

    The sequence is divided into epochs. Each epoch contains every window once, in its own order. All windows
    of an epoch are shifted by the same random number of tokens, so that a given word appears at different
    positions in the context.
    """

    def __init__(self, split: Split, block_size: int, batch_size: int, accumulation: int, seed: int) -> None:
        """`accumulation`: micro-batches of `batch_size` rows in a step, summed over the ranks."""
        self.split, self.block_size, self.seed = split, block_size, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.windows_per_epoch = split.count_windows(block_size)
        self._window_index = split.window_index(block_size)
        # The last rows read, (k * B, T + 1) for k micro-batches, and their key (group, rank, world_size).
        self._prefetched: tuple[tuple[int, int, int], np.ndarray] | None = None

    def locations(self, numbers: np.ndarray) -> Locations:
        """The locations of the windows with `numbers` (B,) in the sequence."""
        epochs, positions = np.divmod(numbers, self.windows_per_epoch)  # (B,)
        keys = splitmix64(np.uint64(derive_seed(self.seed)) ^ epochs.astype(np.uint64))
        windows = permute(positions, self.windows_per_epoch, keys)
        shifts = (splitmix64(~keys) % np.uint64(self.block_size)).astype(np.int64)
        return self._window_index.locate(windows, shifts)

    def rank_batches(self, world_size: int) -> tuple[int, int]:
        """Rows per micro-batch, and micro-batches per step, of each of `world_size` ranks.

        Raises ValueError if the step cannot be divided evenly.
        """
        if self.accumulation % world_size == 0:
            return self.batch_size, self.accumulation // world_size
        if self.batch_size % world_size == 0:
            return self.batch_size // world_size, self.accumulation
        raise ValueError(
            f"{world_size} processes cannot share gradient_accumulation_steps = {self.accumulation} "
            f"micro-batches of batch_size = {self.batch_size}: make one of them a multiple of {world_size}"
        )

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a rank in a step: inputs and targets, int64, (B, T) each.

        Together, the ranks get exactly the rows that a single process would get.
        """
        rows, count = self.rank_batches(world_size)
        group_size = max(1, min(PREFETCH_WINDOWS, PREFETCH_TOKENS // self.block_size) // rows)
        for number in range(step * count, step * count + count):  # counts this rank's micro-batches
            group, index = divmod(number, group_size)
            if self._prefetched is None or self._prefetched[0] != (group, rank, world_size):
                batches = np.arange(group * group_size, (group + 1) * group_size) * world_size + rank
                windows = (batches[:, None] * rows + np.arange(rows)).ravel()  # numbers in the sequence
                tokens = self.split.read_rows(self.locations(windows), self.block_size)
                self._prefetched = (group, rank, world_size), tokens
            yield inputs_and_targets(self._prefetched[1][index * rows : (index + 1) * rows])


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element: the finalizer of SplitMix64 (Steele et al. 2014), modulo 2^64."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*numbers: int) -> int:
    """A seed, 0 <= seed < 2^63, hashed from `numbers`; it depends on each of them and on their order."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Map `indices` (B,) through pseudo-random permutations of range(n), one for each of `keys` (B,).

    A four-round Feistel network permutes range(4^k), for the smallest 4^k >= n; a result outside range(n) is
    permuted again until it is inside (cycle walking, Black & Rogaway 2002), on average fewer than four times.
    No permutation is stored.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & mask
        for i in range(4):
            hashed = splitmix64(keys[outside] ^ splitmix64(right) + np.uint64(i))
            left, right = right, left ^ (hashed & mask)
        values[outside] = left << half_bits | right
        outside = values >= n
    return values.astype(np.int64)
