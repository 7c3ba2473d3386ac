"""The command line of every data/<corpus>/prepare.py: flags, messages, exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import signal
import sys
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


@dataclass(frozen=True)
class CorpusSpec:
    """What makes a corpus. With neither `text` nor `documents`, it is made of the reader's own --input."""

    folder: Path  # data/<corpus>, where its prepare.py lies
    about: str  # the docstring of its prepare.py
    tokenizer: str  # char | gpt2 | bpe:SIZE
    then: str  # the command to go on with; {name} is the corpus
    text: Callable[[Path], Text] | None = None  # from `folder`, where downloads are kept
    documents: Callable[[], Iterator[Iterable[str]]] | None = None
    document_files: Callable[[], Sequence[documents.HubFile]] | None = None  # the same, for --shards

    @property
    def is_custom(self) -> bool:
        """Whether the text, the tokenizer and the name are the reader's."""
        return self.text is None and self.documents is None


def main(recipe: CorpusSpec, argv: Sequence[str] | None = None) -> int:
    """Prepare a corpus as the command line says, and return the exit status.

    0: the corpus is there. 2: a mistake that the user can mend, told on standard error. 130 and 143: stopped
    by Ctrl-C and by SIGTERM. Whatever happens, nothing half-made stays; with --shards, finished shards do.
    """
    args = _parser(recipe).parse_args(argv)
    try:
        with _handle_signals():
            out_dir = _out_dir(recipe, args)
            if args.shards is None:
                meta: dict[str, Any] | ShardCount = _prepare(recipe, args, out_dir)
            else:
                worker = Worker() if args.worker is None else Worker.parse(args.worker)
                meta = prepare_shards(_job(recipe, args), out_dir, worker)
            _report(recipe, out_dir, meta)
    except (KeyboardInterrupt, SystemExit) as stop:
        shards = "finished shards stay; the same command goes on with the rest"
        print(f"stopped; {'nothing half-made is left' if args.shards is None else shards}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(str(stop.code))
    except (ValueError, OSError, ImportError) as error:
        if args.debug == "True":
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(recipe: CorpusSpec) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=recipe.about.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    kinds = ", ".join(documents.ENDINGS) if recipe.documents else ".txt"
    paths = f"files or folders (their {kinds} files, at any depth, in the order of names)"
    add(
        "--input",
        nargs="+",
        action="extend",
        type=Path,
        metavar="PATH",
        required=recipe.is_custom,
        help=f"your {paths}" if recipe.is_custom else f"{paths} to use instead of the usual source",
    )
    if recipe.is_custom:
        add("--tokenizer", default=recipe.tokenizer, help="char, gpt2, or bpe:SIZE (default: %(default)s)")
        add("--name", help="the corpus is made in data/NAME (default: data/custom)")
    add(
        "--val_fraction",
        type=float,
        default=0.0005 if recipe.documents else 0.1,
        metavar="F",
        help="the part that validates and is never trained on (default: %(default)s)",
    )
    if recipe.documents:
        add("--max_documents", type=int, metavar="N", help="stop after N documents, for a trial")
    add("--out_dir", type=Path, metavar="DIR", help="where to make it (default: the folder of prepare.py)")
    add(
        "--shards",
        type=int,
        metavar="N",
        help="make the training split of N files, train_00000.bin and so on; the same command goes on with "
        "what is missing",
    )
    add(
        "--worker",
        metavar="I/N",
        help="with --shards: make only the shards k with k mod N = I, for an I from 0 to N-1. Others make "
        "the rest, at any time, on any machine that has the folder; the files do not depend on who makes "
        "them",
    )
    truth = {"nargs": "?", "choices": ("True", "False"), "const": "True", "default": "False"}
    add("--debug", **truth, help="show the traceback of an error")
    return parser


def _out_dir(recipe: CorpusSpec, args: argparse.Namespace) -> Path:
    name = getattr(args, "name", None)
    if name is None:
        return args.out_dir or recipe.folder
    if args.out_dir:
        raise ValueError("--name and --out_dir both say where the corpus goes: give one of them")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name.endswith("."):
        raise ValueError(f"--name {name!r} is not a plain folder name: use letters, digits, _ and -")
    folder = recipe.folder.parent / name
    if (folder / "prepare.py").exists():
        raise ValueError(f"--name {name}: {folder} has a prepare.py of its own: choose another name")
    return folder


def _prepare(recipe: CorpusSpec, args: argparse.Namespace, out_dir: Path) -> dict[str, Any]:
    if args.worker is not None:
        raise ValueError("--worker makes a part of the shards: give --shards, too, the same for all workers")
    check_finished(out_dir)
    if recipe.documents is None:
        return prepare_text(_text(recipe, args), out_dir, _tokenizer(recipe, args), args.val_fraction)
    _check_max_documents(args)
    source, stream = "the Hugging Face hub", recipe.documents
    if args.input:
        files = find_files(args.input, documents.ENDINGS)
        source, stream = _names(files), lambda: documents.local_documents(files)
    return prepare_documents(
        stream(), source, out_dir, recipe.tokenizer, args.val_fraction, args.max_documents
    )


def _job(recipe: CorpusSpec, args: argparse.Namespace) -> Job:
    if recipe.documents is None:
        return TextJob(_text(recipe, args), _tokenizer(recipe, args), args.val_fraction, args.shards)
    _check_max_documents(args)
    if args.input:
        files: Sequence[Path | documents.HubFile] = find_files(args.input, documents.ENDINGS)
        source = _names(files)
    elif recipe.document_files is not None:
        source, files = "the Hugging Face hub", recipe.document_files()
    else:
        raise ValueError("--shards needs files whose documents can be counted: give --input")
    return DocumentJob(files, source, recipe.tokenizer, args.val_fraction, args.shards, args.max_documents)


def _tokenizer(recipe: CorpusSpec, args: argparse.Namespace) -> str:
    return getattr(args, "tokenizer", recipe.tokenizer)


def _check_max_documents(args: argparse.Namespace) -> None:
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max_documents is {args.max_documents}, and must be at least 1")


def _text(recipe: CorpusSpec, args: argparse.Namespace) -> Text:
    if args.input:
        files = find_files(args.input)
        return files_text(files, _names(files))
    assert recipe.text is not None  # a custom recipe requires --input
    return recipe.text(recipe.folder)


def _names(files: Sequence[Path]) -> str:
    """Files as meta.json names them: not where they lie on this machine."""
    if len(files) > 30:
        return f"{files[0].name} ... {files[-1].name} ({len(files)} files)"
    return ", ".join(path.name for path in files)


def _report(recipe: CorpusSpec, out_dir: Path, meta: dict[str, Any] | ShardCount) -> None:
    if isinstance(meta, ShardCount):
        print(
            f"{out_dir.name}: the shards of this worker are finished, {meta.done} of {meta.total} in all. "
            "Whoever finishes the last one makes the corpus; should no worker be running, run any of them "
            "again"
        )
        return
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    print(
        f"{out_dir.name}: {train['tokens']:,} tokens to train on and {val['tokens']:,} to validate with, "
        f"from {(train['bytes'] + val['bytes']) / 1e6:.2f} MB of text; vocabulary of {meta['vocab_size']:,} "
        f"({meta['tokenizer']})"
    )
    first, *_, last = [shard["file"] for shard in train["shards"] * 2]
    trained = first if first == last else f"{first} to {last}"
    print(f"written to {out_dir}: {trained}, val.bin, tokenizer.json, meta.json")
    if out_dir.resolve().parent == recipe.folder.resolve().parent:
        print(f"next: {recipe.then.format(name=out_dir.name)}")


def _message(error: Exception) -> str:
    """What went wrong, without Python's names for it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}the disk is full. Free some space, or choose another place with --out_dir"
    return f"{place}{error.strerror}"


@contextlib.contextmanager
def _handle_signals() -> Iterator[None]:
    """Let SIGTERM, and a terminal that closes, unwind the stack as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup asks for that
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
