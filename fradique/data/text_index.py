"""An index of a text: its size, its characters, and the offset and checksum of each block.

With the index, any part of the text can be read again without reading what comes before it, and is verified
to be unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fradique.data.console import progress_bar
from fradique.data.text import Text
from fradique.tokenizer.tokenizer import code_points

BLOCK_CHARS = 1 << 22  # characters that are read and verified together


@dataclass(frozen=True)
class TextIndex:
    """The result of a pass over a text."""

    chars: int
    bytes: int  # of its UTF-8 encoding
    alphabet: str  # its distinct characters, sorted
    blocks: list[tuple[int, str]]  # (first byte, sha256) of each BLOCK_CHARS characters; the last is shorter


def index_text(text: Text) -> TextIndex:
    """Read all of `text` and index it. Raises ValueError if it is empty."""
    occurs = np.zeros(0x110000, dtype=bool)  # by code point
    n_chars = n_bytes = block_start = 0
    blocks: list[tuple[int, str]] = []
    remaining, digest = BLOCK_CHARS, hashlib.sha256()  # of the current block
    with progress_bar(text.size, "reading", "B") as bar:
        for chunk in text.chunks():
            while chunk:
                piece, chunk = chunk[:remaining], chunk[remaining:]
                occurs[code_points(piece)] = True
                data = piece.encode()
                digest.update(data)
                n_chars += len(piece)
                n_bytes += len(data)
                remaining -= len(piece)
                bar.update(len(data))
                if not remaining:
                    blocks.append((block_start, digest.hexdigest()))
                    block_start, remaining, digest = n_bytes, BLOCK_CHARS, hashlib.sha256()
    if not n_chars:
        raise ValueError("the text is empty")
    if remaining < BLOCK_CHARS:
        blocks.append((block_start, digest.hexdigest()))
    return TextIndex(n_chars, n_bytes, "".join(map(chr, np.flatnonzero(occurs))), blocks)


def read_between(text: Text, index: TextIndex, start: int, end: int) -> Iterator[str]:
    """Characters `start` to `end` (exclusive) of an indexed text, in chunks.

    Only the blocks that contain them are read. Raises ValueError if one of these blocks has changed.
    """
    if start >= end:
        return
    first_block = start // BLOCK_CHARS
    chunks = text.from_byte(index.blocks[first_block][0])
    remainder = ""  # what was read beyond the last block
    for block_start in range(first_block * BLOCK_CHARS, end, BLOCK_CHARS):
        size = min(BLOCK_CHARS, index.chars - block_start)
        parts, missing = [remainder], size - len(remainder)
        while missing > 0 and (chunk := next(chunks, "")):
            parts.append(chunk)
            missing -= len(chunk)
        block = "".join(parts)
        block, remainder = block[:size], block[size:]
        _, expected = index.blocks[block_start // BLOCK_CHARS]
        if missing > 0 or hashlib.sha256(block.encode()).hexdigest() != expected:
            raise ValueError(
                "the text has changed since the first shards were made from it. Give the original text, or "
                "delete .shards and train_*.bin in the folder of the corpus to start over"
            )
        yield block[max(0, start - block_start) : end - block_start]
