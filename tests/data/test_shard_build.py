"""Corpora that many workers make, against the corpus that one process makes and against their mistakes."""

import errno
import gzip
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from fradique.data import build, dataset, documents, shard_build, shard_plan, sources, text_index
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.prepare import CorpusSpec, main
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.shard_plan import DocumentJob, TextJob
from fradique.data.shard_progress import ShardCount
from fradique.data.text import Text, files_text
from fradique.tokenizer import tokenizer

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
STORY = "Era uma vez um gato que não dormia, e uma lua: a lua de Lisboa — 🙂.\r\n\tFim. " * 100
SPACED = st.text("ab1é.'s \u00a0\u2003\x1c\t\r\n", max_size=120)
KINDS = ["char", "gpt2", "bpe:300"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "MIN_SHARD_CHARS", 10)


def of(string, chunk=500):
    """A text that comes in chunks of so many characters."""
    return Text("a test", len(string), lambda: (string[i : i + chunk] for i in range(0, len(string), chunk)))


def text_job(string=STORY, kind="char", n=7, val_fraction=0.1):
    return TextJob(of(string), kind, val_fraction, n)


def sums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def joined(folder, n):
    return b"".join((folder / f"train_{i:05d}.bin").read_bytes() for i in range(n))


# Any part of a text


@PROPERTY
@given(
    contents=st.lists(st.text("aé🙂\n\ufeff", max_size=6), min_size=1, max_size=5),
    marks=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_files_are_read_from_any_character_on_as_from_the_beginning(tmp_path_factory, contents, marks):
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / f"part{i}.txt" for i in range(len(contents))]
    for path, content, mark in zip(paths, contents, marks, strict=False):
        path.write_bytes(b"\xef\xbb\xbf" * mark + content.encode())
    text = files_text(paths, "")
    whole = "".join(text.chunks())
    for i in range(len(whole) + 1):
        assert "".join(text.from_byte(len(whole[:i].encode()))) == whole[i:]
        assert "".join(of(whole, 2).from_byte(len(whole[:i].encode()))) == whole[i:]


def test_any_stretch_of_a_surveyed_text_is_found_and_checked(monkeypatch):
    monkeypatch.setattr(text_index, "BLOCK_CHARS", 64)
    string = STORY[:500]
    found = text_index.index_text(of(string, 30))
    assert (found.chars, found.bytes) == (500, len(string.encode()))
    assert found.alphabet == "".join(sorted(set(string))) and len(found.blocks) == 8
    for start in range(0, 500, 7):
        for end in (start, start + 1, start + 64, 500):
            part = "".join(text_index.read_between(of(string, 30), found, start, min(end, 500)))
            assert part == string[start : min(end, 500)]
    for changed in (string[:400] + "x" + string[401:], string[:450], string[1:]):
        with pytest.raises(ValueError, match=r"it has changed since"):
            list(text_index.read_between(of(changed, 30), found, 390, 500))


# One corpus, whoever makes it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "val_fraction"), [(1, 0.1), (7, 0.1), (20, 0.5)])
def test_all_shards_together_are_the_corpus_that_one_process_makes(tmp_path, kind, n, val_fraction):
    whole = prepare_text(of(STORY), tmp_path / "whole", kind, val_fraction)
    meta = prepare_shards(text_job(STORY, kind, n, val_fraction), tmp_path / "shards", Worker())
    assert joined(tmp_path / "shards", n) == (tmp_path / "whole" / "train.bin").read_bytes()
    for name in ("val.bin", "tokenizer.json"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "shards" / "meta.json").read_text(encoding="utf-8")) == meta
    assert {k: v for k, v in meta.items() if k not in ("splits", "made_from")}.items() <= whole.items()
    assert meta["splits"]["val"] == whole["splits"]["val"]
    train, expected = meta["splits"]["train"], whole["splits"]["train"]
    assert (train["tokens"], train["bytes"]) == (expected["tokens"], expected["bytes"])
    for i, entry in enumerate(train["shards"]):
        data = (tmp_path / "shards" / f"train_{i:05d}.bin").read_bytes()
        assert entry["file"] == f"train_{i:05d}.bin" and entry["tokens"] == len(data) // 2
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    names = {f"train_{i:05d}.bin" for i in range(n)} | {"val.bin", "tokenizer.json", "meta.json"}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == names


@PROPERTY
@given(string=SPACED.filter(lambda s: len(s) > 1), n=st.integers(1, 9))
def test_a_text_in_shards_has_the_tokens_of_the_whole(string, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_plan, "MIN_SHARD_CHARS", 1)
        n = min(n, int(len(string) * 0.7))
        job = TextJob(of(string, 9), "gpt2", 0.3, n)
        made = job.plan()
    gpt2, found = tokenizer.GPT2Tokenizer(), {"train": [], "val": []}
    cut, place, exact = int(len(string) * 0.7), {"train": 0, "val": int(len(string) * 0.7)}, True
    text = {"train": "", "val": ""}
    for shard in range(n):
        for split in ("train", "val"):
            part = "".join(piece for where, piece in job.items(made, shard) if where == split)
            start, text[split] = place[split] + len(text[split]), text[split] + part
            if start not in (0, cut, len(string)):
                exact &= not string[start - 1].isspace() and string[start] in " \t\r\n"
            found[split] += gpt2.encode(part).tolist()
    assert text == {"train": string[:cut], "val": string[cut:]}
    expected = {split: gpt2.encode(part).tolist() for split, part in text.items()}
    assert found == expected or not exact  # where there is no place to cut, the cut comes anyway


def test_shards_are_about_as_large_as_each_other(tmp_path):
    meta = prepare_shards(text_job(n=10), tmp_path, Worker())
    sizes = [entry["tokens"] for entry in meta["splits"]["train"]["shards"]]
    assert max(sizes) - min(sizes) < 60


@pytest.mark.parametrize("kind", ["char", "bpe:300", "documents"])
def test_the_files_are_the_same_for_any_number_of_workers(tmp_path, kind):
    def job():
        return document_job(tmp_path / "source") if kind == "documents" else text_job(STORY, kind)

    write_documents(tmp_path / "source")
    prepare_shards(job(), tmp_path / "1", Worker())
    assert (tmp_path / "1" / "meta.json").exists()
    for count in (2, 3, 5, 9):
        order = list(range(count))
        random.Random(count).shuffle(order)
        found = [prepare_shards(job(), tmp_path / str(count), Worker(i, count)) for i in order]
        assert count > 7 or all(isinstance(part, ShardCount) for part in found[:-1])
        assert sums(tmp_path / str(count)) == sums(tmp_path / "1")


def test_a_worker_makes_the_shards_that_are_its_own(tmp_path):
    assert prepare_shards(text_job(n=7), tmp_path, Worker(1, 3)) == ShardCount(2, 7)
    assert [path.name for path in sorted(tmp_path.glob("*.bin"))] == ["train_00001.bin", "train_00004.bin"]


def test_a_corpus_in_shards_opens_and_trains_in_their_order(tmp_path):
    prepare_shards(text_job(n=7), tmp_path, Worker())
    opened = dataset.open_corpus(tmp_path, block_size=16)
    assert len(opened.train.shards) == 7
    assert (
        opened.tokenizer.decode(np.concatenate(list(opened.train.shards))) == STORY[: int(len(STORY) * 0.9)]
    )


# Documents


def write_documents(folder):
    """All kinds of files; the documents in them."""
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


def document_job(folder, n=7, val_fraction=0.2, most=None):
    return DocumentJob(sorted(folder.iterdir()), "a test", "gpt2", val_fraction, n, most)


@pytest.mark.parametrize(("n", "most"), [(1, None), (7, None), (121, None), (5, 60)])
def test_documents_in_shards_are_those_that_one_process_makes(tmp_path, n, most):
    write_documents(tmp_path / "source")
    stream = documents.local_documents(sorted((tmp_path / "source").iterdir()))
    whole = prepare_documents(stream, "a test", tmp_path / "whole", "gpt2", 0.2, most)
    job = document_job(tmp_path / "source", n, 0.2, most)
    if n == 121:  # a document each: those that validate leave nothing to train on
        with pytest.raises(ValueError, match=r"has 0 tokens to train on.*smaller --shards"):
            prepare_shards(job, tmp_path / "shards", Worker())
        return
    meta = prepare_shards(job, tmp_path / "shards", Worker())
    assert joined(tmp_path / "shards", n) == (tmp_path / "whole" / "train.bin").read_bytes()
    for name in ("val.bin", "tokenizer.json"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert meta["splits"]["val"] == whole["splits"]["val"]


def test_documents_are_counted_and_read_from_any_on(tmp_path):
    docs = write_documents(tmp_path)
    counts = [documents.count_documents(path) for path in sorted(tmp_path.iterdir())]
    assert counts == [50, 30, 40, 1]
    for path, count in zip(sorted(tmp_path.iterdir()), counts, strict=True):
        for first in range(0, count + 1, 9):
            assert ["".join(doc) for doc in documents.read_documents(path, first)] == docs[first:count]
        docs = docs[count:]


class FakeDatasets:
    """Stands in for the package `datasets`: the files of a data set, which lie on this machine."""

    def __init__(self, urls):
        self.config, self.data_files = self, {"train": urls}

    def load_dataset_builder(self, name, **options):
        if not self.data_files["train"]:
            raise ConnectionError("no route")
        return self


def test_the_files_of_the_hub_are_read_where_they_are_needed(tmp_path, monkeypatch):
    write_documents(tmp_path / "source")
    shutil.copy(tmp_path / "source" / "a.parquet", tmp_path / "b.parquet")
    paths = [tmp_path / "source" / "a.parquet", tmp_path / "b.parquet"]
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([path.as_uri() for path in paths]))
    files = documents.hub_files(sources.OPENWEBTEXT)
    assert [file.size for file in files] == [path.stat().st_size for path in paths]
    hub = DocumentJob(files, "a test", "gpt2", 0.2, 3)
    local = DocumentJob(paths, "a test", "gpt2", 0.2, 3)
    prepare_shards(hub, tmp_path / "hub", Worker())
    prepare_shards(local, tmp_path / "local", Worker())
    for name in ("val.bin", *(f"train_{i:05d}.bin" for i in range(3))):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(documents.HubFile, "open", lambda file, mode: 1 // 0)  # as no OSError tells it
        with pytest.raises(ValueError, match=r"a.parquet cannot be streamed .*ZeroDivisionError.*--input"):
            documents.count_documents(files[0])
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([]))
    with pytest.raises(ValueError, match=r"ConnectionError: no route\).*--input"):
        documents.hub_files(sources.OPENWEBTEXT)


# Going on


def interrupted(monkeypatch, at, error):
    """`prepare_shards` fails with `error` once `at` shards have been encoded."""
    encode, left = shard_build.encode_splits, iter([None] * at)

    def encode_or_fail(items, made, folder):
        found = encode(items, made, folder)
        next(left, error)
        if not left.__length_hint__() and not hasattr(encode_or_fail, "last"):
            encode_or_fail.last = True
            return found
        if hasattr(encode_or_fail, "last"):
            error()
        return found

    monkeypatch.setattr(shard_build, "encode_splits", encode_or_fail)


def book(folder, capsys=None):
    return CorpusSpec(folder, "A test.", "char", "go {name}", text=lambda _: of(STORY))


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "status", "words"),
    [
        (interrupt, 130, "stopped; finished shards stay; the same command goes on with the rest"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped; finished shards stay"),
        (no_space, 2, "error: the disk is full"),
    ],
    ids=["Ctrl-C", "SIGTERM", "full disk"],
)
def test_finished_shards_stay_and_are_not_made_again(tmp_path, monkeypatch, capsys, stop, status, words):
    prepare_shards(text_job(), tmp_path / "whole", Worker())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 3, stop)
        assert main(book(out), ["--shards=7"]) == status
    assert words in capsys.readouterr().err
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("train_*.bin")}
    assert sorted(made) == [f"train_{i:05d}.bin" for i in range(3)]
    assert not list(out.glob(".shards/part_*"))
    assert main(book(out), ["--shards=7"]) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made
    assert sums(out) == sums(tmp_path / "whole")
    assert "train_00000.bin to train_00006.bin, val.bin" in capsys.readouterr().out


def test_what_a_killed_worker_left_of_a_shard_goes_when_the_shard_is_made(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    for name in ("part_00000-dead", "part_00002-alive"):
        (tmp_path / ".shards" / name).mkdir()
    prepare_shards(text_job(), tmp_path, Worker(0, 3))
    assert [path.name for path in (tmp_path / ".shards").glob("part_*")] == ["part_00002-alive"]


def test_a_finished_corpus_is_told_and_not_made_again(tmp_path, monkeypatch, capsys):
    assert main(book(tmp_path), ["--shards=7"]) == 0
    told = capsys.readouterr().out
    (tmp_path / ".shards").mkdir()  # as who is killed at the very end leaves it
    (tmp_path / ".shards" / "plan.json").write_text("{}")
    monkeypatch.setattr(shard_build, "encode_splits", None)
    assert main(book(tmp_path), ["--shards=7", "--worker=2/3"]) == 0
    assert capsys.readouterr().out == told and not (tmp_path / ".shards").exists()


@pytest.mark.parametrize("name", ["train_00004.bin", ".shards/val_00004.bin", ".shards/shard_00004.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_not_whole_is_made_anew(tmp_path, name, damage):
    prepare_shards(text_job(), tmp_path / "whole", Worker())
    prepare_shards(text_job(), tmp_path / "out", Worker(1, 3))
    if damage == "gone":
        (tmp_path / "out" / name).unlink()
    else:
        os.truncate(tmp_path / "out" / name, 10)
    prepare_shards(text_job(), tmp_path / "out", Worker())
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_a_shard_of_another_worker_that_is_not_whole_is_named_and_not_used(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 2))
    os.truncate(tmp_path / "train_00003.bin", 10)
    with pytest.raises(ValueError, match=r"shard 3 .* is not whole now: run --worker 3/7"):
        prepare_shards(text_job(), tmp_path, Worker(0, 2))
    assert not (tmp_path / "meta.json").exists()
    prepare_shards(text_job(), tmp_path, Worker(3, 7))
    assert (tmp_path / "meta.json").exists()


def test_a_damaged_part_of_the_validation_split_is_found_and_made_anew(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 2))
    path = tmp_path / ".shards" / "val_00003.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"val_00003.bin is damaged: run the same command again"):
        prepare_shards(text_job(), tmp_path, Worker(0, 2))
    prepare_shards(text_job(), tmp_path, Worker())
    assert (tmp_path / "meta.json").exists()


def test_two_who_make_the_same_shard_do_not_harm_each_other(tmp_path, monkeypatch):
    """While a worker encodes its first shard, another with its number makes all of them, or the corpus."""
    prepare_shards(text_job(), tmp_path / "whole", Worker())
    for name, twin in (("shards", Worker(1, 2)), ("corpus", Worker())):
        encode = build.encode_splits

        def encode_twice(items, made, folder, name=name, twin=twin, encode=encode):
            monkeypatch.setattr(shard_build, "encode_splits", encode)
            found = encode(items, made, folder)
            prepare_shards(text_job(), tmp_path / name, twin)
            return found

        monkeypatch.setattr(shard_build, "encode_splits", encode_twice)
        found = prepare_shards(text_job(), tmp_path / name, Worker(1, 2))
        assert isinstance(found, ShardCount) == (name == "shards")
        prepare_shards(text_job(), tmp_path / name, Worker(0, 2))
        assert sums(tmp_path / name) == sums(tmp_path / "whole")


def test_workers_killed_at_random_moments_make_the_corpus_of_the_undisturbed_one():
    script = ROOT / "tests" / "faults" / "kill_prepare.py"
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked, so that kills come within the work")
    words = ["--kills", "6", "--kinds", "char", "--workers", "3"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= 6 and result["different"] == 0


# What does not belong together


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (text_job(n=6), "shards: 7, not 6"),
        (text_job(val_fraction=0.2), "val_fraction: 0.1, not 0.2"),
        (text_job(kind="gpt2"), "tokenizer: char, not gpt2"),
        (text_job(STORY + "x"), r"size: \d+, not \d+"),
    ],
    ids=["shards", "val_fraction", "tokenizer", "text"],
)
def test_a_preparation_that_differs_is_refused_and_changes_nothing(tmp_path, other, words):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    before = sums(tmp_path)
    with pytest.raises(ValueError, match=rf"shards of another preparation \({words}\).*begin anew: delete"):
        prepare_shards(other, tmp_path, Worker(2, 3))
    assert sums(tmp_path) == before
    prepare_shards(text_job(), tmp_path, Worker())
    with pytest.raises(ValueError, match=r"holds another corpus.*delete it first"):
        prepare_shards(other, tmp_path, Worker())


def test_a_text_of_the_same_size_with_another_letter_is_refused(tmp_path):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    with pytest.raises(ValueError, match=r"it has changed since"):
        prepare_shards(text_job("Ela" + STORY[3:]), tmp_path, Worker(0, 3))


def test_a_file_of_documents_with_another_end_is_refused(tmp_path):
    write_documents(tmp_path / "source")
    prepare_shards(document_job(tmp_path / "source"), tmp_path / "out", Worker(1, 3))
    path = tmp_path / "source" / "d.txt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"another preparation \(files: "):
        prepare_shards(document_job(tmp_path / "source"), tmp_path / "out", Worker(0, 3))


def test_shards_of_workers_that_made_different_plans_are_not_mixed(tmp_path):
    """Two begin at once, on texts of one size that differ; the last plan stays."""
    prepare_shards(text_job("Ela" + STORY[3:]), tmp_path / "a", Worker(0, 2))
    prepare_shards(text_job(), tmp_path / "b", Worker(1, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"shard 1 .* was made from another plan.*Begin anew: delete"):
        prepare_shards(text_job("Ela" + STORY[3:]), tmp_path / "b", Worker())
    assert not (tmp_path / "b" / "meta.json").exists()


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_00000.bin"])
def test_shards_never_replace_what_is_there(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"holds {name}.*delete it first"):
        prepare_shards(text_job(), tmp_path, Worker())
    assert sums(tmp_path) == {name: hashlib.sha256(b"mine").hexdigest()}


def test_another_corpus_is_kept_and_an_unfinished_one_is_not_overwritten(tmp_path):
    prepare_text(of(STORY), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds another corpus"):
        prepare_shards(text_job(), tmp_path / "whole", Worker())
    dataset.open_corpus(tmp_path / "whole", block_size=16)
    prepare_shards(text_job(), tmp_path / "out", Worker(1, 3))
    before = sums(tmp_path / "out")
    assert main(book(tmp_path / "out"), []) == 2
    assert sums(tmp_path / "out") == before


def test_training_on_an_unfinished_corpus_says_how_far_it_is(tmp_path):
    prepare_shards(text_job(), tmp_path / "data" / "book", Worker(1, 3))
    (tmp_path / "data" / "book" / "val.bin").write_bytes(b"as who is killed at the very end leaves it")
    with pytest.raises(
        ValueError, match=r"2 of 7 shards are there. Run the other workers.*--shards 7 --worker"
    ):
        dataset.open_corpus(tmp_path / "data" / "book", 8)
    with pytest.raises(ValueError, match=r"there is no corpus in") as caught:
        dataset.open_corpus(tmp_path / "data" / "nothing", 8)
    assert "prepared: book" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"asked": {}}', b"\xff", b"[" * 100_000])
def test_a_damaged_plan_is_named(tmp_path, data):
    prepare_shards(text_job(), tmp_path, Worker(1, 3))
    (tmp_path / ".shards" / "plan.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"plan.json is damaged .*delete"):
        prepare_shards(text_job(), tmp_path, Worker())
    with pytest.raises(ValueError, match=r"not finished: 2 of 0 shards"):
        dataset.open_corpus(tmp_path, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shards=7", "--worker=5/4"], "--worker 5/4: workers are counted from 0, so from 0/4 to 3/4"),
        (["--shards=7", "--worker=4/4"], "--worker 4/4: workers are counted from 0"),
        (["--shards=7", "--worker=0/0"], "--worker 0/0: give it as I/N"),
        (["--shards=7", "--worker=abc"], "--worker abc: give it as I/N"),
        (["--shards=7", "--worker="], "--worker : give it as I/N"),
        (["--shards=7", "--worker=-1/2"], "--worker -1/2: give it as I/N"),
        (["--worker=0/2"], "--worker makes a part of the shards: give --shards"),
        (["--shards=0"], "--shards is 0, and must be 1 to 100,000"),
        (["--shards=-3"], "--shards is -3"),
        (["--shards=100001"], "--shards is 100001"),
        (["--shards=900"], "--shards 900 is too many for 6,750 characters to train on: --shards 675 at most"),
        (["--shards=7", "--val_fraction=2"], "--val_fraction is 2.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message_and_leaves_nothing(tmp_path, capsys, words, message):
    assert main(book(tmp_path / "out"), words) == 2
    told = capsys.readouterr().err
    assert f"error: {message}" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_number_of_shards_that_is_proposed_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_plan, "MIN_SHARD_CHARS", 150)
    assert main(book(tmp_path), ["--shards=46"]) == 2
    assert "--shards 45 at most" in capsys.readouterr().err
    assert main(book(tmp_path), ["--shards=45"]) == 0
    assert len(list(tmp_path.glob("train_*.bin"))) == 45


def test_a_text_that_yields_a_shard_without_tokens_is_refused(tmp_path):
    """All of one word: its places to cut are at its end."""
    with pytest.raises(ValueError, match=r"shard 1 of 8 has 0 tokens to train on.*smaller --shards"):
        prepare_shards(text_job("x" * 400 + " " + "y" * 1600, "gpt2", 8, 0.5), tmp_path / "out", Worker())


def test_too_few_documents_for_the_shards_are_told(tmp_path):
    write_documents(tmp_path / "source")
    with pytest.raises(ValueError, match=r"--shards 200 is too many for 121 documents: --shards 121 at most"):
        prepare_shards(document_job(tmp_path / "source", 200), tmp_path / "out", Worker())
    assert not (tmp_path / "out").exists()


def test_a_stream_without_files_cannot_be_cut(tmp_path, capsys):
    stream = CorpusSpec(tmp_path, "A test.", "gpt2", "go", documents=lambda: iter([["a"]]))
    assert main(stream, ["--shards=2"]) == 2
    assert "error: --shards needs files whose documents can be counted" in capsys.readouterr().err


def test_the_script_of_openwebtext_makes_shards_of_files(tmp_path, capsys):
    write_documents(tmp_path / "source")
    recipe = runpy.run_path(str(ROOT / "data" / "openwebtext" / "prepare.py"))["RECIPE"]
    words = ["--input", str(tmp_path / "source"), "--val_fraction=0.2", "--out_dir", str(tmp_path / "out")]
    assert main(recipe, [*words, "--shards=5", "--worker=0/2"]) == 0
    assert "out: the shards of this worker are finished, 3 of 5 in all" in capsys.readouterr().out
    assert main(recipe, [*words, "--shards=5", "--worker=1/2"]) == 0
    assert "train_00000.bin to train_00004.bin, val.bin" in capsys.readouterr().out


def test_help_tells_how_workers_are_counted(capsys):
    with pytest.raises(SystemExit):
        main(book(Path()), ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "make only the shards k with k mod N = I, for an I from 0 to N-1" in told
