"""The default groups of characters and of BPE tokens, and custom groups."""

import pytest

from fradique.tokenizer import tokenizer as tokenizers
from lab.token_groups import token_groups


def test_characters_are_grouped_by_kind():
    tokenizer = tokenizers.CharTokenizer("aéBç7, \n")
    assert token_groups(tokenizer, range(8)).tolist() == [
        "vowel", "vowel", "capital", "consonant", "digit", "punctuation", "space", "space",
    ]  # fmt: skip
    assert token_groups(tokenizer, range(3), "as=aé;rest=xyz").tolist() == ["as", "as", "other"]
    with pytest.raises(ValueError, match='write "name=characters;name=characters"'):
        token_groups(tokenizer, range(3), "aé")


def test_bpe_tokens_are_grouped_by_kind():
    tokenizer = tokenizers.GPT2Tokenizer()
    groups = {
        " the": "space before",
        "ing": "inside a word",
        " Lisbon": "capital",
        "2016": "digits",
        "!": "punctuation",
    }
    for text, group in groups.items():
        (token,) = tokenizer.encode(text).tolist()
        assert token_groups(tokenizer, [token]).tolist() == [group], text
