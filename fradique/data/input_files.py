"""The files that --input means: those in folders too, without hidden files and copies, and only text."""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from fradique.data.console import print_note
from fradique.data.text import bom_size
from fradique.io.files import checksum

MAX_NAMES = 5  # in a note; of more files it gives the number
SAVE_AS_TEXT = "open it and save its text as UTF-8 (.txt)"
PREPARE_DOCUMENTS = (
    "prepare its documents with: python data/openwebtext/prepare.py --input {path} --out_dir data/NAME"
)
# The first bytes of files that are not text, what the files are, and how to make text of them.
NOT_TEXT = (
    (b"\x1f\x8b", "compressed with gzip", "decompress it with: gunzip -k {path}"),
    (b"BZh", "compressed with bzip2", "decompress it with: bunzip2 -k {path}"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it with: unxz -k {path}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it with: unzstd {path}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it, and give the text files in it"),
    (b"PK\x03\x04", "a ZIP archive or an office document (.docx, .odt, .epub)", SAVE_AS_TEXT),
    (b"\xd0\xcf\x11\xe0", "an office document (.doc)", SAVE_AS_TEXT),
    (b"{\\rtf", "a document in Rich Text Format", SAVE_AS_TEXT),
    (b"%PDF", "a PDF document", "extract its text, for example with: pdftotext {path}"),
    (b"PAR1", "a Parquet table", PREPARE_DOCUMENTS),
)


def find_files(inputs: Sequence[Path], endings: Sequence[str] = (".txt",)) -> list[Path]:
    """The files that --input means: each file in `inputs`, and the files at any depth of each folder.

    Of a folder, only files that end in one of `endings` are used, sorted by name, and no hidden ones (their
    own name or that of a folder above them begins with a dot). A file with the same content as an earlier one
    is left out: copies would put the same text into both splits. Notes on standard error name the hidden,
    empty and repeated files, which are skipped, and the files with a byte-order mark.

    Raises ValueError for a missing path, an empty file, a folder without files to use, a pipe or device,
    which cannot be read twice, and a file that is no text, such as a PDF, unless `endings` has its ending.
    Raises OSError for a file that cannot be read.
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
    paths, hidden, others = _list_folder(folder, endings)
    if hidden:
        print_note(f"hidden in {folder}, skipped: {_join_names(hidden)}")
    files = []
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path.stat().st_size:
            files.append(path)
        else:
            print_note(f"{path} is empty or not a plain file: skipped")
    if not files:
        contents = f"; it has {_join_endings(others)}" if others else ""
        raise ValueError(
            f"--input: there is no non-empty {' or '.join(endings)} file in {folder}{contents}. "
            "Files with another ending can be given by name"
        )
    return files


def _list_folder(folder: Path, endings: tuple[str, ...]) -> tuple[list[Path], list[str], list[str]]:
    """The paths in `folder` at any depth that end in one of `endings`; what is hidden; the other file names.

    The paths are not sorted. Hidden folders are listed, but not what they contain.
    """
    paths, hidden, others = [], [], []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent) / name
            is_wanted = name.lower().endswith(endings)
            if name.startswith("."):
                if is_wanted or name in folders:
                    hidden.append(path.relative_to(folder).as_posix())
            elif is_wanted:
                paths.append(path)
            elif name in names:
                others.append(name)
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk skips the others
    return paths, sorted(hidden), sorted(others)


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
    quoted = shlex.quote(str(path))
    with path.open("rb") as file:
        first_bytes = file.read(16)
    for magic, kind, advice in NOT_TEXT:
        if first_bytes.startswith(magic):
            raise ValueError(f"--input: {path} is {kind}, not text: {advice.format(path=quoted)}")
    if name.endswith(".jsonl"):
        raise ValueError(f"--input: {path} is JSON Lines, not text: {PREPARE_DOCUMENTS.format(path=quoted)}")


def _without_copies(files: Sequence[Path]) -> list[Path]:
    """`files` without those that have the same content as an earlier one; a note names them.

    Only files of equal size are read.
    """
    sizes = Counter(path.stat().st_size for path in files)
    first: dict[tuple[int, str], Path] = {}  # (size, SHA-256) -> the first file with this content
    copies: dict[Path, list[str]] = defaultdict(list)  # a first file -> the names of its copies
    kept = []
    for path in files:
        size = path.stat().st_size
        content = (size, checksum(path) if sizes[size] > 1 else "")
        if content in first:
            copies[first[content]].append(str(path))
        else:
            first[content] = path
            kept.append(path)
    for original, names in copies.items():
        print_note(f"the same content as {original}, read only once: {_join_names(names)}")
    return kept
