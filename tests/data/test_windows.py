"""The windows of a split: the tokens that they predict, and their memory."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from corpus_helpers import make_split, read_windows

from fradique.data.windows import Tiling, Window, WindowIndex


def test_all_windows_predict_each_token_once(tmp_path):
    split = make_split(tmp_path, [103, 57, 1, 9])
    predicted = Counter()
    for window in split.all_windows(10):
        x, y = read_windows(split, [window])
        assert x.shape[1] == window.length
        predicted.update(y.flatten().tolist())
    first_tokens = {0, 103, 160, 161}
    assert predicted == Counter(t for t in range(170) if t not in first_tokens)


def test_fixed_windows_are_spread_evenly_and_reproducible(tmp_path):
    split = make_split(tmp_path, [1001, 501])
    windows = split.fixed_windows(10, 30)
    assert windows == split.fixed_windows(10, 30)
    assert [split.token_files[w.shard][w.start] for w in windows[:3]] == [0, 50, 100]
    assert len(split.fixed_windows(10, 10_000)) == 150


def test_windows_of_a_trillion_tokens_need_little_memory():
    lengths = np.full(1000, 10**9 + 7, dtype=np.int64)
    tracemalloc.start()
    tiling, index = Tiling(lengths, 64), WindowIndex(lengths, 64)
    last = tiling[len(tiling) - 1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tiling) == 1000 * -(-(10**9 + 6) // 64) and index.ends[-1] == 1000 * ((10**9 + 6) // 64)
    assert last == Window(999, (10**9 + 6) // 64 * 64, (10**9 + 6) % 64)
    assert peak < 1_000_000
    with pytest.raises(IndexError):
        tiling[len(tiling)]
