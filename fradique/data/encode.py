"""Encode text into token files: make the tokenizer of a corpus, and write its splits in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fradique.data.console import print_note, progress_bar
from fradique.data.splits import Part, count_chars
from fradique.data.text import PIECE_CHARS, Text, cut_pieces
from fradique.tokenizer.bpe import END_OF_TEXT
from fradique.tokenizer.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, train_bpe

SPLITS = ("train", "val")
MIN_TOKENS = 2  # in a split: a block of one token and its target
FEW_TOKENS = 1000  # with fewer tokens in the validation split, a note says that its loss means little
MAX_THREADS = 16
SAMPLE_CHARS = 64 << 20  # most characters that a BPE is trained on
SAMPLE_WORD_BYTES = 4 << 20  # most bytes of distinct words in the sample; training takes 100 times the memory
SAMPLE_PIECE = 1 << 14  # characters in a piece of the sample: small, because `train_bpe` buffers 256 pieces
PIECE_OVERHEAD = 100  # characters that use about as much memory as the Python objects of a piece

# A split and a piece of its text. None instead of a text marks the end of a document.
SplitPiece: TypeAlias = tuple[str, str | None]


def make_tokenizer(
    spec: str | tuple[str, int],
    text: Text,
    parts: Sequence[Part],
    alphabet: str,
    separator: str | None = END_OF_TEXT,
) -> Tokenizer:
    """Make a tokenizer. `spec` is a result of `parse_spec`: "char", "gpt2" or ("bpe", vocab_size).

    A character tokenizer has the characters of `alphabet`; a BPE is trained on the training split of `text`.
    separator: the text between documents that becomes <|endoftext|>; None: no text does. Characters have no
    such token.
    """
    if spec == "char":
        return CharTokenizer(alphabet)
    if spec == "gpt2":
        return GPT2Tokenizer(separator)
    _, vocab_size = spec
    sample = BPESample(text, parts)
    tokenizer = train_bpe(sample, vocab_size, separator)
    n_train = count_chars(parts, "train")
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
    """The text that a BPE is trained on, in pieces: a sample of the training split of `text`.

    The sample contains all of the split if it is small. From a large text it takes pieces spread
    evenly over the text, up to SAMPLE_CHARS characters. It takes fewer if its distinct words, which the
    trainer keeps in memory, would exceed SAMPLE_WORD_BYTES.
    """

    def __init__(self, text: Text, parts: Sequence[Part]) -> None:
        self.n_chars = 0  # characters yielded so far
        self._text, self._parts, self._n_train = text, parts, count_chars(parts, "train")

    def __iter__(self) -> Iterator[str]:
        words: set[str] = set()
        n_read = self.n_chars = word_bytes = 0
        pieces = cut_pieces(self._text.chunks(), SAMPLE_PIECE, SAMPLE_PIECE)
        with progress_bar(self._n_train, "sampling", "char") as bar:
            for split, piece in track_chars(split_pieces(pieces, self._parts), bar):
                if split != "train":
                    continue
                n_read += len(piece)
                fraction_read = n_read / self._n_train
                # Both limits grow with the part that was read, so that the end of the text is sampled too.
                # The limit of the words starts at half: at the beginning of a text most words are new.
                max_chars = fraction_read * SAMPLE_CHARS
                max_word_bytes = (1 + fraction_read) / 2 * SAMPLE_WORD_BYTES
                if self.n_chars > max_chars or word_bytes > max_word_bytes:
                    continue
                new_words = set(piece.split()) - words
                words |= new_words
                word_bytes += len(" ".join(new_words).encode())
                self.n_chars += len(piece)
                yield piece


def split_pieces(pieces: Iterable[str], parts: Sequence[Part]) -> Iterator[SplitPiece]:
    """Cut the pieces of a text at the ends of its parts, and yield each with the split of its part."""
    position = i = 0  # position: of the next character; i: the part that contains it
    for piece in pieces:
        start = 0  # of the rest of the piece
        while start < len(piece):
            # text after the last part, which was added while it was read, belongs to the last one
            while i < len(parts) - 1 and position >= parts[i].end:
                i += 1
            n_left = parts[i].end - position if i < len(parts) - 1 else len(piece)
            taken = piece[start : start + n_left]
            yield parts[i].split, taken
            start, position = start + len(taken), position + len(taken)


def track_chars(pieces: Iterable[SplitPiece], bar: Any) -> Iterator[SplitPiece]:
    """Yield `pieces`, and advance the tqdm `bar` by the characters in each."""
    for split, piece in pieces:
        yield split, piece
        bar.update(len(piece or ""))


def encode_splits(
    pieces: Iterable[SplitPiece], tokenizer: Tokenizer, folder: Path
) -> dict[str, dict[str, Any]]:
    """Encode `pieces` into train.bin and val.bin in `folder`. Returns the value of "splits" in meta.json.

    Raises ValueError if a character is not in the vocabulary of `tokenizer`.
    """
    threads = min(_available_cores(), MAX_THREADS)
    # only documents need this token, and a tokenizer without it encodes no documents
    end_of_text = np.array([tokenizer.end_of_text or 0], dtype=tokenizer.dtype)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(TokenFileWriter(folder / f"{split}.bin")) for split in SPLITS}
        for batch in batch_pieces(pieces, 4 * threads * PIECE_CHARS):  # 4 pieces per thread balance the load
            texts = [piece for _, piece in batch if piece is not None]
            encoded_texts = iter(tokenizer.encode_batch(texts, threads))
            for split, piece in batch:
                if piece is None:
                    files[split].write(end_of_text, 0)
                else:
                    files[split].write(next(encoded_texts), len(piece.encode()))
    return {
        split: {"tokens": file.tokens, "bytes": file.bytes, "shards": [file.entry()]}
        for split, file in files.items()
    }


def batch_pieces(pieces: Iterable[SplitPiece], max_chars: int) -> Iterator[list[SplitPiece]]:
    """Group `pieces` into lists of about `max_chars` characters; the last list may be empty."""
    batch: list[SplitPiece] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece or "") + PIECE_OVERHEAD  # there may be many empty documents
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
    """Writes one file of little-endian token ids. Computes its size and its SHA-256 on the way."""

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
        with self._file:  # closes the file even if it cannot be synced
            self._file.flush()
            os.fsync(self._file.fileno())

    def entry(self) -> dict[str, Any]:
        """The entry of this file in meta.json."""
        sha256 = self._digest.hexdigest()
        return {"file": self.path.name, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}


def check_splits(splits: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if a split is too short for one block; print a note if the validation split is small.

    `splits` is the value of "splits" in meta.json.
    """
    for name, split in splits.items():
        if split["tokens"] < MIN_TOKENS:
            raise ValueError(
                f"the text is too small: its {name} split has {split['tokens']} tokens, and a block needs at "
                f"least {MIN_TOKENS}. Use more text, or change --val_fraction"
            )
    if splits["val"]["tokens"] < FEW_TOKENS:
        print_note(
            f"the validation split has only {splits['val']['tokens']:,} tokens: its loss will mean little"
        )
