"""Token files, cached and read from disk, compared with NumPy arrays of the whole files."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from corpus_helpers import read_windows, write_token_files
from support import ROOT

from bench.dataloader import sparse_corpus
from fradique.data import token_files
from fradique.data.dataset import Split, open_corpus
from fradique.data.sampler import Sampler
from fradique.data.token_files import TokenFiles, check_uint16
from fradique.data.windows import Window
from fradique.tokenizer.tokenizer import GPT2Tokenizer


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_equal_the_files_for_every_reader(tmp_path, reader, dtype):
    sizes = [100, 0, 7, 300, 1, 50]
    paths = write_token_files(tmp_path, sizes, np.dtype(dtype))
    files = TokenFiles(paths, dtype)
    files._max_open = 2  # so that files are closed and reopened
    assert files.lengths.tolist() == sizes
    rng = np.random.default_rng(1)
    for length in (1, 3, 7):
        indices = rng.choice([0, 2, 3, 5], 40)
        starts = np.array([rng.integers(sizes[i] - length + 1) for i in indices])
        expected = [
            np.fromfile(paths[i], dtype)[s : s + length] for i, s in zip(indices, starts, strict=True)
        ]
        rows = files.read(indices, starts, length)
        assert rows.dtype == dtype and np.array_equal(rows, expected)


def test_more_files_than_a_process_may_open_are_read(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path\n"
        "import numpy as np\n"
        "from fradique.data import dataset, sampler, token_files\n"
        "token_files.MAX_CACHED_BYTES = 0\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.bin'))\n"
        "split = dataset.Split(paths, 'uint16', 50_000, None)\n"
        "sampler = sampler.Sampler(split, 10, 100, 1, 0)\n"
        "groups = np.arange(2000).reshape(20, 100)\n"
        "spread = sum(len(np.unique(sampler.locations(group)[0])) > 60 for group in groups)\n"
        "for step in range(20): list(sampler.micro_batches(step))\n"
        "assert len(paths) == 300 and spread == 20 and len(split.token_files._descriptors) == 16\n"
    )
    pytest.importorskip("resource")
    write_token_files(tmp_path, [50] * 300)
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")  # noqa: PTH112
def test_files_are_closed_when_their_split_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", 0)
    paths = write_token_files(tmp_path, [50] * 10)

    def count_open():
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return sum(link.startswith(str(tmp_path)) for link in links)

    split = Split(paths, "uint16", 50_000, None)
    read_windows(split, split.all_windows(49))
    assert count_open() == 10
    del split
    assert count_open() == 0


def test_a_file_changed_while_in_use_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", 0)
    paths = write_token_files(tmp_path, [100, 100])
    files = TokenFiles(paths, "uint16")
    file_index, start = np.array([1]), np.array([90])
    files.read(file_index, start, 10)
    os.truncate(paths[1], 190)
    with pytest.raises(ValueError, match=r"train_00001.bin was truncated or replaced during the run"):
        files.read(file_index, start, 10)
    paths[0].write_bytes(b"other")
    with pytest.raises(ValueError, match=r"train_00000.bin was truncated or replaced during the run"):
        files.read(file_index - 1, start, 10)


def test_files_changed_before_they_are_cached_are_refused(tmp_path):
    files = TokenFiles(write_token_files(tmp_path, [100, 100]), "uint16")
    os.truncate(files.paths[1], 190)
    with pytest.raises(ValueError, match=r"changed while it was read"):
        files.read(np.array([0]), np.array([0]), 10)


def test_positions_beyond_32_bits_are_read_correctly(tmp_path):
    """Two sparse files of 6.7 and 1.1 billion tokens: positions beyond 2^32, byte offsets beyond 2^33."""
    paths = [tmp_path / "train_00000.bin", tmp_path / "train_00001.bin"]
    size = 100 * (1 << 26)
    for path, tokens in zip(paths, (size, 1_100_000_001), strict=True):
        with path.open("wb") as file:
            file.truncate(2 * tokens)
            file.seek(2 * tokens - 20)
            file.write(np.arange(1, 11).astype("<u2").tobytes())
    split = Split(paths, "uint16", 11, None)
    assert split.tokens == size + 1_100_000_001 > 1 << 32
    split.check_ids()  # beyond SCAN_LIMIT, so not read
    locations = np.array([0, 1]), np.array([size - 10, 1_100_000_001 - 10])
    x, y = split.read_locations(locations, 9)
    assert x.tolist() == [list(range(1, 10))] * 2 and y.tolist() == [list(range(2, 11))] * 2
    sampler = Sampler(split, 1, 3, 1, seed=0)
    assert sampler.windows_per_epoch == split.tokens - 2
    shards, starts = sampler.locations(np.arange(10**12, 10**12 + 2000))
    assert (starts >= 0).all() and (starts[shards == 0] < size).all() and starts.max() > 1 << 32
    assert 0.1 < (shards == 1).mean() < 0.2  # 1.1 of 7.8 billion tokens
    assert split.all_windows(1)[size + 5] == Window(1, 6, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_tokens_read(tmp_path):
    """3,200 windows of a sparse 1 GB file took 179 MB with memory mapping; the list of all windows 288 MB."""
    code = (
        "import sys; from pathlib import Path\n"
        "from fradique.data import dataset, sampler\n"
        "def used():\n"
        "    lines = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)\n"
        "    return [int(lines[name].split()[0]) // 1024 for name in ('RssAnon', 'RssFile')]\n"
        "corpus = dataset.open_corpus(Path(sys.argv[1]), 256)\n"
        "sampler = sampler.Sampler(corpus.train, 256, 32, 1, 0)\n"
        "list(sampler.micro_batches(0))\n"
        "before = used()\n"
        "for step in range(1, 100): list(sampler.micro_batches(step))\n"
        "windows = corpus.train.all_windows(256)\n"
        "for _, (x, y) in zip(range(20), corpus.train.batches(windows, 32)): pass\n"
        "print(len(windows), *(after - first for first, after in zip(before, used())))\n"
    )
    sparse_corpus(tmp_path / "holes", 1)
    command = [sys.executable, "-c", code, str(tmp_path / "holes")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    n_windows, anonymous, mapped = map(int, result.stdout.split())
    assert n_windows > 1_950_000 and anonymous < 20 and mapped < 20, result.stdout


# Files of another dtype


WORDS = "A lua de Lisboa é uma lua, e o gato que não dormia olhava a lua. " * 400


def write_foreign_file(path, kind):
    """Write a file that is no token file of uint16, with the ids of GPT-2's tokens where it has ids."""
    ids = GPT2Tokenizer().encode(WORDS)
    chars = np.frombuffer(WORDS.encode("ascii", "ignore"), dtype="u1") - 10
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, ids)
    elif kind == "text":
        path.write_text(WORDS, encoding="utf-8")
    elif kind == "uint8":
        chars.tofile(path)
    else:
        ids.astype(kind).tofile(path)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("uint32", "32 or 64 bits"),
        ("int32", "32 or 64 bits"),
        ("int64", "32 or 64 bits"),
        ("npy", "numpy.save"),
        ("text", "contains text"),
        ("uint8", "8 bits"),
        ("float16", "floating-point numbers of 16 bits"),
        ("float32", "floating-point numbers of 32 bits"),
        ("float64", "floating-point numbers of 64 bits|32 or 64 bits"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_not_uint16_is_refused_by_its_content(tmp_path, kind, content, split):
    """Read as uint16, all of them are tokens of GPT-2's vocabulary, or begin with some."""
    for name in ("train", "val"):
        GPT2Tokenizer().encode(WORDS).astype("<u2").tofile(tmp_path / f"{name}.bin")
    assert open_corpus(tmp_path, 8).train.vocab_size == 50257
    write_foreign_file(tmp_path / f"{split}.bin", kind)
    with pytest.raises(ValueError, match=content) as caught:
        open_corpus(tmp_path, 8)
    assert f"{split}.bin" in str(caught.value) and "prepare.py" in str(caught.value)


@pytest.mark.parametrize("kind", ["uint32", "int64", "npy", "text"])
def test_a_shard_of_another_dtype_is_refused(tmp_path, kind):
    for name in ("train_00000", "train_00001", "val"):
        GPT2Tokenizer().encode(WORDS).astype("<u2").tofile(tmp_path / f"{name}.bin")
    write_foreign_file(tmp_path / "train_00001.bin", kind)
    with pytest.raises(ValueError, match="train_00001"):
        open_corpus(tmp_path, 8)


@pytest.mark.parametrize("kind", ["uint32", "int64"])
def test_characters_of_another_dtype_are_refused(tmp_path, kind):
    """Their upper halves would be characters 0."""
    stoi = {char: i for i, char in enumerate(sorted(set(WORDS)))}
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: char for char, i in stoi.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    ids = np.array([stoi[char] for char in WORDS])
    for name in ("train", "val"):
        ids.astype("<u2").tofile(tmp_path / f"{name}.bin")
    assert open_corpus(tmp_path, 8).train.vocab_size == len(stoi)
    ids.astype(kind).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="32 or 64 bits"):
        open_corpus(tmp_path, 8)


@pytest.mark.parametrize("vocab_size", [2, 65, 300, 50257])
@pytest.mark.parametrize("pattern", [[1, 0], [0, 1], [0], [5, 6, 7]])
def test_small_regular_corpora_are_not_mistaken(tmp_path, vocab_size, pattern):
    ids = np.array(pattern * 20_000) % vocab_size
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    if vocab_size <= 1 << 14:  # GPT-2's tokens are never so few
        check_uint16(tmp_path / "train.bin", vocab_size)


@pytest.mark.parametrize("high", [2, 10, 64, 127, 128, 256, 1000])
@pytest.mark.parametrize("vocab_size", [16_385, 50257])
def test_small_ids_of_a_large_vocabulary_are_not_mistaken(tmp_path, high, vocab_size):
    """Such as a corpus of characters without its meta.pkl."""
    rng = np.random.default_rng(1)
    for size in (64, 1000, 20_000):
        rng.integers(high, size=size).astype("<u2").tofile(tmp_path / "train.bin")
        check_uint16(tmp_path / "train.bin", vocab_size)


@pytest.mark.parametrize("ids", [[0, 0, 0, 20_480], [15_615], [50_256, 50_256, 11], [16_639, 262]])
def test_regular_large_ids_are_not_mistaken_for_floats(tmp_path, ids):
    np.array(ids * 9000, dtype="<u2").tofile(tmp_path / "train.bin")
    check_uint16(tmp_path / "train.bin", 50257)


@pytest.mark.parametrize("kind", [">u2", "u1", "<f2"])
def test_an_unknown_id_may_come_from_another_dtype(tmp_path, kind):
    meta = {"vocab_size": 65, "stoi": {chr(40 + i): i for i in range(65)}}
    meta["itos"] = {i: char for char, i in meta["stoi"].items()}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    for name in ("train", "val"):
        np.random.default_rng(0).integers(65, size=5000).astype(kind).tofile(tmp_path / f"{name}.bin")
    with pytest.raises(ValueError, match=r"another tokenizer, or its tokens are not uint16"):
        open_corpus(tmp_path, 8)


@pytest.mark.parametrize("vocab_size", [65, 300, 4096, 50257])
def test_random_tokens_are_not_mistaken(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    for size in [*range(40, 140), 9000] * 3:
        rng.integers(vocab_size, size=size).astype("<u2").tofile(tmp_path / "train.bin")
        check_uint16(tmp_path / "train.bin", vocab_size)
