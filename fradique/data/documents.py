"""Documents, one at a time, from Parquet, JSON Lines and text files or from the Hugging Face hub.

A document is an iterable of pieces of text: one piece for a row of a table, several for a large text file.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from fradique.data.text import not_utf8_error, read_file

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
MAX_LINE_BYTES = 64 << 20  # of JSON Lines
FIELD = "text"  # the column or key with the text of a document

Document: TypeAlias = Iterable[str]


@dataclass(frozen=True)
class HubFile:
    """A Parquet file on the Hugging Face hub; only the parts that are read are downloaded.

    It has the part of Path's interface that reading needs: `name` and `open`.
    """

    url: str  # with the commit
    size: int  # bytes

    @property
    def name(self) -> str:
        """The file name, the last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    def open(self, mode: str) -> BinaryIO:
        """Open the file for reading ("rb")."""
        import fsspec

        return fsspec.open(self.url, mode).open()


def local_documents(files: Sequence[Path]) -> Iterator[Document]:
    """The documents of `files` in order: each row of a .parquet, line of a .jsonl(.gz), or whole .txt.

    Raises ValueError naming the file, and the line or byte, if a file is damaged or not of its kind.
    """
    for path in files:
        yield from read_documents(path)


def read_documents(file: Path | HubFile, first: int = 0) -> Iterator[Document]:
    """The documents of one file from number `first`. Raises as `local_documents` does."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from ((text,) for text in _parquet_texts(file, first))
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from ((text,) for text in _json_lines_texts(file, first))
    elif name.endswith(".txt"):
        if not first:
            yield read_file(file)
    else:
        raise ValueError(f"{file} is none of {', '.join(ENDINGS)}")


def count_documents(file: Path | HubFile) -> int:
    """The number of documents in a file. Raises as `local_documents` does.

    A .parquet states it in its metadata; the lines of a .jsonl are counted without parsing them.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        with _open_parquet(file) as table:
            return table.metadata.num_rows
    if name.endswith((".jsonl", ".jsonl.gz")):
        return sum(1 for _ in _read_lines(file))
    return 1


def hub_documents(name: str) -> Iterator[Document]:
    """Stream the documents of a data set on the Hugging Face hub; nothing is written to the disk.

    Raises ValueError if it cannot be reached or the connection fails.
    """
    try:
        from datasets import load_dataset

        # the hub makes this branch for each data set; it needs no loading script
        for row in load_dataset(name, revision="refs/convert/parquet", split="train", streaming=True):
            yield (row[FIELD],)
    except Exception as error:  # from requests, huggingface_hub, datasets, fsspec, pyarrow...
        raise _stream_error(name, error) from error


def _stream_error(name: str, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValueError(
        f"the data set {name} cannot be streamed from the Hugging Face hub ({reason}). Check the network, "
        f"or use files of your own ({', '.join(ENDINGS)}): --input FILE"
    )


def hub_files(name: str) -> list[HubFile]:
    """The files of a data set on the Hugging Face hub, in order, at the current commit.

    Raises ValueError if it cannot be reached.
    """
    try:
        import fsspec
        from datasets import load_dataset_builder

        builder = load_dataset_builder(name, revision="refs/convert/parquet")
        urls = [str(url) for url in builder.config.data_files["train"]]
        return [HubFile(url, int(fsspec.core.url_to_fs(url)[0].size(url))) for url in urls]
    except Exception as error:  # as in hub_documents
        raise _stream_error(name, error) from error


@contextlib.contextmanager
def _open_parquet(file: Path | HubFile) -> Iterator[Any]:
    """Open a Parquet file that has the column FIELD. Raises ValueError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read in small steps, because a row group can be as large as the file
        with (
            contextlib.nullcontext(file) if isinstance(file, Path) else file.open("rb") as source,
            pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table,
        ):
            if FIELD not in (columns := table.schema_arrow.names):
                raise ValueError(f"{file} has no column {FIELD!r}, only {', '.join(columns)}")
            yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {str(error)[:300]}") from error
    except Exception as error:  # network errors of a file on the hub
        if isinstance(error, ValueError) or isinstance(file, Path):
            raise
        raise _stream_error(file.url, error) from error


def _parquet_texts(file: Path | HubFile, first: int) -> Iterator[str]:
    with _open_parquet(file) as table:
        row, group = 0, 0
        while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= first:
            row, group = row + table.metadata.row_group(group).num_rows, group + 1
        groups = range(group, table.num_row_groups)
        for batch in table.iter_batches(256, row_groups=groups, columns=[FIELD], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise ValueError(f"{file}, row {row}: {FIELD!r} is {type(text).__name__}, not text")
                if row >= first:
                    yield text
                row += 1


def _json_lines_texts(path: Path, first: int) -> Iterator[str]:
    for document, (line_number, offset, line) in enumerate(_read_lines(path)):
        if document >= first:
            yield _parse_line(line, path, line_number, offset)


def _read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The lines that are not blank: line number from 1, byte offset of the line, and its bytes."""
    line_number, offset = 0, 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                line_number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{path}, line {line_number} is longer than {MAX_LINE_BYTES >> 20} MB")
                if not line.isspace():
                    yield line_number, offset, line
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f"{path} cannot be decompressed after line {line_number}: {error}") from error


def _parse_line(line: bytes, path: Path, line_number: int, offset: int) -> str:
    """The text of a line of JSON that begins at byte `offset` of `path`."""
    try:
        text = json.loads(line.decode("utf-8"))[FIELD]
        text.encode()  # "\\ud800" is valid JSON, but not a character
        return text
    except UnicodeDecodeError as error:
        raise not_utf8_error(path, offset + error.start, line[error.start]) from None
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
