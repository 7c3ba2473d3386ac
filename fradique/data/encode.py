"""Text -> token files: make the tokenizer of a corpus, and encode its splits in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fradique.data.console import print_note, progress_bar
from fradique.data.text import PIECE_CHARS, Text, cut_pieces
from fradique.tokenizer import tokenizer as tokenizers

SPLITS = ("train", "val")
MIN_TOKENS = 2  # in a split: a block of one token and its target
FEW_TOKENS = 1000  # in the validation split: with fewer, its loss means little
MAX_THREADS = 16
SAMPLE_CHARS = 64 << 20  # characters that a BPE is trained on, at most
SAMPLE_WORD_BYTES = 4 << 20  # distinct words in these; the trainer needs about 100 times as much memory
SAMPLE_PIECE = 1 << 14  # characters in a piece of the sample; `tokenizers` buffers 256 pieces

SplitPiece: TypeAlias = tuple[str, str | None]  # a split and a piece of its text; None: end of a document


def make_tokenizer(
    spec: str | tuple[str, int], text: Text, n_train: int, alphabet: str
) -> tokenizers.Tokenizer:
    """Make the tokenizer that `spec`, a result of `parse_spec`, asks for.

    A character tokenizer has the characters of `alphabet`; a BPE is trained on the first `n_train` characters
    of `text`.
    """
    if spec == "char":
        return tokenizers.CharTokenizer(alphabet)
    if spec == "gpt2":
        return tokenizers.GPT2Tokenizer()
    _, vocab_size = spec
    sample = BPESample(text, n_train)
    tokenizer = tokenizers.train_bpe(sample, vocab_size)
    if sample.n_chars < n_train:
        print_note(
            f"the BPE was trained on a sample of {sample.n_chars:,} of {n_train:,} characters, spread over "
            "the text"
        )
    if tokenizer.vocab_size < vocab_size:
        print_note(
            f"the text is too small for {vocab_size:,} tokens: the BPE has {tokenizer.vocab_size:,} tokens"
        )
    return tokenizer


class BPESample:
    """Pieces of the first `n_train` characters of a text, to train a BPE on; all of them, if it is small.

    From a larger text, up to SAMPLE_CHARS characters are taken, spread evenly over the text; fewer if the
    distinct words, which the trainer counts in memory, exceed SAMPLE_WORD_BYTES.
    """

    def __init__(self, text: Text, n_train: int) -> None:
        self.n_chars = 0  # in the pieces yielded so far
        self._text, self._n_train = text, n_train

    def __iter__(self) -> Iterator[str]:
        words: set[str] = set()
        n_read = self.n_chars = word_bytes = 0
        pieces = cut_pieces(self._text.chunks(), SAMPLE_PIECE, SAMPLE_PIECE)
        with progress_bar(self._n_train, "sampling", "char") as bar:
            for split, piece in show_chars(split_pieces(pieces, self._n_train), bar):
                if split != "train":
                    return
                n_read += len(piece)
                fraction = n_read / self._n_train
                max_word_bytes = (1 + fraction) / 2 * SAMPLE_WORD_BYTES
                if self.n_chars > fraction * SAMPLE_CHARS or word_bytes > max_word_bytes:
                    continue
                new_words = set(piece.split()) - words
                words |= new_words
                word_bytes += len(" ".join(new_words).encode())
                self.n_chars += len(piece)
                yield piece


def split_pieces(pieces: Iterable[str], n_train: int) -> Iterator[SplitPiece]:
    """Assign the first `n_train` characters to train and the rest to val."""
    for piece in pieces:
        if n_train > 0:
            yield "train", piece[:n_train]
        if n_train < len(piece):
            yield "val", piece[max(0, n_train) :]
        n_train -= len(piece)


def show_chars(pieces: Iterable[SplitPiece], bar: Any) -> Iterator[SplitPiece]:
    """Yield `pieces`, and advance the progress bar by the characters in each."""
    for piece in pieces:
        yield piece
        bar.update(len(piece[1] or ""))


def encode_splits(
    pieces: Iterable[SplitPiece], tokenizer: tokenizers.Tokenizer, folder: Path
) -> dict[str, dict[str, Any]]:
    """Encode `pieces` into train.bin and val.bin in `folder`; the "splits" of meta.json."""
    threads = min(_available_cores(), MAX_THREADS)
    end_of_text = np.array([tokenizer.end_of_text or 0], dtype=tokenizer.dtype)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(TokenFileWriter(folder / f"{split}.bin")) for split in SPLITS}
        for batch in batch_pieces(pieces, 4 * threads * PIECE_CHARS):
            encoded = iter(tokenizer.encode_batch([text for _, text in batch if text is not None], threads))
            for split, text in batch:
                if text is None:
                    files[split].write(end_of_text, 0)
                else:
                    files[split].write(next(encoded), len(text.encode()))
    return {
        split: {"tokens": file.tokens, "bytes": file.bytes, "shards": [file.entry()]}
        for split, file in files.items()
    }


def batch_pieces(pieces: Iterable[SplitPiece], max_chars: int) -> Iterator[list[SplitPiece]]:
    """Group `pieces` into lists of about `max_chars` characters."""
    batch: list[SplitPiece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1] or "") + 100  # documents may be tiny or empty, and each takes memory itself
        if size >= max_chars:
            yield batch
            batch, size = [], 0
    yield batch


def _available_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TokenFileWriter:
    """Writes one file of little-endian token ids, and counts and hashes what it writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens, self.bytes = path, 0, 0
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def __enter__(self) -> TokenFileWriter:
        return self

    def write(self, ids: np.ndarray, n_bytes: int) -> None:
        """Append `ids` (n,), which encode `n_bytes` UTF-8 bytes of text."""
        data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        self.bytes += n_bytes

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def entry(self) -> dict[str, Any]:
        """The entry of this file in meta.json."""
        sha256 = self._digest.hexdigest()
        return {"file": self.path.name, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}


def check_splits(splits: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if a split has no room for a block; print a note if the validation split is small."""
    for name, split in splits.items():
        if split["tokens"] < MIN_TOKENS:
            raise ValueError(
                f"the text is too small: its {name} split has {split['tokens']} tokens, and a block needs at "
                f"least {MIN_TOKENS}. Give it more text, or change --val_fraction"
            )
    if splits["val"]["tokens"] < FEW_TOKENS:
        print_note(
            f"the validation split has only {splits['val']['tokens']:,} tokens: its loss will mean little"
        )
