"""Helpers for the corpus tests: make texts, documents, token files and splits, and read them."""

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import ROOT

from fradique.data.dataset import Split
from fradique.data.prepare import CorpusSpec
from fradique.data.sampler import Sampler
from fradique.data.shard_plan import DocumentJob, TextJob
from fradique.data.text import Text
from fradique.data.windows import Window, list_windows, locations_of

CORPORA = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason=f"the real corpora are not in {CORPORA}")
STORY = "Era uma vez um gato que não dormia, e uma lua: a lua de Lisboa — 🙂.\r\n\tFim. " * 100


def text_of(string: str, chunk: int = 50) -> Text:
    """A text that is read in chunks of `chunk` characters."""
    return Text("a test", len(string), lambda: (string[i : i + chunk] for i in range(0, len(string), chunk)))


def read_ids(folder: Path, split: str) -> np.ndarray:
    """The tokens of a split that is one file."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(folder / f"{split}.bin", dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file in a folder, at any depth."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def write_documents(folder):
    """Write documents to files of all kinds; return the documents in order."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    docs = [" ".join(rng.choices(STORY.split(), k=rng.randint(0, 40))) for _ in range(120)]
    table = pa.table({"text": docs[:50]})
    pq.write_table(table, folder / "a.parquet", row_group_size=20)
    lines = [json.dumps({"text": doc}) + "\n" * rng.randint(1, 3) for doc in docs[50:]]
    (folder / "b.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    with gzip.open(folder / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(lines[30:]))
    (folder / "d.txt").write_bytes(STORY.encode())
    return [*docs, STORY]


def text_job(string=STORY, kind="char", n=7, val_fraction=0.1):
    return TextJob(text_of(string), kind, val_fraction, n)


def document_job(folder, n=7, val_fraction=0.2, max_documents=None):
    return DocumentJob(sorted(folder.iterdir()), "a test", "gpt2", val_fraction, n, max_documents)


def story_spec(folder: Path) -> CorpusSpec:
    """A corpus of characters made from STORY."""
    return CorpusSpec(folder, "A test.", "char", "go {name}", text=lambda _: text_of(STORY))


def write_token_files(folder, sizes, dtype="<u2"):
    """Write one file of random tokens for each of `sizes`; return the paths."""
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"train_{i:05d}.bin")
        np.random.default_rng(i).integers(50_000, size=size).astype(dtype).tofile(paths[-1])
    return paths


def make_split(folder, sizes, vocab_size=1000, gap=0):
    """Write files of `sizes` tokens and return them as a split.

    The tokens of a file count up modulo vocab_size, and jump by `gap` at the next file.
    """
    paths, first_token = [], 0
    for i, size in enumerate(sizes):
        path = folder / f"train_{i:05d}.bin"
        (np.arange(first_token, first_token + size) % vocab_size).astype("<u2").tofile(path)
        paths.append(path)
        first_token += size + gap
    return Split(paths, "uint16", vocab_size, None)


def make_sampler(split, block_size, seed, batch_size=1, accumulation=1):
    return Sampler(split, block_size, batch_size, accumulation, seed)


def sampled_windows(sampler: Sampler, first: int, count: int) -> list[Window]:
    """The windows first to first + count - 1 of a sampler's sequence."""
    return list_windows(sampler.locations(np.arange(first, first + count)), sampler.block_size)


def read_windows(split: Split, windows: Sequence[Window]):
    """Inputs and targets (B, T) of B windows of the same length T."""
    return split.read_locations(locations_of(windows), windows[0].length)
