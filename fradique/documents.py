"""Documents, one at a time, from Parquet, JSON Lines and text files, or from the Hugging Face hub.

A document is an iterable of pieces of text: one piece for a row of a table, several for a large text file.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fradique.text import not_utf8, read_file

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
MAX_LINE_BYTES = 64 << 20  # of JSON Lines
FIELD = "text"  # the column or key that holds the text


def local_documents(files: Sequence[Path]) -> Iterator[Iterable[str]]:
    """The documents of `files` in order: a row of a .parquet, a line of a .jsonl(.gz), or a whole .txt.

    Raises ValueError that names the file, and the line or byte, for anything that cannot be read as such.
    """
    for path in files:
        name = path.name.lower()
        if name.endswith(".parquet"):
            yield from ((text,) for text in _parquet(path))
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from ((text,) for text in _json_lines(path))
        elif name.endswith(".txt"):
            yield read_file(path)
        else:
            raise ValueError(f"{path} is none of {', '.join(ENDINGS)}")


def hub_documents(name: str) -> Iterator[Iterable[str]]:
    """The documents of a data set on the Hugging Face hub, streamed: nothing is kept on the disk.

    Raises ValueError where it cannot be reached, or breaks off.
    """
    try:
        from datasets import load_dataset

        # this branch, which the hub makes for each data set, needs no loading script
        for row in load_dataset(name, revision="refs/convert/parquet", split="train", streaming=True):
            yield (row[FIELD],)
    except Exception as error:  # of requests, huggingface_hub, datasets, fsspec, pyarrow...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the data set {name} cannot be streamed from the Hugging Face hub ({reason}). Is there a "
            f"network? Documents can also come from files of yours ({', '.join(ENDINGS)}): --input FILE"
        ) from error


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read in small steps: a row group can be as large as the file
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            if FIELD not in (columns := table.schema_arrow.names):
                raise ValueError(f"{path} has no column {FIELD!r}, only {', '.join(columns)}")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[FIELD], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, row {row}: {FIELD!r} is {type(text).__name__}, not text")
                    yield text
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error)[:300]}") from error


def _json_lines(path: Path) -> Iterator[str]:
    number, offset = 0, 0  # of the line, of its first byte
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MB")
                if not line.isspace():
                    yield _text_of_line(line, path, number, offset)
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f"{path} cannot be unpacked after line {number}: {error}") from error


def _text_of_line(line: bytes, path: Path, number: int, offset: int) -> str:
    try:
        text = json.loads(line.decode("utf-8"))[FIELD]
        text.encode()  # "\\ud800" is JSON, and is no character
        return text
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, line[error.start]) from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number}: half of a surrogate pair is no text ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}, line {number} is not an object with a text: {{"{FIELD}": "..."}}'
        ) from error
