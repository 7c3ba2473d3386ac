"""A lock on a run folder, so that only one process writes to it.

The operating system releases the lock when the process ends, even after SIGKILL. On Linux and macOS
`current_path` follows the folder when it is renamed or moved.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"
F_GETPATH = 50  # from fcntl.h of macOS
# The errors of file systems that do not support locks.
NO_LOCK_SUPPORT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
MAX_COMMAND_CHARS = 500
# `lock_holder` holds the lock for an instant, which must not make another process fail.
TRIES, RETRY_SECONDS = 5, 0.02


class FolderLock:
    """An exclusive lock on a folder, held until `release`."""

    def __init__(self, folder: Path) -> None:
        """Lock an existing folder. Raises ValueError naming the process that has locked it already."""
        self.folder = folder
        self.file: IO[str] | None = None
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8", newline="\n")
        try:
            tries = 1
            while not _try_lock(file):
                if tries == TRIES:
                    raise ValueError(in_use_message(folder, _read_holder(file)))
                tries += 1
                time.sleep(RETRY_SECONDS)
            file.truncate(0)
            holder = {"host": socket.gethostname(), "process": os.getpid(), "command": _command_line()}
            file.write(json.dumps(holder))
            file.flush()
            # the folder stays open too: its descriptor still refers to it after a rename
            self.descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
        except BaseException:
            file.close()
            raise
        self.file = file

    def current_path(self) -> Path | None:
        """The path of the folder now, which differs after a rename.

        None if the folder was deleted, or if the system does not report its path. On Windows always the
        original path.
        """
        if self.descriptor is None or _is_same_folder(self.folder, self.descriptor):
            return self.folder
        path = _descriptor_path(self.descriptor)
        return path if path is not None and _is_same_folder(path, self.descriptor) else None

    def release(self) -> None:
        """Release the lock. Can be called again."""
        if self.file is not None:
            # closing releases the lock, even if it raises: a network drive may be gone
            with contextlib.suppress(OSError), self.file:
                self.file.truncate(0)  # the next process that locks it is no longer this one
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.file = self.descriptor = None


def lock_holder(folder: Path) -> str | None:
    """A description of the process that holds the lock of a folder; None if it is not locked.

    Also None if that cannot be determined: the folder is not writable, or its file system has no locks.
    """
    try:
        with (folder / LOCK_FILE).open("r+", encoding="utf-8", newline="\n") as file:
            return None if _try_lock(file) else _read_holder(file)
    except OSError:  # no lock file: never locked
        return None


def in_use_message(folder: Path, holder: str) -> str:
    """The error message for a folder that `holder` has locked."""
    return (
        f"out_dir={folder} is in use by {holder}: two runs in one folder would overwrite each other's files. "
        "Wait for it, stop it (Ctrl-C or SIGTERM: it saves a checkpoint), or choose another --out_dir"
    )


def _try_lock(file: IO[str]) -> bool:
    """Lock an open file until it is closed. Returns False if another process has locked it.

    On a file system without locks it returns True: a run there is not protected, but possible.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # far past the text: on Windows other processes cannot read a locked byte
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
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just writing it, or it is damaged
        return "another process"


def _command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:MAX_COMMAND_CHARS]


def _is_same_folder(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _descriptor_path(descriptor: int) -> Path | None:
    """The path of an open folder; None where the system does not report it."""
    try:
        if sys.platform == "darwin":
            import fcntl

            return Path(os.fsdecode(fcntl.fcntl(descriptor, F_GETPATH, bytes(1024)).rstrip(b"\0")))
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:
        return None
