"""Decode and join text files of any size, and cut their text into pieces, in bounded memory."""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 20  # bytes that are read at a time
PIECE_CHARS = 1 << 18  # characters in a piece of text
MAX_PIECE_CHARS = 1 << 20  # characters in a piece, if the text has no white space

# A text is cut between the end of a word and the white space that follows. GPT-2's BPE splits every text
# there, so the tokens of the pieces are those of the whole text. Both patterns match up to such a position.
# Python's \S matches slightly fewer characters than GPT-2's, so every cut is between two tokens.
_LAST_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
_FIRST_CUT = re.compile(r"\S(?=[ \t\r\n])")


@dataclass(frozen=True)
class Text:
    """A text that can be streamed any number of times."""

    source: str  # a description for meta.json
    size: int  # bytes, for the progress bar
    chunks: Callable[[], Iterator[str]]  # streams the text from the beginning
    chunks_from: Callable[[int], Iterator[str]] | None = None  # streams it from a byte, without reading all

    def from_byte(self, offset: int) -> Iterator[str]:
        """Stream the text from byte `offset` of its UTF-8 encoding, where a character must begin."""
        if self.chunks_from is not None:
            yield from self.chunks_from(offset)
            return
        for chunk in self.chunks():
            if offset:
                data = chunk.encode()
                chunk = data[offset:].decode()
                offset = max(0, offset - len(data))
            if chunk:
                yield chunk


def files_text(files: Sequence[Path], source: str) -> Text:
    """The concatenation of UTF-8 files, with a newline added after a file that does not end with one."""
    size = sum(path.stat().st_size for path in files)
    return Text(source, size, lambda: _concatenate(files), lambda offset: _concatenate(files, offset))


def _concatenate(files: Sequence[Path], offset: int = 0) -> Iterator[str]:
    """Stream the concatenation of `files` from byte `offset`; see `files_text`."""
    needs_newline = False  # whether the text before the current file ends without a newline
    for path in files:
        if needs_newline and offset:
            offset -= 1
        elif needs_newline:
            yield "\n"
        if offset:
            size, last_byte = _size_and_last_byte(path)
            if offset >= size:  # skip the file
                offset -= size
                if size:
                    needs_newline = last_byte != b"\n"
                continue
        for chunk in read_file(path, start=offset):
            needs_newline = not chunk.endswith("\n")
            yield chunk
        offset = 0


def _size_and_last_byte(path: Path) -> tuple[int, bytes]:
    """The number of bytes in a file without its byte-order mark, and the last of these bytes."""
    with path.open("rb") as file:
        bom = bom_size(file)
        size = file.seek(0, os.SEEK_END) - bom
        file.seek(bom + max(0, size - 1))
        return size, file.read(1)


def bom_size(file: BinaryIO) -> int:
    """The size in bytes of the byte-order mark of a file that was just opened: 3, or 0 if it has none."""
    return 3 if file.read(3) == codecs.BOM_UTF8 else 0


def read_file(path: Path, block_bytes: int = BLOCK_BYTES, start: int = 0) -> Iterator[str]:
    """Stream a UTF-8 file in non-empty chunks, with unchanged newlines and without its byte-order mark.

    Reading begins at byte `start` after the byte-order mark, where a character must begin. Raises ValueError
    naming the file and the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    block_start = 0  # offset in the file
    may_have_bom = start == 0
    with path.open("rb") as file:
        if start:
            block_start = file.seek(bom_size(file) + start)
        while True:
            block = file.read(block_bytes)
            incomplete, _ = decoder.getstate()  # bytes of a character that began in the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # error.start is counted from the beginning of `incomplete`
                position = block_start - len(incomplete) + error.start
                raise not_utf8_error(path, position, error.object[error.start]) from None
            if text and may_have_bom:
                text, may_have_bom = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return
            block_start += len(block)


def not_utf8_error(path: Path, offset: int, byte: int) -> ValueError:
    """The error for a `byte` at `offset` of `path` that is not valid UTF-8 there."""
    has_utf16_bom = offset == 0 and byte in (0xFE, 0xFF)
    encoding = "UTF-16" if has_utf16_bom else "WINDOWS-1252"  # the most common encodings other than UTF-8
    converted = shlex.quote(f"{path.stem}-utf8{path.suffix}")
    return ValueError(
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset} (counted from 0). If it is text in "
        f"another encoding, convert it, for example with: iconv -f {encoding} -t UTF-8 "
        f"{shlex.quote(str(path))} > {converted}, and pass the result to --input"
    )


def cut_pieces(
    chunks: Iterable[str], piece_chars: int = PIECE_CHARS, max_piece_chars: int = MAX_PIECE_CHARS
) -> Iterator[str]:
    """Cut a stream of text into pieces of about `piece_chars` characters.

    The tokens of the pieces, concatenated, are those of the whole text. If `max_piece_chars` characters have
    no position for such a cut, the text is cut after them anyway, so that memory stays bounded. Then the
    tokens may differ, but no text is lost.
    """
    pending = ""
    max_chars = piece_chars  # of the next piece
    for chunk in chunks:
        pending += chunk
        start = 0  # of the next piece in `pending`
        while len(pending) - start >= max_chars:
            match = _LAST_CUT.match(pending, start, start + max_chars)
            if not match and max_chars < max_piece_chars:
                max_chars *= 2  # look for a cut in more text
                continue
            end = match.end() if match else start + max_chars
            yield pending[start:end]
            start, max_chars = end, piece_chars
        pending = pending[start:]
    if pending:
        yield pending


def first_cut(text: str) -> int:
    """The first position where `text` can be cut without changing its tokens; 0 if there is none."""
    match = _FIRST_CUT.search(text)
    return match.end() if match else 0
