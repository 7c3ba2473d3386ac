"""Files: atomic writes, reading of small files and JSON within a size limit, checksums.

Files that somebody else may have written are read with a limit, so that none can fill the memory. Everything
that is written is complete or absent: it is written under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20  # the largest vocabularies on the Hugging Face hub have 35 MB


@contextlib.contextmanager
def atomic_path(path: Path, token: str = "", keep_suffix: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, sync that file and rename it to `path`.

    Readers see the old file or the new one, never a part. After an error the temporary file is removed and
    `path` is unchanged. The name is `.<name>.<token>.tmp`; `token` defaults to the process id, and must be
    unique where several machines share the disk. With `keep_suffix` the name ends in the suffix of `path`,
    for writers that derive the format from it.
    """
    token = token or str(os.getpid())
    name = f".{path.stem}.{token}.tmp{path.suffix}" if keep_suffix else f".{path.name}.{token}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file with "\\n" line ends, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `format_json(value)`, atomically."""
    write_text(path, format_json(value))


def format_json(value: Any) -> str:
    """Indented JSON with a newline at the end; equal values give equal text. Raises ValueError for NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def fsync(path: Path) -> None:
    """Write a file, or a folder's list of names, to the disk. Windows cannot sync folders and need not."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Sync the files in the folder `temporary` and rename it to `folder`.

    An existing `folder` is first renamed to `.<name>.old`; `checkpoint.recover_run_folder` restores it after
    a crash.
    """
    for path in [*temporary.iterdir(), temporary]:
        fsync(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    fsync(folder.parent)


def read_small_file(path: Path, limit: int) -> bytes:
    """The bytes of a file.

    Raises ValueError for more than `limit` bytes, and for a folder, a pipe or a device, which may never end.
    Raises OSError if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file: put the file itself there")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit >> 20} MB, more than any such file needs")
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file. Raises ValueError naming the file if it is not JSON."""
    data = read_small_file(path, limit)
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:  # includes json.JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it is missing or damaged."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file name without a folder, so that it cannot lead out of another folder."""
    plain = isinstance(name, str) and name.isprintable() and not {*name} & {*"/\\:"}
    return plain and name not in ("", ".", "..")


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 0 to the largest size that a file can have."""
    return type(value) is int and 0 <= value < 1 << 63


def checksum(path: Path, digest: Any = None) -> str:
    """The hexadecimal SHA-256 of a file, or that of another hashlib object `digest`."""
    digest = hashlib.sha256() if digest is None else digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
