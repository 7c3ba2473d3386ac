"""Files that anybody may have written: small plain ones, JSON, plain names; and the sum of any."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20  # a large vocabulary of Hugging Face's has 35 MB


def small_file(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises ValueError for one of more than `limit` bytes, and for a folder, a pipe or
    a device, which may never end; OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file: put the file itself there")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit >> 20} MB, more than any such file needs")
    return data


def json_value(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds. Raises ValueError that names it where it is none, else as `small_file`."""
    data = small_file(path, limit)
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise ValueError(f"{path} is damaged: {error}") from error


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file's own name, which can point nowhere but into the folder it is joined to."""
    plain = isinstance(name, str) and name.isprintable() and not {*name} & {*"/\\:"}
    return plain and name not in ("", ".", "..")


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number that counts something, no larger than a file can be."""
    return type(value) is int and 0 <= value < 1 << 63


def sum_of(path: Path, digest: Any = None) -> str:
    """The sum of a file, in hexadecimal digits: of hashlib's sha256, or of another `digest` of its."""
    digest = hashlib.sha256() if digest is None else digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
