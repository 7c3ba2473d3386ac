"""The command line of every data/<corpus>/prepare.py: flags, messages, exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
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
from fradique.data.console import print_note
from fradique.data.input_files import find_files
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import DocumentJob, Job, TextJob
from fradique.data.shard_progress import ShardCount, check_no_unfinished_shards
from fradique.data.splits import VAL_SPLITS
from fradique.data.text import Text, files_text
from fradique.data.token_files import TokenFiles
from fradique.data.train_command import complete_command
from fradique.io.terminal import (
    command_output,
    is_closed_pipe,
    path_argument,
    quote,
    relative_path,
    shell_command,
)
from fradique.tokenizer.bpe import END_OF_TEXT
from fradique.tokenizer.tokenizer import check_separator

HUB_SOURCE = "the Hugging Face hub"  # "source" in the meta.json of a corpus from the hub
AUTO_COMMAND = "python train.py config/auto.py --dataset={name} --out_dir=out/{name}"
NO_SEPARATOR = "none"  # as --document_separator: all text is ordinary
MIN_BPE_VOCAB, MAX_BPE_VOCAB = 512, 4096  # with --tokenizer auto
OS_ERRORS = {  # errno -> the reason and what to do
    errno.ENOSPC: "the disk is full. Free some space, or choose another folder with --out_dir",
    errno.EROFS: "this disk cannot be written to. Choose another folder with --out_dir",
    errno.EACCES: "you have no permission. Change it with chmod (on Windows: close the programs that have it "
    "open), or choose other paths: --input, --out_dir",
    errno.EEXIST: "this is a file, not a folder. Choose another folder with --out_dir",
    errno.ENOTDIR: "a part of this path is a file, not a folder. Choose another folder with --out_dir",
}
MAX_LISTED_FILES = 30  # of more files, "source" names the first and the last


@dataclass(frozen=True)
class CorpusSpec:
    """What a corpus is made from. Without `text` and `documents`, --input is required."""

    folder: Path  # data/<corpus>, which contains its prepare.py
    description: str  # for --help: the docstring of its prepare.py
    tokenizer: str  # char | gpt2 | bpe:SIZE
    # the command that trains on it on any machine; {name} is the folder name of the corpus
    next_command: str = AUTO_COMMAND
    text: Callable[[Path], Text] | None = None  # called with `folder`, where downloads are kept
    documents: Callable[[], Iterator[Iterable[str]]] | None = None  # streams them, for a run without --shards
    # the files that contain these documents; --shards needs them, to count and divide the documents
    document_files: Callable[[], Sequence[documents.HubFile]] | None = None
    gpu_command: str | None = None  # the command for the largest config of this corpus, which wants a GPU
    val_split: str = "tail"  # the default of --val_split, for a text
    val_fraction: float = 0.1  # the default of --val_fraction

    @property
    def is_custom(self) -> bool:
        """Whether this is data/custom: the user chooses the text, the tokenizer and the name."""
        return self.text is None and self.documents is None


@command_output()
def main(spec: CorpusSpec, argv: Sequence[str] | None = None) -> int:
    """Prepare a corpus according to the command line, and return the exit status.

    0: the corpus, or this worker's part of it, is finished. 2: an error, reported on standard error. 130,
    143, 129: stopped by Ctrl-C, SIGTERM, SIGHUP. If the preparation does not finish, it leaves no partial
    files; with --shards, it keeps the finished shards.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _make_parser(spec).parse_args(argv)
    try:
        with _handle_signals():
            summary = _run(spec, args, argv)
    except (KeyboardInterrupt, SystemExit) as stop:
        message = "finished shards are kept; run the same command to continue"
        if args.shards is None:
            message = "no partial files are left"
        print(f"stopped: {message}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except (ValueError, OSError, ImportError) as error:
        if args.debug == "True" or is_closed_pipe(error):  # the latter is handled by `command_output`
            raise
        print(f"error: {_format_error(error)}", file=sys.stderr)
        return 2
    try:
        print(summary)
    except OSError as error:  # what is done stays done
        if is_closed_pipe(error):
            raise
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _run(spec: CorpusSpec, args: argparse.Namespace, argv: Sequence[str]) -> str:
    """Prepare the corpus, or this worker's part of it. Returns what to print about it."""
    out_dir = _choose_out_dir(spec, args)
    if args.shards is None:
        meta = _prepare(spec, args, out_dir)
    else:
        worker = Worker() if args.worker is None else Worker.parse(args.worker)
        meta = prepare_shards(_make_job(spec, args), out_dir, worker)
        if isinstance(meta, ShardCount):  # other workers have not finished theirs
            return _format_progress(spec, out_dir, meta, argv)
    if getattr(args, "document_separator", None) is not None and spec.documents is None:
        _note_unused_separator(out_dir, meta)
    return _format_result(spec, out_dir, meta)


def _note_unused_separator(out_dir: Path, meta: dict[str, Any]) -> None:
    """Print a note if a separator was given and no text of the corpus has it."""
    separator, end_of_text = meta["document_separator"], meta["vocab_size"] - 1  # its id is the last one
    if separator is None:
        return
    paths = [out_dir / shard["file"] for split in meta["splits"].values() for shard in split["shards"]]
    files = TokenFiles(paths, meta["dtype"])
    if not any((chunk == end_of_text).any() for i in range(len(files)) for chunk in files.chunks(i)):
        print_note(f"--document_separator: the text has no {separator!r}; is it spelt in another way there?")


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the text to the terminal, but not within a word, a path or a flag.

    An indented line of the description is a shell command; a long one is split with a backslash.
    """

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [
            " \\\n".join(_wrap(line, width - 2, next_indent=" " * 8))  # 2: the space and the backslash
            if line.startswith(" ")
            else "\n".join(self._split_lines(line, width))
            for line in re.sub(r"(?<=\S)\n(?=\S)", " ", text).split("\n")  # joins the lines of a paragraph
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
    parser.add_argument(  # --debug, --debug=True or --debug=False, as in train.py
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
    extensions = ", ".join(documents.ENDINGS) if spec.documents else ".txt"
    note = "" if spec.is_custom else ", instead of the default source"
    add(
        "--input",
        nargs="+",
        action="extend",
        type=path_argument,
        metavar="PATH",
        required=spec.is_custom,
        help=f"files, or folders to search for {extensions} files at any depth, sorted by name{note}",
    )
    if spec.is_custom:
        add(
            "--tokenizer",
            default=spec.tokenizer,
            help="char, gpt2, bpe:SIZE, or auto: bpe of a SIZE that suits the "
            "length of the text, or char if it is short (default: %(default)s)",
        )
        add("--name", help="make the corpus in data/NAME (default: data/custom)")
    add(
        "--val_fraction",
        type=float,
        default=spec.val_fraction,
        metavar="F",
        help="fraction of the text held out for validation (default: %(default)s)",
    )
    if spec.documents:
        add("--max_documents", type=int, metavar="N", help="use only the first N documents, for a trial")
    else:
        add(
            "--val_split",
            choices=VAL_SPLITS,
            default=spec.val_split,
            help="where the validation text is taken from. tail: the end of the text; blocks: pieces spread "
            "evenly over the text, cut at line ends, for a text whose end is of another kind than the rest, "
            "such as a glossary (default: %(default)s)",
        )
    if spec.is_custom or spec.tokenizer != "char":
        add(
            "--document_separator",
            metavar="TEXT",
            help=f"with gpt2 and bpe: the text between documents, which becomes the token {END_OF_TEXT}, in "
            f"this corpus and in the prompts of the models that it trains; {NO_SEPARATOR}: no text does "
            f"(default: {END_OF_TEXT})",
        )
    add(
        "--out_dir",
        type=path_argument,
        metavar="DIR",
        help="folder of the corpus (default: the folder of prepare.py)",
    )


def _add_shard_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write the training split as N files, train_00000.bin and so on; run the same command again to "
        "continue, existing shards are kept",
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
        folder = args.out_dir or spec.folder
        try:
            str(folder.absolute()).encode("utf-8")
        except UnicodeEncodeError:  # train.py writes the path to settings.json
            raise ValueError(
                f"--out_dir {folder}: the name is not UTF-8, so train.py cannot use it: choose another name"
            ) from None
        return folder
    if args.out_dir:
        raise ValueError("--name and --out_dir both set the folder of the corpus: use only one of them")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name.endswith("."):
        raise ValueError(f"--name {name!r} is not a plain folder name: use letters, digits, _, - and .")
    folder = spec.folder.parent / name
    if (folder / "prepare.py").exists():
        raise ValueError(f"--name {name}: {folder} has its own prepare.py: choose another name")
    return folder


def _prepare(spec: CorpusSpec, args: argparse.Namespace, out_dir: Path) -> dict[str, Any]:
    """Make the whole corpus in this process, and return its meta.json."""
    if args.worker is not None:
        raise ValueError("--worker needs --shards, with the same number for all workers")
    check_no_unfinished_shards(out_dir)
    if spec.documents is None:
        text = _open_text(spec, args)
        tokenizer = _tokenizer(spec, args, text.size)
        separator = _document_separator(args, tokenizer)
        return prepare_text(text, out_dir, tokenizer, args.val_fraction, args.val_split, separator)
    _check_max_documents(args)
    separator = _document_separator(args, spec.tokenizer)
    if args.input:
        files = find_files(args.input, documents.ENDINGS)
        source, stream = _describe_files(files), documents.local_documents(files)
    else:
        source, stream = HUB_SOURCE, spec.documents()
    return prepare_documents(
        stream, source, out_dir, spec.tokenizer, args.val_fraction, args.max_documents, separator
    )


def _make_job(spec: CorpusSpec, args: argparse.Namespace) -> Job:
    """The job that --shards divides among workers."""
    if spec.documents is None:
        text = _open_text(spec, args)
        tokenizer = _tokenizer(spec, args, text.size)
        separator = _document_separator(args, tokenizer)
        return TextJob(text, tokenizer, args.val_fraction, args.shards, args.val_split, separator)
    _check_max_documents(args)
    separator = _document_separator(args, spec.tokenizer)
    if args.input:
        files: Sequence[Path | documents.HubFile] = find_files(args.input, documents.ENDINGS)
        source = _describe_files(files)
    elif spec.document_files is not None:
        source, files = HUB_SOURCE, spec.document_files()
    else:
        raise ValueError(
            "this corpus cannot be made in shards from its default source: give files with --input"
        )
    return DocumentJob(
        files, source, spec.tokenizer, args.val_fraction, args.shards, args.max_documents, separator
    )


def _tokenizer(spec: CorpusSpec, args: argparse.Namespace, text_bytes: int) -> str:
    """The tokenizer that is asked for. auto: chosen by the size of the text."""
    name = getattr(args, "tokenizer", spec.tokenizer)  # only data/custom has --tokenizer
    return automatic_tokenizer(text_bytes) if name == "auto" else name


def automatic_tokenizer(text_bytes: int) -> str:
    """BPE with about a token for each kilobyte of text, 512 to 4,096; characters for a shorter text."""
    size = 1 << max(0, (text_bytes // 1000).bit_length() - 1)  # the power of two below
    return "char" if size < MIN_BPE_VOCAB // 2 else f"bpe:{min(max(size, MIN_BPE_VOCAB), MAX_BPE_VOCAB)}"


def _document_separator(args: argparse.Namespace, tokenizer: str) -> str | None:
    """The text that becomes <|endoftext|>; None if no text does. Raises ValueError for an unusable one."""
    text = getattr(args, "document_separator", None)
    if text is None:
        return END_OF_TEXT
    if tokenizer == "char":
        raise ValueError(
            "--document_separator: the vocabulary of a character corpus has no token that ends a document. "
            "Leave it out, or use --tokenizer gpt2 or bpe:SIZE"
        )
    if text == NO_SEPARATOR:
        return None
    check_separator(text)
    return text


def _check_max_documents(args: argparse.Namespace) -> None:
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max_documents must be at least 1, not {args.max_documents}")


def _open_text(spec: CorpusSpec, args: argparse.Namespace) -> Text:
    if args.input:
        files = find_files(args.input)
        return files_text(files, _describe_files(files))
    assert spec.text is not None  # a custom corpus requires --input
    return spec.text(spec.folder)


def _describe_files(files: Sequence[Path]) -> str:
    """The source in meta.json: only file names, because folders may differ between machines."""
    # a name may contain bytes that are not UTF-8, which JSON cannot hold
    names = [path.name.encode("utf-8", "backslashreplace").decode("utf-8") for path in files]
    if len(names) > MAX_LISTED_FILES:
        return f"{names[0]} ... {names[-1]} ({len(names)} files)"
    return ", ".join(names)


def _format_result(spec: CorpusSpec, out_dir: Path, meta: dict[str, Any]) -> str:
    """A summary of a finished corpus and the command that trains on it."""
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    names = [shard["file"] for shard in train["shards"]]
    has_gpu_command = spec.gpu_command is not None and _is_default(spec, out_dir)
    train_files = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return (
        f"{out_dir.resolve().name}: {train['tokens']:,} training tokens and {val['tokens']:,} validation "
        f"tokens from {(train['bytes'] + val['bytes']) / 1e6:.2f} MB of text; vocabulary of "
        f"{meta['vocab_size']:,} ({meta['tokenizer']})\n"
        f"written to {relative_path(out_dir)}: {train_files}, val.bin, tokenizer.json, meta.json\n"
        f"next: {_training_command(spec, out_dir, meta)}"
        + (f"\non a GPU: {complete_command(spec.gpu_command, meta)}" if has_gpu_command else "")
    )


def _training_command(spec: CorpusSpec, out_dir: Path, meta: dict[str, Any]) -> str:
    """The command that trains on the corpus: with a config of its own only if it is in its default folder."""
    folder = out_dir.resolve()
    command = spec.next_command if _is_default(spec, folder) else AUTO_COMMAND
    command = complete_command(command, meta).replace("{name}", quote(folder.name))
    if folder.parent != spec.folder.resolve().parent:
        command += f" --data_dir={quote(str(folder.parent))}"
    return command


def _is_default(spec: CorpusSpec, out_dir: Path) -> bool:
    return out_dir.resolve() == spec.folder.resolve()


def _format_progress(spec: CorpusSpec, out_dir: Path, count: ShardCount, argv: Sequence[str]) -> str:
    """The progress of an unfinished corpus, and the command that makes all remaining shards."""
    arguments = [  # without --worker I/N
        argument
        for previous, argument in zip(["", *argv], argv, strict=False)
        if previous != "--worker" and argument != "--worker" and not argument.startswith("--worker=")
    ]
    return (
        f"{out_dir.resolve().name}: this worker's shards are finished; {count.done} of {count.total} shards "
        "are finished in total\n"
        "The worker that finishes the last shard completes the corpus. If no other worker is running, make "
        "the remaining shards with:\n"
        f"next: {shell_command(spec.folder / 'prepare.py', *arguments)}"
    )


def _format_error(error: Exception) -> str:
    """The text to show for an error; for an OSError "path: reason", without the error number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    path = f"{error.filename}: " if error.filename else ""
    if error.errno in OS_ERRORS:
        return f"{path}{OS_ERRORS[error.errno]}"
    return f"{path}{error.strerror}"


@contextlib.contextmanager
def _handle_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, SIGHUP (closed terminal) and SIGBREAK (Ctrl-Break, only on Windows).

    So temporary files are removed, as after Ctrl-C.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled in numbers:  # a second signal must not interrupt the cleanup
            signal.signal(handled, signal.SIG_IGN)
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
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
