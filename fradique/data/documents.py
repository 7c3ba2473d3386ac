"""Read documents from Parquet, JSON Lines and text files, or from a data set on the Hugging Face hub.

A document is an iterable of pieces of text. A row of a table or a line of JSON is one piece. A large text
file has several.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from fradique.data.text import not_utf8_error, read_file

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")  # of the names of files with documents
MAX_LINE_BYTES = 64 << 20  # in a .jsonl file
FIELD = "text"  # the Parquet column or JSON key with the text of a document
BATCH_ROWS = 256  # rows of a Parquet file in memory at a time
CONVERTED = "refs/convert/parquet"  # a branch that the hub adds to each data set, with its data as Parquet

Document: TypeAlias = Iterable[str]


@dataclass(frozen=True)
class HubFile:
    """A Parquet file on the Hugging Face hub; only the parts that are read are downloaded.

    `name` and `open` are used as those of a Path.
    """

    url: str  # contains the commit, so the content cannot change
    size: int  # bytes

    @property
    def name(self) -> str:
        """The file name at the end of the URL."""
        return self.url.rsplit("/", 1)[-1]

    def open(self, mode: str) -> BinaryIO:
        """Open the file for reading; `mode` is "rb"."""
        import fsspec

        return fsspec.open(self.url, mode).open()


def local_documents(files: Sequence[Path]) -> Iterator[Document]:
    """The documents of `files` in order: each row of a .parquet, each line of a .jsonl(.gz), each whole .txt.

    Raises ValueError naming the file, and where possible the line or byte, if a file is damaged or does not
    have the format that its name ends in.
    """
    for path in files:
        yield from read_documents(path)


def read_documents(file: Path | HubFile, first: int = 0) -> Iterator[Document]:
    """The documents of a file from number `first`, counted from 0. Raises the errors of `local_documents`."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        for text in _parquet_texts(file, first):
            yield (text,)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        for text in _json_lines_texts(file, first):
            yield (text,)
    elif name.endswith(".txt"):
        if first == 0:
            yield read_file(file)
    else:
        advice = "; if it is JSON Lines, one object per line, rename it to .jsonl" if "json" in name else ""
        raise ValueError(f"{file} ends in none of {', '.join(ENDINGS)}{advice}")


def count_documents(file: Path | HubFile) -> int:
    """The number of documents in a file. Raises the errors of `local_documents`.

    A .parquet file has the number in its metadata. The lines of a .jsonl file are counted, but not parsed.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        with _open_parquet(file) as table:
            return table.metadata.num_rows
    if name.endswith((".jsonl", ".jsonl.gz")):
        return sum(1 for _ in _read_lines(file))
    return 1  # a .txt file is one document


class _NoTextError(ValueError):
    """A data set on the hub has no column FIELD of texts."""


def hub_documents(name: str) -> Iterator[Document]:
    """Stream the documents of a data set on the Hugging Face hub; nothing is written to the disk.

    Raises ValueError if the hub cannot be reached or the connection fails.
    """
    try:
        from datasets import load_dataset

        # other branches may need a loading script, which is code that the data set's author wrote
        for row in load_dataset(name, revision=CONVERTED, split="train", streaming=True):
            if not isinstance(row.get(FIELD), str):
                raise _NoTextError(
                    f"the data set {name} has no column {FIELD!r} of text, only {', '.join(row)}"
                )
            yield (row[FIELD],)
    except _NoTextError:
        raise
    except Exception as error:  # datasets and the packages that it uses raise errors of many types
        raise _stream_error(name, error) from error


def _stream_error(name: str, error: Exception) -> ValueError:
    """The error for a data set or file `name` on the hub that could not be read because of `error`."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValueError(
        f"the data set {name} cannot be streamed from the Hugging Face hub ({reason}). Check the network, "
        f"or use files of your own ({', '.join(ENDINGS)}): --input FILE"
    )


def hub_files(name: str) -> list[HubFile]:
    """The files of a data set on the Hugging Face hub, in order, at the current commit.

    Raises ValueError if the hub cannot be reached.
    """
    try:
        import fsspec
        from datasets import load_dataset_builder

        builder = load_dataset_builder(name, revision=CONVERTED)
        files = []
        for url in map(str, builder.config.data_files["train"]):
            file_system, _ = fsspec.core.url_to_fs(url)
            files.append(HubFile(url, int(file_system.size(url))))
        return files
    except Exception as error:  # of many types, as in hub_documents
        raise _stream_error(name, error) from error


@contextlib.contextmanager
def _open_parquet(file: Path | HubFile) -> Iterator[Any]:
    """Open a Parquet file. Raises ValueError if it cannot be read or has no column FIELD."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with (
            contextlib.nullcontext(file) if isinstance(file, Path) else file.open("rb") as source,
            # without these options a whole row group would be in memory, which can be as large as the file
            pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table,
        ):
            columns = table.schema_arrow.names
            if FIELD not in columns:
                raise ValueError(f"{file} has no column {FIELD!r}, only {', '.join(columns)}")
            yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {str(error)[:300]}") from error
    except Exception as error:
        if isinstance(error, ValueError) or isinstance(file, Path):
            raise
        raise _stream_error(file.url, error) from error  # an error of the network, which can have many types


def _parquet_texts(file: Path | HubFile, first: int) -> Iterator[str]:
    """The texts of the rows from number `first`. Earlier row groups are not read."""
    with _open_parquet(file) as table:
        n_rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        row, group = 0, 0  # the first row and the first row group that are read
        while group < len(n_rows) and row + n_rows[group] <= first:
            row, group = row + n_rows[group], group + 1
        groups = range(group, len(n_rows))
        for batch in table.iter_batches(BATCH_ROWS, row_groups=groups, columns=[FIELD], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise ValueError(f"{file}, row {row}: {FIELD!r} is {type(text).__name__}, not text")
                if row >= first:
                    yield text
                row += 1


def _json_lines_texts(path: Path, first: int) -> Iterator[str]:
    """The texts of the lines from number `first`, where blank lines do not count."""
    lines = itertools.islice(_read_lines(path), first, None)
    for line_number, offset, line in lines:
        yield _parse_line(line, path, line_number, offset)


def _read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The lines that are not blank, each as (line number from 1, byte offset of the line, bytes)."""
    line_number, offset = 0, 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                line_number += 1
                if line_number == 1 and line.startswith(codecs.BOM_UTF8):  # written by some Windows programs
                    offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{path}, line {line_number} is longer than {MAX_LINE_BYTES >> 20} MB")
                if line.strip():
                    yield line_number, offset, line
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f"{path} cannot be decompressed after line {line_number}: {error}") from error


def _parse_line(line: bytes, path: Path, line_number: int, offset: int) -> str:
    """The text of a line of JSON that begins at byte `offset` of `path`."""
    try:
        text = json.loads(line.decode("utf-8"))[FIELD]
        text.encode()  # raises an error if the text has a lone surrogate, which JSON allows, or is not a str
        return text
    except UnicodeDecodeError as error:
        raise not_utf8_error(path, offset + error.start, line, error.start) from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}, line {line_number}: half of a surrogate pair is not text ({error})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {line_number} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}, line {line_number} is not an object with a text: {{"{FIELD}": "..."}}'
        ) from error
