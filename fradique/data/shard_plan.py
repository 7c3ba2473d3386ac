"""What each shard of a corpus is made of: a function of the source and of what was asked for alone.

A job has `asked`, which tells two jobs apart, `plan`, a pass over the source that need be made only once, and
`items`, the text of one shard. A plan is JSON: any worker that reads it makes the same shards.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fradique.data import build
from fradique.data.build import SPLITS, Item
from fradique.data.documents import HubFile, count_documents, read_documents
from fradique.data.text import MAX_PIECE_CHARS, Text, cut_pieces, first_word_end
from fradique.data.text_index import TextIndex, index_text, progress_bar, read_between
from fradique.tokenizer import tokenizer as tokenizers

MAX_SHARDS = 100_000  # their numbers have five digits
MIN_SHARD_CHARS = 1000  # of the training split, in a shard: less would be no use to any block
END_BYTES = 1 << 16  # at both ends of a file of documents, that tell it from another

ShardPlan: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TextJob:
    """A text in `shards` pieces, each a stretch of both splits, cut where GPT-2's pattern cuts anyway."""

    text: Text
    tokenizer: str
    val_fraction: float
    shards: int

    def __post_init__(self) -> None:
        tokenizers.parse_spec(self.tokenizer)
        _check(self.val_fraction, self.shards)

    @property
    def source(self) -> str:
        """As meta.json tells it."""
        return self.text.source

    @property
    def asked(self) -> dict[str, Any]:
        """What the shards follow from, but for what is in the text."""
        return {
            "source": self.source,
            "size": self.text.size,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        }

    def plan(self) -> ShardPlan:
        """Read the text, and train a BPE where one is asked for. Raises ValueError for too many shards."""
        found = index_text(self.text)
        n_train = int(found.chars * (1 - self.val_fraction))
        most = n_train // MIN_SHARD_CHARS
        if most < self.shards:
            raise _too_many(self.shards, f"{n_train:,} characters to train on", most)
        made = build.make_tokenizer(tokenizers.parse_spec(self.tokenizer), self.text, n_train, found.alphabet)
        survey_json = {"chars": found.chars, "bytes": found.bytes, "blocks": found.blocks}
        return {"asked": self.asked, "tokenizer": made.to_json(), "bytes": found.bytes, "survey": survey_json}

    def items(self, plan: ShardPlan, shard: int) -> Iterator[Item]:
        """The text of a shard, in pieces with their splits. Raises ValueError where the text has changed."""
        blocks = [(int(first), str(digest)) for first, digest in plan["survey"]["blocks"]]
        found = TextIndex(plan["survey"]["chars"], plan["survey"]["bytes"], "", blocks)
        n_train = int(found.chars * (1 - self.val_fraction))
        for split, (start, end) in zip(SPLITS, ((0, n_train), (n_train, found.chars)), strict=True):
            first, last = (self._cut(found, start, end, number) for number in (shard, shard + 1))
            for piece in cut_pieces(read_between(self.text, found, first, last)):
                yield split, piece

    def _cut(self, found: TextIndex, start: int, end: int, number: int) -> int:
        """Where the shard with a number begins in a split, as the place of a character in the text."""
        place = start + (end - start) * number // self.shards
        if place in (start, end):
            return place
        ahead = read_between(self.text, found, place, min(end, place + MAX_PIECE_CHARS))
        return place + first_word_end("".join(ahead))


@dataclass(frozen=True)
class DocumentJob:
    """Documents in `shards` stretches of the same number, each of them in the split that its place gives."""

    files: Sequence[Path | HubFile]
    source: str
    tokenizer: str
    val_fraction: float
    shards: int
    max_documents: int | None = None

    def __post_init__(self) -> None:
        build.check_document_tokenizer(self.tokenizer)
        _check(self.val_fraction, self.shards)

    @property
    def asked(self) -> dict[str, Any]:
        """What the shards follow from: of the files their names, sizes and a sum of both ends."""
        return {
            "source": self.source,
            "files": [_describe(file) for file in self.files],
            "documents": self.max_documents,
            "shards": self.shards,
            "tokenizer": self.tokenizer,
            "val_fraction": self.val_fraction,
        }

    def plan(self) -> ShardPlan:
        """Count the documents. Raises ValueError for too many shards."""
        with progress_bar(len(self.files), "counting", "file") as bar:
            counts = []
            for file in self.files:
                counts.append(count_documents(file))
                bar.update()
        total = min(sum(counts), self.max_documents or sum(counts))
        if total < self.shards:
            raise _too_many(self.shards, f"{total:,} documents", total)
        made = tokenizers.GPT2Tokenizer()
        return {"asked": self.asked, "tokenizer": made.to_json(), "bytes": None, "counts": counts}

    def items(self, plan: ShardPlan, shard: int) -> Iterator[Item]:
        """The documents of a shard, in pieces with their splits."""
        counts = plan["counts"]
        total = min(sum(counts), self.max_documents or sum(counts))
        first, last = (total * number // self.shards for number in (shard, shard + 1))
        documents = itertools.islice(self._from(counts, first), last - first)
        return build.document_items(enumerate(documents, first), self.val_fraction)

    def _from(self, counts: list[int], first: int) -> Iterator[Any]:
        for file, count in zip(self.files, counts, strict=True):
            if first < count:
                yield from read_documents(file, first)
            first = max(0, first - count)


Job: TypeAlias = TextJob | DocumentJob


def _check(val_fraction: float, shards: int) -> None:
    build.check_val_fraction(val_fraction)
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"--shards is {shards}, and must be 1 to {MAX_SHARDS:,}")


def _too_many(shards: int, what: str, most: int) -> ValueError:
    advice = f"--shards {most} at most" if most else "leave --shards out"
    return ValueError(f"--shards {shards} is too many for {what}: {advice}")


def _describe(file: Path | HubFile) -> list[Any]:
    """A file's name, size, and a sum of its ends; of the hub's, the address, which has the commit."""
    if isinstance(file, HubFile):
        return [file.url, file.size, ""]
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(END_BYTES))
        size = opened.seek(0, 2)
        opened.seek(max(0, size - END_BYTES))
        digest.update(opened.read())
    return [file.name, size, digest.hexdigest()]
