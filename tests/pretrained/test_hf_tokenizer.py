"""The tokenizer of a folder in Hugging Face's layout: GPT-2's, that of an export, or one that is refused."""

import json

import pytest

from fradique.pretrained.export import tokenizer_to_hf
from fradique.pretrained.hf_tokenizer import read_hf_tokenizer
from fradique.pretrained.hub import CONFIG_FILES
from fradique.tokenizer import bpe
from fradique.tokenizer.tokenizer import CharTokenizer, GPT2Tokenizer, save_tokenizer, train_bpe

GPT2 = GPT2Tokenizer()
GPT2_JSON = bpe.to_hf_json(GPT2.merges)
VOCAB = GPT2_JSON["model"]["vocab"] | {"<|endoftext|>": 50256}
MERGES_TXT = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in GPT2.merges)
OWN = {
    "char": CharTokenizer("abc"),
    "bpe": train_bpe(["uma casa, um gato, uma casa, um gato"], 270),
    "gpt2": GPT2,
    "gpt2 without separator": GPT2Tokenizer(None),
    "gpt2 with another separator": GPT2Tokenizer("</s>"),
}


def write(folder, **files):
    """Write files; a name is without its ending."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def error_of(folder, vocab_size=50257):
    with pytest.raises(ValueError) as caught:
        read_hf_tokenizer(folder, vocab_size)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def with_vocab(vocab):
    return GPT2_JSON | {"model": GPT2_JSON["model"] | {"vocab": vocab}}


def write_export(folder, tokenizer):
    """The tokenizer files that `export_model` writes."""
    save_tokenizer(tokenizer, folder / "fradique_tokenizer.json")
    write(folder, tokenizer=tokenizer_to_hf(tokenizer))


# Exports of Fradique


@pytest.mark.parametrize("kind", OWN)
def test_an_export_has_its_own_tokenizer(tmp_path, kind):
    write_export(tmp_path, OWN[kind])
    assert read_hf_tokenizer(tmp_path, 50304) == OWN[kind]


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("place", ["added_tokens", "vocab", "special_tokens_map", "tokenizer_config"])
def test_a_token_added_to_an_export_is_refused(tmp_path, kind, place):
    write_export(tmp_path, OWN[kind])
    content = tokenizer_to_hf(OWN[kind])
    if place == "added_tokens":
        content["added_tokens"].append({"id": OWN[kind].vocab_size, "content": "<|user|>"})
    elif place == "vocab":
        content["model"]["vocab"]["<|user|>"] = OWN[kind].vocab_size
    else:
        write(tmp_path, **{place: {"additional_special_tokens": ["<|user|>"]}})
    write(tmp_path, tokenizer=content)
    assert "adds 1 tokens to those of its model" in error_of(tmp_path)


# GPT-2's vocabulary


def test_gpt2s_own_files_have_its_tokenizer(tmp_path):
    special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    write(tmp_path, tokenizer=GPT2_JSON, vocab=VOCAB, special_tokens_map=special)
    write(tmp_path, tokenizer_config={"model_max_length": 1024, "add_prefix_space": False} | special)
    (tmp_path / "merges.txt").write_text(MERGES_TXT, encoding="utf-8")
    assert read_hf_tokenizer(tmp_path, 50257) == GPT2
    (tmp_path / "tokenizer.json").unlink()
    assert read_hf_tokenizer(tmp_path, 50257) == GPT2
    merges = [" ".join(pair) for pair in GPT2.merges]  # as in the tokenizer.json of OpenAI's gpt2
    write(tmp_path, tokenizer=GPT2_JSON | {"model": {"vocab": VOCAB, "merges": merges}})
    assert read_hf_tokenizer(tmp_path, 50257) == GPT2


SPECIAL_TOKENS = {
    "special_tokens_map": {"additional_special_tokens": ["<|user|>"]},
    "tokenizer_config": {
        "additional_special_tokens": [{"content": "<|user|>"}],
        "bos_token": "<|endoftext|>",
    },
}


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
@pytest.mark.parametrize("vocabulary", ["tokenizer", "vocab", None])
def test_special_tokens_that_gpt2_does_not_have_are_refused(tmp_path, name, vocabulary):
    write(tmp_path, **{name: SPECIAL_TOKENS[name]})
    if vocabulary:
        write(tmp_path, **{vocabulary: GPT2_JSON if vocabulary == "tokenizer" else VOCAB})
    assert "adds 1 tokens to GPT-2's, which is not supported: '<|user|>'" in error_of(tmp_path)


@pytest.mark.parametrize("entry", ["[PAD]", {"content": "[PAD]"}])
def test_an_added_padding_token_is_refused(tmp_path, entry):
    write(tmp_path, vocab=VOCAB, special_tokens_map={"pad_token": entry})
    assert "'[PAD]'" in error_of(tmp_path)


@pytest.mark.parametrize("entry", [5, True, [[]], {"text": "x"}])
def test_damaged_special_tokens_are_reported(tmp_path, entry):
    write(tmp_path, special_tokens_map={"additional_special_tokens": entry})
    assert "damaged" in error_of(tmp_path)


@pytest.mark.parametrize("vocabulary", ["tokenizer", "vocab"])
@pytest.mark.parametrize("vocab_size", [50257, 50259, 50304])
def test_tokens_merged_into_the_vocabulary_are_refused(tmp_path, vocabulary, vocab_size):
    vocab = VOCAB | {"<|user|>": 50257, "<|assistant|>": 50258}
    write(tmp_path, **{vocabulary: with_vocab(vocab) if vocabulary == "tokenizer" else vocab})
    assert "adds 2 tokens to GPT-2's" in error_of(tmp_path, vocab_size)


@pytest.mark.parametrize("extra", [{"x<|user|>": 50258}, {"x<|user|>": "a"}, {"x<|user|>": 5}])
def test_a_vocabulary_with_a_gap_or_a_repeated_id_is_unknown(tmp_path, extra):
    write(tmp_path, vocab=VOCAB | extra)
    assert read_hf_tokenizer(tmp_path, 50257) is None


BYTE_LEVEL = GPT2_JSON["pre_tokenizer"]
OTHER_ENCODINGS = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "a normalizer changes the text"),
    "prefix space": ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
    "no pattern": ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "not its pre_tokenizer"),
    "white space": ({"pre_tokenizer": {"type": "Whitespace"}}, "not its pre_tokenizer"),
    "merges": (
        {"model": GPT2_JSON["model"] | {"merges": GPT2_JSON["model"]["merges"][::-1]}},
        "other merges",
    ),
    "no merges": ({"model": GPT2_JSON["model"] | {"merges": []}}, "other merges"),
}


@pytest.mark.parametrize("name", OTHER_ENCODINGS)
def test_gpt2s_vocabulary_with_another_encoding_is_refused(tmp_path, name):
    changes, reason = OTHER_ENCODINGS[name]
    write(tmp_path, tokenizer=GPT2_JSON | changes)
    assert reason in error_of(tmp_path)


def test_other_merges_or_a_prefix_space_beside_vocab_json_are_refused(tmp_path):
    write(tmp_path, vocab=VOCAB)
    (tmp_path / "merges.txt").write_text(MERGES_TXT.replace("Ġ t\nĠ a\n", "Ġ a\nĠ t\n"), encoding="utf-8")
    assert "other merges" in error_of(tmp_path)
    (tmp_path / "merges.txt").write_text(MERGES_TXT, encoding="utf-8")
    write(tmp_path, tokenizer_config={"add_prefix_space": True})
    assert "add_prefix_space" in error_of(tmp_path)


def test_all_files_that_are_checked_are_downloaded():
    files = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert files | {"added_tokens.json", "special_tokens_map.json"} <= set(CONFIG_FILES)
