"""An index of a text: its size, its characters, and the byte offset and checksum of each block.

With the index, `read_between` reads any part of the text without the text before it, and verifies that it has
not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fradique.data.console import progress_bar
from fradique.data.text import Text
from fradique.tokenizer.tokenizer import code_points

BLOCK_CHARS = 1 << 22  # characters in a block, which is read and verified as a whole
N_CODE_POINTS = 0x110000  # of Unicode


@dataclass(frozen=True)
class TextIndex:
    """What `index_text` finds in a text."""

    chars: int  # number of characters
    bytes: int  # number of bytes in UTF-8
    alphabet: str  # the distinct characters, sorted
    blocks: list[tuple[int, str]]  # (byte offset, SHA-256) of each block; the last one may be shorter


def index_text(text: Text) -> TextIndex:
    """Read all of `text` and index it. Raises ValueError if it is empty."""
    occurs = np.zeros(N_CODE_POINTS, dtype=bool)
    n_chars = n_bytes = block_start = 0
    blocks: list[tuple[int, str]] = []
    n_missing, digest = BLOCK_CHARS, hashlib.sha256()  # characters and checksum of the current block
    with progress_bar(text.size, "reading", "B") as bar:
        for chunk in text.chunks():
            while chunk:
                piece, chunk = chunk[:n_missing], chunk[n_missing:]  # cut at the end of the block
                occurs[code_points(piece)] = True
                data = piece.encode()
                digest.update(data)
                n_chars += len(piece)
                n_bytes += len(data)
                n_missing -= len(piece)
                bar.update(len(data))
                if n_missing == 0:
                    blocks.append((block_start, digest.hexdigest()))
                    block_start, n_missing, digest = n_bytes, BLOCK_CHARS, hashlib.sha256()
    if not n_chars:
        raise ValueError("the text is empty")
    if n_missing < BLOCK_CHARS:
        blocks.append((block_start, digest.hexdigest()))
    alphabet = "".join(map(chr, np.flatnonzero(occurs)))
    return TextIndex(n_chars, n_bytes, alphabet, blocks)


def read_between(text: Text, index: TextIndex, start: int, end: int) -> Iterator[str]:
    """Characters `start` to `end` (exclusive) of an indexed text, in chunks.

    Only the blocks that contain these characters are read. Raises ValueError if one of them has changed.
    """
    if start >= end:
        return
    first_block = start // BLOCK_CHARS
    first_byte, _ = index.blocks[first_block]
    chunks = text.from_byte(first_byte)
    remainder = ""  # text that was read after the end of the block
    for block_start in range(first_block * BLOCK_CHARS, end, BLOCK_CHARS):  # in characters
        block_chars = min(BLOCK_CHARS, index.chars - block_start)
        pieces, n_missing = [remainder], block_chars - len(remainder)
        while n_missing > 0 and (chunk := next(chunks, "")):
            pieces.append(chunk)
            n_missing -= len(chunk)
        joined = "".join(pieces)
        block, remainder = joined[:block_chars], joined[block_chars:]
        _, expected = index.blocks[block_start // BLOCK_CHARS]
        if n_missing > 0 or hashlib.sha256(block.encode()).hexdigest() != expected:
            raise ValueError(
                "the text has changed since the first shards were made from it. Give the original text, or "
                "delete .shards and train_*.bin in the folder of the corpus to start over"
            )
        yield block[max(0, start - block_start) : end - block_start]
