"""Open a prepared corpus: its training and validation split, from which batches are read, and its tokenizer.

A corpus is a folder with `train.bin` and `val.bin`, files of raw little-endian token ids. A split may also be
in several files: `train_00000.bin`, `train_00001.bin`, ... They are written by `fradique.data.build`,
`fradique.data.shard_build` or nanoGPT. Tokens are read when a batch needs them, so a split may be larger than
memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fradique.data.shard_progress import check_no_unfinished_shards, is_unfinished
from fradique.data.token_files import TokenFiles, check_uint16, sample_checksum
from fradique.data.windows import Locations, Tiling, Window, WindowIndex, group_by_length, list_windows
from fradique.io.files import describe_search, find_beside_project, is_count, is_plain_name, read_json
from fradique.io.terminal import shell_command
from fradique.tokenizer.meta_pkl import read_meta_pkl
from fradique.tokenizer.tokenizer import (
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_checksum,
)

SCAN_LIMIT = 1 << 29  # bytes: all ids of a split up to this size are checked when the corpus is opened


class Split:
    """One split of a corpus, train or val: its token files and the size of the text they encode."""

    def __init__(
        self,
        paths: list[Path],
        dtype: str,
        vocab_size: int,
        text_bytes: int | None,
        checksums: Sequence[str] = (),
    ) -> None:
        """text_bytes: UTF-8 bytes of the encoded text; None if there is no meta.json that gives them.

        checksums: the SHA-256 of each file as meta.json has it; empty if there is no meta.json.
        """
        self.paths, self.vocab_size, self.text_bytes = paths, vocab_size, text_bytes
        self._checksums = list(checksums)
        self.token_files = TokenFiles(paths, dtype)
        self.tokens = int(self.token_files.lengths.sum())
        # the first token of a file cannot be predicted, so it is never a target
        self.targets = int(np.maximum(self.token_files.lengths - 1, 0).sum())
        self._window_indexes: dict[int, WindowIndex] = {}  # block_size -> index

    def fingerprint(self) -> str:
        """A text that is equal for equal token files. Files without a checksum in meta.json are sampled."""
        if not all(self._checksums) or not self._checksums:
            self._checksums = [sample_checksum(path) for path in self.paths]
        return " ".join(map(str, [*self.token_files.lengths.tolist(), *self._checksums]))

    def window_index(self, block_size: int) -> WindowIndex:
        """Numbers the adjacent windows of `block_size` tokens; made once for each `block_size`."""
        if block_size not in self._window_indexes:
            self._window_indexes[block_size] = WindowIndex(self.token_files.lengths, block_size)
        return self._window_indexes[block_size]

    def count_windows(self, block_size: int) -> int:
        """The number of windows of `block_size` tokens, each with its targets in the same file."""
        return int(self.window_index(block_size).ends[-1])  # ends: windows up to the end of each file

    def read_locations(self, locations: Locations, length: int) -> tuple[Tensor, Tensor]:
        """Read the inputs and targets of B windows of `length` T: int64, (B, T) each.

        locations: for each window the index of its token file, and its position in the file, (B,) each.
        Raises ValueError naming the file and the position if a token id is not in the vocabulary.
        """
        return inputs_and_targets(self.read_rows(locations, length))

    def read_rows(self, locations: Locations, length: int) -> np.ndarray:
        """Read B windows of `length` T, each with its last target: (B, T + 1), uint16 or uint32.

        Raises ValueError naming the file and the position if a token id is not in the vocabulary.
        """
        rows = self.token_files.read(*locations, length + 1)
        if rows.max() >= self.vocab_size:
            b, t = np.unravel_index(int(rows.argmax()), rows.shape)
            shards, starts = locations
            raise self._vocabulary_error(int(shards[b]), int(starts[b] + t), int(rows[b, t]))
        return rows

    def check_ids(self) -> None:
        """Raise ValueError for an id outside the vocabulary.

        A split larger than SCAN_LIMIT is not checked here, because that takes long; each batch is.
        """
        if self.token_files.nbytes > SCAN_LIMIT:
            return
        for shard in range(len(self.token_files)):
            chunk_start = 0
            for chunk in self.token_files.chunks(shard):
                max_id = int(chunk.max())
                if max_id >= self.vocab_size:
                    raise self._vocabulary_error(shard, chunk_start + int(chunk.argmax()), max_id)
                chunk_start += len(chunk)

    def _vocabulary_error(self, shard: int, position: int, token: int) -> ValueError:
        has_meta = self.text_bytes is not None
        other_dtype = "" if has_meta else ", or its tokens are not uint16 in little-endian order"
        return ValueError(
            f"{self.paths[shard]}: token {token} at position {position} is not in the vocabulary of "
            f"{self.vocab_size} tokens: the file was written with another tokenizer{other_dtype}; prepare "
            "the corpus again"
        )

    def fixed_windows(self, block_size: int, count: int) -> list[Window]:
        """`count` windows spread evenly over the split, the same at every call; all if it has fewer."""
        available = self.count_windows(block_size)
        count = min(count, available)
        numbers = np.arange(count) * available // count
        return list_windows(self.window_index(block_size).locate(numbers), block_size)

    def all_windows(self, block_size: int) -> Tiling:
        """Adjacent windows in which each token is a target exactly once, except the first of each file.

        The last window of a file may be shorter than `block_size`.
        """
        return Tiling(self.token_files.lengths, block_size)

    def batches(
        self, windows: Sequence[Window], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `windows` for this rank: inputs and targets, int64, (B, T) each, B <= batch_size.

        The windows of a batch have equal length T. Batch i is for rank i mod world_size.
        """
        batch_number = 0
        for group in group_by_length(windows):
            for first in range(0, group.count, batch_size):
                if batch_number % world_size == rank:
                    numbers = np.arange(first, min(first + batch_size, group.count))
                    yield self.read_locations(group.locate(numbers), group.length)
                batch_number += 1

    def count_text_bytes(self, tokenizer: Tokenizer) -> int:
        """UTF-8 bytes of the text that the split encodes, from meta.json or else from all of its tokens.

        `tokenizer` is the one that encoded the split.
        """
        if self.text_bytes is not None:
            return self.text_bytes
        byte_lengths = tokenizer.byte_lengths()  # (vocab_size,)
        n_bytes = 0
        for shard in range(len(self.token_files)):
            for chunk in self.token_files.chunks(shard):
                n_bytes += int(byte_lengths[chunk].sum())
        return n_bytes


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Convert rows of tokens (B, T + 1) to inputs and targets, int64, (B, T) each."""
    inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: both splits and the tokenizer that encoded them."""

    folder: Path
    train: Split
    val: Split
    tokenizer: Tokenizer


def open_corpus(folder: Path, block_size: int) -> Corpus:
    """Open the corpus in `folder`: one of Fradique, which has a meta.json, or one of nanoGPT.

    Token files without a meta.json must be uint16, as nanoGPT writes them. The tokenizer is then that of
    tokenizer.json (left by a preparation that was killed before it wrote meta.json), else that of meta.pkl
    (nanoGPT's characters), else GPT-2's. Raises ValueError, with the fix, if the corpus is missing,
    unfinished, damaged, or too small for one block.
    """
    check_no_unfinished_shards(folder)
    if not _token_paths(folder, "train") or not _token_paths(folder, "val"):
        raise ValueError(_missing_corpus_message(folder))
    path = folder / "meta.json"
    has_meta = path.exists() or path.is_symlink()  # a broken link is an error, not a corpus of nanoGPT
    meta = _read_meta(path) if has_meta else None
    tokenizer = _load_tokenizer(folder, meta)
    train, val = (_open_split(folder, name, meta, tokenizer.vocab_size) for name in ("train", "val"))
    _check_size(folder, train, val, block_size)
    train.check_ids()
    val.check_ids()
    return Corpus(folder, train, val, tokenizer)


def _check_size(folder: Path, train: Split, val: Split, block_size: int) -> None:
    """Raise ValueError if a split has no window of `block_size` tokens.

    The message gives the largest block size of which both splits have a window.
    """
    splits = {"train": train, "val": val}
    longest_files = {name: int(split.token_files.lengths.max()) for name, split in splits.items()}
    name = min(longest_files, key=longest_files.get)
    max_block_size = longest_files[name] - 1  # a window and its last target are in one file
    if block_size > max_block_size:
        advice = f", or --block_size={max_block_size} at most" if max_block_size > 0 else ""
        file = "split" if len(splits[name].paths) == 1 else "split's longest file"
        raise ValueError(
            f"{folder}: the {name} {file} has {longest_files[name]} tokens, too few for one block of "
            f"{block_size} and its target: use a longer text{advice}"
        )


def _token_paths(folder: Path, split: str) -> list[Path]:
    """The token files of a split, found by their names and not in meta.json; [] if there are none."""
    single = folder / f"{split}.bin"
    return [single] if single.exists() else sorted(folder.glob(f"{split}_[0-9]*.bin"))


def _open_split(folder: Path, name: str, meta: dict | None, vocab_size: int) -> Split:
    """Open the split `name`, "train" or "val".

    Raises ValueError if a file that meta.json lists is missing, or has another size than meta.json says.
    """
    if meta is None:
        if vocab_size > 1 << 16:
            raise ValueError(
                f"{folder} has no meta.json, and its vocabulary is too large for the tokens of uint16 that "
                "nanoGPT writes; prepare the corpus again"
            )
        paths = _token_paths(folder, name)
        for path in paths:
            check_uint16(path, vocab_size)
        return Split(paths, "uint16", vocab_size, None)
    entries = meta["splits"][name]["shards"]
    for entry in entries:
        path = folder / entry["file"]
        if not path.exists():
            raise ValueError(f"{path} is listed in meta.json but is missing; prepare the corpus again")
        size, expected = path.stat().st_size, entry["tokens"] * np.dtype(meta["dtype"]).itemsize
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes where meta.json says {expected}: the file is truncated or was "
                "replaced; prepare the corpus again"
            )
    paths = [folder / entry["file"] for entry in entries]
    checksums = [str(entry.get("sha256", "")) for entry in entries]
    return Split(paths, meta["dtype"], vocab_size, meta["splits"][name]["bytes"], checksums)


def _read_meta(path: Path) -> dict:
    """Read meta.json, and check every value that is used here."""
    try:
        meta = read_json(path)
        valid = meta["format"] == 1 and meta["dtype"] in ("uint16", "uint32")
        for name in ("train", "val"):
            split = meta["splits"][name]
            valid = valid and is_count(split["bytes"]) and len(split["shards"]) > 0
            for shard in split["shards"]:
                valid = valid and is_count(shard["tokens"]) and is_plain_name(shard["file"])
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}; prepare the corpus again") from error
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the corpus again") from error
    if not valid:
        raise ValueError(f"{path} is damaged or of another version; prepare the corpus again")
    return meta


def _load_tokenizer(folder: Path, meta: dict | None) -> Tokenizer:
    """The tokenizer of a corpus. `meta`: the content of its meta.json; None if it has none."""
    path = folder / "tokenizer.json"
    if meta is not None and not path.exists():
        raise ValueError(
            f"{path} is missing: it gives the text of each token. Put that file back, or prepare the "
            "corpus again"
        )
    if meta is not None or path.exists():
        tokenizer = load_tokenizer(path)
        if meta is not None:
            _check_tokenizer(folder, tokenizer, meta)
        return tokenizer
    if (folder / "meta.pkl").exists():
        return read_meta_pkl(folder / "meta.pkl")
    return GPT2Tokenizer()


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, meta: dict) -> None:
    """Raise ValueError if tokenizer.json is not the one with which the corpus was made.

    Older versions wrote only the kind and the size of the vocabulary to meta.json, and no checksum.
    """
    facts = {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    facts["tokenizer_sha256"] = tokenizer_checksum(tokenizer)
    if any(name in meta and meta[name] != value for name, value in facts.items()):
        raise ValueError(
            f"{folder / 'tokenizer.json'} is not the tokenizer with which the corpus was made: its tokens "
            "would mean other text. Put that file back, or prepare the corpus again"
        )


def _missing_corpus_message(folder: Path) -> str:
    """The message for a folder without a corpus: the command that makes it, or the corpora beside it."""
    script = folder / "prepare.py"
    if script.exists():
        return f"the corpus {folder} is not prepared yet; make it with: {shell_command(Path.cwd() / script)}"
    data = find_beside_project(folder.parent)
    folders = {path.parent for path in data.glob("*/train*.bin")}
    prepared = sorted(path.name for path in folders if not is_unfinished(path))
    preparable = sorted(path.parent.name for path in data.glob("*/prepare.py"))
    searched = "" if folder.is_absolute() else f" (looked for {describe_search(folder)})"
    custom = shell_command("data/custom/prepare.py", "--input", "book.txt", "--name", "my_book")
    return (
        f"there is no corpus in {folder}{searched}; "
        + (f"prepared: {', '.join(prepared)}; " if prepared else "")
        + (f"can be prepared: {', '.join(preparable)}; " if preparable else "")
        + f"to use your own text: {custom}"
    )
