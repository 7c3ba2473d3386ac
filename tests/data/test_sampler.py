"""The sequence of training windows: permutations, epochs, ranks, and the checksum of its batches."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from corpus_helpers import make_sampler, make_split, sampled_windows, write_token_files
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fradique.data import sampler as samplers
from fradique.data.dataset import Split
from fradique.data.sampler import Sampler, derive_seed, permute


@hypothesis_settings(derandomize=True, deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_range(n, key):
    permuted = permute(np.arange(n), n, np.full(n, key, dtype=np.uint64))
    assert sorted(permuted.tolist()) == list(range(n))


def test_permute_has_no_visible_order():
    permuted = permute(np.arange(5000), 5000, np.full(5000, 7, dtype=np.uint64))
    assert abs(np.corrcoef(np.arange(5000), permuted)[0, 1]) < 0.05
    assert (np.diff(permuted) == 1).mean() < 0.01


def test_permute_equals_big_integer_arithmetic_beyond_32_bits():
    def splitmix(x):
        mask = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def permute_one(value, n, key):
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = value >> half, value & mask
            for i in range(4):
                left, right = right, left ^ (splitmix(key ^ ((splitmix(right) + i) % (1 << 64))) & mask)
            value = left << half | right
            if value < n:
                return value

    for n in (2**32 + 15, 2**37 - 1, 2**41 + 3):
        values = np.append(np.random.default_rng(n).integers(n, size=200), [0, n - 1])
        permuted = permute(values, n, np.full(202, 12345, dtype=np.uint64))
        assert permuted.tolist() == [permute_one(int(value), n, 12345) for value in values]


def test_derived_seeds_depend_on_each_number_and_their_order():
    seeds = [derive_seed(s, step, rank) for s in range(5) for step in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_each_epoch_has_every_window_once_in_a_new_order(tmp_path):
    split = make_split(tmp_path, [103, 57, 8, 200])
    sampler = make_sampler(split, 10, 3)
    n = sampler.windows_per_epoch
    assert n == 10 + 5 + 0 + 19  # the third file is too short for a window
    orders = []
    for epoch in range(2):
        windows = sampled_windows(sampler, epoch * n, n)
        assert Counter(w.shard for w in windows) == {0: 10, 1: 5, 3: 19}
        locations = [(w.shard, w.start) for w in windows]
        assert len(set(locations)) == n
        orders.append(locations)
    assert orders[0] != orders[1]


def test_an_epoch_covers_all_tokens_except_at_the_ends(tmp_path):
    split = make_split(tmp_path, [1000])
    sampler = make_sampler(split, 10, 0)
    covered = Counter()
    for window in sampled_windows(sampler, 0, sampler.windows_per_epoch):
        covered.update(range(window.start, window.start + 10))
    assert len(covered) == sum(covered.values()) == 990  # 99 windows of 10 tokens, which do not overlap


def test_targets_are_shifted_by_one_within_one_file(tmp_path):
    split = make_split(tmp_path, [103, 57, 200], gap=100)
    sampler = make_sampler(split, 10, 1, batch_size=7)
    for step in range(43):  # several epochs of 34 windows
        ((x, y),) = sampler.micro_batches(step)
        assert x.shape == y.shape == (7, 10)
        assert (x[:, 1:] == y[:, :-1]).all()
        assert (y == x + 1).all()  # the tokens of a file count up


def test_windows_depend_only_on_seed_and_number(tmp_path):
    split = make_split(tmp_path, [500])
    windows = sampled_windows(make_sampler(split, 8, 9), 0, 12)
    last, *earlier = (sampled_windows(make_sampler(split, 8, 9), first, 3) for first in (9, 0, 3, 6))
    assert [window for group in (*earlier, last) for window in group] == windows
    assert sampled_windows(make_sampler(split, 8, 10), 0, 12) != windows


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(2, 3, 1), (6, 2, 1), (2, 4, 2), (4, 3, 2)]
)
def test_prefetched_batches_follow_the_sequence(tmp_path, monkeypatch, batch_size, accumulation, world_size):
    monkeypatch.setattr(samplers, "PREFETCH_WINDOWS", 5)
    split = make_split(tmp_path, [90, 60])
    sampler = make_sampler(split, 7, 3, batch_size, accumulation)
    rows, count = sampler.rank_batches(world_size)
    for step in (0, 1, 2, 40, 1, 0):  # forward across groups and epochs, and backward
        for rank in range(world_size):
            batches = list(sampler.micro_batches(step, rank, world_size))
            for i, (x, y) in enumerate(batches):
                first = step * batch_size * accumulation + (i * world_size + rank) * rows
                windows = sampled_windows(sampler, first, rows)
                for window, row in zip(windows, zip(x, y, strict=True), strict=True):
                    tokens = split.token_files[window.shard][window.start : window.start + 8].tolist()
                    assert tokens == [*row[0].tolist(), int(row[1][-1])] and tokens[1:] == row[1].tolist()
            assert len(batches) == count


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(4, 6, 2), (4, 6, 3), (6, 1, 3), (4, 1, 4)]
)
def test_ranks_together_read_the_rows_of_a_single_process(tmp_path, batch_size, accumulation, world_size):
    split = make_split(tmp_path, [2000])
    sampler = make_sampler(split, 8, 5, batch_size, accumulation)
    for step in (0, 7):
        single = [row.tolist() for x, _ in sampler.micro_batches(step) for row in x]
        divided = [
            row.tolist()
            for rank in range(world_size)
            for x, _ in sampler.micro_batches(step, rank, world_size)
            for row in x
        ]
        assert sorted(single) == sorted(divided) and len(single) == batch_size * accumulation


def test_a_step_that_cannot_be_divided_evenly_is_refused(tmp_path):
    split = make_split(tmp_path, [200])
    assert make_sampler(split, 8, 0, 4, 6).rank_batches(3) == (4, 2)
    assert make_sampler(split, 8, 0, 6, 1).rank_batches(3) == (2, 1)
    with pytest.raises(ValueError, match="3 processes cannot share gradient_accumulation_steps = 2"):
        make_sampler(split, 8, 0, 4, 2).rank_batches(3)


def test_batches_have_the_recorded_checksum(tmp_path, reader):
    """The checksum is of an earlier version: a run resumed with a new version must get the same batches."""
    split = Split(write_token_files(tmp_path, [500, 1000, 3, 777]), "uint16", 50_000, None)
    sampler = Sampler(split, 16, 4, 2, seed=1337)
    digest = hashlib.sha256()
    for step in (0, 1, 2, 40, 10**9):
        for x, y in sampler.micro_batches(step):
            digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert digest.hexdigest() == "d9548ebdb4db297df58f1f8cb336cbb0e31f8358ce8bca362f75f75deb5065b9"
