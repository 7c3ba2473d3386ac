"""Text -> tokens -> shards and meta.json: what every data/<corpus>/prepare.py runs, in bounded memory.

A text is streamed twice: once to count it and to find its characters, once to encode it (a BPE of our own
trains on a sample in between). Documents are streamed once. Everything is made in a folder `.prepare-…`
within its place and renamed at the end, meta.json last: a corpus with a meta.json is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fradique.data.text import PIECE_CHARS, Text, cut_pieces, print_note
from fradique.data.text_index import index_text, progress_bar
from fradique.io import folder_lock
from fradique.io.files import fsync, write_json
from fradique.tokenizer import tokenizer as tokenizers

FORMAT = 1  # of meta.json
SPLITS = ("train", "val")
MIN_TOKENS = 2  # in a split: a block of one token and its target
FEW_TOKENS = 1000  # in the validation split: its loss would mean little
MAX_THREADS = 16
SAMPLE_CHARS = 64 << 20  # that a BPE trains on
SAMPLE_WORD_BYTES = 4 << 20  # of different words in these; the trainer needs about 100 times as much memory
SAMPLE_PIECE = 1 << 14  # characters in a piece of it; `tokenizers` keeps 256 of these waiting

Item = tuple[str, str | None]  # a split and a piece of its text, or None for the end of a document


def prepare_text(
    text: Text, out_dir: Path, tokenizer: str = "char", val_fraction: float = 0.1
) -> dict[str, Any]:
    """Make a corpus of `text` in `out_dir`, and return its meta.json.

    The first int(n_chars * (1 - val_fraction)) characters train, as in nanoGPT, and the rest validates.
    `tokenizer` is "char", "gpt2" or "bpe:SIZE". Raises ValueError for what the user can mend and OSError for
    what the disk refuses; `out_dir` is then as it was.
    """
    spec = tokenizers.parse_spec(tokenizer)
    check_val_fraction(val_fraction)
    with _temporary_folder(out_dir) as folder:
        found = index_text(text)
        n_train = int(found.chars * (1 - val_fraction))
        made = make_tokenizer(spec, text, n_train, found.alphabet)
        with progress_bar(found.chars, "encoding", "char") as bar:
            items = _watched(_split(cut_pieces(text.chunks()), n_train), bar)
            splits = encode_splits(items, made, folder)
        check_splits(splits)
        if sum(split["bytes"] for split in splits.values()) != found.bytes:
            raise ValueError("the text changed while it was read: prepare it again")
        return _finish(folder, out_dir, made, text.source, splits)


def prepare_documents(
    documents: Iterable[Iterable[str]],
    source: str,
    out_dir: Path,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.0005,
    max_documents: int | None = None,
) -> dict[str, Any]:
    """Make a corpus of `documents` (each an iterable of pieces), and return its meta.json.

    After each document comes <|endoftext|>. Which documents validate is a function of their place alone.
    Raises as `prepare_text`.
    """
    check_document_tokenizer(tokenizer)
    check_val_fraction(val_fraction)
    with _temporary_folder(out_dir) as folder:
        made = tokenizers.GPT2Tokenizer()
        with progress_bar(max_documents, "encoding", "document") as bar:
            numbered = enumerate(itertools.islice(documents, max_documents))
            splits = encode_splits(_counted(document_items(numbered, val_fraction), bar), made, folder)
        check_splits(splits)
        return _finish(folder, out_dir, made, source, splits)


def check_document_tokenizer(tokenizer: str) -> None:
    """Raise ValueError for a tokenizer that knows no end of a document."""
    if tokenizer != "gpt2":
        raise ValueError("documents are encoded with gpt2, which has a token for the end of a text")


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError for a part that is none."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction is {val_fraction}, and must lie between 0 and 1")


def make_tokenizer(
    spec: str | tuple[str, int], text: Text, n_train: int, alphabet: str
) -> tokenizers.Tokenizer:
    """What `spec` asks for: of the characters in `alphabet`, or trained on the first `n_train` of `text`."""
    if spec == "char":
        return tokenizers.CharTokenizer(alphabet)
    if spec == "gpt2":
        return tokenizers.GPT2Tokenizer()
    _, vocab_size = spec
    sample = TrainingSample(text, n_train)
    made = tokenizers.train_bpe(sample, vocab_size)
    if sample.n_chars < n_train:
        print_note(
            f"the BPE was trained on {sample.n_chars:,} of {n_train:,} characters, spread over the text"
        )
    if made.vocab_size < vocab_size:
        print_note(
            f"the text is enough for {made.vocab_size:,} tokens only, not for the {vocab_size:,} asked for"
        )
    return made


class TrainingSample:
    """Pieces of the first `n_train` characters of a text, to train a BPE on: all of them in a small text.

    In a larger one, pieces spread over all of it, up to SAMPLE_CHARS, and fewer where its words are so many
    that the trainer's table of them would outgrow the memory.
    """

    def __init__(self, text: Text, n_train: int) -> None:
        self.n_chars = 0  # given out so far
        self._text, self._n_train = text, n_train

    def __iter__(self) -> Iterator[str]:
        words: set[str] = set()
        passed = self.n_chars = word_bytes = 0
        pieces = cut_pieces(self._text.chunks(), SAMPLE_PIECE, SAMPLE_PIECE)
        with progress_bar(self._n_train, "sampling", "char") as bar:
            for split, piece in _watched(_split(pieces, self._n_train), bar):
                if split != "train":
                    return
                passed += len(piece)
                share = passed / self._n_train
                if self.n_chars > share * SAMPLE_CHARS or word_bytes > (1 + share) / 2 * SAMPLE_WORD_BYTES:
                    continue
                new = set(piece.split()) - words
                words |= new
                word_bytes += len(" ".join(new).encode())
                self.n_chars += len(piece)
                yield piece


def _split(pieces: Iterable[str], n_train: int) -> Iterator[Item]:
    """The first `n_train` characters as train, the rest as val."""
    for piece in pieces:
        if n_train > 0:
            yield "train", piece[:n_train]
        if n_train < len(piece):
            yield "val", piece[max(0, n_train) :]
        n_train -= len(piece)


def document_items(documents: Iterable[tuple[int, Iterable[str]]], val_fraction: float) -> Iterator[Item]:
    """Documents with their numbers, in pieces, each in the split that its number gives."""
    for number, document in documents:
        split = "val" if _uniform(number) < val_fraction else "train"
        for piece in cut_pieces(document):
            yield split, piece
        yield split, None


def _uniform(index: int) -> float:
    """A number in [0, 1) that looks random, and is a function of `index`."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, person=b"fradique val")
    return int.from_bytes(digest.digest(), "little") / 2**64


def encode_splits(
    items: Iterable[Item], tokenizer: tokenizers.Tokenizer, folder: Path
) -> dict[str, dict[str, Any]]:
    """Encode `items` into train.bin and val.bin; the part of meta.json that describes them."""
    threads = min(_cores(), MAX_THREADS)
    separator = np.array([tokenizer.end_of_text or 0], dtype=tokenizer.dtype)
    with contextlib.ExitStack() as stack:
        shards = {split: stack.enter_context(_Shard(folder / f"{split}.bin")) for split in SPLITS}
        for batch in _batches(items, 4 * threads * PIECE_CHARS):
            encoded = iter(tokenizer.encode_batch([text for _, text in batch if text is not None], threads))
            for split, text in batch:
                if text is None:
                    shards[split].write(separator, 0)
                else:
                    shards[split].write(next(encoded), len(text.encode()))
    return {
        split: {"tokens": shard.tokens, "bytes": shard.bytes, "shards": [shard.entry()]}
        for split, shard in shards.items()
    }


def check_splits(splits: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError where a split is too small for any block; tell where it is too small to mean much."""
    for name, split in splits.items():
        if split["tokens"] < MIN_TOKENS:
            raise ValueError(
                f"the text is too small: its {name} split has {split['tokens']} tokens, and a block needs "
                f"{MIN_TOKENS} at least. Give it more text, or change --val_fraction"
            )
    if splits["val"]["tokens"] < FEW_TOKENS:
        print_note(
            f"the validation split has only {splits['val']['tokens']:,} tokens: its loss will tell little"
        )


def _batches(items: Iterable[Item], max_chars: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1] or "") + 100  # documents may be tiny or empty, and an item takes memory itself
        if size >= max_chars:
            yield batch
            batch, size = [], 0
    yield batch


def _cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Shard:
    """One file of token ids, little-endian, that knows what is in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens, self.bytes = path, 0, 0
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def __enter__(self) -> _Shard:
        return self

    def write(self, ids: np.ndarray, n_bytes: int) -> None:
        """Add `ids` (n,), which stand for `n_bytes` UTF-8 bytes of text."""
        data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        self.bytes += n_bytes

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def entry(self) -> dict[str, Any]:
        """What meta.json says of this file."""
        sha256 = self._digest.hexdigest()
        return {"file": self.path.name, "tokens": self.tokens, "bytes": self.bytes, "sha256": sha256}


def _finish(
    folder: Path,
    out_dir: Path,
    tokenizer: tokenizers.Tokenizer,
    source: str,
    splits: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write tokenizer.json and meta.json beside the shards, and put everything in its place."""
    meta = make_metadata(tokenizer, source, splits)
    tokenizers.save_tokenizer(tokenizer, folder / "tokenizer.json")
    write_json(folder / "meta.json", meta)
    shards = [shard["file"] for split in splits.values() for shard in split["shards"]]
    _install(folder, out_dir, ["tokenizer.json", *reversed(shards), "meta.json"])
    return meta


def make_metadata(
    tokenizer: tokenizers.Tokenizer, source: str, splits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What meta.json says of a corpus."""
    return {
        "format": FORMAT,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.kind,
        "source": source,
        "splits": splits,
    }


def _install(folder: Path, out_dir: Path, names: list[str]) -> None:
    """Rename `names`, in this order, from `folder` into `out_dir`, once the corpus that was there is gone.

    Whoever is stopped here leaves no corpus, not half of one. Whoever is killed here leaves no shard without
    its tokenizer, so that tokens are never read with another.
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
    """A temporary folder within `out_dir`; it goes in the end, as does an `out_dir` that is new and empty."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder: choose another place with --out_dir")
    new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / f".prepare-{uuid.uuid4().hex}"  # machines may share the disk, and numbers of processes
    held = None
    try:
        _sweep(out_dir)
        folder.mkdir()
        held = folder_lock.FolderLock(folder)
        yield folder
    finally:
        if held:
            held.release()
        shutil.rmtree(folder, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it holds the corpus now
                out_dir.rmdir()


def _sweep(out_dir: Path) -> None:
    """Remove what processes that were killed have left: folders that nobody has, but those just begun."""
    for path in out_dir.glob(".prepare-*"):
        with contextlib.suppress(OSError):
            begun = (path / folder_lock.LOCK_FILE).exists() or time.time() - path.stat().st_mtime > 3600
            if begun and folder_lock.lock_holder(path) is None:
                shutil.rmtree(path, ignore_errors=True)


def _watched(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    for item in items:
        yield item
        bar.update(len(item[1] or ""))


def _counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    for item in items:
        yield item
        bar.update(item[1] is None)
