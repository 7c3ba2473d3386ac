"""Text files as a stream of pieces: find, check, decode and cut files of any size in bounded memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fradique.data.console import print_note

BLOCK_BYTES = 1 << 20  # read at a time
PIECE_CHARS = 1 << 18  # characters in a piece of text
MAX_PIECE_CHARS = 1 << 20  # the longest piece, where the text has no position that keeps its tokens when cut

# Both match up to the end of a word that is followed by white space. GPT-2's pattern never matches across
# that position and does not look past it, so a text that is cut there has the same tokens as an uncut text.
# (Python's \S is slightly stricter than GPT-2's.)
_LAST_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
_FIRST_CUT = re.compile(r"\S(?=[ \t\r\n])")


@dataclass(frozen=True)
class Text:
    """A text that can be streamed any number of times."""

    source: str  # where it comes from, for people who read meta.json
    size: int  # bytes, for the progress bar
    chunks: Callable[[], Iterator[str]]  # the text from the beginning
    chunks_from: Callable[[int], Iterator[str]] | None = None  # the text from a byte, if that is faster

    def from_byte(self, offset: int) -> Iterator[str]:
        """The text in chunks from byte `offset` of its UTF-8 encoding, where a character must begin."""
        if self.chunks_from is not None:
            yield from self.chunks_from(offset)
            return
        for chunk in self.chunks():
            if offset:
                data = chunk.encode()
                chunk, offset = data[offset:].decode(), max(0, offset - len(data))
            if chunk:
                yield chunk


def files_text(files: Sequence[Path], source: str) -> Text:
    """The concatenation of UTF-8 files; a newline is added after a file that does not end with one."""
    size = sum(path.stat().st_size for path in files)
    return Text(source, size, lambda: _concatenate(files), lambda offset: _concatenate(files, offset))


def _concatenate(files: Sequence[Path], offset: int = 0) -> Iterator[str]:
    """The text of `files_text` in chunks, from byte `offset`."""
    at_line_start = True  # after the files so far
    for path in files:
        if not at_line_start and offset:
            offset -= 1  # the added newline
        elif not at_line_start:
            yield "\n"
        if offset:
            size, last_byte = _size_and_last_byte(path)
            if offset >= size:
                offset, at_line_start = offset - size, last_byte == b"\n" if size else at_line_start
                continue
        for chunk in read_file(path, start=offset):
            at_line_start = chunk[-1] == "\n"
            yield chunk
        offset = 0


def _size_and_last_byte(path: Path) -> tuple[int, bytes]:
    """The bytes of text in a file, without its byte-order mark, and the last of these bytes."""
    with path.open("rb") as file:
        bom_size = _bom_size(file)
        size = file.seek(0, 2) - bom_size
        file.seek(bom_size + max(0, size - 1))
        return size, file.read(1)


def _bom_size(file: BinaryIO) -> int:
    """The bytes of the byte-order mark at the beginning of `file`: 3 or 0."""
    return 3 if file.read(3) == codecs.BOM_UTF8 else 0


def read_file(path: Path, block_bytes: int = BLOCK_BYTES, start: int = 0) -> Iterator[str]:
    """The text of a UTF-8 file in non-empty chunks, with unchanged newlines and without a byte-order mark.

    Reading begins at byte `start` of the text, where a character must begin. Raises ValueError naming the
    file and the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started = 0, start > 0  # `offset` of the block in the file
    with path.open("rb") as file:
        if start:
            offset = file.seek(_bom_size(file) + start)
        while True:
            block = file.read(block_bytes)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = offset - pending + error.start
                raise not_utf8_error(path, position, error.object[error.start]) from None
            if text and not started:
                text, started = text.removeprefix("\ufeff"), True
            if text:
                yield text
            if not block:
                return
            offset += len(block)


def not_utf8_error(path: Path, offset: int, byte: int) -> ValueError:
    """The error for a `byte` at `offset` of `path` that is not valid UTF-8 there."""
    encoding = "UTF-16" if offset == 0 and byte in (0xFE, 0xFF) else "WINDOWS-1252"
    return ValueError(
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset} (counted from 0). If it is text in "
        f"another encoding, convert it, for example with: iconv -f {encoding} -t UTF-8 {path.name} > "
        f"{path.stem}-utf8.txt, and pass the result to --input"
    )


def cut_pieces(
    chunks: Iterable[str], piece_chars: int = PIECE_CHARS, max_piece_chars: int = MAX_PIECE_CHARS
) -> Iterator[str]:
    """Cut a stream into pieces of up to `piece_chars` whose tokens, concatenated, are those of the whole.

    Where no cut keeps the tokens, a piece grows up to `max_piece_chars` and is then cut anyway, so that
    memory stays bounded; the tokens may differ there, but the text never does.
    """
    pending, window = "", piece_chars
    for chunk in chunks:
        pending += chunk
        start = 0
        while len(pending) - start >= window:
            match = _LAST_CUT.match(pending, start, start + window)
            if not match and window < max_piece_chars:
                window *= 2  # look for a cut further on
                continue
            end = match.end() if match else start + window
            yield pending[start:end]
            start, window = end, piece_chars
        pending = pending[start:]
    if pending:
        yield pending


def first_cut(text: str) -> int:
    """The first position where `text` can be cut without changing its tokens; 0 if there is none."""
    match = _FIRST_CUT.search(text)
    return match.end() if match else 0


def find_files(inputs: Sequence[Path], endings: Sequence[str] = (".txt",)) -> list[Path]:
    """The files given by --input: files, and the files in folders at any depth, sorted by name.

    A note on standard error names each empty file in a folder, which is skipped, and each file with a
    byte-order mark. Raises ValueError for a missing path, an empty file, a folder without a non-empty file
    that ends in one of `endings`, and a pipe or device, which cannot be read twice; OSError for a file that
    cannot be read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_in_folder(path, endings)
        elif not path.exists():
            raise ValueError(f"--input: there is no file or folder {path}")
        elif not path.is_file():
            raise ValueError(f"--input: {path} must be a plain file, because it is read more than once")
        elif path.stat().st_size == 0:
            raise ValueError(f"--input: {path} is empty")
        else:
            files.append(path)
    for path in files:
        with path.open("rb") as file:
            if _bom_size(file):
                print_note(f"{path} begins with a byte-order mark, which is removed")
    return files


def _files_in_folder(folder: Path, endings: Sequence[str]) -> list[Path]:
    paths = [path for path in folder.rglob("*") if path.name.lower().endswith(tuple(endings))]
    files = []
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path.stat().st_size:
            files.append(path)
        else:
            print_note(f"{path} is empty or not a plain file: skipped")
    if not files:
        raise ValueError(f"--input: there is no non-empty {' or '.join(endings)} file in {folder}")
    return files
