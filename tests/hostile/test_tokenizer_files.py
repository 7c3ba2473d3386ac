"""Damaged and malicious tokenizer.json files."""

import json

import pytest
from damaged_files import error_of

from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers


@pytest.mark.parametrize(
    "merges",
    [
        [["a", "b"], ["a", "b"]],
        [["ab", "c"]],
        [["a", "ab"], ["a", "b"]],
        [["", ""]],
        [["a", ""]],
        [["a"]],
        ["ab", "abc"],
        [["a", 1]],
        {"a": "b"},
        None,
        7,
    ],
)
def test_merges_that_make_no_new_token_are_refused(tmp_path, merges):
    content = tokenizers.train_bpe(["aa ab aab aabb"], 259).to_json()
    content["model"]["model"]["merges"] = merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    error_of(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", match=tmp_path / "tokenizer.json")


@pytest.mark.parametrize("token_id", [-1, 3, 10**9, 1.5, None, "0", 10**30])
def test_ids_that_are_not_0_to_n_are_refused(tmp_path, token_id):
    content = tokenizers.train_bpe(["aa ab aab aabb"], 259).to_json()
    content["model"]["model"]["vocab"]["a"] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    error_of(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", match="contradict")


def test_ten_million_merges_are_refused_before_they_are_applied():
    error_of(bpe.token_bytes, [("a", "b")] * 10_000_000, match="out of range")


@pytest.mark.parametrize(
    "kind", ["x" * 10_000, [["x"] * 99] * 99, None, 7, {"char": 1}], ids=lambda kind: str(kind)[:20]
)
def test_an_unknown_kind_of_tokenizer_gives_a_short_message(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": kind}))
    error_of(tokenizers.load_tokenizer, tmp_path / "tokenizer.json", match="its kind is")
