"""The training batches: a pure function of the seed, the step and the rank.

The windows of an epoch are read in the order of a pseudo-random permutation, of which `permute` computes any
element without storing the rest. Training can therefore resume at any step, on any number of ranks, without a
saved position.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fradique.data.dataset import Split, inputs_and_targets
from fradique.data.windows import Locations

# The micro-batches of several steps are read at once, up to these limits: twice as fast for small batches.
PREFETCH_WINDOWS, PREFETCH_TOKENS = 1024, 1 << 19


class Sampler:
    """Chooses the windows of each training step.

    A step has n = batch_size * accumulation rows, for any number of ranks. Row r of step s is window number
    s * n + r, counted from 0, of an infinite sequence of windows.

    The sequence consists of epochs. Each epoch contains every window of the split once, in an order of its
    own. All windows of an epoch are shifted by the same random number of tokens, so that the same text is at
    different positions of the context in different epochs.
    """

    def __init__(self, split: Split, block_size: int, batch_size: int, accumulation: int, seed: int) -> None:
        """`accumulation`: micro-batches of `batch_size` rows in a step of all ranks together."""
        self.split, self.block_size, self.seed = split, block_size, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.windows_per_epoch = split.count_windows(block_size)
        self._window_index = split.window_index(block_size)
        # the micro-batches that were read last, (group_size * B, T + 1), and their (group, rank, world_size)
        self._prefetched_rows = np.empty((0, block_size + 1), dtype=np.uint16)
        self._prefetched_for: tuple[int, int, int] | None = None

    def locations(self, numbers: np.ndarray) -> Locations:
        """The locations in the token files of the windows `numbers` (B,) of the sequence."""
        epochs, positions = np.divmod(numbers, self.windows_per_epoch)  # (B,) each
        keys = splitmix64(np.uint64(derive_seed(self.seed)) ^ epochs.astype(np.uint64))  # (B,) one per epoch
        windows = permute(positions, self.windows_per_epoch, keys)
        shifts = (splitmix64(~keys) % np.uint64(self.block_size)).astype(np.int64)  # ~: not the order's key
        return self._window_index.locate(windows, shifts)

    def rank_batches(self, world_size: int) -> tuple[int, int]:
        """(rows per micro-batch, micro-batches per step) of each of `world_size` ranks.

        Raises ValueError if a step cannot be divided evenly among the ranks.
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
        n_rows, n_batches = self.rank_batches(world_size)
        group_size = max(1, min(PREFETCH_WINDOWS, PREFETCH_TOKENS // self.block_size) // n_rows)
        for number in range(step * n_batches, (step + 1) * n_batches):  # counts this rank's micro-batches
            group, index = divmod(number, group_size)
            if self._prefetched_for != (group, rank, world_size):
                # micro-batch i of rank r is micro-batch i * world_size + r of all ranks
                batches = np.arange(group * group_size, (group + 1) * group_size) * world_size + rank
                windows = (batches[:, None] * n_rows + np.arange(n_rows)).ravel()  # numbers in the sequence
                self._prefetched_rows = self.split.read_rows(self.locations(windows), self.block_size)
                self._prefetched_for = (group, rank, world_size)
            yield inputs_and_targets(self._prefetched_rows[index * n_rows : (index + 1) * n_rows])


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element: one step of SplitMix64 (Steele et al. 2014), modulo 2^64."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*numbers: int) -> int:
    """A seed, 0 <= seed < 2^63: a hash of `numbers`, which depends on each of them and on their order."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Element indices[b] of the pseudo-random permutation of range(n) with key keys[b], for each b: (B,).

    A Feistel network of four rounds permutes range(4^k), where 4^k is the smallest power of 4 that is not
    below n. A result outside range(n) is permuted again until it is inside (cycle walking, Black & Rogaway
    2002), on average fewer than four times. No permutation is stored.
    """
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)  # which elements to permute (again)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & mask
        for i in range(4):  # rounds
            hashed = splitmix64(keys[outside] ^ (splitmix64(right) + np.uint64(i)))
            left, right = right, left ^ (hashed & mask)
        values[outside] = left << half_bits | right
        outside = values >= n
    return values.astype(np.int64)
