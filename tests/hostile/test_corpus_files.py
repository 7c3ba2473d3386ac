"""Damaged and malicious corpora: meta.json, token files, and documents that decompress to a huge size."""

import gzip
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_files import edit_json, error_of

from fradique.data import dataset, documents

DEEPLY_NESTED = b"[" * 100_000
MANY_DIGITS = b"9" * 100_000


@pytest.mark.parametrize(
    "name", ["../val.bin", "..", ".", "", "a/../val.bin", "a\0b", "..\\val.bin", "C:x", 7, None]
)
def test_a_corpus_cannot_name_a_file_outside_its_folder(corpus, name):
    (corpus.parent / "val.bin").write_bytes((corpus / "val.bin").read_bytes())
    edit_json(corpus / "meta.json", "splits", "val", "shards", 0, "file", to=name)
    assert "damaged" in error_of(dataset.open_corpus, corpus, 8, match=corpus / "meta.json")


def test_a_corpus_cannot_name_a_file_by_its_absolute_path(corpus):
    edit_json(corpus / "meta.json", "splits", "val", "shards", 0, "file", to=str(corpus / "val.bin"))
    error_of(dataset.open_corpus, corpus, 8, match="meta.json is damaged")


def test_a_symlink_in_a_corpus_is_followed(corpus):
    (corpus / "train.bin").rename(corpus.parent / "elsewhere.bin")
    (corpus / "train.bin").symlink_to(corpus.parent / "elsewhere.bin")
    assert dataset.open_corpus(corpus, 8).train.tokens == 300


@pytest.mark.parametrize("tokens", [-1, True, 10**30, 1.5, "300", None, [], math.nan])
def test_an_invalid_number_of_tokens_is_refused(corpus, tokens):
    edit_json(corpus / "meta.json", "splits", "train", "shards", 0, "tokens", to=tokens)
    error_of(dataset.open_corpus, corpus, 8, match="meta.json")


@pytest.mark.parametrize(
    "keys", [("format",), ("dtype",), ("splits",), ("splits", "val"), ("splits", "val", "shards")]
)
@pytest.mark.parametrize("value", [[], {}, None, "x", 3, -1, math.inf])
def test_a_value_of_the_wrong_type_in_meta_json_is_refused(corpus, keys, value):
    edit_json(corpus / "meta.json", *keys, to=value)
    error_of(dataset.open_corpus, corpus, 8, match=corpus / "meta.json")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xef\xbb\xbf{}", b"[]", b"NaN", b"1e999999999", DEEPLY_NESTED, MANY_DIGITS],
    ids=lambda data: str(data[:20]),
)
@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json"])
def test_a_file_that_is_not_a_json_object_is_refused(corpus, name, data):
    (corpus / name).write_bytes(data)
    error_of(dataset.open_corpus, corpus, 8, match=corpus / name)


def test_the_last_value_of_a_repeated_key_is_used(corpus):
    text = (corpus / "meta.json").read_text()
    (corpus / "meta.json").write_text(text.replace('"format"', '"format": 7, "format"'))
    assert dataset.open_corpus(corpus, 8).train.tokens == 300


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc", "not a whole number of uint16 tokens"),
        (b"", "too few"),
        (b"\xff\xff" * 99, "token 65535 at position 0 is not in the vocabulary"),
    ],
    ids=["odd size", "empty", "unknown tokens"],
)
def test_an_invalid_token_file_is_refused(corpus, data, reason):
    (corpus / "meta.json").unlink()
    (corpus / "train.bin").write_bytes(data)
    assert reason in error_of(dataset.open_corpus, corpus, 8, match=corpus)


def test_a_compressed_jsonl_line_is_limited_in_length(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 16)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (1 << 24) + b'"}'))
    error_of(lambda: list(documents.local_documents([path])), match=f"{path}, line 1 is longer than")


def test_parquet_with_invalid_utf8_is_refused(tmp_path):
    offsets = pa.py_buffer(np.array([0, 3], np.int32).tobytes())
    invalid = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xffb")])
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": invalid}), path)
    error_of(lambda: list(documents.local_documents([path])), match="d.parquet cannot be read")
