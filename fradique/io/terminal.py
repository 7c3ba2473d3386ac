"""The command line: paths in flags, wrapped help texts, standard output that nobody reads."""

import argparse
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

from fradique.io.files import expand_home

MIN_WIDTH, MAX_WIDTH = 60, 100  # columns of a help text


def path_argument(text: str) -> Path:
    """The value of a flag of argparse as a path, with ~ expanded. Raises ArgumentTypeError if it is empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: name a file or folder (is a variable of the shell unset?)")
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def help_width() -> int:
    """The width of a help text in columns: that of the terminal, from MIN_WIDTH to MAX_WIDTH."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


def wrap(text: str, width: int, indent: int = 0) -> str:
    """`text` as indented lines of at most `width` columns; words and `quoted commands` are not broken."""
    text = re.sub("`([^`]*)`", lambda match: match[1].replace(" ", "\u00a0"), text)  # no-break spaces
    text = textwrap.fill(text, width - indent, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(text.replace("\u00a0", " "), " " * indent)


def discard_closed_stdout() -> bool:
    """Whether stdout is a closed pipe (python train.py | head); if so, later output to it is discarded."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports an error at exit
        return True
    return False
