"""The first pass over a text: how much it is, its characters, and sums of its blocks.

With these any part of it can be found and read again, and is checked to be what was surveyed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fradique.data.text import Text
from fradique.tokenizer.tokenizer import code_points

BLOCK_CHARS = 1 << 22  # read and checked together


@dataclass(frozen=True)
class TextIndex:
    """What is known of a text."""

    chars: int
    bytes: int  # of its UTF-8
    alphabet: str  # its different characters, in order
    blocks: list[tuple[int, str]]  # of BLOCK_CHARS, the last may be shorter: first byte, sha256


def index_text(text: Text) -> TextIndex:
    """Read all of `text`. Raises ValueError where it is empty."""
    seen = np.zeros(0x110000, dtype=bool)
    chars = size = first = 0
    blocks: list[tuple[int, str]] = []
    room, digest = BLOCK_CHARS, hashlib.sha256()  # of the block that is being read
    with progress_bar(text.size, "reading", "B") as bar:
        for chunk in text.chunks():
            while chunk:
                piece, chunk = chunk[:room], chunk[room:]
                seen[code_points(piece)] = True
                data = piece.encode()
                digest.update(data)
                chars, size, room = chars + len(piece), size + len(data), room - len(piece)
                bar.update(len(data))
                if not room:
                    blocks.append((first, digest.hexdigest()))
                    first, room, digest = size, BLOCK_CHARS, hashlib.sha256()
    if not chars:
        raise ValueError("the text is empty")
    if room < BLOCK_CHARS:
        blocks.append((first, digest.hexdigest()))
    return TextIndex(chars, size, "".join(map(chr, np.flatnonzero(seen))), blocks)


def read_between(text: Text, found: TextIndex, start: int, end: int) -> Iterator[str]:
    """Characters `start` to `end` of a text that was surveyed, in chunks.

    Only the blocks that hold them are read. Raises ValueError where one is not what it was.
    """
    if start >= end:
        return
    index = start // BLOCK_CHARS
    chunks = text.from_byte(found.blocks[index][0])
    rest = ""
    for first in range(index * BLOCK_CHARS, end, BLOCK_CHARS):
        size = min(BLOCK_CHARS, found.chars - first)
        parts, missing = [rest], size - len(rest)
        while missing > 0 and (chunk := next(chunks, "")):
            parts.append(chunk)
            missing -= len(chunk)
        block = "".join(parts)
        block, rest = block[:size], block[size:]
        if missing > 0 or hashlib.sha256(block.encode()).hexdigest() != found.blocks[first // BLOCK_CHARS][1]:
            raise ValueError(
                "the text is not the one that these shards were begun with: it has changed since. Give that "
                "text, or delete .shards and train_*.bin in the folder of the corpus to begin anew"
            )
        yield block[max(0, start - first) : end - first]


def progress_bar(total: int | None, doing: str, unit: str) -> Any:
    """A progress bar, shown only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=doing, unit=unit, unit_scale=True, disable=None, leave=False)
