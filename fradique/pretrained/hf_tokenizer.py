"""Recognise the tokenizer of a folder in Hugging Face's layout: one that Fradique exported, or GPT-2's.

Of GPT-2's vocabulary with anything that changes how a text is encoded, such as added tokens or a normalizer,
the files are refused: the model would read other tokens than those it was trained on.
"""

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fradique.io.files import read_json_object, read_small_file
from fradique.pretrained.weight_files import FRADIQUE_TOKENIZER_FILE
from fradique.tokenizer.bpe import END_OF_TEXT, byte_alphabet
from fradique.tokenizer.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer

GPT2_VOCAB_SIZE = 50257
MAX_LISTED_TOKENS = 5  # in an error message
MAX_MERGES_BYTES = 16 << 20  # GPT-2's merges.txt has 456 KB
# The files of Hugging Face that may have added tokens with their ids, and the key of these; None: all of it.
ADDED_TOKEN_FILES = {
    "tokenizer.json": "added_tokens",
    "tokenizer_config.json": "added_tokens_decoder",
    "added_tokens.json": None,
}
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # special tokens, without ids
SPECIAL_TOKEN_KEY = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token|(additional|extra)_special_tokens")


def read_hf_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model in Hugging Face's layout with `vocab_size` embeddings; None if unknown.

    It is known if Fradique exported the folder, or if the vocabulary is GPT-2's. Raises ValueError if the
    files add tokens to it, which as plain text would be other tokens, or encode text in another way.
    """
    if (folder / FRADIQUE_TOKENIZER_FILE).exists():
        tokenizer = load_tokenizer(folder / FRADIQUE_TOKENIZER_FILE)
        vocab = _read_vocabulary(folder) or {}
        merged = [token for token, i in vocab.items() if type(i) is int and i >= tokenizer.vocab_size]
        known = set(vocab).difference(merged) | {tokenizer.document_separator or END_OF_TEXT}
        _check_added_tokens(folder, merged, known, "those of its model")
        return tokenizer
    vocab = _read_vocabulary(folder)
    merged = [] if vocab is None else _tokens_after_gpt2(vocab)
    if merged is None:
        return None
    known = _gpt2_tokens()
    _check_added_tokens(folder, merged, known, "GPT-2's")
    if reason := _other_encoding(folder):
        raise ValueError(
            f"{folder}: its tokenizer has GPT-2's vocabulary, but {reason}: it encodes text in another way, "
            "which is not supported. Use weights with GPT-2's own tokenizer"
        )
    return GPT2Tokenizer() if fits_embedding(GPT2_VOCAB_SIZE, vocab_size) else None


def fits_embedding(n_tokens: int, vocab_size: int) -> bool:
    """Whether vocab_size is the number of tokens, possibly padded to a multiple of 64 as in nanoGPT."""
    padded = math.ceil(n_tokens / 64) * 64
    return vocab_size in (n_tokens, padded)


def _read_vocabulary(folder: Path) -> dict[str, Any] | None:
    """The vocabulary {token: id} in a folder; {} if it is no object; None if there is no vocabulary."""
    if (folder / "tokenizer.json").exists():
        model = read_json_object(folder / "tokenizer.json").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / "vocab.json").exists():
        vocab = read_json_object(folder / "vocab.json")
    else:
        return None
    return vocab if isinstance(vocab, dict) else {}


def _gpt2_tokens() -> set[str]:
    """GPT-2's tokens in the byte alphabet, and <|endoftext|>."""
    tokenizer = GPT2Tokenizer()
    chars = {byte: char for char, byte in byte_alphabet().items()}
    tokens = (tokenizer.decode_bytes([i]) for i in range(GPT2_VOCAB_SIZE - 1))
    return {"".join(chars[byte] for byte in token) for token in tokens} | {END_OF_TEXT}


def _tokens_after_gpt2(vocab: dict[str, Any]) -> list[str] | None:
    """The tokens of a vocabulary with ids above GPT-2's; None if the others are not GPT-2's, one by one."""
    vocab = {END_OF_TEXT: GPT2_VOCAB_SIZE - 1} | vocab  # it may be only among the added tokens
    expected_ids = {str(i) for i in range(len(vocab))}
    if len(vocab) < GPT2_VOCAB_SIZE or {str(i) for i in vocab.values()} != expected_ids:  # ids of any type
        return None
    alphabet = byte_alphabet()  # character -> byte
    tokens = sorted(vocab, key=lambda token: int(vocab[token]))
    token_bytes = bytes(alphabet.get(char, 0) for token in tokens[:GPT2_VOCAB_SIZE] for char in token)
    is_gpt2 = token_bytes == GPT2Tokenizer().decode_bytes(range(GPT2_VOCAB_SIZE))
    return tokens[GPT2_VOCAB_SIZE:] if is_gpt2 else None


def _check_added_tokens(folder: Path, merged: list[str], known: Collection[str], vocabulary: str) -> None:
    """Raise ValueError if the files in a folder have tokens that are not `known`.

    merged: those that were merged into the vocabulary. vocabulary: what is added to, for the message.
    """
    added = list(dict.fromkeys([*merged, *_added_tokens(folder, known)]))
    if added:
        names = ", ".join(map(repr, added[:MAX_LISTED_TOKENS]))
        raise ValueError(
            f"{folder}: its tokenizer adds {len(added)} tokens to {vocabulary}, which is not supported: "
            f"{names}{' ...' if len(added) > MAX_LISTED_TOKENS else ''}. Use weights without added tokens"
        )


def _added_tokens(folder: Path, known: Collection[str]) -> list[str]:
    """The tokens in Hugging Face's files that are not `known`: first those with ids, in their order."""
    damaged = ValueError(f"{folder}: the added tokens of its tokenizer are damaged")
    tokens: dict[int, str] = {}
    for token_id, entry in _entries_with_ids(folder):
        content = _content(entry)
        if not isinstance(content, str) or not re.fullmatch("[0-9]{1,9}", str(token_id)):
            raise damaged
        if content not in known:
            tokens[int(token_id)] = content
    added = [tokens[token_id] for token_id in sorted(tokens)]
    for entry in _special_entries(folder):
        content = _content(entry)
        if not isinstance(content, str):
            raise damaged
        if content not in known:
            added.append(content)
    return added


def _content(entry: Any) -> Any:
    """The text of a token, which Hugging Face writes as a string or as an object."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _entries_with_ids(folder: Path) -> Iterator[tuple[Any, Any]]:
    """(id, token) of each added token in a folder."""
    for name, key in ADDED_TOKEN_FILES.items():
        if not (folder / name).exists():
            continue
        entries = read_json_object(folder / name)
        if key is None:
            yield from ((token_id, token) for token, token_id in entries.items())
        elif isinstance(entries.get(key), list):  # in tokenizer.json
            yield from (
                (entry.get("id") if isinstance(entry, dict) else None, entry) for entry in entries[key]
            )
        elif isinstance(entries.get(key), dict):
            yield from entries[key].items()


def _special_entries(folder: Path) -> Iterator[Any]:
    """The special tokens of a folder that are given by their text only."""
    for name in SPECIAL_TOKEN_FILES:
        if not (folder / name).exists():
            continue
        for key, value in read_json_object(folder / name).items():
            if not SPECIAL_TOKEN_KEY.fullmatch(key):
                continue
            for entry in value if isinstance(value, list) else [value]:
                if entry is not None:  # no such token
                    yield entry


def _other_encoding(folder: Path) -> str | None:
    """How the files in a folder, which have GPT-2's vocabulary, encode text in another way than GPT-2."""
    merges = None
    if (folder / "tokenizer.json").exists():
        content = read_json_object(folder / "tokenizer.json")
        if content.get("normalizer") is not None:
            return "a normalizer changes the text"
        pre_tokenizer = content.get("pre_tokenizer")
        if isinstance(pre_tokenizer, dict):
            if pre_tokenizer.get("type") != "ByteLevel" or pre_tokenizer.get("use_regex") is False:
                return f"not its pre_tokenizer ({pre_tokenizer.get('type')})"
            if pre_tokenizer.get("add_prefix_space"):
                return "a space is added before the text (add_prefix_space)"
        merges = content["model"].get("merges")
    elif (folder / "merges.txt").exists():
        text = read_small_file(folder / "merges.txt", MAX_MERGES_BYTES).decode("utf-8", errors="replace")
        merges = [line for line in text.splitlines() if line and not line.startswith("#version")]
    path = folder / "tokenizer_config.json"
    if path.exists() and read_json_object(path).get("add_prefix_space"):
        return "a space is added before the text (add_prefix_space)"
    if merges is not None and not _are_gpt2_merges(merges):
        return "other merges"
    return None


def _are_gpt2_merges(merges: Any) -> bool:
    """Whether `merges`, each written as "a b" or as a pair, are GPT-2's in the same order."""
    if not isinstance(merges, list):
        return False
    pairs = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
    return pairs == [" ".join(pair) for pair in GPT2Tokenizer().merges]
