"""Files: atomic writes, reading of small files and JSON with a size limit, checksums.

The size limit keeps a damaged or malicious file from filling the memory. A file is written under a temporary
name, synced to the disk, and then renamed, so under its final name it is always complete.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

PROJECT_FOLDER = Path(__file__).resolve().parents[2]  # the folder of train.py, config/ and data/
MAX_JSON_BYTES = 64 << 20  # the largest vocabularies on the Hugging Face hub have 35 MB


@contextlib.contextmanager
def atomic_path(path: Path, writer_id: str = "", keep_suffix: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. The block writes a file there, which replaces `path`.

    Readers of `path` see the old file or the whole new one. After an error the temporary file is removed and
    `path` is unchanged.

    writer_id: part of the temporary name, `.<name>.<writer_id>.tmp`. The default is the process id. Give an
        id that is unique across machines if several of them write `path` on a shared disk.
    keep_suffix: end the temporary name in the suffix of `path`, from which some libraries derive the format.
    """
    writer_id = writer_id or str(os.getpid())
    name = f".{path.stem}.{writer_id}.tmp{path.suffix}" if keep_suffix else f".{path.name}.{writer_id}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Line ends are "\\n" on every system."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity."""
    write_text(path, format_json(value))


def format_json(value: Any) -> str:
    """The text of a JSON file: indented by one space, with a newline at the end.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def fsync(path: Path) -> None:
    """Make the operating system write a file to the disk, or for a folder its list of file names.

    Does nothing for a folder on Windows, which cannot open folders.
    """
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)  # Windows syncs only writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(temporary: Path, folder: Path, owned: Collection[str]) -> None:
    """Sync the folder `temporary` (without subfolders) to the disk and rename it to `folder`.

    An existing `folder` is renamed to `.<name>.old` before. At the end its files with names in `owned` are
    deleted, and all others moved to the new folder. After a crash between the two renames,
    `checkpoint.recover_run_folder` restores it.
    """
    for path in [*temporary.iterdir(), temporary]:
        fsync(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        merge_old_folder(old, folder, owned)  # left by a crash
        folder.rename(old)
    temporary.rename(folder)
    merge_old_folder(old, folder, owned)
    fsync(folder.parent)


def merge_old_folder(old: Path, folder: Path, owned: Collection[str]) -> None:
    """Delete the files of `old` with names in `owned`, and `old` itself; move its other content to `folder`.

    Best effort: what cannot be moved stays in `old`.
    """
    with contextlib.suppress(OSError):
        for path in old.iterdir():
            if path.name in owned and not path.is_dir():
                path.unlink()
            elif not (folder / path.name).exists():
                path.rename(folder / path.name)
        old.rmdir()


def read_small_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises ValueError if the file is larger, and for a folder, a pipe or a device: reading a pipe can block,
    and /dev/zero has no end. Raises OSError if the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file but a folder, pipe or device: replace it with a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)  # one byte more, to notice a larger file
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit >> 20} MB, more than any such file needs")
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises ValueError naming the file if it is not JSON or too large, and OSError if it cannot be read.
    """
    data = read_small_file(path, limit)
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:  # includes json.JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as a dict.

    Raises ValueError naming the file if it is missing, cannot be read, or is not a JSON object.
    """
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
    """Whether `name` is a file name without any folder, so that `folder / name` is always in `folder`."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and not any(char in name for char in "/\\:")  # Windows: a\b, C:b


def is_count(value: Any) -> bool:
    """Whether `value` is an int (not a bool) from 0 to 2^63 - 1, the largest possible file size."""
    return type(value) is int and 0 <= value < 1 << 63


def checksum(path: Path, digest: Any = None) -> str:
    """The checksum of a file in hexadecimal: by default its SHA-256.

    digest: a hashlib object to use instead, which may contain data that precedes the file's.
    """
    digest = hashlib.sha256() if digest is None else digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def expand_home(text: str) -> str:
    """A path with its leading ~ or ~user replaced by the home folder, as a shell does.

    A shell leaves --out_dir=~/runs as it is. Raises ValueError if there is no such user.
    """
    expanded = os.path.expanduser(text)  # noqa: PTH111 (a name on the hub is no path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"no home folder {user!r}; a folder of this name in the current one is ./{user}")
    return expanded


def absolute_path(path: Path) -> Path:
    """`path` as an absolute path without symbolic links.

    Unlike Path.resolve it raises no error for a link that leads to itself, whose own path it returns.
    """
    return Path(os.path.realpath(path))


def broken_link(path: Path) -> Path | None:
    """The first of `path` and its parents that is a symbolic link to nothing or to itself, if any."""
    links = (link for link in (path, *path.parents) if link.is_symlink() and not _exists(link))
    return next(links, None)


def find_beside_project(path: Path) -> Path:
    """`path`, or the same path beside train.py if it exists there and not in the current folder.

    For configs and corpora, so that a command works in any folder. An absolute path is returned unchanged.
    """
    beside = PROJECT_FOLDER / path
    return beside if _exists(beside) and not _exists(path) else path


def describe_search(path: Path) -> str:
    """For a message: the absolute paths that `find_beside_project` looks for."""
    paths = [PROJECT_FOLDER / path]
    with contextlib.suppress(OSError):  # the current folder may be deleted
        paths.insert(0, Path.cwd() / path)
    return " and ".join(map(str, dict.fromkeys(paths)))


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError):  # the name is too long, or a folder cannot be read
        return path.exists()
    return False
