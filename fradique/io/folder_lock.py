"""One run to a folder: a lock that the system lets go when its process ends, however it ends; and the place
of the folder, should somebody move it meanwhile."""

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
F_GETPATH = 50  # fcntl.h of macOS
# What a file system answers that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """A folder that is this process's own until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take `folder`, which is there. Raises ValueError, saying who has it, where another process does."""
        self.folder = folder
        self.file: IO[str] | None = None
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            if not _lock(file):
                raise ValueError(in_use_message(folder, _holder(file)))
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "command": _command()}))
        file.flush()
        self.file = file
        # the folder itself is held open: that is how it is found again
        self.number = os.open(folder, os.O_RDONLY) if os.name == "posix" else None

    def place(self) -> Path | None:
        """Where the folder is now; None where it is nowhere any more."""
        if self.number is None or _is(self.folder, self.number):
            return self.folder
        moved = _path_of(self.number)
        return moved if moved is not None and _is(moved, self.number) else None

    def release(self) -> None:
        """Let others have the folder."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk: the lock goes all the same
                self.file.close()
        if self.number is not None:
            os.close(self.number)
        self.file = self.number = None


def lock_holder(folder: Path) -> str | None:
    """Who has a folder: None where nobody does."""
    try:
        with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
            return None if _lock(file) else _holder(file)
    except OSError:  # none there, or not to be written to: then it is no run's
        return None


def in_use_message(folder: Path, who: str) -> str:
    """What to say of a folder that somebody has."""
    return (
        f"out_dir={folder} is in use by {who}: two runs in one folder would spoil each other. Wait for it, "
        "stop it (Ctrl-C or SIGTERM: it saves), or choose another --out_dir"
    )


def _lock(file: IO[str]) -> bool:
    """Lock an open file for as long as it is open; whether that was possible."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # a byte behind what is written: locked bytes cannot be read there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        about: dict[str, Any] = json.loads(file.read(10_000))
        return f"process {about['process']} on {about['host']} ({about['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and is about to say who it is
        return "another process"


def _command() -> str:
    return " ".join(Path(sys.argv[0]).name if i == 0 else word for i, word in enumerate(sys.argv))[:500]


def _is(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:
        return False


def _path_of(number: int) -> Path | None:
    """The path of an open folder, where the system tells it: Linux and macOS do."""
    try:
        if sys.platform == "darwin":
            import fcntl

            return Path(os.fsdecode(fcntl.fcntl(number, F_GETPATH, bytes(1024)).rstrip(b"\0")))
        return Path(f"/proc/self/fd/{number}").readlink()
    except OSError:
        return None
