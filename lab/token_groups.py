"""Groups of tokens, such as vowels, capitals and digits, for the colors of a picture."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from fradique.tokenizer.tokenizer import Tokenizer

VOWELS = set("aeiouy")


def token_groups(tokenizer: Tokenizer, ids: Sequence[int], spec: str = "") -> np.ndarray:
    """The name of the group of each token: (n,).

    spec: the value of --groups: custom groups such as "vowels=aeiou;digits=0123456789", or "" for the default
    groups. A token belongs to the first custom group that contains all its characters, or to "other" if none
    does. Raises ValueError if `spec` cannot be parsed.
    """
    texts = [tokenizer.decode([token]) for token in ids]
    if spec:
        groups = _parse_groups(spec)
        return np.array([_custom_group(text, groups) for text in texts])
    default_group = character_group if tokenizer.kind == "char" else subword_group
    return np.array([default_group(text) for text in texts])


def character_group(char: str) -> str:
    """The default group of a token of the character tokenizer."""
    if char.isspace():
        return "space"
    if char.isdigit():
        return "digit"
    if char.isalpha():
        if char.isupper():
            return "capital"
        base_letter = unicodedata.normalize("NFD", char)[0].lower()  # without its accent
        return "vowel" if base_letter in VOWELS else "consonant"
    return "punctuation"


def subword_group(text: str) -> str:
    """The default group of a BPE token. Bytes that are not valid UTF-8 are decoded to "" or U+FFFD."""
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
                f'--groups={spec!r}: write "name=characters;name=characters", for example '
                '"vowels=aeiou;digits=0123456789"'
            )
        groups[name.strip()] = set(characters)
    return groups


def _custom_group(text: str, groups: dict[str, set[str]]) -> str:
    """The first group that contains all characters of a token, without whitespace around it."""
    characters = set(text.strip())
    for name, members in groups.items():
        if characters and characters <= members:
            return name
    return "other"
