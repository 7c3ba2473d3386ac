"""Make a corpus from a text or from documents, in bounded memory; every data/<corpus>/prepare.py uses this.

A text is read twice: once to index it, which counts its characters and collects the alphabet, and once to
encode it; a BPE is trained in between. Documents are read once. All files are made in a folder `.prepare-*`
inside the corpus's folder and renamed at the end, meta.json last: a corpus with a meta.json is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
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
    show_chars,
    split_pieces,
)
from fradique.data.text import Text, cut_pieces
from fradique.data.text_index import index_text
from fradique.io import folder_lock
from fradique.io.files import fsync, write_json
from fradique.tokenizer import tokenizer as tokenizers

FORMAT = 1  # of meta.json
STALE_SECONDS = 3600  # age at which a temporary folder without a lock file is taken for abandoned


def prepare_text(
    text: Text, out_dir: Path, tokenizer: str = "char", val_fraction: float = 0.1
) -> dict[str, Any]:
    """Make a corpus from `text` in `out_dir`, and return its meta.json.

    The first int(n_chars * (1 - val_fraction)) characters are the training split, as in nanoGPT, and the rest
    is the validation split. `tokenizer` is "char", "gpt2" or "bpe:SIZE". Raises ValueError for a mistake of
    the user and OSError if files cannot be written; `out_dir` is then unchanged.
    """
    spec = tokenizers.parse_spec(tokenizer)
    check_val_fraction(val_fraction)
    with _temporary_folder(out_dir) as folder:
        index = index_text(text)
        n_train = int(index.chars * (1 - val_fraction))
        encoder = make_tokenizer(spec, text, n_train, index.alphabet)
        with progress_bar(index.chars, "encoding", "char") as bar:
            pieces = split_pieces(cut_pieces(text.chunks()), n_train)
            splits = encode_splits(show_chars(pieces, bar), encoder, folder)
        check_splits(splits)
        if sum(split["bytes"] for split in splits.values()) != index.bytes:
            raise ValueError("the text changed while it was read: prepare it again")
        return _finish(folder, out_dir, encoder, text.source, splits)


def prepare_documents(
    documents: Iterable[Iterable[str]],
    source: str,
    out_dir: Path,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.0005,
    max_documents: int | None = None,
) -> dict[str, Any]:
    """Make a corpus from `documents`, each an iterable of pieces of text, and return its meta.json.

    Each document is followed by <|endoftext|>. Its split depends only on its number. Raises as `prepare_text`
    does.
    """
    check_document_tokenizer(tokenizer)
    check_val_fraction(val_fraction)
    with _temporary_folder(out_dir) as folder:
        encoder = tokenizers.GPT2Tokenizer()
        with progress_bar(max_documents, "encoding", "document") as bar:
            numbered = enumerate(itertools.islice(documents, max_documents))
            pieces = _show_documents(document_pieces(numbered, val_fraction), bar)
            splits = encode_splits(pieces, encoder, folder)
        check_splits(splits)
        return _finish(folder, out_dir, encoder, source, splits)


def check_document_tokenizer(tokenizer: str) -> None:
    """Raise ValueError for a tokenizer without an end-of-text token."""
    if tokenizer != "gpt2":
        raise ValueError("documents need the gpt2 tokenizer, which has a token for the end of a text")


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless 0 < val_fraction < 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction is {val_fraction}, and must be between 0 and 1")


def document_pieces(
    documents: Iterable[tuple[int, Iterable[str]]], val_fraction: float
) -> Iterator[SplitPiece]:
    """The pieces of numbered documents, each with the split that its number determines."""
    for number, document in documents:
        split = "val" if uniform_hash(number) < val_fraction else "train"
        for piece in cut_pieces(document):
            yield split, piece
        yield split, None


def uniform_hash(index: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on `index`."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, person=b"fradique val")
    return int.from_bytes(digest.digest(), "little") / 2**64


def _show_documents(pieces: Iterable[SplitPiece], bar: Any) -> Iterator[SplitPiece]:
    """Yield `pieces`, and advance the progress bar at the end of each document."""
    for piece in pieces:
        yield piece
        bar.update(piece[1] is None)


def _finish(
    folder: Path,
    out_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    source: str,
    splits: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write tokenizer.json and meta.json, and move all files from `folder` to `out_dir`."""
    meta = make_metadata(tokenizer, source, splits)
    tokenizers.save_tokenizer(tokenizer, folder / "tokenizer.json")
    write_json(folder / "meta.json", meta)
    token_files = [shard["file"] for split in splits.values() for shard in split["shards"]]
    _install(folder, out_dir, ["tokenizer.json", *reversed(token_files), "meta.json"])
    return meta


def make_metadata(
    tokenizer: tokenizers.Tokenizer, source: str, splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The content of meta.json."""
    return {
        "format": FORMAT,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.kind,
        "source": source,
        "splits": splits,
    }


def _install(folder: Path, out_dir: Path, names: list[str]) -> None:
    """Delete the corpus in `out_dir`, then move `names` from `folder` to it, in this order.

    If this is interrupted, no corpus is left rather than a partial one. If the process is killed, no token
    file is left without its tokenizer, so tokens are never decoded with another one.
    """
    (out_dir / "meta.json").unlink(missing_ok=True)
    for path in out_dir.glob("*.bin"):
        if re.fullmatch(r"(train|val)(_[0-9]+)?\.bin", path.name):
            path.unlink()
    fsync(out_dir)
    try:
        for name in names:
            (folder / name).replace(out_dir / name)
    except BaseException:
        for name in names:
            (out_dir / name).unlink(missing_ok=True)
        raise
    fsync(out_dir)


@contextlib.contextmanager
def _temporary_folder(out_dir: Path) -> Iterator[Path]:
    """A locked temporary folder in `out_dir`, removed at the end.

    `out_dir` is created if it is missing, and removed again if it stays empty.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another folder with --out_dir")
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    # a random name, because machines that share the disk may have processes with the same id
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
            with contextlib.suppress(OSError):  # not empty: it contains the corpus now
                out_dir.rmdir()


def _remove_abandoned(out_dir: Path) -> None:
    """Remove the temporary folders of killed processes; a new one may not have its lock file yet."""
    for path in out_dir.glob(".prepare-*"):
        with contextlib.suppress(OSError):
            has_lock_file = (path / folder_lock.LOCK_FILE).exists()
            is_stale = has_lock_file or time.time() - path.stat().st_mtime > STALE_SECONDS
            if is_stale and folder_lock.lock_holder(path) is None:
                shutil.rmtree(path, ignore_errors=True)
