"""Kinds of tokens, to colour pictures by: vowels, capitals, digits; for BPE, a space before the word."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from fradique.tokenizer import tokenizer as tokenizers

VOWELS = set("aeiouy")


def kind_of_character(char: str) -> str:
    """The group of a character; accents do not count."""
    plain = unicodedata.normalize("NFD", char)[0].lower()
    if char.isspace():
        return "space"
    if char.isdigit():
        return "digit"
    if char.isalpha():
        if char.isupper():
            return "capital"
        return "vowel" if plain in VOWELS else "consonant"
    return "punctuation"


def kind_of_piece(piece: str) -> str:
    """The group of a token of several characters; "" for bytes that are no text."""
    if not piece or "\ufffd" in piece:
        return "part of a character"
    word = piece.strip()
    if not word:
        return "space"
    if any(c.isdigit() for c in word):
        return "digits"
    if not any(c.isalpha() for c in word):
        return "punctuation"
    if word[0].isupper():
        return "capital"
    return "space before" if piece[0] == " " else "inside a word"


def groups(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], chosen: str = "") -> np.ndarray:
    """The group of each token (n,), as text. `chosen`, name=characters with semicolons between them, says
    what else they may be: --groups="vogais=aeiouáéíóú;resto=…"; what is in none of these is "other".

    Raises ValueError where `chosen` cannot be read.
    """
    pieces = [tokenizer.decode([token]) for token in ids]
    if not chosen:
        kind = kind_of_character if tokenizer.kind == "char" else kind_of_piece
        return np.array([kind(piece) for piece in pieces])
    named = {}
    for part in chosen.split(";"):
        name, sign, characters = part.partition("=")
        if not sign or not name.strip() or not characters:
            raise ValueError(
                f'--groups={chosen!r}: say "name=characters;name=characters", as in vowels=aeiou'
            )
        named[name.strip()] = set(characters)

    def find(piece: str) -> str:
        inside = set(piece.strip())
        return next((name for name, chars in named.items() if inside and inside <= chars), "other")

    return np.array([find(piece) for piece in pieces])
