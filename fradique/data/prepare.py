"""The command line of every data/<corpus>/prepare.py: flags, messages, exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fradique.data import documents
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import DocumentJob, Job, TextJob
from fradique.data.shard_progress import ShardCount, check_finished
from fradique.data.text import Text, files_text, find_files

HUB_SOURCE = "the Hugging Face hub"  # in meta.json
MAX_LISTED_FILES = 30  # in the source that meta.json names


@dataclass(frozen=True)
class CorpusSpec:
    """What a corpus is made from. Without `text` and `documents`, --input is required."""

    folder: Path  # data/<corpus>, which contains its prepare.py
    description: str  # for --help: the docstring of its prepare.py
    tokenizer: str  # char | gpt2 | bpe:SIZE
    next_command: str  # the command that trains on it; {name} is the folder name of the corpus
    text: Callable[[Path], Text] | None = None  # called with `folder`, where downloads are kept
    documents: Callable[[], Iterator[Iterable[str]]] | None = None
    document_files: Callable[[], Sequence[documents.HubFile]] | None = None  # the same, for --shards

    @property
    def is_custom(self) -> bool:
        """Whether the text, the tokenizer and the name are the user's."""
        return self.text is None and self.documents is None


def main(spec: CorpusSpec, argv: Sequence[str] | None = None) -> int:
    """Prepare a corpus according to the command line, and return the exit status.

    0: the corpus, or this worker's part of it, is finished. 2: a mistake of the user, with a message on
    standard error. 130, 143, 129: stopped by Ctrl-C, SIGTERM, SIGHUP. If the preparation does not finish, it
    leaves no partial files; with --shards, it keeps the finished shards.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _make_parser(spec).parse_args(argv)
    try:
        with _handle_signals():
            out_dir = _choose_out_dir(spec, args)
            if args.shards is None:
                print(_format_result(spec, out_dir, _prepare(spec, args, out_dir)))
            else:
                worker = Worker() if args.worker is None else Worker.parse(args.worker)
                result = prepare_shards(_make_job(spec, args), out_dir, worker)
                if isinstance(result, ShardCount):
                    print(_format_progress(spec, out_dir, result, argv))
                else:
                    print(_format_result(spec, out_dir, result))
    except (KeyboardInterrupt, SystemExit) as stop:
        message = "finished shards are kept; run the same command to continue"
        if args.shards is None:
            message = "no partial files are left"
        print(f"stopped: {message}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(str(stop.code))
    except (ValueError, OSError, ImportError) as error:
        if args.debug == "True":
            raise
        print(f"error: {_format_error(error)}", file=sys.stderr)
        return 2
    return 0


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the text to the terminal, but not within a word, a path or a flag.

    An indented line of the description is a command; if it is too long, it is continued after a backslash.
    """

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [
            " \\\n".join(_wrap(line, width - 2, " " * 8))
            if line.startswith(" ")
            else "\n".join(self._split_lines(line, width))
            for line in re.sub(r"(?<=\S)\n(?=\S)", " ", text).split("\n")
        ]
        return "\n".join(paragraphs)


def _wrap(text: str, width: int, next_indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=next_indent, break_long_words=False, break_on_hyphens=False
    )


def _make_parser(spec: CorpusSpec) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=spec.description.strip(), formatter_class=_HelpFormatter, allow_abbrev=False
    )
    _add_source_flags(parser, spec)
    _add_shard_flags(parser)
    parser.add_argument(
        "--debug",
        nargs="?",
        choices=("True", "False"),
        const="True",
        default="False",
        help="show the traceback of an error",
    )
    return parser


def _add_source_flags(parser: argparse.ArgumentParser, spec: CorpusSpec) -> None:
    """Flags for the text, its tokenizer, its splits and the folder of the corpus."""
    add = parser.add_argument
    endings = ", ".join(documents.ENDINGS) if spec.documents else ".txt"
    suffix = "" if spec.is_custom else ", instead of the usual source"
    add(
        "--input",
        nargs="+",
        action="extend",
        type=Path,
        metavar="PATH",
        required=spec.is_custom,
        help=f"files, or folders whose {endings} files are used, at any depth, sorted by name{suffix}",
    )
    if spec.is_custom:
        add("--tokenizer", default=spec.tokenizer, help="char, gpt2, or bpe:SIZE (default: %(default)s)")
        add("--name", help="make the corpus in data/NAME (default: data/custom)")
    add(
        "--val_fraction",
        type=float,
        default=0.0005 if spec.documents else 0.1,
        metavar="F",
        help="fraction that is held out for validation (default: %(default)s)",
    )
    if spec.documents:
        add("--max_documents", type=int, metavar="N", help="use only the first N documents, for a trial")
    add(
        "--out_dir",
        type=Path,
        metavar="DIR",
        help="folder of the corpus (default: the folder of prepare.py)",
    )


def _add_shard_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write the training split as N files, train_00000.bin and so on; the same command makes only "
        "the missing files",
    )
    parser.add_argument(
        "--worker",
        metavar="I/N",
        help="with --shards: make only the shards k with k mod N = I, for an I from 0 to N-1. Other workers "
        "make the rest, at any time, on any machine that shares the folder; the files do not depend on the "
        "number of workers",
    )


def _choose_out_dir(spec: CorpusSpec, args: argparse.Namespace) -> Path:
    """The folder that --name or --out_dir asks for. Raises ValueError if it cannot be used."""
    name = getattr(args, "name", None)
    if name is None:
        return args.out_dir or spec.folder
    if args.out_dir:
        raise ValueError("--name and --out_dir both set the folder of the corpus: use only one of them")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name.endswith("."):
        raise ValueError(f"--name {name!r} is not a plain folder name: use letters, digits, _ and -")
    folder = spec.folder.parent / name
    if (folder / "prepare.py").exists():
        raise ValueError(f"--name {name}: {folder} has its own prepare.py: choose another name")
    return folder


def _prepare(spec: CorpusSpec, args: argparse.Namespace, out_dir: Path) -> dict[str, Any]:
    """Make the whole corpus in this process, and return its meta.json."""
    if args.worker is not None:
        raise ValueError("--worker makes some of the shards: also give --shards, the same for all workers")
    check_finished(out_dir)
    if spec.documents is None:
        return prepare_text(_open_text(spec, args), out_dir, _tokenizer(spec, args), args.val_fraction)
    _check_max_documents(args)
    if args.input:
        files = find_files(args.input, documents.ENDINGS)
        source, stream = _describe_files(files), documents.local_documents(files)
    else:
        source, stream = HUB_SOURCE, spec.documents()
    return prepare_documents(stream, source, out_dir, spec.tokenizer, args.val_fraction, args.max_documents)


def _make_job(spec: CorpusSpec, args: argparse.Namespace) -> Job:
    """The job that --shards divides among workers."""
    if spec.documents is None:
        return TextJob(_open_text(spec, args), _tokenizer(spec, args), args.val_fraction, args.shards)
    _check_max_documents(args)
    if args.input:
        files: Sequence[Path | documents.HubFile] = find_files(args.input, documents.ENDINGS)
        source = _describe_files(files)
    elif spec.document_files is not None:
        source, files = HUB_SOURCE, spec.document_files()
    else:
        raise ValueError("--shards needs files whose documents can be counted: use --input")
    return DocumentJob(files, source, spec.tokenizer, args.val_fraction, args.shards, args.max_documents)


def _tokenizer(spec: CorpusSpec, args: argparse.Namespace) -> str:
    return getattr(args, "tokenizer", spec.tokenizer)


def _check_max_documents(args: argparse.Namespace) -> None:
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max_documents is {args.max_documents}, and must be at least 1")


def _open_text(spec: CorpusSpec, args: argparse.Namespace) -> Text:
    if args.input:
        files = find_files(args.input)
        return files_text(files, _describe_files(files))
    assert spec.text is not None  # a custom corpus requires --input
    return spec.text(spec.folder)


def _describe_files(files: Sequence[Path]) -> str:
    """The source in meta.json: file names without folders, which may differ between machines."""
    if len(files) > MAX_LISTED_FILES:
        return f"{files[0].name} ... {files[-1].name} ({len(files)} files)"
    return ", ".join(path.name for path in files)


def _format_result(spec: CorpusSpec, out_dir: Path, meta: dict[str, Any]) -> str:
    """A summary of a finished corpus and the command that trains on it."""
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    first, *_, last = [shard["file"] for shard in train["shards"] * 2]
    train_files = first if first == last else f"{first} to {last}"
    return (
        f"{out_dir.resolve().name}: {train['tokens']:,} training tokens and {val['tokens']:,} validation "
        f"tokens from {(train['bytes'] + val['bytes']) / 1e6:.2f} MB of text; vocabulary of "
        f"{meta['vocab_size']:,} ({meta['tokenizer']})\n"
        f"written to {_relative(out_dir)}: {train_files}, val.bin, tokenizer.json, meta.json\n"
        f"next: {_training_command(spec, out_dir)}"
    )


def _training_command(spec: CorpusSpec, out_dir: Path) -> str:
    """`next_command` with the flags that name the folder, if it is not the usual one."""
    folder = out_dir.resolve()
    command = spec.next_command.format(name=_quote(folder.name))
    if folder != spec.folder.resolve() and "{name}" not in spec.next_command:
        command += f" --dataset={_quote(folder.name)}"
    if folder.parent != spec.folder.resolve().parent:
        command += f" --data_dir={_quote(str(folder.parent))}"
    return command


def _format_progress(spec: CorpusSpec, out_dir: Path, count: ShardCount, argv: Sequence[str]) -> str:
    """The progress of an unfinished corpus and the command that makes the remaining shards."""
    script = str(_relative(spec.folder / "prepare.py"))
    words = [
        word
        for previous, word in zip(["", *argv], argv, strict=False)
        if previous != "--worker" and word != "--worker" and not word.startswith("--worker=")
    ]
    return (
        f"{out_dir.resolve().name}: this worker's shards are finished; {count.done} of {count.total} shards "
        "are finished in all\n"
        "The worker that finishes the last shard completes the corpus. If no other worker is running:\n"
        f"next: python {' '.join(map(_quote, [script, *words]))}"
    )


def _quote(word: str) -> str:
    """`word` quoted for a shell if necessary. Unlike shlex.quote, accented letters need no quotes."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else shlex.quote(word)


def _relative(path: Path) -> Path:
    """`path` relative to the current folder, if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _format_error(error: Exception) -> str:
    """The message of an error, without Python's error numbers and class names."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    path = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{path}the disk is full. Free some space, or choose another folder with --out_dir"
    return f"{path}{error.strerror}"


@contextlib.contextmanager
def _handle_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP (a closed terminal) raise SystemExit, so that they clean up as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may set handlers
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
