"""What each shard of a corpus contains: a function of the source and the flags only.

A job has a `request`, which identifies it, `make_plan`, a pass over the source that is needed once, and
`pieces`, the text of one shard. A plan is JSON; every worker that reads it makes the same shards.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fradique.data.build import check_document_tokenizer, check_val_fraction, document_pieces
from fradique.data.console import progress_bar
from fradique.data.documents import Document, HubFile, count_documents, read_documents
from fradique.data.encode import SPLITS, SplitPiece, make_tokenizer
from fradique.data.text import MAX_PIECE_CHARS, Text, cut_pieces, first_cut
from fradique.data.text_index import TextIndex, index_text, read_between
from fradique.tokenizer import tokenizer as tokenizers

MAX_SHARDS = 100_000  # shard numbers have five digits
MIN_SHARD_CHARS = 1000  # of the training split in each shard; fewer would be too short for most blocks
FINGERPRINT_BYTES = 1 << 16  # at both ends of a file of documents, hashed to identify it

ShardPlan: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TextJob:
    """A text to be made into `shards` shards.

    Each shard has a contiguous part of both splits, cut where the cut does not change GPT-2's tokens.
    """

    text: Text
    tokenizer: str
    val_fraction: float
    shards: int

    def __post_init__(self) -> None:
        tokenizers.parse_spec(self.tokenizer)
        _check(self.val_fraction, self.shards)

    @property
    def source(self) -> str:
        """The source that meta.json names."""
        return self.text.source

    @property
    def request(self) -> dict[str, Any]:
        """Everything that determines the shards, except the content of the text."""
        return {
            "source": self.source,
            "size": self.text.size,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        }

    def make_plan(self) -> ShardPlan:
        """Index the text, and train a BPE if the job needs one. Raises ValueError for too many shards."""
        index = index_text(self.text)
        n_train = int(index.chars * (1 - self.val_fraction))
        max_shards = n_train // MIN_SHARD_CHARS
        if max_shards < self.shards:
            raise _too_many_shards(self.shards, f"{n_train:,} characters to train on", max_shards)
        spec = tokenizers.parse_spec(self.tokenizer)
        tokenizer = make_tokenizer(spec, self.text, n_train, index.alphabet)
        return {
            "asked": self.request,
            "tokenizer": tokenizer.to_json(),
            "bytes": index.bytes,
            "survey": {"chars": index.chars, "bytes": index.bytes, "blocks": index.blocks},
        }

    def pieces(self, plan: ShardPlan, shard: int) -> Iterator[SplitPiece]:
        """The text of a shard, in pieces. Raises ValueError if the text has changed since the plan."""
        survey = plan["survey"]
        blocks = [(int(first_byte), str(digest)) for first_byte, digest in survey["blocks"]]
        index = TextIndex(survey["chars"], survey["bytes"], "", blocks)
        n_train = int(index.chars * (1 - self.val_fraction))
        for split, (start, end) in zip(SPLITS, ((0, n_train), (n_train, index.chars)), strict=True):
            first, last = (self._cut_position(index, start, end, number) for number in (shard, shard + 1))
            for piece in cut_pieces(read_between(self.text, index, first, last)):
                yield split, piece

    def _cut_position(self, index: TextIndex, start: int, end: int, shard: int) -> int:
        """The character at which `shard` begins in the split from `start` to `end`."""
        position = start + (end - start) * shard // self.shards
        if position in (start, end):
            return position
        following = read_between(self.text, index, position, min(end, position + MAX_PIECE_CHARS))
        return position + first_cut("".join(following))


@dataclass(frozen=True)
class DocumentJob:
    """Documents to be made into `shards` shards of the same number of documents.

    The split of a document depends only on its number.
    """

    files: Sequence[Path | HubFile]
    source: str  # for meta.json
    tokenizer: str
    val_fraction: float
    shards: int
    max_documents: int | None = None

    def __post_init__(self) -> None:
        check_document_tokenizer(self.tokenizer)
        _check(self.val_fraction, self.shards)

    @property
    def request(self) -> dict[str, Any]:
        """Everything that determines the shards; the files are identified by name, size and a checksum."""
        return {
            "source": self.source,
            "files": [_fingerprint(file) for file in self.files],
            "documents": self.max_documents,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        }

    def make_plan(self) -> ShardPlan:
        """Count the documents of each file. Raises ValueError for too many shards."""
        with progress_bar(len(self.files), "counting", "file") as bar:
            counts = []
            for file in self.files:
                counts.append(count_documents(file))
                bar.update()
        total = self._total(counts)
        if total < self.shards:
            raise _too_many_shards(self.shards, f"{total:,} documents", total)
        tokenizer = tokenizers.GPT2Tokenizer()
        return {"asked": self.request, "tokenizer": tokenizer.to_json(), "bytes": None, "counts": counts}

    def pieces(self, plan: ShardPlan, shard: int) -> Iterator[SplitPiece]:
        """The documents of a shard, in pieces."""
        counts = plan["counts"]
        first, last = (self._total(counts) * number // self.shards for number in (shard, shard + 1))
        documents = itertools.islice(self._documents_from(counts, first), last - first)
        return document_pieces(enumerate(documents, first), self.val_fraction)

    def _total(self, counts: list[int]) -> int:
        """The number of documents in all shards."""
        return min(sum(counts), self.max_documents or sum(counts))

    def _documents_from(self, counts: list[int], first: int) -> Iterator[Document]:
        """The documents from number `first`; `counts` has the number of documents in each file."""
        for file, count in zip(self.files, counts, strict=True):
            if first < count:
                yield from read_documents(file, first)
            first = max(0, first - count)


Job: TypeAlias = TextJob | DocumentJob


def _check(val_fraction: float, shards: int) -> None:
    check_val_fraction(val_fraction)
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"--shards is {shards}, and must be 1 to {MAX_SHARDS:,}")


def _too_many_shards(shards: int, amount: str, max_shards: int) -> ValueError:
    advice = f"use --shards {max_shards} at most" if max_shards else "leave --shards out"
    return ValueError(f"--shards {shards} is too many for {amount}: {advice}")


def _fingerprint(file: Path | HubFile) -> list[Any]:
    """Name, size and sha256 of both ends of a file; of a file on the hub, its URL, which has the commit."""
    if isinstance(file, HubFile):
        return [file.url, file.size, ""]
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(FINGERPRINT_BYTES))
        size = opened.seek(0, 2)
        opened.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(opened.read())
    return [file.name, size, digest.hexdigest()]
