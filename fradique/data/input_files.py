"""The files that --input means: those in folders too, without hidden files and copies, and only text."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from fradique.data.console import print_note
from fradique.data.text import bom_size, nul_error
from fradique.io.files import checksum
from fradique.io.terminal import quote, shell_command

MAX_NAMES = 5  # in a note; of more files it gives the number
FIRST_BYTES = 1 << 16  # of a file, which are checked and compared first
HASHED_BYTES = 1 << 20  # of a file that are in memory at a time
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, struct.error)
SAVE_AS_TEXT = "open it and save its text as UTF-8 (.txt)"
UNPACK = "unpack it, and give the text files in it"
# The first bytes of files that are not text, what the files are, and how to make text of them.
NOT_TEXT = (
    (b"\x1f\x8b", "compressed with gzip", "decompress it with: gunzip -k {path}"),
    (b"BZh", "compressed with bzip2", "decompress it with: bunzip2 -k {path}"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it with: unxz -k {path}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it with: unzstd {path}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it with: unlz4 {path}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"PK\x03\x04", "a ZIP archive or an office document (.docx, .odt, .epub)", SAVE_AS_TEXT),
    (b"\xd0\xcf\x11\xe0", "an office document (.doc)", SAVE_AS_TEXT),
    (b"{\\rtf", "a document in Rich Text Format", SAVE_AS_TEXT),
    (b"%PDF", "a PDF document", "extract its text, for example with: pdftotext {path}"),
    (b"PAR1", "a Parquet table", "{documents}"),
    (b"SQLite format 3\0", "an SQLite database", "export its text as UTF-8 (.txt)"),
)
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257
DOCUMENT_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")  # of files that data/openwebtext reads
# other endings of files that are refused when they are given by name
REFUSED_ENDINGS = (
    ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".zip", ".tar", ".docx", ".odt", ".epub", ".doc",
    ".rtf", ".pdf", ".ndjson",
)  # fmt: skip


def find_files(inputs: Sequence[Path], endings: Sequence[str] = (".txt",)) -> list[Path]:
    """The files that --input means: each file in `inputs`, and the files at any depth of each folder.

    Of a folder, only files that end in one of `endings` are used, sorted by name, and no hidden ones (their
    own name or that of a folder above them begins with a dot). A file with the same content as an earlier one
    is left out: copies would put the same text into both splits. Byte-order marks, the kind of line ends and
    the compression of .gz do not make the content another. Notes on standard error name the hidden, empty and
    repeated files and the linked folders, which are skipped, and the files with a byte-order mark.

    Raises ValueError for a missing path, an empty file, a folder without files to use, a pipe or device,
    which cannot be read twice, and a file that is no text, such as a PDF, unless `endings` has its ending.
    Raises OSError for a file or folder that cannot be read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_in_folder(path, tuple(endings))
        elif not path.exists():
            raise ValueError(f"--input: there is no file or folder {path}")
        elif not path.is_file():
            raise ValueError(f"--input: {path} must be a plain file, because it is read more than once")
        elif path.stat().st_size == 0:
            raise ValueError(f"--input: {path} is empty")
        else:
            files.append(path)
    for path in files:
        _check_text(path, endings)
    files = _without_copies(files)
    for path in files:
        with path.open("rb") as file:
            if bom_size(file):
                print_note(f"{path} begins with a byte-order mark, which is removed")
    return files


def _files_in_folder(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The non-empty files in `folder` at any depth that end in one of `endings`, sorted by name."""
    paths, hidden, linked, others = _list_folder(folder, endings)
    if hidden:
        print_note(f"hidden in {folder}, skipped: {_join_names(hidden)}")
    if linked:
        print_note(f"linked folder in {folder}, skipped (give it by name to use it): {_join_names(linked)}")
    files = []
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path.stat().st_size:
            files.append(path)
        else:
            print_note(f"{path} is empty or not a plain file: skipped")
    if files:
        return files
    contents = f"; it has {_join_endings(others)}" if others else ""
    names = [name.lower() for name in others]
    advice = ""
    if any(name.endswith(DOCUMENT_ENDINGS) for name in names):
        advice = f". For documents: {_prepare_documents(folder)}"
    elif not names or not all(name.endswith(REFUSED_ENDINGS) for name in names):
        advice = ". Files with another ending can be given by name"
    raise ValueError(
        f"--input: there is no non-empty {' or '.join(endings)} file in {folder}{contents}{advice}"
    )


def _list_folder(
    folder: Path, endings: tuple[str, ...]
) -> tuple[list[Path], list[str], list[str], list[str]]:
    """The paths in `folder` at any depth that end in one of `endings`, which are not sorted.

    Also what is hidden, the linked folders, and the names of the other files. Hidden and linked folders are
    listed, but not what they contain. Raises OSError for a folder that cannot be read.
    """
    paths, hidden, linked, others = [], [], [], []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            path = Path(parent) / name
            if name.startswith("."):
                hidden.append(path.relative_to(folder).as_posix())
            elif path.is_symlink():  # os.walk does not follow links, which may lead in a circle
                linked.append(path.relative_to(folder).as_posix())
        for name in names:
            path = Path(parent) / name
            is_wanted = name.lower().endswith(endings)
            if is_wanted and name.startswith("."):
                hidden.append(path.relative_to(folder).as_posix())
            elif is_wanted:
                paths.append(path)
            elif not name.startswith("."):
                others.append(name)
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk skips the others
    return paths, sorted(hidden), sorted(linked), sorted(others)


def _raise(error: OSError) -> NoReturn:
    raise error


def _join_names(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _join_endings(names: Sequence[str]) -> str:
    """For example: 3 .docx, 1 .pdf"""
    endings = Counter("".join(Path(name).suffixes[-2:]).lower() or "without ending" for name in names)
    return _join_names([f"{count:,} {ending}" for ending, count in endings.most_common()])


def _check_text(path: Path, endings: Sequence[str]) -> None:
    """Raise ValueError, with what to do, if a file is no text and has none of `endings`."""
    name = path.name.lower()
    if name.endswith(tuple(ending for ending in endings if ending != ".txt")):
        return
    quoted = quote(str(path))
    with path.open("rb") as file:
        first_bytes = file.read(FIRST_BYTES)
    for magic, kind, advice in NOT_TEXT:
        if first_bytes.startswith(magic):
            advice = advice.format(path=quoted, documents=_prepare_documents(path))
            raise ValueError(f"--input: {path} is {kind}, not text: {advice}")
    if first_bytes.startswith(TAR_MAGIC, TAR_MAGIC_OFFSET):
        raise ValueError(f"--input: {path} is a tar archive, not text: {UNPACK}")
    if name.endswith(".jsonl"):
        raise ValueError(f"--input: {path} is JSON Lines, not text: {_prepare_documents(path)}")
    if name.endswith(".ndjson") or (name.endswith(".json") and _is_json_line(first_bytes)):
        advice = "" if ".jsonl" in endings else f", then {_prepare_documents(path.with_suffix('.jsonl'))}"
        raise ValueError(f"--input: {path} is JSON Lines, not text: rename it to .jsonl{advice}")
    if (nul := first_bytes.find(0)) >= 0:
        raise nul_error(path, nul, first_bytes, nul)


def _prepare_documents(path: Path) -> str:
    command = shell_command("data/openwebtext/prepare.py", "--input", str(path), "--out_dir", "data/NAME")
    return f"prepare its documents with: {command}"


def _is_json_line(first_bytes: bytes) -> bool:
    """Whether the first line of a file is a JSON object, as in JSON Lines."""
    try:
        return isinstance(json.loads(first_bytes.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _without_copies(files: Sequence[Path]) -> list[Path]:
    """`files` without those that have the same content as an earlier one; a note names them.

    A file is read to its end only if another one begins in the same way, or for Parquet has the same size.
    """
    beginnings = [_beginning(path) for path in files]
    counts = Counter(beginnings)
    first: dict[tuple[Hashable, str], Path] = {}  # the first file with this beginning and checksum
    copies: dict[Path, list[str]] = defaultdict(list)  # a first file -> the names of its copies
    kept = []
    for path, beginning in zip(files, beginnings, strict=True):
        content = (beginning, _content_checksum(path) if counts[beginning] > 1 else "")
        if content in first:
            copies[first[content]].append(str(path))
        else:
            first[content] = path
            kept.append(path)
    for original, names in copies.items():
        print_note(f"the same content as {original}, read only once: {_join_names(names)}")
    return kept


def _beginning(path: Path) -> Hashable:
    """A value that is equal for files of equal content: the size of Parquet, else a checksum of its start."""
    if path.name.lower().endswith(".parquet"):
        return path.stat().st_size
    try:
        with _open_text(path) as file:  # a line end has up to two bytes
            data = file.read(len(codecs.BOM_UTF8) + 2 * FIRST_BYTES + 1)
    except GZIP_ERRORS:
        return path  # its reader reports the damage
    return hashlib.sha256(_normalize(data.removeprefix(codecs.BOM_UTF8))[:FIRST_BYTES]).hexdigest()


def _content_checksum(path: Path) -> str:
    """The SHA-256 of a Parquet file, or of a decompressed text without byte-order mark and with \\n only."""
    if path.name.lower().endswith(".parquet"):
        return checksum(path)
    digest = hashlib.sha256()
    pending = b""  # a carriage return at the end of a block
    try:
        with _open_text(path) as file:
            block = file.read(HASHED_BYTES).removeprefix(codecs.BOM_UTF8)
            while block:
                block = pending + block
                pending = b"\r" if block.endswith(b"\r") else b""
                digest.update(_normalize(block.removesuffix(pending)))
                block = file.read(HASHED_BYTES)
    except GZIP_ERRORS:
        return str(path)  # its reader reports the damage
    digest.update(pending)
    return digest.hexdigest()


def _open_text(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _normalize(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")
