"""A lock on a run folder, so that only one process writes to it.

The operating system releases the lock when the process ends, even after SIGKILL. The lock also finds the
folder again after somebody has renamed or moved it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"
F_GETPATH = 50  # from fcntl.h of macOS
# What a file system without locks answers.
NO_LOCK_SUPPORT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
MAX_COMMAND_CHARS = 500


class FolderLock:
    """An exclusive lock on a folder, held until `release`."""

    def __init__(self, folder: Path) -> None:
        """Lock an existing folder. Raises ValueError naming the process that has locked it already."""
        self.folder = folder
        self.file: IO[str] | None = None
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            if not _try_lock(file):
                raise ValueError(in_use_message(folder, _read_holder(file)))
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "command": _command_line()}
        file.write(json.dumps(holder))
        file.flush()
        self.file = file
        # the folder stays open too: its descriptor still refers to it after a rename
        self.descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None

    def current_path(self) -> Path | None:
        """The path of the folder now, which differs after a rename; None if the folder was deleted."""
        if self.descriptor is None or _is_same_folder(self.folder, self.descriptor):
            return self.folder
        path = _descriptor_path(self.descriptor)
        return path if path is not None and _is_same_folder(path, self.descriptor) else None

    def release(self) -> None:
        """Release the lock. Does nothing the second time."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk: the lock is released all the same
                self.file.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.file = self.descriptor = None


def lock_holder(folder: Path) -> str | None:
    """A description of the process that holds the lock of a folder; None if it is not locked."""
    try:
        with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
            return None if _try_lock(file) else _read_holder(file)
    except OSError:  # no such folder, or it is read-only: then no run writes to it
        return None


def in_use_message(folder: Path, holder: str) -> str:
    """The error message for a folder that `holder` has locked."""
    return (
        f"out_dir={folder} is in use by {holder}: two runs in one folder would overwrite each other's files. "
        "Wait for it, stop it (Ctrl-C or SIGTERM: it saves a checkpoint), or choose another --out_dir"
    )


def _try_lock(file: IO[str]) -> bool:
    """Lock an open file until it is closed. Returns False if another process has locked it.

    Returns True without a lock on a file system that has no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # past the end of the text: Windows lets nobody read a locked byte
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCK_SUPPORT
    return True


def _read_holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        holder: dict[str, Any] = json.loads(file.read(10_000))
        return f"process {holder['process']} on {holder['host']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has locked the file but not yet written to it
        return "another process"


def _command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:MAX_COMMAND_CHARS]


def _is_same_folder(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _descriptor_path(descriptor: int) -> Path | None:
    """The path of an open folder; None where the system does not tell it (Linux and macOS do)."""
    try:
        if sys.platform == "darwin":
            import fcntl

            return Path(os.fsdecode(fcntl.fcntl(descriptor, F_GETPATH, bytes(1024)).rstrip(b"\0")))
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:
        return None
