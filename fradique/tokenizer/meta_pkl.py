"""The character tokenizer of a corpus of nanoGPT, in its meta.pkl."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Any

from fradique.io import files, safe_pickle
from fradique.tokenizer.tokenizer import CharTokenizer

MAX_META_PKL_BYTES = 8 << 20


def read_meta_pkl(path: str | os.PathLike[str]) -> CharTokenizer:
    """The character tokenizer in a meta.pkl of nanoGPT: vocab_size, stoi {str: int} and itos {int: str}.

    No code in the pickle runs. Raises ValueError naming the file if it contains anything else, and OSError if
    it cannot be read.
    """
    data = files.read_small_file(Path(path), MAX_META_PKL_BYTES)
    try:
        return _char_tokenizer_from_meta(safe_pickle.load_plain(data))
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(
            f"{path} is not a meta.pkl of nanoGPT's character corpora: {error}. Prepare the corpus again"
        ) from error


def _char_tokenizer_from_meta(meta: Any) -> CharTokenizer:
    """The tokenizer of the content of a meta.pkl. Raises ValueError if it is not consistent."""
    if not isinstance(meta, dict) or not {"vocab_size", "stoi", "itos"} <= meta.keys():
        raise ValueError("it has no vocab_size, stoi and itos")
    stoi, itos = meta["stoi"], meta["itos"]
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise ValueError("stoi and itos are not dicts")
    if any(type(char) is not str or len(char) != 1 or type(i) is not int for char, i in stoi.items()):
        raise ValueError("stoi does not map single characters to integers")
    if itos != {i: char for char, i in stoi.items()} or sorted(itos) != list(range(len(stoi))):
        raise ValueError("stoi and itos do not give the same ids from 0 on to the same characters")
    if type(meta["vocab_size"]) is not int or meta["vocab_size"] != len(stoi):
        raise ValueError(
            f"vocab_size is {reprlib.repr(meta['vocab_size'])}, but there are {len(stoi)} characters"
        )
    return CharTokenizer("".join(itos[i] for i in range(len(itos))))
