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

from fradique.data.shard_progress import check_finished, is_unfinished
from fradique.data.token_files import TokenFiles
from fradique.data.windows import (
    Locations,
    Tiling,
    Window,
    WindowIndex,
    group_by_length,
    list_windows,
    locations_of,
)
from fradique.io import files as file_io
from fradique.tokenizer import tokenizer as tokenizers

SCAN_LIMIT = 1 << 29  # bytes of a split whose ids are all checked at start-up; batches are, in any case


class Split:
    """One side of a corpus, train or val: its shards, and how many bytes of text they stand for."""

    def __init__(self, paths: list[Path], dtype: str, vocab_size: int, text_bytes: int | None) -> None:
        self.paths, self.vocab_size, self.text_bytes = paths, vocab_size, text_bytes
        self.shards = TokenFiles(paths, dtype)
        self.tokens = int(self.shards.lengths.sum())
        self.targets = int(np.maximum(self.shards.lengths - 1, 0).sum())  # all tokens but a shard's first
        self._grids: dict[int, WindowIndex] = {}

    def count_windows(self, block_size: int) -> int:
        """Whole windows in all shards. A window needs block_size + 1 tokens of one shard."""
        return int(self.grid(block_size).ends[-1])

    def grid(self, block_size: int) -> WindowIndex:
        """The whole windows, side by side."""
        if block_size not in self._grids:
            self._grids[block_size] = WindowIndex(self.shards.lengths, block_size)
        return self._grids[block_size]

    def read(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, (B, T) each, of windows of one length T.

        Raises ValueError where an id is not in the vocabulary, naming the file and the position.
        """
        return self.read_places(locations_of(windows), windows[0].length)

    def read_places(self, places: Locations, length: int) -> tuple[Tensor, Tensor]:
        """`read` for windows that are given as places, B of them, all of one `length` T."""
        return inputs_and_targets(self.rows(places, length))

    def rows(self, places: Locations, length: int) -> np.ndarray:
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
        return list_windows(self.grid(block_size).find(np.arange(count) * there // count), block_size)

    def all_windows(self, block_size: int) -> Tiling:
        """Windows that predict each token of the split once (but a shard's first); the last may be short."""
        return Tiling(self.shards.lengths, block_size)

    def batches(
        self, windows: Sequence[Window], batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of `windows`, batch_size at a time, windows of one length together."""
        number = 0  # of the batch, of all ranks
        for run in group_by_length(windows):
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


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """int64, (B, T) each, of tokens (B, T + 1)."""
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
    return x, y


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
    check_finished(folder)
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
        meta = file_io.read_json(path)
        sound = meta["format"] == 1 and meta["dtype"] in ("uint16", "uint32")
        for name in ("train", "val"):
            split = meta["splits"][name]
            sound &= file_io.is_count(split["bytes"]) and len(split["shards"]) > 0
            for shard in split["shards"]:
                sound &= file_io.is_count(shard["tokens"]) and file_io.is_plain_name(shard["file"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged (no {error}); prepare the corpus again") from error
    if not sound:
        raise ValueError(f"{path} is damaged or of another version; prepare the corpus again")
    return meta


def _tokenizer(folder: Path, meta: dict | None) -> tokenizers.Tokenizer:
    if meta is not None or (folder / "tokenizer.json").exists():
        return tokenizers.load_tokenizer(folder / "tokenizer.json")
    if (folder / "meta.pkl").exists():
        return tokenizers.read_meta_pkl(folder / "meta.pkl")
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
