"""Groups of tokens, to color pictures: vowels, capitals, digits; for BPE, with or without a space before."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from fradique.tokenizer import tokenizer as tokenizers

VOWELS = set("aeiouy")


def token_groups(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], spec: str = "") -> np.ndarray:
    """The group of each token (n,), as text.

    spec: custom groups instead of the default ones, "name=characters;name=characters", as in
    --groups="vowels=aeiou;digits=0123456789". A token belongs to the first group that has all its characters,
    else to "other". Raises ValueError if it cannot be parsed.
    """
    texts = [tokenizer.decode([token]) for token in ids]
    if spec:
        groups = _parse_groups(spec)
        return np.array([_custom_group(text, groups) for text in texts])
    default_group = character_group if tokenizer.kind == "char" else subword_group
    return np.array([default_group(text) for text in texts])


def character_group(char: str) -> str:
    """The group of a character; an accented vowel is a vowel."""
    base = unicodedata.normalize("NFD", char)[0].lower()
    if char.isspace():
        return "space"
    if char.isdigit():
        return "digit"
    if char.isalpha():
        if char.isupper():
            return "capital"
        return "vowel" if base in VOWELS else "consonant"
    return "punctuation"


def subword_group(text: str) -> str:
    """The group of a token of several characters. Bytes that are not valid UTF-8 decode to "" or U+FFFD."""
    if not text or "\ufffd" in text:
        return "part of a character"
    word = text.strip()
    if not word:
        return "space"
    if any(c.isdigit() for c in word):
        return "digits"
    if not any(c.isalpha() for c in word):
        return "punctuation"
    if word[0].isupper():
        return "capital"
    return "space before" if text[0] == " " else "inside a word"


def _parse_groups(spec: str) -> dict[str, set[str]]:
    """Group name -> its characters."""
    groups = {}
    for item in spec.split(";"):
        name, equals, characters = item.partition("=")
        if not equals or not name.strip() or not characters:
            raise ValueError(
                f'--groups={spec!r}: write "name=characters;name=characters", as in vowels=aeiou'
            )
        groups[name.strip()] = set(characters)
    return groups


def _custom_group(text: str, groups: dict[str, set[str]]) -> str:
    characters = set(text.strip())
    return next((name for name, members in groups.items() if characters and characters <= members), "other")
