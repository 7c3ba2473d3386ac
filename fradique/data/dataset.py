"""A prepared corpus: its two splits, read as batches of token windows, and its tokenizer.

A corpus is a folder with `train.bin` and `val.bin` (or `train_00000.bin`, ...): files of raw little-endian
token ids, written by `fradique.data.build`, `fradique.data.shard_build` or nanoGPT. Windows are read when a
batch needs them, so a split may be larger than memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fradique.data.shard_progress import check_finished, is_unfinished
from fradique.data.token_files import TokenFiles
from fradique.data.windows import Locations, Tiling, Window, WindowIndex, group_by_length, list_windows
from fradique.io import files as file_io
from fradique.tokenizer import tokenizer as tokenizers

SCAN_LIMIT = 1 << 29  # bytes: a split up to this size is checked in full when opened; batches always are


class Split:
    """One split of a corpus, train or val: its token files and the size of the text they encode."""

    def __init__(self, paths: list[Path], dtype: str, vocab_size: int, text_bytes: int | None) -> None:
        """`text_bytes`: UTF-8 bytes of the encoded text; None if meta.json does not give them."""
        self.paths, self.vocab_size, self.text_bytes = paths, vocab_size, text_bytes
        self.token_files = TokenFiles(paths, dtype)
        self.tokens = int(self.token_files.lengths.sum())
        self.targets = int(np.maximum(self.token_files.lengths - 1, 0).sum())  # without each file's first
        self._window_indexes: dict[int, WindowIndex] = {}  # by block_size

    def window_index(self, block_size: int) -> WindowIndex:
        """The index of the adjacent full windows of `block_size` tokens."""
        if block_size not in self._window_indexes:
            self._window_indexes[block_size] = WindowIndex(self.token_files.lengths, block_size)
        return self._window_indexes[block_size]

    def count_windows(self, block_size: int) -> int:
        """The number of full windows. A window needs block_size + 1 tokens of one file."""
        return int(self.window_index(block_size).ends[-1])

    def read_locations(self, locations: Locations, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, (B, T) each, of the B windows at `locations`, all of `length` T.

        Raises ValueError naming the file and the position if a token id is not in the vocabulary.
        """
        return inputs_and_targets(self.read_rows(locations, length))

    def read_rows(self, locations: Locations, length: int) -> np.ndarray:
        """The tokens of the B windows at `locations`, one more than `length` T: (B, T + 1), the files' dtype.

        Raises ValueError naming the file and the position if a token id is not in the vocabulary.
        """
        rows = self.token_files.read(*locations, length + 1)
        if rows.max() >= self.vocab_size:
            b, t = np.unravel_index(int(rows.argmax()), rows.shape)
            shards, starts = locations
            raise self._vocabulary_error(int(shards[b]), int(starts[b] + t), int(rows[b, t]))
        return rows

    def check_ids(self) -> None:
        """Raise ValueError for an id outside the vocabulary; a split beyond SCAN_LIMIT is not checked."""
        if self.token_files.nbytes > SCAN_LIMIT:
            return
        for i in range(len(self.token_files)):
            position = 0
            for chunk in self.token_files.chunks(i):
                if (max_id := int(chunk.max())) >= self.vocab_size:
                    raise self._vocabulary_error(i, position + int(chunk.argmax()), max_id)
                position += len(chunk)

    def _vocabulary_error(self, shard: int, position: int, token: int) -> ValueError:
        return ValueError(
            f"{self.paths[shard]}: token {token} at position {position} is not in the vocabulary of "
            f"{self.vocab_size} tokens: the file was written with another tokenizer; prepare the corpus again"
        )

    def fixed_windows(self, block_size: int, count: int) -> list[Window]:
        """`count` windows spread evenly over the split (all, if it has fewer); always the same."""
        available = self.count_windows(block_size)
        count = min(count, available)
        numbers = np.arange(count) * available // count
        return list_windows(self.window_index(block_size).locate(numbers), block_size)

    def all_windows(self, block_size: int) -> Tiling:
        """Adjacent windows that predict each token of the split once, except the first of each file."""
        return Tiling(self.token_files.lengths, block_size)

    def batches(
        self, windows: Sequence[Window], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batches of `windows`: inputs and targets, int64, (B, T) each, B <= batch_size.

        The windows of a batch have equal length T. Batches are dealt to the ranks in turn.
        """
        batch_number = 0  # counted over all ranks
        for group in group_by_length(windows):
            for first in range(0, group.count, batch_size):
                if batch_number % world_size == rank:
                    numbers = np.arange(first, min(first + batch_size, group.count))
                    yield self.read_locations(group.locate(numbers), group.length)
                batch_number += 1

    def count_text_bytes(self, tokenizer: tokenizers.Tokenizer) -> int:
        """UTF-8 bytes of the text that the split encodes: from meta.json, else summed over its tokens."""
        if self.text_bytes is not None:
            return self.text_bytes
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths()
        indices = range(len(self.token_files))
        return sum(int(lengths[chunk].sum()) for i in indices for chunk in self.token_files.chunks(i))


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Split token rows (B, T + 1) into inputs and targets, int64, (B, T) each."""
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
    return x, y


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: both splits and the tokenizer that encoded them."""

    folder: Path
    train: Split
    val: Split
    tokenizer: tokenizers.Tokenizer


def open_corpus(folder: Path, block_size: int) -> Corpus:
    """Open the corpus in `folder`: Fradique's (with meta.json) or nanoGPT's.

    A nanoGPT corpus has a meta.pkl with its characters, or no metadata, which means GPT-2's tokens. Raises
    ValueError, with the fix, if the corpus is missing, unfinished, damaged, or too small for one block.
    """
    check_finished(folder)
    if not _token_paths(folder, "train") or not _token_paths(folder, "val"):
        raise ValueError(_missing_corpus_message(folder))
    path = folder / "meta.json"
    meta = _read_meta(path) if path.exists() or path.is_symlink() else None
    tokenizer = _load_tokenizer(folder, meta)
    train, val = (_open_split(folder, name, meta, tokenizer.vocab_size) for name in ("train", "val"))
    _check_size(folder, train, val, block_size)
    train.check_ids()
    val.check_ids()
    return Corpus(folder, train, val, tokenizer)


def _check_size(folder: Path, train: Split, val: Split, block_size: int) -> None:
    """Raise ValueError if a split has no window of `block_size` tokens."""
    splits = {"train": train, "val": val}
    name, split = min(splits.items(), key=lambda item: item[1].token_files.lengths.max())
    if split.count_windows(block_size) < 1:
        max_block_size = max(1, int(split.token_files.lengths.max()) - 1)
        raise ValueError(
            f"{folder}: the {name} split has {split.tokens} tokens, too few for one block of {block_size} "
            f"and its target: use a longer text, or --block_size={max_block_size} at most"
        )


def _token_paths(folder: Path, split: str) -> list[Path]:
    single = folder / f"{split}.bin"
    return [single] if single.exists() else sorted(folder.glob(f"{split}_[0-9]*.bin"))


def _open_split(folder: Path, name: str, meta: dict | None, vocab_size: int) -> Split:
    if meta is None:
        return Split(_token_paths(folder, name), "uint16", vocab_size, None)
    entries = meta["splits"][name]["shards"]
    for entry in entries:
        path, expected = folder / entry["file"], entry["tokens"] * np.dtype(meta["dtype"]).itemsize
        if not path.exists():
            raise ValueError(f"{path} is listed in meta.json but is missing; prepare the corpus again")
        if (size := path.stat().st_size) != expected:
            raise ValueError(
                f"{path} has {size} bytes where meta.json says {expected}: the file is truncated or was "
                "replaced; prepare the corpus again"
            )
    paths = [folder / entry["file"] for entry in entries]
    return Split(paths, meta["dtype"], vocab_size, meta["splits"][name]["bytes"])


def _read_meta(path: Path) -> dict:
    """Read meta.json and check its format, its dtype, and that its files are plain names in the folder."""
    try:
        meta = file_io.read_json(path)
        valid = meta["format"] == 1 and meta["dtype"] in ("uint16", "uint32")
        for name in ("train", "val"):
            split = meta["splits"][name]
            valid &= file_io.is_count(split["bytes"]) and len(split["shards"]) > 0
            for shard in split["shards"]:
                valid &= file_io.is_count(shard["tokens"]) and file_io.is_plain_name(shard["file"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged (no {error}); prepare the corpus again") from error
    if not valid:
        raise ValueError(f"{path} is damaged or of another version; prepare the corpus again")
    return meta


def _load_tokenizer(folder: Path, meta: dict | None) -> tokenizers.Tokenizer:
    if meta is not None or (folder / "tokenizer.json").exists():
        return tokenizers.load_tokenizer(folder / "tokenizer.json")
    if (folder / "meta.pkl").exists():
        return tokenizers.read_meta_pkl(folder / "meta.pkl")
    return tokenizers.GPT2Tokenizer()  # as in nanoGPT: without meta.pkl, tokens are those of GPT-2's BPE


def _missing_corpus_message(folder: Path) -> str:
    """The message for a folder without a corpus: the command that makes it, or the corpora that exist."""
    script = folder / "prepare.py"
    if script.exists():
        return f"the corpus {folder} is not prepared yet; make it with: python {script}"
    folders = {path.parent for path in folder.parent.glob("*/train*.bin")}
    prepared = sorted(path.name for path in folders if not is_unfinished(path))
    preparable = sorted(path.parent.name for path in folder.parent.glob("*/prepare.py"))
    return (
        f"there is no corpus in {folder}; "
        + (f"prepared: {', '.join(prepared)}; " if prepared else "")
        + (f"that can be prepared: {', '.join(preparable)}; " if preparable else "")
        + "your own text: python data/custom/prepare.py --input book.txt --name my_book"
    )
