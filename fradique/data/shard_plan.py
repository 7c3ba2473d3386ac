"""Plan which part of a text, or which documents, each shard of a corpus contains.

A job is a corpus to be prepared in shards. `request` identifies it, `make_plan` reads the text or documents
once and returns what the workers need to know about them, and `pieces` reads the text of one shard. A plan is
a JSON object. It depends only on the text or documents and the flags, so all workers make the same shards.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fradique.data.build import DOCUMENTS, check_document_tokenizer, document_pieces
from fradique.data.console import progress_bar
from fradique.data.documents import Document, HubFile, count_documents, read_documents
from fradique.data.encode import SPLITS, SplitPiece, make_tokenizer
from fradique.data.splits import Part, check_val_fraction, check_val_split, count_chars, divide_text
from fradique.data.text import MAX_PIECE_CHARS, Text, cut_pieces, first_cut
from fradique.data.text_index import TextIndex, index_text, read_between
from fradique.tokenizer.bpe import END_OF_TEXT
from fradique.tokenizer.tokenizer import GPT2Tokenizer, parse_spec

MAX_SHARDS = 100_000  # the numbers in file names have five digits
MIN_SHARD_CHARS = 1000  # of training text in a shard: with fewer, a file would be too short for most blocks
FINGERPRINT_BYTES = 1 << 16  # the first and the last bytes of a file of documents that identify it

ShardPlan: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TextJob:
    """A text to be prepared in `shards` shards.

    Each shard has a contiguous part of the training split and one of the validation split. The text is cut
    where this does not change its GPT-2 tokens. The fields are the arguments of `build.prepare_text`.
    """

    text: Text
    tokenizer: str
    val_fraction: float
    shards: int
    val_split: str = "tail"
    document_separator: str | None = END_OF_TEXT

    def __post_init__(self) -> None:
        parse_spec(self.tokenizer)  # raises ValueError for an unknown tokenizer
        check_val_split(self.val_split)
        _check_flags(self.val_fraction, self.shards)

    @property
    def source(self) -> str:
        """A description of the text for meta.json."""
        return self.text.source

    @property
    def request(self) -> dict[str, Any]:
        """Everything that determines the shards, except the content of the text. Plans have it as "asked"."""
        return {
            "source": self.source,
            "size": self.text.size,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        } | _new_flags(self.val_split, self.document_separator)

    def make_plan(self) -> ShardPlan:
        """Index the text and make the tokenizer. Raises ValueError if there are too many shards."""
        index = index_text(self.text)
        spec = parse_spec(self.tokenizer)
        separator = None if spec == "char" else self.document_separator
        parts = divide_text(self.text, index.chars, self.val_fraction, self.val_split, separator, index)
        n_train = count_chars(parts, "train")
        max_shards = n_train // MIN_SHARD_CHARS
        if max_shards < self.shards:
            raise _too_many_shards(self.shards, f"{n_train:,} characters to train on", max_shards)
        tokenizer = make_tokenizer(spec, self.text, parts, index.alphabet, self.document_separator)
        return {
            "asked": self.request,
            "tokenizer": tokenizer.to_json(),
            "bytes": index.bytes,
            "survey": {"chars": index.chars, "bytes": index.bytes, "blocks": index.blocks, "parts": parts},
        }

    def pieces(self, plan: ShardPlan, shard: int) -> Iterator[SplitPiece]:
        """The text of a shard, in pieces. Raises ValueError if the text is not the one of the plan."""
        survey = plan["survey"]
        blocks = [(int(first_byte), str(digest)) for first_byte, digest in survey["blocks"]]
        alphabet = ""  # not needed: the plan has the tokenizer
        index = TextIndex(survey["chars"], survey["bytes"], alphabet, blocks)
        # plans of older versions, which knew only "tail", have no parts
        saved_parts = survey.get("parts") or divide_text(self.text, index.chars, self.val_fraction, "tail")
        all_parts = [Part(*part) for part in saved_parts]
        for split in SPLITS:
            parts = [part for part in all_parts if part.split == split]
            shard_start = self._shard_start(index, parts, shard)
            shard_end = self._shard_start(index, parts, shard + 1)
            for part in parts:
                start, end = max(part.start, shard_start), min(part.end, shard_end)
                for piece in cut_pieces(read_between(self.text, index, start, end)):
                    yield split, piece

    def _shard_start(self, index: TextIndex, parts: Sequence[Part], shard: int) -> int:
        """The character of the text at which `shard` begins in the split that has `parts`.

        The split is divided evenly, but a shard begins at the next position that keeps the tokens when cut.
        """
        offset = sum(part.end - part.start for part in parts) * shard // self.shards  # in the split
        for part in parts:
            position = part.start + offset
            if position < part.end:
                break
            offset -= part.end - part.start
        else:
            return parts[-1].end
        if position == part.start:
            return position
        following = read_between(self.text, index, position, min(part.end, position + MAX_PIECE_CHARS))
        return position + first_cut("".join(following))


@dataclass(frozen=True)
class DocumentJob:
    """Documents to be prepared in `shards` shards with about the same number of documents.

    Whether a document is in the training or the validation split depends only on its number.
    """

    files: Sequence[Path | HubFile]
    source: str  # a description of the files for meta.json
    tokenizer: str
    val_fraction: float
    shards: int
    max_documents: int | None = None
    document_separator: str | None = END_OF_TEXT
    val_split = DOCUMENTS  # in meta.json

    def __post_init__(self) -> None:
        check_document_tokenizer(self.tokenizer)
        _check_flags(self.val_fraction, self.shards)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that determines the shards; files are identified by their name, size and a checksum."""
        return {
            "source": self.source,
            "files": [_fingerprint(file) for file in self.files],
            "documents": self.max_documents,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        } | _new_flags(None, self.document_separator)

    def make_plan(self) -> ShardPlan:
        """Count the documents of each file. Raises ValueError if there are too many shards."""
        with progress_bar(len(self.files), "counting", "file") as bar:
            counts = []
            for file in self.files:
                counts.append(count_documents(file))
                bar.update()
        n_documents = self._count_used(counts)
        if n_documents < self.shards:
            raise _too_many_shards(self.shards, f"{n_documents:,} documents", n_documents)
        tokenizer = GPT2Tokenizer(self.document_separator)
        return {"asked": self.request, "tokenizer": tokenizer.to_json(), "bytes": None, "counts": counts}

    def pieces(self, plan: ShardPlan, shard: int) -> Iterator[SplitPiece]:
        """The documents of a shard, in pieces."""
        counts = plan["counts"]  # documents in each file
        n_documents = self._count_used(counts)
        first, end = n_documents * shard // self.shards, n_documents * (shard + 1) // self.shards
        documents = itertools.islice(self._documents_from(first, counts), end - first)
        return document_pieces(enumerate(documents, first), self.val_fraction)

    def _count_used(self, counts: list[int]) -> int:
        """The number of documents in the corpus."""
        total = sum(counts)
        return total if self.max_documents is None else min(total, self.max_documents)

    def _documents_from(self, first: int, counts: list[int]) -> Iterator[Document]:
        """The documents from number `first`, counted over all files."""
        for file, count in zip(self.files, counts, strict=True):
            if first < count:
                yield from read_documents(file, first)
            first = max(0, first - count)  # counted from the beginning of the next file


Job: TypeAlias = TextJob | DocumentJob


def _new_flags(val_split: str | None, document_separator: str | None) -> dict[str, str | None]:
    """The flags that a request has only with other values than the defaults.

    Older versions did not have these flags, so their requests still equal those of today.
    """
    flags: dict[str, str | None] = {}
    if val_split not in (None, "tail"):
        flags["val_split"] = val_split
    if document_separator != END_OF_TEXT:
        flags["document_separator"] = document_separator
    return flags


def _check_flags(val_fraction: float, shards: int) -> None:
    check_val_fraction(val_fraction)
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"--shards must be from 1 to {MAX_SHARDS:,}, not {shards}")


def _too_many_shards(shards: int, amount: str, max_shards: int) -> ValueError:
    """The error if `amount`, such as "5 documents", is enough for only `max_shards` shards."""
    advice = f"use --shards {max_shards} at most" if max_shards else "leave --shards out"
    return ValueError(f"--shards {shards} is too many for {amount}: {advice}")


def _fingerprint(file: Path | HubFile) -> list[Any]:
    """[name, size in bytes, checksum] of a file.

    The checksum is the SHA-256 of both ends of a local file, since hashing a whole file takes long. A file on
    the hub needs none: its name is a URL with the commit.
    """
    if isinstance(file, HubFile):
        return [file.url, file.size, ""]
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(FINGERPRINT_BYTES))
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(opened.read())
    return [file.name, size, digest.hexdigest()]
