"""The character tokenizer, compared with a dict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import CHARACTERS, PROPERTY, TEXTS

from fradique.tokenizer import tokenizer
from fradique.tokenizer.tokenizer import CharTokenizer


@PROPERTY
@given(TEXTS, st.text(CHARACTERS, max_size=20))
def test_char_ids_equal_a_dict_lookup(text, extra):
    chars = "".join(dict.fromkeys(text + extra)) or "x"
    ids_by_char = {char: i for i, char in enumerate(chars)}
    tok = CharTokenizer(chars)
    assert tok.encode(text).tolist() == [ids_by_char[char] for char in text]
    assert tok.decode(tok.encode(text)) == text
    assert tok.byte_lengths().tolist() == [len(char.encode()) for char in chars]


def test_char_encodes_texts_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(tokenizer, "_CHAR_BLOCK", 7)
    text = "abcé🙂" * 20
    ids = CharTokenizer("🙂éabc").encode(text)
    assert ids.tolist() == ["🙂éabc".index(char) for char in text]


@pytest.mark.parametrize(
    ("text", "details"),
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
    ids=["unknown letter", "long text", "null character", "surrogate"],
)
def test_an_unknown_character_is_reported_with_its_position(text, details):
    with pytest.raises(ValueError) as caught:
        CharTokenizer("abc").encode(text)
    assert type(caught.value) is ValueError  # not a UnicodeEncodeError
    assert all(detail in str(caught.value) for detail in details), caught.value


@pytest.mark.parametrize("chars", ["", "aba", "a\ud800", None, ["a"]])
def test_an_empty_or_invalid_character_vocabulary_is_refused(chars):
    with pytest.raises(ValueError, match=r"vocabulary|surrogate"):
        CharTokenizer(chars)


@pytest.mark.parametrize(("size", "dtype"), [(65_535, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_uint16_up_to_65536_tokens(size, dtype):
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0xE000 + size - 0xD800)]))
    tok = CharTokenizer(chars)
    ids = tok.encode(chars)
    assert ids.dtype == tok.dtype == dtype
    assert ids.tolist() == list(range(size))
    with pytest.raises(ValueError, match=r"not among"):
        tok.encode("\U0010ffff")
