"""The command line: the encoding of the output, closed pipes, paths in flags, wrapped help texts."""

import argparse
import codecs
import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from fradique.io.files import PROJECT_FOLDER, expand_home

MIN_WIDTH, MAX_WIDTH = 60, 100  # columns of a help text
ERROR_HANDLER = "fradique.replace"  # the name under which codecs knows the one of `command_output`
SIGPIPE_STATUS = 141  # the exit status of a program that SIGPIPE ended


@contextlib.contextmanager
def command_output() -> Iterator[None]:
    """Around the main function of a command: any text can be printed, whatever the encoding of the console.

    A file or a pipe gets UTF-8, also on Windows. On a terminal, ? stands for each character that its encoding
    lacks, and one note at the end says so. Bytes of a file name that are not UTF-8 are printed as \\udcff. A
    closed stream becomes os.devnull. Exits with the status of `flush_stdout` if stdout cannot be written to.

    It is a decorator too: @command_output() before a `main` that parses its flags with argparse.
    """
    replaced: set[str] = set()  # characters

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        char = error.object[error.start]
        if "\ud800" <= char <= "\udfff":  # no encoding has these
            return char.encode("ascii", "backslashreplace").decode(), error.start + 1
        replaced.add(char)
        return "?", error.start + 1

    codecs.register_error(ERROR_HANDLER, replace)
    for name in ("stdout", "stderr"):
        _configure_stream(name)
    status = 0
    try:
        yield
    except OSError as error:
        # a line more, because a closed pipe is noticed only when something is written to it
        status = flush_stdout("\n") if is_closed_pipe(error) else 0
        if not status:
            raise
    finally:
        status = flush_stdout() or status
        if replaced:
            _print_replacement_note()
        if status:
            sys.exit(status)


def _configure_stream(name: str) -> None:
    """Set encoding and error handler of sys.stdout or sys.stderr."""
    stream = getattr(sys, name)
    if stream is None:  # closed, as by `python train.py >&-`
        stream = open(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    if hasattr(stream, "reconfigure"):  # not in a notebook
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=ERROR_HANDLER)


def _print_replacement_note() -> None:
    terminal = sys.stdout if sys.stdout.isatty() else sys.stderr
    with contextlib.suppress(OSError):
        print(
            f"note: this terminal's encoding ({terminal.encoding}) lacks some characters, shown as ?. To see "
            "them, set PYTHONIOENCODING=utf-8 (on Windows, type chcp 65001 too), or redirect the output to a "
            "file, which is UTF-8",
            file=sys.stderr,
        )


def flush_stdout(probe: str = "") -> int:
    """Write `probe` and all output that is still buffered to stdout. Returns 0, or the status of an error.

    It is SIGPIPE_STATUS if stdout is a closed pipe, as in `python train.py | head`, and 2, after a message,
    if it cannot be written to, for example because the disk is full. Later output is then discarded.
    """
    try:
        print(end=probe, flush=True)
    except OSError as error:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # else Python reports an error at exit
        os.close(devnull)
        if is_closed_pipe(error):
            return SIGPIPE_STATUS
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def is_closed_pipe(error: BaseException) -> bool:
    """Whether `error` was raised by a write to a pipe that nobody reads any more."""
    # Windows reports EINVAL, which it also reports for a bad file name
    is_einval = isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or (os.name == "nt" and is_einval)


def path_argument(text: str) -> Path:
    """The value of a flag of argparse as a path, with ~ expanded. Raises ArgumentTypeError if it is empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: name a file or folder (is a variable of the shell unset?)")
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shell_command(script: str | Path, *arguments: str) -> str:
    """A command that runs a script of the project, such as "train.py", when it is typed in this folder.

    script: an absolute path, or one relative to the folder of the project.

    The arguments are quoted for a shell where necessary.
    """
    return " ".join(
        ["python", quote(relative_path(PROJECT_FOLDER / script).as_posix()), *map(quote, arguments)]
    )


def quote(word: str) -> str:
    """`word` quoted for a shell if necessary. Unlike shlex.quote, it leaves accented letters unquoted.

    Of --key=value only the value is quoted. On Windows by its rules: in double quotes, and a backslash quotes
    only a double quote.
    """
    key, equals, value = word.partition("=")
    if equals and re.fullmatch(r"--\w+", key):
        return f"{key}={quote(value)}" if value else word
    if os.name == "nt":
        if re.fullmatch(r"[\w@+=:./\\-]+", word):
            return word
        escaped = re.sub(r'(\\*)"', r'\1\1\\"', word)
        return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else shlex.quote(word)


def relative_path(path: Path) -> Path:
    """`path` relative to the current folder if it is inside it, else unchanged."""
    try:
        folder = Path.cwd()
    except OSError:  # the current folder was deleted
        return path
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def help_width() -> int:
    """The width of a help text in columns: that of the terminal, from MIN_WIDTH to MAX_WIDTH."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


def wrap(text: str, width: int, indent: int = 0) -> str:
    """`text` as indented lines of at most `width` columns; words and `quoted commands` are not broken."""
    text = re.sub("`([^`]*)`", lambda match: match[1].replace(" ", "\u00a0"), text)  # no-break spaces
    text = textwrap.fill(text, width - indent, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(text.replace("\u00a0", " "), " " * indent)
