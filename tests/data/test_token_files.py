"""Files of tokens, held and read from the disk, against NumPy on the whole of them."""

import hashlib
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from support import ROOT

from bench.dataloader import sparse_corpus
from fradique.data import dataset, token_files
from fradique.data import sampler as samplers
from fradique.data.token_files import TokenFiles
from fradique.data.windows import Tiling, WindowIndex

READERS = {"held": (64 << 20, "pread"), "pread": (0, "pread"), "seek": (0, "_seek_and_read")}


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Each way to read tokens: in memory, by os.pread, and as where there is none."""
    held, name = READERS[request.param]
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", held)
    if name != "pread":
        monkeypatch.setattr(token_files, "_read", token_files._seek_and_read)
    elif not hasattr(os, "pread"):
        pytest.skip("this system has no os.pread")


def write_files(folder, sizes, dtype="<u2"):
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"train_{i:05d}.bin")
        np.random.default_rng(i).integers(50_000, size=size).astype(dtype).tofile(paths[-1])
    return paths


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_are_those_of_the_files_whatever_reads_them(tmp_path, reader, dtype):
    sizes = [100, 0, 7, 300, 1, 50]
    paths = write_files(tmp_path, sizes, np.dtype(dtype))
    files = TokenFiles(paths, dtype)
    files._most_open = 2  # so that files are closed and opened again
    assert files.lengths.tolist() == sizes
    rng = np.random.default_rng(1)
    for length in (1, 3, 7):
        chosen = rng.choice([0, 2, 3, 5], 40)
        starts = np.array([rng.integers(sizes[i] - length + 1) for i in chosen])
        expected = [np.fromfile(paths[i], dtype)[s : s + length] for i, s in zip(chosen, starts, strict=True)]
        rows = files.read(chosen, starts, length)
        assert rows.dtype == dtype and np.array_equal(rows, expected)


def test_the_batches_of_a_run_are_those_that_they_always_were(tmp_path, reader):
    """The sum of the first steps was taken before reading was made faster: runs resume across versions."""
    split = dataset.Split(write_files(tmp_path, [500, 1000, 3, 777]), "uint16", 50_000, None)
    sampler = samplers.Sampler(split, 16, 4, 2, seed=1337)
    digest = hashlib.sha256()
    for step in (0, 1, 2, 40, 10**9):
        for x, y in sampler.micro_batches(step):
            digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert digest.hexdigest() == "d9548ebdb4db297df58f1f8cb336cbb0e31f8358ce8bca362f75f75deb5065b9"


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
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
        "seen = sum(len(np.unique(sampler.places(group)[0])) > 60 for group in groups)\n"
        "for step in range(20): list(sampler.micro_batches(step))\n"
        "assert len(paths) == 300 and seen == 20 and len(split.shards._open) == 16\n"
    )
    pytest.importorskip("resource")
    write_files(tmp_path, [50] * 300)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")  # noqa: PTH112
def test_files_are_closed_with_the_split_that_opened_them(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", 0)
    paths = write_files(tmp_path, [50] * 10)

    def opened():
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return sum(link.startswith(str(tmp_path)) for link in links)

    split = dataset.Split(paths, "uint16", 50_000, None)
    split.read(split.all_windows(49))
    assert opened() == 10
    del split
    assert opened() == 0


def test_a_file_that_is_cut_or_replaced_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_CACHED_BYTES", 0)
    paths = write_files(tmp_path, [100, 100])
    files = TokenFiles(paths, "uint16")
    one, start = np.array([1]), np.array([90])
    files.read(one, start, 10)
    os.truncate(paths[1], 190)
    with pytest.raises(ValueError, match=r"train_00001.bin was cut or replaced while it was in use"):
        files.read(one, start, 10)
    paths[0].write_bytes(b"other")
    with pytest.raises(ValueError, match=r"train_00000.bin was cut or replaced while it was in use"):
        files.read(one - 1, start, 10)


def test_files_that_change_before_they_are_held_are_refused(tmp_path):
    files = TokenFiles(write_files(tmp_path, [100, 100]), "uint16")
    os.truncate(files.paths[1], 190)
    with pytest.raises(ValueError, match=r"changed while they were read"):
        files.read(np.array([0]), np.array([0]), 10)


def test_tokens_beyond_the_range_of_32_bits_are_read_at_their_places(tmp_path):
    """Two files with holes, 6.4 billion tokens and 1.1 billion: positions past 2^32, bytes past 2^33."""
    paths = [tmp_path / "train_00000.bin", tmp_path / "train_00001.bin"]
    size = 100 * (1 << 26)
    for path, tokens in zip(paths, (size, 1_100_000_001), strict=True):
        with path.open("wb") as file:
            file.truncate(2 * tokens)
            file.seek(2 * tokens - 20)
            file.write(np.arange(1, 11).astype("<u2").tobytes())
    split = dataset.Split(paths, "uint16", 11, None)
    assert split.tokens == size + 1_100_000_001 > 1 << 32
    split.check_ids()  # too large to scan
    places = np.array([0, 1]), np.array([size - 10, 1_100_000_001 - 10])
    x, y = split.read_places(places, 9)
    assert x.tolist() == [list(range(1, 10))] * 2 and y.tolist() == [list(range(2, 11))] * 2
    sampler = samplers.Sampler(split, 1, 3, 1, seed=0)
    assert sampler.windows_per_epoch == split.tokens - 2
    shards, starts = sampler.places(np.arange(10**12, 10**12 + 2000))
    assert (starts >= 0).all() and (starts[shards == 0] < size).all() and starts.max() > 1 << 32
    assert 0.1 < (shards == 1).mean() < 0.2  # 1.1 of 7.5
    assert split.all_windows(1)[size + 5] == dataset.Window(1, 6, 1)


def test_an_epoch_of_more_windows_than_32_bits_count_is_permuted_as_big_integers_are():
    def mixed(x):
        mask = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def permuted(place, n, key):
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = place >> half, place & mask
            for turn in range(4):
                left, right = right, left ^ (mixed(key ^ ((mixed(right) + turn) % (1 << 64))) & mask)
            place = left << half | right
            if place < n:
                return place

    for n in (2**32 + 15, 2**37 - 1, 2**41 + 3):
        places = np.append(np.random.default_rng(n).integers(n, size=200), [0, n - 1])
        found = samplers.permute(places, n, np.full(202, 12345, dtype=np.uint64))
        assert found.tolist() == [permuted(int(place), n, 12345) for place in places]


def test_the_windows_of_a_terabyte_take_no_memory():
    lengths = np.full(1000, 10**9 + 7, dtype=np.int64)
    tracemalloc.start()
    tiling, grid = Tiling(lengths, 64), WindowIndex(lengths, 64)
    last = tiling[len(tiling) - 1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tiling) == 1000 * -(-(10**9 + 6) // 64) and grid.ends[-1] == 1000 * ((10**9 + 6) // 64)
    assert last == dataset.Window(999, (10**9 + 6) // 64 * 64, (10**9 + 6) % 64)
    assert peak < 1_000_000
    with pytest.raises(IndexError):
        tiling[len(tiling)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """3,200 windows spread over a gigabyte of holes. Mapped, they took 179 MB, and a list of all 288 MB."""
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    windows, anonymous, mapped = map(int, done.stdout.split())
    assert windows > 1_950_000 and anonymous < 20 and mapped < 20, done.stdout
