import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import make_text, write_corpus

from fradique.data import dataset
from fradique.data import sampler as samplers


def make_split(tmp_path, sizes, vocab_size=1000):
    """A split whose tokens count on through its shards, so that a token tells where it stands."""
    paths, first = [], 0
    for i, size in enumerate(sizes):
        path = tmp_path / f"train_{i:05d}.bin"
        (np.arange(first, first + size) % vocab_size).astype("<u2").tofile(path)
        paths.append(path)
        first += size
    return dataset.Split(paths, "uint16", vocab_size, None)


def sampler_of(split, block_size, seed, batch_size=1, accumulation=1):
    return samplers.Sampler(split, block_size, batch_size, accumulation, seed)


@hypothesis_settings(derandomize=True, deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_range(n, key):
    placed = samplers.permute(np.arange(n), n, np.full(n, key, dtype=np.uint64))
    assert sorted(placed.tolist()) == list(range(n))


def test_permute_has_no_visible_order():
    placed = samplers.permute(np.arange(5000), 5000, np.full(5000, 7, dtype=np.uint64))
    assert abs(np.corrcoef(np.arange(5000), placed)[0, 1]) < 0.05
    assert (np.diff(placed) == 1).mean() < 0.01


def test_hash_numbers_differs_where_a_number_or_their_order_differs():
    seeds = [samplers.derive_seed(s, step, rank) for s in range(5) for step in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert samplers.derive_seed(1, 2) != samplers.derive_seed(2, 1)


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order(tmp_path):
    split = make_split(tmp_path, [103, 57, 8, 200])
    sampler = sampler_of(split, 10, 3)
    n = sampler.windows_per_epoch
    assert n == 10 + 5 + 0 + 19  # the third shard is too short for a window
    orders = []
    for epoch in range(2):
        windows = sampler.windows(epoch * n, n)
        assert Counter(w.shard for w in windows) == {0: 10, 1: 5, 3: 19}
        places = [(w.shard, w.start) for w in windows]
        assert len(set(places)) == n or len(set(places)) == n - 1  # the last of a shard may be clipped
        orders.append(places)
    assert orders[0] != orders[1]


def test_windows_of_an_epoch_cover_all_tokens_but_the_shifted_ends(tmp_path):
    split = make_split(tmp_path, [1000])
    sampler = sampler_of(split, 10, 0)
    covered = Counter()
    for window in sampler.windows(0, sampler.windows_per_epoch):
        covered.update(range(window.start, window.start + 10))
    assert sum(covered.values()) == 990
    assert len(covered) >= 980


def test_targets_are_inputs_moved_on_by_one_and_never_cross_shards(tmp_path):
    split = make_split(tmp_path, [103, 57, 200])
    sampler = sampler_of(split, 10, 1, batch_size=7)
    for step in range(43):
        ((x, y),) = sampler.micro_batches(step)
        assert x.shape == y.shape == (7, 10)
        assert (x[:, 1:] == y[:, :-1]).all()
        assert (y == x + 1).all()  # tokens count on, within a shard


def test_a_batch_depends_on_its_place_alone(tmp_path):
    split = make_split(tmp_path, [500])
    whole = sampler_of(split, 8, 9).windows(0, 12)
    last, *parts = (sampler_of(split, 8, 9).windows(first, 3) for first in (9, 0, 3, 6))
    assert [window for part in (*parts, last) for window in part] == whole
    assert sampler_of(split, 8, 10).windows(0, 12) != whole


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world"), [(2, 3, 1), (6, 2, 1), (2, 4, 2), (4, 3, 2)]
)
def test_what_is_read_ahead_is_the_sequence(tmp_path, monkeypatch, batch_size, accumulation, world):
    monkeypatch.setattr(samplers, "PREFETCH_WINDOWS", 5)
    split = make_split(tmp_path, [90, 60])
    sampler = sampler_of(split, 7, 3, batch_size, accumulation)
    rows, count = sampler.share(world)
    for step in (0, 1, 2, 40, 1, 0):  # over groups and epochs, and back
        for rank in range(world):
            found = list(sampler.micro_batches(step, rank, world))
            for i, (x, y) in enumerate(found):
                first = step * batch_size * accumulation + (i * world + rank) * rows
                for window, row in zip(sampler.windows(first, rows), zip(x, y, strict=True), strict=True):
                    tokens = split.shards[window.shard][window.start : window.start + 8].tolist()
                    assert tokens == [*row[0].tolist(), int(row[1][-1])] and tokens[1:] == row[1].tolist()
            assert len(found) == count


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world"), [(4, 6, 2), (4, 6, 3), (6, 1, 3), (4, 1, 4)]
)
def test_ranks_together_see_the_rows_that_one_would_see(tmp_path, batch_size, accumulation, world):
    split = make_split(tmp_path, [2000])
    sampler = sampler_of(split, 8, 5, batch_size, accumulation)
    for step in (0, 7):
        alone = [row.tolist() for x, _ in sampler.micro_batches(step) for row in x]
        shared = [
            row.tolist()
            for rank in range(world)
            for x, _ in sampler.micro_batches(step, rank, world)
            for row in x
        ]
        assert sorted(alone) == sorted(shared) and len(alone) == batch_size * accumulation


def test_rows_that_cannot_be_shared_are_refused(tmp_path):
    split = make_split(tmp_path, [200])
    assert sampler_of(split, 8, 0, 4, 6).share(3) == (4, 2)
    assert sampler_of(split, 8, 0, 6, 1).share(3) == (2, 1)
    with pytest.raises(ValueError, match="3 processes cannot share gradient_accumulation_steps = 2"):
        sampler_of(split, 8, 0, 4, 2).share(3)


def test_all_windows_predict_each_token_once(tmp_path):
    split = make_split(tmp_path, [103, 57, 1, 9])
    predicted = Counter()
    for window in split.all_windows(10):
        x, y = split.read([window])
        assert x.shape[1] == window.length
        predicted.update(y.flatten().tolist())
    firsts = {0, 103, 160, 161}
    assert predicted == Counter(t for t in range(170) if t not in firsts)


def test_ranks_share_the_windows_without_gap_or_overlap(tmp_path):
    split = make_split(tmp_path, [103, 57])
    windows = split.all_windows(10)
    alone = sorted(y.flatten().tolist() for _, y in split.batches(windows, 4))
    shared = sorted(y.flatten().tolist() for rank in range(3) for _, y in split.batches(windows, 4, rank, 3))
    assert alone == shared


def test_fixed_windows_are_spread_over_the_split_and_always_the_same(tmp_path):
    split = make_split(tmp_path, [1001, 501])
    windows = split.fixed_windows(10, 30)
    assert windows == split.fixed_windows(10, 30)
    assert [split.shards[w.shard][w.start] for w in windows[:3]] == [0, 50, 100]
    assert len(split.fixed_windows(10, 10_000)) == 150


def test_a_token_beyond_the_vocabulary_is_named_with_file_and_position(tmp_path):
    split = make_split(tmp_path, [50, 50])
    split.vocab_size = 73
    with pytest.raises(
        ValueError, match=r"train_00001.bin: token 99 at position 49 is beyond the vocabulary of 73"
    ):
        split.check_ids()
    with pytest.raises(ValueError, match=r"train_00001.bin: token 79 at position 29"):
        split.read([dataset.Window(1, 20, 9)])


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "data" / "book", make_text(300))


def test_a_corpus_opens_with_its_tokenizer_and_bytes(corpus):
    opened = dataset.open_corpus(corpus, block_size=16)
    text = make_text(300)
    cut = int(len(text) * 0.9)
    assert opened.tokenizer.decode(np.asarray(opened.train.shards[0])) == text[:cut]
    assert opened.val.count_text_bytes(opened.tokenizer) == len(text[cut:].encode())


def test_bytes_are_counted_from_the_tokens_where_meta_does_not_tell(corpus):
    opened = dataset.open_corpus(corpus, block_size=16)
    opened.val.text_bytes = None
    text = make_text(300)
    assert opened.val.count_text_bytes(opened.tokenizer) == len(text[int(len(text) * 0.9) :].encode())


def test_numbered_shards_are_read_in_order(corpus):
    ids = np.fromfile(corpus / "train.bin", dtype="<u2")
    (corpus / "train.bin").unlink()
    (corpus / "meta.json").unlink()
    ids[:100].tofile(corpus / "train_00000.bin")
    ids[100:].tofile(corpus / "train_00001.bin")
    opened = dataset.open_corpus(corpus, block_size=16)
    assert [len(s) for s in opened.train.shards] == [100, len(ids) - 100]
    assert np.array_equal(np.concatenate(opened.train.shards), ids)


def test_uint32_shards_are_read_as_meta_says(corpus):
    meta = json.loads((corpus / "meta.json").read_text())
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        ids.astype("<u4").tofile(corpus / f"{split}.bin")
    (corpus / "meta.json").write_text(json.dumps(meta | {"dtype": "uint32"}))
    opened = dataset.open_corpus(corpus, block_size=16)
    assert opened.train.shards[0].dtype == np.uint32
    assert opened.tokenizer.decode(np.asarray(opened.train.shards[0][:50])) == make_text(300)[:50]


def test_a_missing_corpus_names_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "data" / "eca_char"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    with pytest.raises(ValueError, match=r"make it with: python .*eca_char/prepare.py"):
        dataset.open_corpus(folder, 8)
    with pytest.raises(ValueError, match=r"no corpus in .*nothing.*can be prepared: eca_char.*data/custom"):
        dataset.open_corpus(folder.parent / "nothing", 8)


def test_a_corpus_too_small_for_a_block_is_refused(corpus):
    with pytest.raises(ValueError, match=r"the val split has \d+ tokens, too few for one block of 5000"):
        dataset.open_corpus(corpus, block_size=5000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]),
            "bytes where meta.json says",
        ),
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-1]),
            "bytes where meta.json says",
        ),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_damage_is_told_with_the_name_of_the_file(corpus, damage, message):
    damage(corpus)
    with pytest.raises((ValueError, OSError), match=message):
        dataset.open_corpus(corpus, block_size=8)


def test_meta_cannot_name_a_file_outside_the_folder(corpus):
    meta = json.loads((corpus / "meta.json").read_text())
    meta["splits"]["train"]["shards"][0]["file"] = "../book/train.bin"
    (corpus / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="damaged"):
        dataset.open_corpus(corpus, block_size=8)


def test_half_a_token_is_seen_without_meta_too(corpus):
    (corpus / "meta.json").unlink()
    (corpus / "train.bin").write_bytes((corpus / "train.bin").read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"train.bin has \d+ bytes, which is no whole number of uint16 tokens"
    ):
        dataset.open_corpus(corpus, block_size=8)
