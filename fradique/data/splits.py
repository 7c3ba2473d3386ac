"""Divide a text into its training and its validation split: the end of the text, or blocks all over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fradique.data.console import progress_bar
from fradique.data.text import Text, first_cut
from fradique.data.text_index import TextIndex, read_between

VAL_SPLITS = ("tail", "blocks")
# Blocks of this size have many windows of any usual block_size, so few windows cross the end of a block.
BLOCK_CHARS = 1 << 13
MIN_BLOCKS, MAX_BLOCKS = 4, 128


class Part(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text, which belong to `split`."""

    split: str  # train or val
    start: int
    end: int


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless 0 < val_fraction < 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction must be between 0 and 1, not {val_fraction}")


def check_val_split(val_split: str) -> None:
    """Raise ValueError for an unknown way to choose the validation split."""
    if val_split not in VAL_SPLITS:
        raise ValueError(f"--val_split must be {' or '.join(VAL_SPLITS)}, not {val_split!r}")


def divide_text(
    text: Text,
    n_chars: int,
    val_fraction: float,
    val_split: str,
    separator: str | None = None,
    index: TextIndex | None = None,
) -> list[Part]:
    """The parts of a text of `n_chars` characters, in order. Together they are the whole text.

    val_split "tail": the first int(n_chars * (1 - val_fraction)) characters are the training split, as in
        nanoGPT, and the rest is the validation split.
    val_split "blocks": see `_blocks`. The text is read once to find its line ends.
    separator: the text between documents, which is one token; a cut inside it is moved to its end.
    index: that of the text, with which the text before the tail need not be read to look for a separator.
    """
    if val_split == "tail":
        n_train = int(n_chars * (1 - val_fraction))
        if separator and (index is None or set(separator) <= set(index.alphabet)):
            start, end = max(0, n_train - len(separator) + 1), min(n_chars, n_train + len(separator) - 1)
            chunks = (
                read_between(text, index, start, end)
                if index
                else _read_ranges(text.chunks(), [(start, end)])
            )
            n_train += _separator_end("".join(chunks), n_train - start, separator)
        return [Part("train", 0, n_train), Part("val", n_train, n_chars)]
    with progress_bar(n_chars, "splitting", "char") as bar:
        parts, train_start = [], 0
        for val_start, val_end in _blocks(text.chunks(), n_chars, val_fraction, separator):
            parts += [Part("train", train_start, val_start), Part("val", val_start, val_end)]
            train_start = val_end
            bar.update(val_end - bar.n)
    return [*parts, Part("train", train_start, n_chars)]


def count_chars(parts: Iterable[Part], split: str) -> int:
    """The number of characters of a split."""
    return sum(part.end - part.start for part in parts if part.split == split)


def _blocks(
    chunks: Iterable[str], n_chars: int, val_fraction: float, separator: str | None
) -> Iterator[tuple[int, int]]:
    """The blocks of text for validation: (start, end) of each, in characters.

    The text is divided into equal stretches, and the middle of each stretch is a block. Blocks do not
    overlap, and begin and end at the start of a line: the first one after the exact position. If no line
    starts within half of the block, they begin and end between two words, or else anywhere but inside a
    separator of documents.
    """
    val_chars = int(n_chars * val_fraction)
    n_blocks = min(MAX_BLOCKS, max(MIN_BLOCKS, val_chars // BLOCK_CHARS))
    block_chars = val_chars // n_blocks
    between = n_chars // n_blocks - block_chars  # characters from a block to the next
    # the distance in which a line start is looked for: blocks cannot become empty, nor reach the next one
    distance = max(1, min(block_chars, between) // 2)
    first = [n_chars * i // n_blocks + between // 2 for i in range(n_blocks)]
    positions = [position for start in first for position in (start, start + block_chars)]
    # one character before each position shows whether a line starts there, and more whether a separator does
    before = max(1, len(separator or "") - 1)
    ranges = [(max(0, position - before), position + max(distance, before)) for position in positions]
    cuts = [
        position + _cut(window, position - start, distance, separator)
        for position, (start, _), window in zip(positions, ranges, _read_ranges(chunks, ranges), strict=True)
    ]
    yield from zip(cuts[::2], cuts[1::2], strict=True)


def _cut(window: str, position: int, distance: int, separator: str | None) -> int:
    """How far behind `position` of `window` a text can be cut: at the first start of a line in `distance`.

    Else between two words; else 0, or the end of the separator that contains the position.
    """
    nearby = window[max(0, position - 1) : position + distance]
    newline = nearby.find("\n")
    if newline >= 0:
        return newline
    return first_cut(nearby[1:]) or _separator_end(window, position, separator)


def _separator_end(window: str, position: int, separator: str | None) -> int:
    """How far behind `position` of `window` the separator ends that begins before it; 0 if there is none."""
    if not separator:
        return 0
    margin = len(separator) - 1
    start = window.find(separator, max(0, position - margin), position + margin)
    return start + len(separator) - position if start >= 0 else 0


def _read_ranges(chunks: Iterable[str], ranges: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The text of each range (start, end) of characters; the ranges are in order."""
    stream = iter(chunks)
    pending, position = "", 0  # text that was read, and the position of its first character
    for start, end in ranges:
        while position + len(pending) < end and (chunk := next(stream, "")):
            dropped = max(0, min(len(pending), start - position))
            pending, position = pending[dropped:] + chunk, position + dropped
        yield pending[max(0, start - position) : max(0, end - position)]
