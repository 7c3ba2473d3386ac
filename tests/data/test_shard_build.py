"""Corpora made by many workers, compared with the corpus of a single process."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from corpus_helpers import (
    STORY,
    checksums,
    document_job,
    story_spec,
    text_job,
    text_of,
    write_documents,
)
from support import ROOT

from fradique.data import documents, encode, shard_build
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.dataset import open_corpus
from fradique.data.prepare import main
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import TextJob
from fradique.data.shard_progress import ShardCount

pytestmark = pytest.mark.usefixtures("small_shards")
KINDS = ["char", "gpt2", "bpe:300"]


def joined_train(folder, n):
    """The bytes of all training files, in order."""
    return b"".join((folder / f"train_{i:05d}.bin").read_bytes() for i in range(n))


# The corpus does not depend on the workers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "val_fraction"), [(1, 0.1), (7, 0.1), (20, 0.5)])
def test_shards_equal_the_corpus_of_a_single_process(tmp_path, kind, n, val_fraction):
    reference = prepare_text(text_of(STORY), tmp_path / "reference", kind, val_fraction)
    meta = prepare_shards(text_job(STORY, kind, n, val_fraction), tmp_path / "shards", Worker())
    assert joined_train(tmp_path / "shards", n) == (tmp_path / "reference" / "train.bin").read_bytes()
    for name in ("val.bin", "tokenizer.json"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert json.loads((tmp_path / "shards" / "meta.json").read_text(encoding="utf-8")) == meta
    assert {k: v for k, v in meta.items() if k not in ("splits", "made_from")}.items() <= reference.items()
    assert meta["splits"]["val"] == reference["splits"]["val"]
    train, expected = meta["splits"]["train"], reference["splits"]["train"]
    assert (train["tokens"], train["bytes"]) == (expected["tokens"], expected["bytes"])
    for i, entry in enumerate(train["shards"]):
        data = (tmp_path / "shards" / f"train_{i:05d}.bin").read_bytes()
        assert entry["file"] == f"train_{i:05d}.bin" and entry["tokens"] == len(data) // 2
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    expected_names = {f"train_{i:05d}.bin" for i in range(n)} | {"val.bin", "tokenizer.json", "meta.json"}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == expected_names


def test_shards_have_about_equal_sizes(tmp_path):
    meta = prepare_shards(text_job(n=10), tmp_path, Worker())
    sizes = [entry["tokens"] for entry in meta["splits"]["train"]["shards"]]
    assert max(sizes) - min(sizes) < 60


@pytest.mark.parametrize("kind", ["char", "bpe:300", "documents"])
def test_files_do_not_depend_on_the_number_of_workers(tmp_path, kind):
    def job():
        return document_job(tmp_path / "source") if kind == "documents" else text_job(STORY, kind)

    write_documents(tmp_path / "source")
    prepare_shards(job(), tmp_path / "1", Worker())
    assert (tmp_path / "1" / "meta.json").exists()
    for count in (2, 3, 5, 9):
        order = list(range(count))
        random.Random(count).shuffle(order)
        results = [prepare_shards(job(), tmp_path / str(count), Worker(i, count)) for i in order]
        assert count > 7 or all(isinstance(result, ShardCount) for result in results[:-1])
        assert checksums(tmp_path / str(count)) == checksums(tmp_path / "1")


def test_a_worker_makes_only_its_own_shards(tmp_path):
    assert prepare_shards(text_job(n=7), tmp_path, Worker(1, 3)) == ShardCount(2, 7)
    assert [path.name for path in sorted(tmp_path.glob("*.bin"))] == ["train_00001.bin", "train_00004.bin"]


def test_the_shards_of_a_corpus_are_read_in_order(tmp_path):
    prepare_shards(text_job(n=7), tmp_path, Worker())
    opened = open_corpus(tmp_path, block_size=16)
    assert len(opened.train.token_files) == 7
    assert (
        opened.tokenizer.decode(np.concatenate(list(opened.train.token_files)))
        == STORY[: int(len(STORY) * 0.9)]
    )


@pytest.mark.parametrize(("n", "max_documents"), [(1, None), (7, None), (121, None), (5, 60)])
def test_document_shards_equal_those_of_a_single_process(tmp_path, n, max_documents):
    write_documents(tmp_path / "source")
    stream = documents.local_documents(sorted((tmp_path / "source").iterdir()))
    reference = prepare_documents(stream, "a test", tmp_path / "reference", "gpt2", 0.2, max_documents)
    job = document_job(tmp_path / "source", n, 0.2, max_documents)
    if n == 121:  # one document each: a shard of a validation document has no training tokens
        with pytest.raises(ValueError, match=r"has 0 tokens to train on.*smaller --shards"):
            prepare_shards(job, tmp_path / "shards", Worker())
        return
    meta = prepare_shards(job, tmp_path / "shards", Worker())
    assert joined_train(tmp_path / "shards", n) == (tmp_path / "reference" / "train.bin").read_bytes()
    for name in ("val.bin", "tokenizer.json"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert meta["splits"]["val"] == reference["splits"]["val"]


# Resuming


def test_temporary_files_are_removed_only_for_the_same_shard(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    for name in ("part_00000-dead", "part_00002-alive"):
        (tmp_path / ".shards" / name).mkdir()
    prepare_shards(text_job(), tmp_path, Worker(0, 3))
    assert [path.name for path in (tmp_path / ".shards").glob("part_*")] == ["part_00002-alive"]


@pytest.mark.parametrize("name", ["train_00004.bin", ".shards/val_00004.bin", ".shards/shard_00004.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_an_incomplete_shard_is_made_again(tmp_path, name, damage):
    prepare_shards(text_job(), tmp_path / "reference", Worker())
    prepare_shards(text_job(), tmp_path / "out", Worker(1, 3))
    if damage == "missing":
        (tmp_path / "out" / name).unlink()
    else:
        os.truncate(tmp_path / "out" / name, 10)
    prepare_shards(text_job(), tmp_path / "out", Worker())
    assert checksums(tmp_path / "out") == checksums(tmp_path / "reference")


def test_an_incomplete_shard_of_another_worker_is_named(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 2))
    os.truncate(tmp_path / "train_00003.bin", 10)
    with pytest.raises(ValueError, match=r"shard 3 .* is incomplete now: run --worker 3/7"):
        prepare_shards(text_job(), tmp_path, Worker(0, 2))
    assert not (tmp_path / "meta.json").exists()
    prepare_shards(text_job(), tmp_path, Worker(3, 7))
    assert (tmp_path / "meta.json").exists()


def test_damaged_validation_tokens_are_made_again(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 2))
    path = tmp_path / ".shards" / "val_00003.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"val_00003.bin is damaged: run the same command again"):
        prepare_shards(text_job(), tmp_path, Worker(0, 2))
    prepare_shards(text_job(), tmp_path, Worker())
    assert (tmp_path / "meta.json").exists()


def test_two_workers_can_make_the_same_shard(tmp_path, monkeypatch):
    """While a worker encodes its first shard, a second worker makes the same shards, or all shards."""
    prepare_shards(text_job(), tmp_path / "reference", Worker())
    for name, worker in (("shards", Worker(1, 2)), ("corpus", Worker())):
        encode_splits = encode.encode_splits

        def encode_twice(pieces, tokenizer, folder, name=name, worker=worker, encode_splits=encode_splits):
            monkeypatch.setattr(shard_build, "encode_splits", encode_splits)
            splits = encode_splits(pieces, tokenizer, folder)
            prepare_shards(text_job(), tmp_path / name, worker)
            return splits

        monkeypatch.setattr(shard_build, "encode_splits", encode_twice)
        result = prepare_shards(text_job(), tmp_path / name, Worker(1, 2))
        assert isinstance(result, ShardCount) == (name == "shards")
        prepare_shards(text_job(), tmp_path / name, Worker(0, 2))
        assert checksums(tmp_path / name) == checksums(tmp_path / "reference")


def test_killed_and_restarted_workers_make_the_same_corpus():
    script = ROOT / "tests" / "faults" / "kill_prepare.py"
    if not hasattr(os, "fork"):
        pytest.skip("the workers are forked, so that they are killed while they work")
    arguments = ["--kills", "6", "--kinds", "char", "--workers", "3"]
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills"] >= 6 and counts["different"] == 0


# Other corpora


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_00000.bin"])
def test_shards_never_replace_existing_token_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"contains {name}.*delete it first"):
        prepare_shards(text_job(), tmp_path, Worker())
    assert checksums(tmp_path) == {name: hashlib.sha256(b"mine").hexdigest()}


def test_finished_and_unfinished_corpora_are_kept(tmp_path):
    prepare_text(text_of(STORY), tmp_path / "reference")
    with pytest.raises(ValueError, match=r"contains another corpus"):
        prepare_shards(text_job(), tmp_path / "reference", Worker())
    open_corpus(tmp_path / "reference", block_size=16)
    prepare_shards(text_job(), tmp_path / "out", Worker(1, 3))
    before = checksums(tmp_path / "out")
    assert main(story_spec(tmp_path / "out"), []) == 2
    assert checksums(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["val.bin", "tokenizer.json", "train_00001.bin"])
def test_a_file_of_the_user_beside_unfinished_shards_is_kept(tmp_path, name):
    prepare_shards(text_job(n=2), tmp_path, Worker(0, 2))
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} exists, and prepare\.py has not made it: move it"):
        prepare_shards(text_job(n=2), tmp_path, Worker(1, 2))
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    assert prepare_shards(text_job(n=2), tmp_path, Worker(1, 2))["splits"]["val"]["tokens"] > 0


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ({"val_split": "blocks"}, {}, "val_split: blocks, not None"),
        ({}, {"val_split": "blocks"}, "val_split: None, not blocks"),
        ({"document_separator": "</s>"}, {}, "document_separator: </s>, not None"),
    ],
)
def test_shards_with_other_flags_name_the_flag(tmp_path, first, second, difference):
    def job(flags):
        return TextJob(text_of(STORY), "gpt2", 0.1, 2, **flags)

    prepare_shards(job(first), tmp_path, Worker(0, 2))
    with pytest.raises(ValueError, match="another preparation") as caught:
        prepare_shards(job(second), tmp_path, Worker(1, 2))
    assert difference in str(caught.value)
