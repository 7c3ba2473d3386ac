"""Text files -> pieces of text: found, checked, decoded and cut, however large, with bounded memory."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 20  # read at a time
PIECE_CHARS = 1 << 18  # in a piece of text
MAX_PIECE_CHARS = 1 << 20  # where there is no place to cut it

# The end of the last word with a space after it. GPT-2's pattern never matches across such a place, and does
# not look past it: cut there, a text has the tokens that it has uncut. (Python's \S is a little stricter.)
_LAST_WORD_END = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
_FIRST_WORD_END = re.compile(r"\S(?=[ \t\r\n])")


@dataclass(frozen=True)
class Text:
    """A text that can be streamed as often as needed."""

    source: str  # where it comes from, for people to read in meta.json
    size: int  # bytes, for the progress bar
    chunks: Callable[[], Iterator[str]]
    chunks_from: Callable[[int], Iterator[str]] | None = None  # as `from_byte`, where that can be done fast

    def from_byte(self, offset: int) -> Iterator[str]:
        """The text from a byte of its UTF-8 on, where a character begins, in chunks."""
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
    """UTF-8 files one after another, with a newline between two where the first does not end with one."""
    size = sum(path.stat().st_size for path in files)
    return Text(source, size, lambda: _concatenated(files), lambda offset: _concatenated(files, offset))


def _concatenated(files: Sequence[Path], offset: int = 0) -> Iterator[str]:
    ends_line = True  # what came before
    for path in files:
        if not ends_line and offset:
            offset -= 1
        elif not ends_line:
            yield "\n"
        if offset:
            length, last = _extent(path)
            if offset >= length:
                offset, ends_line = offset - length, last == b"\n" if length else ends_line
                continue
        for chunk in read_file(path, start=offset):
            ends_line = chunk[-1] == "\n"
            yield chunk
        offset = 0


def _extent(path: Path) -> tuple[int, bytes]:
    """How many bytes of text a file has, its byte-order mark left out, and the last of them."""
    with path.open("rb") as file:
        mark = _mark_bytes(file)
        length = file.seek(0, 2) - mark
        file.seek(mark + max(0, length - 1))
        return length, file.read(1)


def _mark_bytes(file: BinaryIO) -> int:
    """How many bytes the byte-order mark takes at the beginning of `file`: 3 or 0."""
    return 3 if file.read(3) == codecs.BOM_UTF8 else 0


def read_file(path: Path, block_bytes: int = BLOCK_BYTES, start: int = 0) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, none empty: newlines as they are, a byte-order mark left out.

    It begins `start` bytes into the text, where a character does. Raises ValueError that names the file and
    the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started = 0, start > 0  # offset: of the block in the file
    with path.open("rb") as file:
        if start:
            offset = file.seek(_mark_bytes(file) + start)
        while True:
            block = file.read(block_bytes)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8_error(
                    path, offset - pending + error.start, error.object[error.start]
                ) from None
            if text and not started:
                text, started = text.removeprefix("\ufeff"), True
            if text:
                yield text
            if not block:
                return
            offset += len(block)


def not_utf8_error(path: Path, offset: int, byte: int) -> ValueError:
    """What to tell the user about a `byte` at `offset` of `path` that no UTF-8 text has there."""
    encoding = "UTF-16" if offset == 0 and byte in (0xFE, 0xFF) else "WINDOWS-1252"
    return ValueError(
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset} (counted from 0). If it is text in "
        f"another encoding, convert it, for example with: iconv -f {encoding} -t UTF-8 {path.name} > "
        f"{path.stem}-utf8.txt, and give the result to --input"
    )


def cut_pieces(
    chunks: Iterable[str], piece_chars: int = PIECE_CHARS, max_piece_chars: int = MAX_PIECE_CHARS
) -> Iterator[str]:
    """Cut a stream into pieces of up to `piece_chars` that have, together, the tokens of the whole.

    A piece grows to `max_piece_chars` where there is no exact place to cut. Then the cut comes anyway, so
    that memory stays bounded, and the tokens may differ there; the text never does.
    """
    rest, window = "", piece_chars
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start >= window:
            match = _LAST_WORD_END.match(rest, start, start + window)
            if not match and window < max_piece_chars:
                window *= 2  # there may be a place further on
                continue
            end = match.end() if match else start + window
            yield rest[start:end]
            start, window = end, piece_chars
        rest = rest[start:]
    if rest:
        yield rest


def first_word_end(text: str) -> int:
    """The first place in `text` where it can be cut and keep its tokens; 0 where there is none."""
    match = _FIRST_WORD_END.search(text)
    return match.end() if match else 0


def find_files(inputs: Sequence[Path], endings: Sequence[str] = (".txt",)) -> list[Path]:
    """The files that --input names: a folder stands for what lies in it, in the order of the names.

    An empty file in a folder is left out, and a byte-order mark is told, both with a note on standard error.
    Raises ValueError for a path that is not there, an empty file, a folder without any file of `endings`, and
    anything that cannot be read twice; OSError for what cannot be read at all.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_below(path, endings)
        elif not path.exists():
            raise ValueError(f"--input: there is no file or folder {path}")
        elif not path.is_file():
            raise ValueError(f"--input: {path} is read more than once: save it to a plain file first")
        elif path.stat().st_size == 0:
            raise ValueError(f"--input: {path} is empty")
        else:
            files.append(path)
    for path in files:
        with path.open("rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                print_note(f"{path} begins with a byte-order mark, which is left out")
    return files


def _files_below(folder: Path, endings: Sequence[str]) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.name.lower().endswith(tuple(endings))]
    files = []
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path.stat().st_size:
            files.append(path)
        else:
            print_note(f"{path} is empty, or not a file, and left out")
    if not files:
        raise ValueError(f"--input: there is no {' or '.join(endings)} file with anything in it in {folder}")
    return files


def print_note(message: str) -> None:
    """Tell the user something on standard error that stops nothing."""
    print(f"note: {message}", file=sys.stderr)
