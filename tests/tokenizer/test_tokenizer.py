"""All tokenizers: ids, equality, streaming, tokenizer.json, nanoGPT's meta.pkl, and the benchmark."""

import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import PROPERTY, SAMPLE

from bench import data as bench_data
from fradique.tokenizer import meta_pkl, tokenizer
from fradique.tokenizer.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, StreamDecoder


def test_threads_do_not_change_the_ids(gpt2, trained):
    texts = [SAMPLE * i for i in range(12)]
    for tok in (gpt2, trained, CharTokenizer("".join(sorted(set(SAMPLE))))):
        expected = [tok.encode(text).tolist() for text in texts]
        assert [ids.tolist() for ids in tok.encode_batch(texts, 3)] == expected
        assert tok.encode_batch([], 3) == []


def test_ids_may_be_lists_arrays_tensors_or_empty(gpt2, trained):
    for tok in (gpt2, trained, CharTokenizer("abc")):
        ids = tok.encode("abc")
        forms = (ids.tolist(), tuple(ids.tolist()), ids, ids.astype(np.int64), torch.tensor(ids.tolist()))
        assert {tok.decode(form) for form in forms} == {"abc"}
        assert tok.decode([]) == "" == tok.decode(np.array([]))
        assert tok.encode("").tolist() == []


@pytest.mark.parametrize("ids", [[-1], [10**9], [0, 1 << 70], [0.5], ["a"], [None]])
def test_ids_outside_the_vocabulary_are_refused(gpt2, trained, ids):
    for tok in (gpt2, trained, CharTokenizer("abc")):
        with pytest.raises(ValueError, match=r"outside the vocabulary|must be integers"):
            tok.decode(ids)


def test_decoded_bytes_may_end_within_a_character(gpt2):
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    assert gpt2.decode_bytes(ids[:1]) == "🙂".encode()[: len(gpt2.decode_bytes(ids[:1]))]
    assert gpt2.decode(ids[:1]) == "\ufffd"


def test_tokenizers_with_equal_json_are_equal(gpt2, trained):
    assert gpt2 == GPT2Tokenizer()
    assert trained == BPETokenizer(trained.merges)
    assert trained != BPETokenizer(trained.merges[:-1])
    assert CharTokenizer("ab") == CharTokenizer("ab") != CharTokenizer("ba")
    assert CharTokenizer("ab") != gpt2 != "gpt2"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(gpt2)


def test_tokenizer_names_are_parsed():
    assert tokenizer.parse_spec("char") == "char"
    assert tokenizer.parse_spec("gpt2") == "gpt2"
    assert tokenizer.parse_spec("bpe:4096") == ("bpe", 4096)


@pytest.mark.parametrize(
    "spec", ["", "bpe", "bpe:", "bpe:-1", "bpe:257", "bpe:1000001", "bpe:4k", "word", "char "]
)
def test_unknown_tokenizer_names_are_refused(spec):
    with pytest.raises(ValueError, match=r"unknown tokenizer|out of range"):
        tokenizer.parse_spec(spec)


# Streaming


@PROPERTY
@given(st.lists(st.integers(0, 300), max_size=40), st.lists(st.integers(1, 4), max_size=40))
def test_streamed_text_equals_the_decoded_text(gpt2, ids, steps):
    stream, start, text = StreamDecoder(gpt2), 0, ""
    for step in [*steps, len(ids)]:
        text += stream.feed(ids[start : start + step])
        start += step
    assert text + stream.flush() == gpt2.decode(ids)


def test_a_stream_returns_only_complete_characters(trained):
    stream = StreamDecoder(trained)
    ids = trained.encode("日本🙂é")
    assert "\ufffd" not in "".join(stream.feed([i]) for i in ids)
    assert stream.flush() == ""
    assert stream.feed(ids[:1]) == "" and stream.flush() == "\ufffd"
    assert stream.feed(ids) == "日本🙂é"  # the stream was reset by flush


# Files


def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path, gpt2, trained):
    for i, tok in enumerate((gpt2, trained, CharTokenizer('\n"\\é🙂\u2028'), CharTokenizer("\x00"))):
        path = tmp_path / f"{i}.json"
        tokenizer.save_tokenizer(tok, path)
        saved = path.read_bytes()
        loaded = tokenizer.load_tokenizer(path)
        assert loaded == tok and type(loaded) is type(tok)
        tokenizer.save_tokenizer(loaded, path)
        assert path.read_bytes() == saved
        assert json.loads(saved)["kind"] == tok.kind
    assert len(list(tmp_path.iterdir())) == 4  # no temporary files are left


def test_a_failed_save_keeps_the_old_file_only(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer.save_tokenizer(CharTokenizer("ab"), path)

    def refuse(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"disk is full"):
        tokenizer.save_tokenizer(CharTokenizer("cd"), path)
    assert tokenizer.load_tokenizer(path) == CharTokenizer("ab")
    assert list(tmp_path.iterdir()) == [path]


def damaged_files() -> list[bytes]:
    model = BPETokenizer([("a", "b"), ("ab", "c")]).to_json()
    texts = ["", "[]", "null", "{", "1e999", "[" * 100_000, '{"format": 1}', '"char"']
    values = [
        {"format": 2, "kind": "gpt2"},
        {"format": True, "kind": "gpt2"},
        {"format": 1, "kind": "word"},
        {"format": 1, "kind": ["char"]},
        {"format": 1, "kind": "char"},
        {"format": 1, "kind": "char", "chars": ""},
        {"format": 1, "kind": "char", "chars": "aa"},
        {"format": 1, "kind": "char", "chars": ["a", "b"]},
        {"format": 1, "kind": "char", "chars": "a\ud800"},
        {"format": 1, "kind": "char", "chars": "ab", "more": 1},
        {"format": 1, "kind": "gpt2", "chars": "ab"},
        {"format": 1, "kind": "bpe"},
        {"format": 1, "kind": "bpe", "model": {"model": {"merges": 3}}},
        {"format": 1, "kind": "bpe", "model": {"model": {"merges": ["ab"]}}},
        {"format": 1, "kind": "bpe", "model": {"model": {"merges": [["a", "b"]]}}},
        {"format": 1, "kind": "bpe", "model": {"model": {"merges": [["a", 1]]}}},
        {"format": 1, "kind": "bpe", "model": {"model": {"merges": [["a", ["b"]]]}}},
        model | {"model": model["model"] | {"normalizer": {"type": "Lowercase"}}},
        model | {"model": model["model"] | {"added_tokens": []}},
    ]
    return [
        *(text.encode() for text in texts),
        *(json.dumps(value).encode() for value in values),
        b"\xff\xfe{}",
        b"\x80",
    ]


@pytest.mark.parametrize("data", damaged_files(), ids=lambda data: data[:60].decode("latin-1"))
def test_a_damaged_or_malicious_file_is_refused(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used as a tokenizer: "):
        tokenizer.load_tokenizer(path)


def test_a_file_above_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b" " * 1001)
    with pytest.raises(ValueError, match=r"tokenizer\.json is larger than"):
        tokenizer.load_tokenizer(path)


# nanoGPT's meta.pkl


def write_meta(path: Path, chars: str, **changes) -> Path:
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: i for i, char in enumerate(chars)},
    }
    path.write_bytes(pickle.dumps(meta | changes))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_nanogpt_meta_pkl_is_read(tmp_path, protocol):
    chars = "\n !$&',-.3:;?ABCé🙂"
    meta = {
        "stoi": {char: i for i, char in reversed(list(enumerate(chars)))},
        "itos": {i: chars[i] for i in (3, *range(3), *range(4, len(chars)))},
        "vocab_size": len(chars),
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta, protocol=protocol))
    assert meta_pkl.read_meta_pkl(path) == CharTokenizer(chars)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_meta_pkl_runs_no_code(tmp_path):
    path, touched = tmp_path / "meta.pkl", tmp_path / "touched"
    for meta in (Malicious(touched), {"vocab_size": Malicious(touched), "stoi": {}, "itos": {}}):
        path.write_bytes(pickle.dumps(meta))
        with pytest.raises(ValueError, match=r"meta\.pkl is not .* imports"):
            meta_pkl.read_meta_pkl(path)
        assert not touched.exists()
        pickle.loads(path.read_bytes())  # pickle itself runs the code
        assert touched.exists()
        touched.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 3},
        {"vocab_size": "2"},
        {"stoi": None},
        {"stoi": {"ab": 0, "c": 1}},
        {"stoi": {"a": 0, "b": "1"}},
        {"stoi": {"a": 0, "b": True}},
        {"stoi": {"a": 1, "b": 0}},
        {"stoi": {"a": 0, "b": 2}, "itos": {0: "a", 2: "b"}},
        {"stoi": {"a": 0, "\ud800": 1}, "itos": {0: "a", 1: "\ud800"}},
        {"itos": ["a", "b"]},
    ],
)
def test_an_inconsistent_meta_pkl_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"meta\.pkl is not"):
        meta_pkl.read_meta_pkl(write_meta(tmp_path / "meta.pkl", "ab", **changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"not a pickle",
        b"]" * 100,
        pickle.dumps([1, 2]),
        b"Nr\xff\xff\xff\x7f.",
        b"(" * 10_000 + b".",
    ],
    ids=lambda data: str(data[:20]),
)
def test_a_damaged_meta_pkl_is_refused_without_using_memory(tmp_path, data):
    path = tmp_path / "meta.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"meta\.pkl is not"):
        meta_pkl.read_meta_pkl(path)


# The benchmark and its sample text


def test_the_benchmark_measures_all_three_tokenizers():
    result = bench_data.measure_tokenizers([SAMPLE * 50, SAMPLE * 20], threads=2, rounds=1)
    assert all(result[kind]["mb_s"] > 0 for kind in ("char", "gpt2", "bpe"))
    assert "tiktoken" in bench_data.table(result)
    json.dumps(result)


def test_the_sample_text_has_all_unicode_categories():
    assert {unicodedata.category(char)[0] for char in SAMPLE} >= {"L", "N", "P", "Z", "C", "S"}


@pytest.mark.parametrize("prompt", ["a\r\nb", "a\r\n\r\nb", "\r\n", "a\nb\r\n"])
def test_windows_line_ends_of_a_prompt_fit_the_vocabulary(prompt):
    without = CharTokenizer("\nab")
    assert without.decode(tokenizer.encode_prompt(without, prompt)) == prompt.replace("\r\n", "\n")
    for other in (CharTokenizer("\n\rab"), GPT2Tokenizer()):
        assert other.decode(tokenizer.encode_prompt(other, prompt)) == prompt
    with pytest.raises(ValueError, match=r"character '.r'"):  # it ends no line
        tokenizer.encode_prompt(without, "a\rb")
