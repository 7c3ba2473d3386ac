"""Shards -> batches, a pure function of (seed, step, rank).

A corpus is a folder with `train.bin` and `val.bin` (or `train_00000.bin`, …): raw little-endian token ids, as
`fradique.corpus` or nanoGPT writes them, any number of them: windows are read when they are needed, or a
little before. Training walks through the windows of an epoch in an order that a keyed permutation gives for
any index alone, so nothing needs to be remembered to go on at any step, on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fradique import reading
from fradique import tokenizer as tokenizers
from fradique.tokenfiles import TokenFiles
from fradique.unfinished import is_unfinished, refuse_unfinished
from fradique.windows import Grid, Places, Tiling, Window, places_of, runs_of, window_list

SCAN_LIMIT = 1 << 29  # bytes of a split whose ids are all checked at start-up; batches are, in any case
# what a sampler reads at a time, at most: small batches take little more than half the time
WINDOWS_AHEAD, TOKENS_AHEAD = 1024, 1 << 19


class Split:
    """One side of a corpus, train or val: its shards, and how many bytes of text they stand for."""

    def __init__(self, paths: list[Path], dtype: str, vocab_size: int, text_bytes: int | None) -> None:
        self.paths, self.vocab_size, self.text_bytes = paths, vocab_size, text_bytes
        self.shards = TokenFiles(paths, dtype)
        self.tokens = int(self.shards.lengths.sum())
        self.targets = int(np.maximum(self.shards.lengths - 1, 0).sum())  # all tokens but a shard's first
        self._grids: dict[int, Grid] = {}

    def count_windows(self, block_size: int) -> int:
        """Whole windows in all shards. A window needs block_size + 1 tokens of one shard."""
        return int(self.grid(block_size).ends[-1])

    def grid(self, block_size: int) -> Grid:
        """The whole windows, side by side."""
        if block_size not in self._grids:
            self._grids[block_size] = Grid(self.shards.lengths, block_size)
        return self._grids[block_size]

    def read(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, (B, T) each, of windows of one length T.

        Raises ValueError where an id is not in the vocabulary, naming the file and the position.
        """
        return self.read_places(places_of(windows), windows[0].length)

    def read_places(self, places: Places, length: int) -> tuple[Tensor, Tensor]:
        """`read` for windows that are given as places, B of them, all of one `length` T."""
        return inputs_and_targets(self.rows(places, length))

    def rows(self, places: Places, length: int) -> np.ndarray:
        """The tokens of windows and one more, (B, T + 1), as their files have them."""
        rows = self.shards.read(*places, length + 1)
        if rows.max() >= self.vocab_size:
            b, t = np.unravel_index(int(rows.argmax()), rows.shape)
            raise self._beyond(int(places[0][b]), int(places[1][b] + t), int(rows[b, t]))
        return rows

    def check_ids(self) -> None:
        """Raise ValueError for the first id beyond the vocabulary, in splits of up to SCAN_LIMIT bytes."""
        if self.shards.nbytes > SCAN_LIMIT:
            return
        for i in range(len(self.shards)):
            position = 0
            for chunk in self.shards.chunks(i):
                if (top := int(chunk.max())) >= self.vocab_size:
                    raise self._beyond(i, position + int(chunk.argmax()), top)
                position += len(chunk)

    def _beyond(self, shard: int, position: int, token: int) -> ValueError:
        return ValueError(
            f"{self.paths[shard]}: token {token} at position {position} is beyond the vocabulary of "
            f"{self.vocab_size}; the file and its tokenizer do not belong together: prepare the corpus again"
        )

    def fixed_windows(self, block_size: int, count: int) -> list[Window]:
        """`count` windows spread evenly over the split (all, if it has fewer): the same every time."""
        there = self.count_windows(block_size)
        count = min(count, there)
        return window_list(self.grid(block_size).find(np.arange(count) * there // count), block_size)

    def all_windows(self, block_size: int) -> Tiling:
        """Windows that predict each token of the split once (but a shard's first); the last may be short."""
        return Tiling(self.shards.lengths, block_size)

    def batches(
        self, windows: Sequence[Window], batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of `windows`, batch_size at a time, windows of one length together."""
        number = 0  # of the batch, of all ranks
        for run in runs_of(windows):
            for first in range(0, run.count, batch_size):
                if number % world == rank:
                    numbers = np.arange(first, min(first + batch_size, run.count))
                    yield self.read_places(run.find(numbers), run.length)
                number += 1

    def count_text_bytes(self, tokenizer: tokenizers.Tokenizer) -> int:
        """UTF-8 bytes of the text that the split encodes: from meta.json, else summed over its tokens."""
        if self.text_bytes is not None:
            return self.text_bytes
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths()
        files = range(len(self.shards))
        return sum(int(lengths[chunk].sum()) for i in files for chunk in self.shards.chunks(i))


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
        return window_list(self.places(np.arange(first, first + count)), self.block_size)

    def places(self, numbers: np.ndarray) -> Places:
        """Where the windows with `numbers` (B,) in the sequence are."""
        epochs, places = np.divmod(numbers, self.windows_per_epoch)  # (B,)
        keys = mix(np.uint64(hash_numbers(self.seed)) ^ epochs.astype(np.uint64))
        places = permute(places, self.windows_per_epoch, keys)
        shifts = (mix(~keys) % np.uint64(self.block_size)).astype(np.int64)
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
        together = max(1, min(WINDOWS_AHEAD, TOKENS_AHEAD // self.block_size) // rows)  # micro-batches
        for number in range(step * count, step * count + count):  # of this rank's in the whole run
            group, place = divmod(number, together)
            if self._ahead is None or self._ahead[0] != (group, rank, world):
                batches = np.arange(group * together, (group + 1) * together) * world + rank
                numbers = (batches[:, None] * rows + np.arange(rows)).ravel()
                self._ahead = (group, rank, world), self.split.rows(self.places(numbers), self.block_size)
            yield inputs_and_targets(self._ahead[1][place * rows : (place + 1) * rows])


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """int64, (B, T) each, of tokens (B, T + 1)."""
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
    return x, y


def mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element: the finaliser of SplitMix64 (Steele et al. 2014), modulo 2^64."""
    x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_numbers(*numbers: int) -> int:
    """A seed, 0 <= seed < 2^63, that differs wherever one of the numbers does."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix(state ^ np.uint64(number))
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
            left, right = right, left ^ (mix(keys[walking] ^ mix(right) + np.uint64(turn)) & mask)
        places[walking] = left << half | right
        walking = places >= n
    return places.astype(np.int64)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: both splits and the tokenizer that made them."""

    folder: Path
    train: Split
    val: Split
    tokenizer: tokenizers.Tokenizer


def open_corpus(folder: Path, block_size: int) -> Corpus:
    """Open `data/<corpus>/`, ours (meta.json) or nanoGPT's (meta.pkl, or none: GPT-2's tokens).

    Raises ValueError, saying what to do, where it is missing, damaged, or too small for one block.
    """
    refuse_unfinished(folder)
    if not _shards(folder, "train") or not _shards(folder, "val"):
        raise ValueError(_no_corpus(folder))
    described = folder / "meta.json"
    meta = _read_meta(described) if described.exists() or described.is_symlink() else None
    tokenizer = _tokenizer(folder, meta)
    train, val = (_open_split(folder, name, meta, tokenizer.vocab_size) for name in ("train", "val"))
    name, small = min(("train", train), ("val", val), key=lambda pair: pair[1].shards.lengths.max())
    if small.count_windows(block_size) < 1:
        most = max(1, int(small.shards.lengths.max()) - 1)
        raise ValueError(
            f"{folder}: the {name} split has {small.tokens} tokens, too few for one block of "
            f"{block_size} and its target; a longer text, or --block_size={most} at most"
        )
    train.check_ids()
    val.check_ids()
    return Corpus(folder, train, val, tokenizer)


def _shards(folder: Path, split: str) -> list[Path]:
    whole = folder / f"{split}.bin"
    return [whole] if whole.exists() else sorted(folder.glob(f"{split}_[0-9]*.bin"))


def _open_split(folder: Path, name: str, meta: dict | None, vocab_size: int) -> Split:
    if meta is None:
        return Split(_shards(folder, name), "uint16", vocab_size, None)
    entries = meta["splits"][name]["shards"]
    for entry in entries:
        path, expected = folder / entry["file"], entry["tokens"] * np.dtype(meta["dtype"]).itemsize
        if not path.exists():
            raise ValueError(f"{path} is named in meta.json but is not there; prepare the corpus again")
        if (size := path.stat().st_size) != expected:
            raise ValueError(
                f"{path} has {size} bytes where meta.json says {expected}: the file is truncated or was "
                "replaced; prepare the corpus again"
            )
    paths = [folder / entry["file"] for entry in entries]
    return Split(paths, meta["dtype"], vocab_size, meta["splits"][name]["bytes"])


def _read_meta(path: Path) -> dict:
    """meta.json, checked: its format, its dtype, and that its shards are plain names in the folder."""
    try:
        meta = reading.json_value(path)
        sound = meta["format"] == 1 and meta["dtype"] in ("uint16", "uint32")
        for name in ("train", "val"):
            split = meta["splits"][name]
            sound &= reading.is_count(split["bytes"]) and len(split["shards"]) > 0
            for shard in split["shards"]:
                sound &= reading.is_count(shard["tokens"]) and reading.is_plain_name(shard["file"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged (no {error}); prepare the corpus again") from error
    if not sound:
        raise ValueError(f"{path} is damaged or of another version; prepare the corpus again")
    return meta


def _tokenizer(folder: Path, meta: dict | None) -> tokenizers.Tokenizer:
    if meta is not None or (folder / "tokenizer.json").exists():
        return tokenizers.load(folder / "tokenizer.json")
    if (folder / "meta.pkl").exists():
        return tokenizers.from_meta_pkl(folder / "meta.pkl")
    return tokenizers.GPT2Tokenizer()  # as nanoGPT has it: no meta.pkl means GPT-2's BPE


def _no_corpus(folder: Path) -> str:
    """What to say where a corpus is not prepared: the command that makes it, or those that are there."""
    if (folder / "prepare.py").exists():
        return f"the corpus {folder} is not prepared yet; make it with: python {folder / 'prepare.py'}"
    found = {path.parent for path in folder.parent.glob("*/train*.bin")}
    ready = sorted(there.name for there in found if not is_unfinished(there))
    makers = sorted(p.parent.name for p in folder.parent.glob("*/prepare.py"))
    return (
        f"there is no corpus in {folder}; "
        + (f"prepared: {', '.join(ready)}; " if ready else "")
        + (f"that can be prepared: {', '.join(makers)}; " if makers else "")
        + "your own text: python data/custom/prepare.py --input book.txt --name my_book"
    )
