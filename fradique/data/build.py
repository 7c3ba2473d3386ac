"""Prepare a corpus from a text or from documents in one process, for the scripts data/<corpus>/prepare.py.

A text is read once to count its characters and collect its alphabet, once more to train a BPE if the corpus
needs one, and once to encode it. Documents are read once. Memory does not grow with the text. All files are
written to a temporary folder inside the corpus's folder and moved at the end, meta.json last. A corpus with a
meta.json is therefore complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fradique.data.console import progress_bar
from fradique.data.encode import (
    SplitPiece,
    check_splits,
    encode_splits,
    make_tokenizer,
    split_pieces,
    track_chars,
)
from fradique.data.splits import check_val_fraction, check_val_split, divide_text
from fradique.data.text import Text, cut_pieces
from fradique.data.text_index import index_text
from fradique.data.token_files import find_token_files
from fradique.io import folder_lock
from fradique.io.files import fsync, read_json, write_json
from fradique.tokenizer.bpe import END_OF_TEXT
from fradique.tokenizer.tokenizer import (
    GPT2Tokenizer,
    Tokenizer,
    parse_spec,
    save_tokenizer,
    tokenizer_checksum,
)

FORMAT = 1  # version of the format of meta.json
DOCUMENTS = "documents"  # "val_split" in the meta.json of a corpus of documents: whole ones, spread evenly
INSTALLING = (
    ".installing"  # in the folder of a corpus while its files are moved to it: lists old and new ones
)
# Any of these shows that a folder is that of a run or a model.
FILES_OF_MODELS = (
    ".run.json",
    "settings.json",
    "config.json",
    "ckpt.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
STALE_SECONDS = 3600  # a temporary folder without a lock file that is older than this is removed


def prepare_text(
    text: Text,
    out_dir: Path,
    tokenizer: str = "char",
    val_fraction: float = 0.1,
    val_split: str = "tail",
    document_separator: str | None = END_OF_TEXT,
) -> dict[str, Any]:
    """Make a corpus from `text` in `out_dir`, and return the content of its meta.json.

    tokenizer: "char", "gpt2" or "bpe:SIZE".
    val_fraction, val_split: the size of the validation split, and where it is taken from: see `divide_text`.
    document_separator: the text that becomes the token <|endoftext|>; None: no text does. Characters have no
        such token.

    Raises ValueError if an argument or the text cannot be used, and OSError if files cannot be read or
    written; `out_dir` is then unchanged.
    """
    spec = parse_spec(tokenizer)
    check_val_fraction(val_fraction)
    check_val_split(val_split)
    check_replaceable(out_dir)
    with _temporary_folder(out_dir) as temp_dir:
        index = index_text(text)
        separator = None if spec == "char" else document_separator
        parts = divide_text(text, index.chars, val_fraction, val_split, separator, index)
        encoder = make_tokenizer(spec, text, parts, index.alphabet, document_separator)
        with progress_bar(index.chars, "encoding", "char") as bar:
            pieces = split_pieces(cut_pieces(text.chunks()), parts)
            splits = encode_splits(track_chars(pieces, bar), encoder, temp_dir)
        check_splits(splits)
        if sum(split["bytes"] for split in splits.values()) != index.bytes:
            raise ValueError("the text changed while it was read: prepare it again")
        return _finish(temp_dir, out_dir, encoder, text.source, val_split, splits)


def prepare_documents(
    documents: Iterable[Iterable[str]],
    source: str,
    out_dir: Path,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.0005,
    max_documents: int | None = None,
    document_separator: str | None = END_OF_TEXT,
) -> dict[str, Any]:
    """Make a corpus from `documents` in `out_dir`, and return the content of its meta.json.

    A document is an iterable of pieces of text. In the token files, <|endoftext|> follows each document. The
    split of a document depends only on its number, counted from 0. `source` is a description for meta.json.
    The other arguments and the errors are those of `prepare_text`.
    """
    check_document_tokenizer(tokenizer)
    check_val_fraction(val_fraction)
    check_replaceable(out_dir)
    with _temporary_folder(out_dir) as temp_dir:
        encoder = GPT2Tokenizer(document_separator)
        with progress_bar(max_documents, "encoding", "document") as bar:
            numbered = enumerate(itertools.islice(documents, max_documents))
            pieces = _track_documents(document_pieces(numbered, val_fraction), bar)
            splits = encode_splits(pieces, encoder, temp_dir)
        check_splits(splits)
        return _finish(temp_dir, out_dir, encoder, source, DOCUMENTS, splits)


def check_document_tokenizer(tokenizer: str) -> None:
    """Raise ValueError for a tokenizer without an end-of-text token."""
    if tokenizer != "gpt2":
        raise ValueError("documents need the gpt2 tokenizer, which has a token for the end of a text")


def document_pieces(
    documents: Iterable[tuple[int, Iterable[str]]], val_fraction: float
) -> Iterator[SplitPiece]:
    """The pieces of numbered documents, each with the document's split; (split, None) ends a document."""
    for number, document in documents:
        split = "val" if uniform_hash(number) < val_fraction else "train"
        for piece in cut_pieces(document):
            yield split, piece
        yield split, None


def uniform_hash(index: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on `index`."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, person=b"fradique val")
    return int.from_bytes(digest.digest(), "little") / 2**64


def _track_documents(pieces: Iterable[SplitPiece], bar: Any) -> Iterator[SplitPiece]:
    """Yield `pieces`, and advance the tqdm `bar` by one at the end of each document."""
    for split, piece in pieces:
        yield split, piece
        if piece is None:
            bar.update(1)


def _finish(
    temp_dir: Path,
    out_dir: Path,
    tokenizer: Tokenizer,
    source: str,
    val_split: str,
    splits: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write tokenizer.json and meta.json, and move all files from `temp_dir` to `out_dir`."""
    meta = make_metadata(tokenizer, source, val_split, splits)
    save_tokenizer(tokenizer, temp_dir / "tokenizer.json")
    write_json(temp_dir / "meta.json", meta)
    _install(temp_dir, out_dir, ["tokenizer.json", "val.bin", "train.bin", "meta.json"])
    return meta


def make_metadata(
    tokenizer: Tokenizer, source: str, val_split: str, splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The content of meta.json. `val_split`: how the validation split was chosen: tail, blocks, documents."""
    return {
        "format": FORMAT,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": tokenizer_checksum(tokenizer),
        "document_separator": tokenizer.document_separator,
        "source": source,
        "val_split": val_split,
        "splits": splits,
    }


def check_replaceable(out_dir: Path) -> None:
    """Raise ValueError if `out_dir` has files that prepare.py has not made and that a corpus would replace.

    These are token files, meta.json and tokenizer.json. The folder of a run or a model is refused too.
    """
    if names := [name for name in FILES_OF_MODELS if (out_dir / name).exists()]:
        raise ValueError(
            f"{out_dir} contains {names[0]}, so it is the folder of a run or a model: choose another folder "
            "with --out_dir"
        )
    own = _own_files(out_dir)
    names = [name for name in ("meta.json", "tokenizer.json") if (out_dir / name).exists()]
    names += [path.name for path in find_token_files(out_dir)]
    if foreign := [name for name in names if name not in own]:
        raise ValueError(
            f"{out_dir} contains {foreign[0]}, which prepare.py has not made: move it to another folder, or "
            "choose another folder for the corpus with --out_dir"
        )


def _own_files(folder: Path) -> set[str]:
    """The names of the files of the corpus in `folder`; none if there is no corpus.

    They are in its meta.json, or, if a process was killed in `_install`, in the file INSTALLING.
    """
    own: set[str] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        own |= set(read_json(folder / INSTALLING)["files"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        meta = read_json(folder / "meta.json")
        if meta["format"] == FORMAT and meta["splits"].keys() == {"train", "val"}:
            own |= {entry["file"] for split in meta["splits"].values() for entry in split["shards"]}
            own |= {"meta.json", "tokenizer.json"}
    return own


def _install(temp_dir: Path, out_dir: Path, names: list[str]) -> None:
    """Delete the corpus in `out_dir`, then move the files `names` from `temp_dir` to it, in this order.

    After an exception, `out_dir` has none of these files. If the process is killed, it may have the first of
    them; tokenizer.json is before the token files, so that they are never decoded with an older tokenizer.
    """
    check_replaceable(out_dir)
    old_names = _own_files(out_dir)
    write_json(out_dir / INSTALLING, {"files": sorted(old_names | set(names))})
    fsync(out_dir)
    (out_dir / "meta.json").unlink(missing_ok=True)
    for path in find_token_files(out_dir):
        if path.name in old_names:
            path.unlink()
    fsync(out_dir)
    try:
        for name in names:
            (temp_dir / name).replace(out_dir / name)
    except BaseException:
        for name in names:
            (out_dir / name).unlink(missing_ok=True)
        (out_dir / INSTALLING).unlink(missing_ok=True)
        raise
    fsync(out_dir)
    (out_dir / INSTALLING).unlink()


@contextlib.contextmanager
def _temporary_folder(out_dir: Path) -> Iterator[Path]:
    """Make a temporary folder in `out_dir`, lock it against `_remove_abandoned`, and remove it at the end.

    `out_dir` is created if it is missing, and is then removed at the end if it is empty.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another folder with --out_dir")
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    # a random name: process ids are not unique if several machines share the disk
    folder = out_dir / f".prepare-{uuid.uuid4().hex}"
    lock = None
    try:
        _remove_abandoned(out_dir)
        folder.mkdir()
        lock = folder_lock.FolderLock(folder)
        yield folder
    finally:
        if lock:
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty: the corpus was made
                out_dir.rmdir()


def _remove_abandoned(out_dir: Path) -> None:
    """Remove the temporary folders of killed processes, which nobody has locked."""
    for path in out_dir.glob(".prepare-*"):
        with contextlib.suppress(OSError):
            has_lock_file = (path / folder_lock.LOCK_FILE).exists()
            is_old = time.time() - path.stat().st_mtime > STALE_SECONDS
            # a new folder without a lock file belongs to a process that is about to lock it
            if (has_lock_file or is_old) and folder_lock.lock_holder(path) is None:
                shutil.rmtree(path, ignore_errors=True)
