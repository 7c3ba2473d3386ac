"""Splits and corpora: evaluation batches, opening a corpus, and damaged or missing files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from corpus_helpers import STORY, make_split, read_windows, text_of
from support import make_text, write_corpus

from fradique.data import dataset
from fradique.data.build import prepare_text
from fradique.data.dataset import open_corpus
from fradique.data.windows import Window
from fradique.tokenizer.tokenizer import CharTokenizer, GPT2Tokenizer, save_tokenizer


def test_ranks_divide_the_windows_without_gap_or_overlap(tmp_path):
    split = make_split(tmp_path, [103, 57])
    windows = split.all_windows(10)
    single = sorted(y.flatten().tolist() for _, y in split.batches(windows, 4))
    divided = sorted(y.flatten().tolist() for rank in range(3) for _, y in split.batches(windows, 4, rank, 3))
    assert single == divided


def test_a_token_outside_the_vocabulary_is_reported(tmp_path):
    split = make_split(tmp_path, [50, 50])
    split.vocab_size = 73
    with pytest.raises(
        ValueError, match=r"train_00001.bin: token 99 at position 49 is not in the vocabulary of 73"
    ):
        split.check_ids()
    with pytest.raises(ValueError, match=r"train_00001.bin: token 79 at position 29"):
        read_windows(split, [Window(1, 20, 9)])


# Opening a corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "data" / "book", make_text(300))


def test_a_corpus_has_its_tokenizer_and_text_size(corpus):
    opened = open_corpus(corpus, block_size=16)
    text = make_text(300)
    cut = int(len(text) * 0.9)
    assert opened.tokenizer.decode(np.asarray(opened.train.token_files[0])) == text[:cut]
    assert opened.val.count_text_bytes(opened.tokenizer) == len(text[cut:].encode())


def test_text_bytes_are_counted_from_tokens_without_metadata(corpus):
    opened = open_corpus(corpus, block_size=16)
    opened.val.text_bytes = None
    text = make_text(300)
    assert opened.val.count_text_bytes(opened.tokenizer) == len(text[int(len(text) * 0.9) :].encode())


def test_numbered_token_files_are_read_in_order(corpus):
    ids = np.fromfile(corpus / "train.bin", dtype="<u2")
    (corpus / "train.bin").unlink()
    (corpus / "meta.json").unlink()
    ids[:100].tofile(corpus / "train_00000.bin")
    ids[100:].tofile(corpus / "train_00001.bin")
    opened = open_corpus(corpus, block_size=16)
    assert [len(s) for s in opened.train.token_files] == [100, len(ids) - 100]
    assert np.array_equal(np.concatenate(opened.train.token_files), ids)


def test_uint32_tokens_are_read(corpus):
    meta = json.loads((corpus / "meta.json").read_text())
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        ids.astype("<u4").tofile(corpus / f"{split}.bin")
    (corpus / "meta.json").write_text(json.dumps(meta | {"dtype": "uint32"}))
    opened = open_corpus(corpus, block_size=16)
    assert opened.train.token_files[0].dtype == np.uint32
    assert opened.tokenizer.decode(np.asarray(opened.train.token_files[0][:50])) == make_text(300)[:50]


def test_the_error_for_a_missing_corpus_shows_the_command(tmp_path):
    folder = tmp_path / "data" / "eca_char"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    with pytest.raises(ValueError, match=r"make it with: python .*eca_char/prepare.py"):
        open_corpus(folder, 8)
    with pytest.raises(ValueError, match=r"no corpus in .*nothing.*can be prepared: eca_char.*data/custom"):
        open_corpus(folder.parent / "nothing", 8)


def test_a_corpus_too_small_for_a_block_is_refused(corpus):
    with pytest.raises(ValueError, match=r"the val split has \d+ tokens, too few for one block of 5000"):
        open_corpus(corpus, block_size=5000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]),
            "bytes where meta.json says",
        ),
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-1]),
            "bytes where meta.json says",
        ),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_a_damaged_file_is_reported(corpus, damage, message):
    damage(corpus)
    with pytest.raises((ValueError, OSError), match=message):
        open_corpus(corpus, block_size=8)


def test_meta_json_cannot_name_a_file_outside_the_folder(corpus):
    meta = json.loads((corpus / "meta.json").read_text())
    meta["splits"]["train"]["shards"][0]["file"] = "../book/train.bin"
    (corpus / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="damaged"):
        open_corpus(corpus, block_size=8)


def test_half_a_token_is_detected_without_metadata(corpus):
    (corpus / "meta.json").unlink()
    (corpus / "train.bin").write_bytes((corpus / "train.bin").read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"train.bin has \d+ bytes, which is not a whole number of uint16 tokens"
    ):
        open_corpus(corpus, block_size=8)


def test_too_short_files_are_reported_by_their_longest(tmp_path):
    """A window lies in one file, so the tokens of all files together do not help."""
    for split in ("train", "val"):
        for i in range(10):
            np.zeros(50, "<u2").tofile(tmp_path / f"{split}_{i:05d}.bin")
    with pytest.raises(ValueError, match=r"longest file has 50 tokens, .*--block_size=49 at most"):
        open_corpus(tmp_path, 50)
    for path in tmp_path.glob("*.bin"):
        np.zeros(1, "<u2").tofile(path)
    with pytest.raises(ValueError, match=r"use a longer text$"):
        open_corpus(tmp_path, 1)


def test_large_vocabularies_without_meta_json_are_refused(tmp_path, monkeypatch):
    """Their tokens are uint32: read as uint16 they would be other tokens of the vocabulary."""
    for split in ("train", "val"):
        np.zeros(50, "<u4").tofile(tmp_path / f"{split}.bin")
    monkeypatch.setattr(dataset, "GPT2Tokenizer", lambda: SimpleNamespace(vocab_size=100_000))
    with pytest.raises(ValueError, match=r"has no meta\.json, and its vocabulary is too large"):
        open_corpus(tmp_path, 8)


@pytest.mark.parametrize("chars", ["fedcba", "abcdefg"], ids=["order", "size"])
@pytest.mark.parametrize("old_version", [False, True])
def test_another_tokenizer_beside_a_corpus_is_refused(tmp_path, chars, old_version):
    prepare_text(text_of("abcdef" * 100), tmp_path)
    save_tokenizer(CharTokenizer(chars), tmp_path / "tokenizer.json")
    if old_version:  # which wrote no checksum: only the kind and the size are known
        meta = json.loads((tmp_path / "meta.json").read_text())
        del meta["tokenizer_sha256"]
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    if old_version and len(chars) == 6:
        assert open_corpus(tmp_path, 8).tokenizer.vocab_size == 6
        return
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer with which the corpus"):
        open_corpus(tmp_path, 8)


def test_ids_of_characters_are_not_read_as_gpt2_tokens(tmp_path):
    prepare_text(text_of("abcdef" * 100), tmp_path)
    save_tokenizer(GPT2Tokenizer(), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is not the tokenizer with which the corpus was made"):
        open_corpus(tmp_path, 8)


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_a_missing_tokenizer_is_reported_with_what_to_do(tmp_path, kind):
    prepare_text(text_of(STORY), tmp_path, kind)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing: .* or prepare the corpus again"):
        open_corpus(tmp_path, 4)
