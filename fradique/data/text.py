"""Decode and join text files of any size, and cut their text into pieces, in bounded memory."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fradique.io.terminal import quote

BLOCK_BYTES = 1 << 20  # bytes that are read at a time
PIECE_CHARS = 1 << 18  # characters in a piece of text
MAX_PIECE_CHARS = 1 << 20  # characters in a piece, if the text has no white space

GUESS_BYTES = 1 << 12  # of a file that is not UTF-8, to guess its encoding
UTF_ENCODINGS = ("UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32")
# the bytes of ASCII's control characters that text does not have; it may have ESC and Ctrl-Z
CONTROL_BYTES = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1a\x1b")
NO_TEXT_ADVICE = "It seems to be no text but an image, an archive or a program: give the text as a UTF-8 file"

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
    naming the file and the offset of the first byte that is not UTF-8, or of a NUL byte.
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
                raise not_utf8_error(path, position, error.object, error.start) from None
            if (nul := block.find(0)) >= 0:
                raise nul_error(path, block_start + nul, block, nul)
            if text and may_have_bom:
                text, may_have_bom = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return
            block_start += len(block)


def not_utf8_error(path: Path, offset: int, data: bytes, position: int) -> ValueError:
    """The error for the byte `data[position]`, at `offset` of `path`, that is not valid UTF-8 there."""
    what = f"{path} is not UTF-8 text: byte 0x{data[position]:02x} at offset {offset} (counted from 0)"
    encoding = guess_encoding(data, is_start=offset == position)
    if encoding is None:
        return ValueError(f"{what}. {NO_TEXT_ADVICE}")
    return ValueError(f"{what}. If it is text in another encoding, {_conversion(path, encoding)}")


def nul_error(path: Path, offset: int, data: bytes, position: int) -> ValueError:
    """The error for the NUL byte `data[position]`, at `offset` of `path`: no text file has one."""
    what = f"{path} is not UTF-8 text: it has a NUL byte at offset {offset} (counted from 0)"
    encoding = guess_encoding(data, is_start=offset == position)
    if encoding in UTF_ENCODINGS:
        return ValueError(f"{what}. It seems to be {encoding}: {_conversion(path, encoding)}")
    return ValueError(
        f"{what}. {NO_TEXT_ADVICE}. If it is text with a few such bytes, remove them"
        + ("" if os.name == "nt" else f" with: tr -d '\\000' < {quote(str(path))} > {_converted_name(path)}")
    )


def guess_encoding(data: bytes, is_start: bool) -> str | None:
    """The likely encoding of a text that is not UTF-8; None if `data` seems to be no text at all.

    is_start: whether `data` is the beginning of a file, where a byte-order mark may be.
    """
    data = data[:GUESS_BYTES]
    if is_start and data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if is_start and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        chars = data.decode("utf-16", errors="replace")
        return "UTF-16" if 10 * sum(map(_is_plain, chars)) >= 9 * len(chars) else None
    if is_start and b"\0" in data:
        for encoding in ("UTF-16LE", "UTF-16BE"):  # of text that is mostly in Latin letters
            chars = data[: len(data) // 2 * 2].decode(encoding, errors="replace")
            n_letters = sum(char == " " or (char.isascii() and char.isalpha()) for char in chars)
            if 2 * n_letters >= len(chars) and all(map(_is_plain, chars)):
                return encoding
        return None
    n_control = len(data) - len(data.translate(None, CONTROL_BYTES))
    return None if 50 * n_control > len(data) else "WINDOWS-1252"  # the most common after UTF-8


def _is_plain(char: str) -> bool:
    return char.isprintable() or char.isspace()


def _conversion(path: Path, encoding: str) -> str:
    """How to convert a file to UTF-8. Windows has no iconv."""
    if os.name == "nt":
        return f"open it in an editor as {encoding}, save it as UTF-8, and pass the result to --input"
    return (
        f"convert it, for example with: iconv -f {encoding} -t UTF-8 {quote(str(path))} > "
        f"{_converted_name(path)}, and pass the result to --input"
    )


def _converted_name(path: Path) -> str:
    return quote(f"{path.stem}-utf8{path.suffix}")


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
