"""Make the project believe that it runs on Windows, as far as Linux can simulate it.

Python imports this module at its start if its folder is in PYTHONPATH, in child processes too. The project's
files get modules without what Windows lacks. Libraries get the real modules, but for every file, whoever
opens it: an open or mapped file cannot be renamed, replaced or deleted, a folder cannot be opened, a name has
no reserved characters, and text is written in cp1252 and with CRLF unless the caller says otherwise.
"""

# pathlib calls the functions that this file replaces
# ruff: noqa: PTH110, PTH112, PTH115, PTH119, PTH208

import builtins
import ctypes
import errno
import io
import os
import pathlib
import select
import shutil
import signal
import socket
import struct
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = (
    "bench",
    "configurator.py",
    "data",
    "fradique",
    "lab",
    "model.py",
    "reference",
    "sample.py",
    "train.py",
)
MISSING_MODULES = {
    "crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog",
    "termios", "tty", "_posixsubprocess",
}  # fmt: skip
# What the documentation of Python's modules marks as "Availability: Unix", "Linux" or "not Windows".
MISSING_NAMES = {
    "os": """
        O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH
        O_SYNC O_TMPFILE WEXITSTATUS WIFEXITED WIFSIGNALED WNOHANG WTERMSIG chown chroot confstr
        copy_file_range ctermid environb eventfd fchdir fchmod fchown fdatasync fork forkpty fstatvfs fwalk
        get_blocking getegid getenvb geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid
        getuid getxattr killpg lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice
        openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite
        pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile set_blocking
        setgid setpgid setpriority setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp ttyname
        uname wait wait3 wait4 waitid writev
    """,
    "select": "epoll poll kqueue EPOLLIN POLLIN",
    "signal": """
        SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGTTIN
        SIGTTOU SIGUSR1 SIGUSR2 SIGWINCH SIG_BLOCK SIG_UNBLOCK alarm getitimer pause pthread_kill
        pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait
    """,
    "socket": "AF_UNIX AF_NETLINK SO_REUSEPORT MSG_DONTWAIT sethostname",
    "sys": "getdlopenflags setdlopenflags abiflags",
    "time": "clock_gettime clock_settime clock_getres pthread_getcpuclockid tzset CLOCK_MONOTONIC",
}  # fmt: skip
SIGBREAK = getattr(signal, "SIGUSR1", 0)  # on Windows 21, which would stop a process on Linux
HANDLED_SIGNALS = {
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGINT,
    signal.SIGSEGV,
    signal.SIGTERM,
    SIGBREAK,
}
ERROR_SHARING_VIOLATION = "The process cannot access the file because it is being used by another process"
real_import, real_open, real_os_open, real_cdll = builtins.__import__, io.open, os.open, ctypes.CDLL
real_rename, real_replace, real_unlink, real_rmdir, real_mkdir = (
    os.rename,
    os.replace,
    os.unlink,
    os.rmdir,
    os.mkdir,
)


# Modules, for the files of the project


class WindowsModule(types.ModuleType):
    """A module as it is on Windows: without some names, and with other values for some."""

    def __init__(self, real: types.ModuleType, missing: set[str], values: dict[str, object]) -> None:
        super().__init__(real.__name__)
        vars(self).update(_real=real, _missing=missing, _values=values)

    def __getattr__(self, name: str) -> object:
        if name in self._missing:
            raise AttributeError(f"Windows has no {self.__name__}.{name}")
        return self._values[name] if name in self._values else getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


def set_signal(number: int, handler: object) -> object:
    if number not in HANDLED_SIGNALS:
        raise ValueError(f"Windows has no handler for signal {number}")
    return signal.signal(number, handler)


def load_library(name: str | None, *arguments: object, **options: object) -> ctypes.CDLL:
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return real_cdll(name, *arguments, **options)


def lock_bytes(descriptor: int, mode: int, count: int) -> None:
    """msvcrt.locking: a lock of the open file, which another handle of the same process does not have."""
    import fcntl

    assert mode == MSVCRT["LK_NBLCK"]
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        fcntl.fcntl(descriptor, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, count, 0))
    except OSError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


MSVCRT = {"LK_LOCK": 1, "LK_NBLCK": 2, "LK_UNLCK": 0, "locking": lock_bytes}
VALUES = {
    "ctypes": {"CDLL": load_library},
    "msvcrt": MSVCRT,
    "os": {"name": "nt", "linesep": "\r\n", "O_BINARY": 0},
    "signal": {"SIGBREAK": SIGBREAK, "signal": set_signal},
    "sys": {"platform": "win32"},
}
MODULES = {
    module.__name__: WindowsModule(
        module, set(MISSING_NAMES.get(module.__name__, "").split()), VALUES.get(module.__name__, {})
    )
    for module in (ctypes, os, select, signal, socket, sys, time, types.ModuleType("msvcrt"))
}


def is_product(caller: dict[str, object] | None, known: dict[str, bool] = {}) -> bool:  # noqa: B006
    """Whether code with these globals is in a file of the project."""
    path = str((caller or {}).get("__file__") or "")
    if path not in known:
        resolved = Path(os.path.realpath(path))
        parts = resolved.relative_to(ROOT).parts if path and resolved.is_relative_to(ROOT) else ("",)
        known[path] = parts[0] in PRODUCT
    return known[path]


def windows_import(name, globals=None, locals=None, fromlist=(), level=0):
    if is_product(globals):
        if name.split(".")[0] in MISSING_MODULES:
            raise ModuleNotFoundError(f"Windows has no module named {name!r}", name=name)
        if name in MODULES:
            return MODULES[name]
    return real_import(name, globals, locals, fromlist, level)


# Files, for all code


def used_files(mapped: bool = True) -> set[str]:
    """The paths of the files and folders that this process has open, or mapped into its memory."""
    paths = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            paths.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # the one of this listing
            continue
    return paths | mapped_files() if mapped else paths


def mapped_files() -> set[str]:
    if not os.path.exists("/proc/self/maps"):  # test_line_ends.py uses `windows_open` on macOS too
        return set()
    with real_open("/proc/self/maps", encoding="utf-8") as file:
        return {line.rstrip("\n").split(" ", 5)[5].strip() for line in file if line.count(" ") >= 5}


def check_unused(path: object) -> None:
    """Raise PermissionError for an open or mapped file, and for a folder that contains one."""
    target = os.path.realpath(os.fsdecode(path))
    for used in used_files():
        if used == target or used.startswith(target + os.sep):
            raise PermissionError(errno.EACCES, f"{ERROR_SHARING_VIOLATION}: {used}", os.fsdecode(path))


def check_name(path: object) -> None:
    """Raise OSError for a new file or folder whose name Windows does not allow."""
    name = os.path.basename(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
    stem = name.split(".")[0].strip().lower()
    reserved = stem in ("con", "prn", "aux", "nul") or (stem[:3] in ("com", "lpt") and stem[3:].isdigit())
    if (
        reserved
        or any(char in '<>:"|?*\\' or char < " " for char in name)
        or (name[-1:] in ". " and name.strip("."))
    ):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", name)


def rename(source, target, **options):
    check_unused(source)
    check_name(target)
    if os.path.lexists(target):
        raise FileExistsError(
            errno.EEXIST, "Cannot create a file when that file already exists", os.fsdecode(target)
        )
    real_rename(source, target, **options)


def replace(source, target, **options):
    check_unused(source)
    check_name(target)
    if os.path.isdir(target):
        raise PermissionError(errno.EACCES, "Access is denied", os.fsdecode(target))
    check_unused(target)
    real_replace(source, target, **options)


def unlink(path, **options):
    check_unused(path)
    real_unlink(path, **options)


def rmdir(path, **options):
    check_unused(path)
    real_rmdir(path, **options)


def mkdir(path, *arguments, **options):
    check_name(path)
    real_mkdir(path, *arguments, **options)


def os_open(path, flags, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
    if flags & os.O_CREAT:
        check_name(path)
    return real_os_open(path, flags, *arguments, **options)


def windows_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **options):
    """Text that is written without `newline` gets CRLF, and the default encoding is cp1252, as on Windows."""
    if "b" not in mode:
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        newline = "\r\n" if newline is None and any(letter in mode for letter in "wax") else newline
    if not isinstance(file, int) and any(letter in mode for letter in "wax"):
        check_name(file)
        if "w" in mode and os.path.realpath(os.fsdecode(file)) in mapped_files():
            raise OSError(errno.EINVAL, "Invalid argument", os.fsdecode(file))
    return real_open(file, mode, buffering, encoding, errors, newline, *rest, **options)


class OutputFile(io.FileIO):
    """A standard stream, whose error for a closed pipe is that of Windows."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise OSError(errno.EINVAL, "Invalid argument") from None


class Console(io.TextIOWrapper):
    """A console of Windows, as far as Python can tell."""

    def isatty(self) -> bool:
        return True


def open_stream(number: int, errors: str) -> io.TextIOWrapper:
    kind = Console if os.environ.get("SIMULATED_CONSOLE") else io.TextIOWrapper
    file = io.BufferedWriter(OutputFile(number, "w", closefd=False))
    return kind(file, "cp1252", errors, "\r\n", line_buffering=errors == "backslashreplace")


def simulate() -> None:
    os.rename, os.replace, os.rmdir, os.mkdir, os.open = rename, replace, rmdir, mkdir, os_open
    os.unlink = os.remove = unlink
    io.open = builtins.open = windows_open
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10, which keeps the functions of os
        for function in (rename, replace, rmdir, mkdir, unlink):
            setattr(accessor, function.__name__, staticmethod(function))
        accessor.open = staticmethod(windows_open)
    shutil._use_fd_functions = False
    builtins.__import__ = windows_import
    sys.stdout, sys.stderr = open_stream(1, "strict"), open_stream(2, "backslashreplace")


if __name__ == "sitecustomize":
    simulate()
