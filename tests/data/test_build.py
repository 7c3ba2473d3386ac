"""Corpora of texts and documents, compared with simple code that keeps all tokens in memory."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import CORPORA, STORY, file_names, needs_corpora, read_ids, text_job, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fradique.data import build
from fradique.data.build import prepare_documents, prepare_text
from fradique.data.shard_build import Worker, prepare_shards
from fradique.data.text import Text, files_text
from fradique.io import folder_lock
from fradique.tokenizer import tokenizer


@settings(derandomize=True, deadline=None, max_examples=20)
@given(n=st.integers(20, 3000))
def test_the_split_is_at_the_same_character_as_in_nanogpt(tmp_path_factory, n):
    folder = tmp_path_factory.getbasetemp() / "split"
    meta = prepare_text(text_of("ab" * n, 97), folder)
    assert meta["splits"]["train"]["tokens"] == int(2 * n * 0.9)
    assert meta["splits"]["val"]["tokens"] == 2 * n - int(2 * n * 0.9)


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.05])
def test_token_files_contain_the_tokens_of_each_split(tmp_path, kind, val_fraction):
    meta = prepare_text(text_of(STORY, 33), tmp_path, kind, val_fraction)
    encoder = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    cut = int(len(STORY) * (1 - val_fraction))
    for split, split_text in (("train", STORY[:cut]), ("val", STORY[cut:])):
        ids = read_ids(tmp_path, split)
        if kind == "char":
            alphabet = sorted(set(STORY))
            assert ids.tolist() == [alphabet.index(char) for char in split_text]
        assert ids.tolist() == encoder.encode(split_text).tolist()
        assert encoder.decode(ids) == split_text
        data = (tmp_path / f"{split}.bin").read_bytes()
        shard = {"file": f"{split}.bin", "tokens": len(ids), "bytes": len(split_text.encode())}
        shard["sha256"] = hashlib.sha256(data).hexdigest()
        assert meta["splits"][split] == {"tokens": len(ids), "bytes": shard["bytes"], "shards": [shard]}
    assert json.loads((tmp_path / "meta.json").read_text(encoding="utf-8")) == meta
    expected = {"format": 1, "dtype": "uint16", "vocab_size": encoder.vocab_size, "tokenizer": encoder.kind}
    assert meta.items() >= expected.items() and meta["source"] == "a test"
    assert file_names(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_large_vocabulary_is_written_as_uint32(tmp_path):
    string = "".join(chr(i) for i in [*range(0xD800), *range(0xE000, 0x14000)])
    meta = prepare_text(text_of(string * 2, 10_000), tmp_path)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(string) > 65_536
    assert read_ids(tmp_path, "train")[: len(string)].tolist() == list(range(len(string)))


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:300"])
def test_the_same_text_gives_the_same_files(tmp_path, kind):
    for name, chunk in (("a", 10), ("b", 1000)):
        prepare_text(text_of(STORY, chunk), tmp_path / name, kind)
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@needs_corpora
@pytest.mark.parametrize(("kind", "train", "val"), [("char", 1003854, 111540), ("gpt2", 301966, 36059)])
def test_shakespeare_has_the_token_counts_of_nanogpt(tmp_path, kind, train, val):
    meta = prepare_text(files_text([CORPORA / "shakespeare.txt"], ""), tmp_path, kind)
    assert (meta["splits"]["train"]["tokens"], meta["splits"]["val"]["tokens"]) == (train, val)
    assert meta["vocab_size"] == {"char": 65, "gpt2": 50257}[kind]


# Documents


DOCS = ["Um gato.", "", "Dois gatos\r\ne uma lua — 🙂.", "x" * 5000, "<|endoftext|> é texto."]


def reference_splits(docs: list[str], val_fraction: float) -> dict[str, list[int]]:
    """The tokens of both splits; `uniform_hash` chooses the split of each document."""
    gpt2, splits = tokenizer.GPT2Tokenizer(), {"train": [], "val": []}
    for index, doc in enumerate(docs):
        split = "val" if build.uniform_hash(index) < val_fraction else "train"
        splits[split] += [*gpt2.encode(doc).tolist(), 50256]
    return splits


def test_each_document_ends_with_end_of_text(tmp_path):
    docs = DOCS * 40
    meta = prepare_documents(([doc] for doc in docs), "a test", tmp_path, val_fraction=0.2)
    for split, ids in reference_splits(docs, 0.2).items():
        assert read_ids(tmp_path, split).tolist() == ids
    assert sum(meta["splits"][split]["bytes"] for split in ("train", "val")) == len("".join(docs).encode())
    encoder = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    val = meta["splits"]["val"]
    literal = "".join(doc for i, doc in enumerate(docs) if build.uniform_hash(i) < 0.2).count("<|endoftext|>")
    token_bytes = encoder.byte_lengths()[read_ids(tmp_path, "val")].sum()
    assert token_bytes + literal * len("<|endoftext|>") == val["bytes"]


def test_max_documents_keeps_the_first_in_the_same_splits(tmp_path):
    docs = [f"documento {i}" for i in range(300)]
    prepare_documents(([doc] for doc in docs), "", tmp_path, val_fraction=0.2, max_documents=100)
    assert read_ids(tmp_path, "val").tolist() == reference_splits(docs[:100], 0.2)["val"]


def test_the_validation_split_has_about_the_given_fraction():
    fraction = np.mean([build.uniform_hash(i) < 0.0005 for i in range(400_000)])
    assert abs(fraction - 0.0005) < 0.00015
    assert len({build.uniform_hash(i) for i in range(1000)}) == 1000


def test_too_few_documents_for_a_validation_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"val split has 0 tokens.*--val_fraction"):
        prepare_documents([["a b c"]], "", tmp_path)


# Errors and interruptions


@pytest.mark.parametrize(
    ("string", "message"), [("", "is empty"), ("a", "too small"), ("ab" * 4, "val split has 1 ")]
)
def test_a_text_too_small_for_a_block_is_refused(tmp_path, string, message):
    with pytest.raises(ValueError, match=message):
        prepare_text(text_of(string), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_small_validation_split_causes_a_note(tmp_path, capsys):
    prepare_text(text_of("ab" * 50), tmp_path)
    assert "validation split has only 10 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_validation_fraction_outside_0_to_1_is_refused(tmp_path, val_fraction):
    with pytest.raises(ValueError, match=r"--val_fraction"):
        prepare_text(text_of(STORY), tmp_path, val_fraction=val_fraction)
    with pytest.raises(ValueError, match=r"--val_fraction"):
        prepare_documents([["a"]], "", tmp_path, val_fraction=val_fraction)


def test_an_error_leaves_the_old_corpus_unchanged(tmp_path):
    prepare_text(text_of(STORY), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing_chunks():
        yield STORY
        raise ValueError("broken")

    for call in (
        lambda: prepare_text(Text("", 1, failing_chunks), tmp_path),
        lambda: prepare_documents(([piece] for piece in failing_chunks()), "", tmp_path, val_fraction=0.5),
    ):
        with pytest.raises(ValueError, match=r"broken"):
            call()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_corpus_replaces_all_files_of_the_old_one(tmp_path):
    prepare_shards(text_job(n=2), tmp_path, Worker())
    assert (tmp_path / "train_00001.bin").exists()
    (tmp_path / "other.bin").write_text("mine")
    prepare_text(text_of(STORY), tmp_path)
    assert file_names(tmp_path) == ["meta.json", "other.bin", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "val.bin", "train_00003.bin"])
def test_files_that_prepare_has_not_made_are_not_replaced(tmp_path, name):
    """For example those of a model of Hugging Face, or of a corpus of nanoGPT."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"contains {name}, which prepare\.py has not made: move it"):
        prepare_text(text_of(STORY), tmp_path)
    assert file_names(tmp_path) == [name] and (tmp_path / name).read_text() == "{}"


def test_an_installation_that_was_killed_can_be_repeated(tmp_path):
    prepare_shards(text_job(n=2), tmp_path, Worker())

    def kill(path, target):
        if target == tmp_path / "val.bin":
            os._exit(9)
        return replace(path, target)

    replace = Path.replace
    if (child := os.fork()) == 0:
        Path.replace = kill
        prepare_text(text_of(STORY), tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / build.INSTALLING).exists() and not (tmp_path / "meta.json").exists()
    prepare_text(text_of(STORY), tmp_path)
    assert file_names(tmp_path) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", ["train_7.bin", "val_1.bin", "train_00003.bin"])
def test_a_file_beside_a_corpus_that_is_not_its_own_is_kept(tmp_path, name):
    """Only the files that meta.json lists are replaced."""
    prepare_text(text_of(STORY), tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"contains {name}, which prepare\.py has not made"):
        prepare_text(text_of(STORY), tmp_path)
    assert (tmp_path / name).read_text() == "mine" and (tmp_path / "meta.json").exists()


@pytest.mark.parametrize("name", build.FILES_OF_MODELS)
def test_the_folder_of_a_run_or_a_model_is_refused(tmp_path, name):
    """Nothing in it is to be deleted: its tokenizer.json belongs to the model."""
    for file in (name, "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match="the folder of a run or a model: choose another") as caught:
        prepare_text(text_of(STORY), tmp_path)
    assert name in str(caught.value) and file_names(tmp_path) == sorted([name, "tokenizer.json"])


def test_an_interrupted_installation_leaves_no_corpus(tmp_path, monkeypatch):
    prepare_text(text_of(STORY), tmp_path)
    replace = Path.replace

    def interrupt_at_meta(path, target):
        if path.name == "meta.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupt_at_meta)
    with pytest.raises(KeyboardInterrupt):
        prepare_text(text_of(STORY), tmp_path)
    assert file_names(tmp_path) == []


def test_the_tokenizer_is_installed_before_the_token_files(tmp_path, monkeypatch):
    replace, order = Path.replace, []

    def recording_replace(path, target):
        if target.parent == tmp_path and target.name != build.INSTALLING:
            order.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recording_replace)
    prepare_text(text_of(STORY), tmp_path)
    assert order == ["tokenizer.json", "val.bin", "train.bin", "meta.json"]


def test_a_text_that_changes_between_passes_is_refused(tmp_path):
    lengths = iter([1000, 1001])
    with pytest.raises(ValueError, match=r"changed while it was read"):
        prepare_text(Text("", 1, lambda: iter(["a" * next(lengths)])), tmp_path)


def test_only_temporary_folders_of_dead_processes_are_removed(tmp_path):
    dead, live, new, old = (tmp_path / f".prepare-{name}" for name in ("dead", "live", "new", "old"))
    for folder in (dead, live, new, old):
        folder.mkdir()
        (folder / "train.bin").write_text("half")
    (dead / folder_lock.LOCK_FILE).write_text("{}")
    os.utime(old, (1e9, 1e9))  # an old folder without a lock file
    lock = folder_lock.FolderLock(live)
    prepare_text(text_of(STORY), tmp_path)
    assert not dead.exists() and not old.exists()
    assert (live / "train.bin").exists() and (new / "train.bin").exists()
    lock.release()


def test_an_out_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "corpus").write_text("x")
    with pytest.raises(ValueError, match=r"corpus is a file, not a folder"):
        prepare_text(text_of(STORY), tmp_path / "corpus")
