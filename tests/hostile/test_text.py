"""Difficult text: every Unicode string is decoded unchanged, and invalid text is refused with a message."""

import re
import subprocess
import sys

import numpy as np
import pytest
from fork_server import TIMEOUT
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support import ROOT

import sample
from configurator import command, resolve
from fradique.data.build import prepare_text
from fradique.data.dataset import open_corpus
from fradique.data.input_files import find_files
from fradique.data.text import files_text, read_file
from fradique.runtime.memory_limits import OomReport
from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import time_budget
from sample import SampleSettings, StreamedSample, read_prompt
from train import TrainSettings

PROPERTY = hypothesis_settings(derandomize=True, deadline=None, max_examples=150, database=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TRICKY = (
    "\0",
    "\r\n\r",
    "\ufeff",
    "\U0001f984\U0010ffff",
    "e\u0301\u0323",
    "<|endoftext|>",
    " " * 70_000,
    "\x85\u2028\xa0",
)
GPT2 = tokenizers.GPT2Tokenizer()
BPE = tokenizers.train_bpe(["Era uma vez um gato, uma casa, um gato, uma casa."], 290)
LONG_LINE_SCRIPT = ROOT / "tests" / "faults" / "long_line.py"
SMALL_BPE = tokenizers.train_bpe(["aa aa"], 258)


@pytest.mark.parametrize("tokenizer", [GPT2, BPE, SMALL_BPE], ids=["gpt2", "bpe", "small_bpe"])
@PROPERTY
@given(text=any_text)
@example(TRICKY[0])
@example(TRICKY[1])
@example(TRICKY[2])
@example(TRICKY[3])
@example(TRICKY[4])
@example(TRICKY[5])
@example(TRICKY[6])
@example(TRICKY[7])
def test_every_text_is_decoded_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    ordinary = text.replace("<|endoftext|>", "")  # the token has no bytes of text
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(ordinary.encode("utf-8"))


@PROPERTY
@given(text=any_text, second_text=any_text)
def test_known_characters_are_decoded_others_are_refused(text, second_text):
    if text:
        tokenizer = tokenizers.CharTokenizer("".join(sorted(set(text))))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        unknown = [c for c in second_text if c not in text]
        if unknown:
            with pytest.raises(ValueError, match=f"U\\+{ord(unknown[0]):04X}"):
                tokenizer.encode(second_text)


@pytest.mark.parametrize(
    "tokenizer", [GPT2, BPE, tokenizers.CharTokenizer("abc ")], ids=["gpt2", "bpe", "char"]
)
@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\udc80" * 3, "a\ud83e \udd84"])
def test_half_of_a_surrogate_pair_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="half of a surrogate pair") as caught:
        tokenizers.encode_prompt(tokenizer, text)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    "flag", ["--start=\udcff", "--start=a\ud800", "--out_dir=out/\udcfe", "--stop=a\udfff"]
)
def test_a_flag_that_is_not_utf8_is_refused(flag):
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        resolve(SampleSettings, [flag])
    assert flag.partition("=")[0] in str(caught.value)


def test_a_very_long_flag_gives_a_short_message():
    for flag in ("--n_layer=" + "9" * 1_000_000, "--" + "x" * 1_000_000 + "=1", "--dtype=" + "x" * 1_000_000):
        with pytest.raises(ValueError) as caught:
            resolve(TrainSettings, [flag])
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["9" * 1_000_000, "1" * 1_000_000 + "h", "9" * 400 + "h", "1h" * 100_000, "0s", "-1s"],
    ids=lambda text: text[:20],
)
def test_an_invalid_duration_is_refused_with_a_short_message(text):
    with pytest.raises(ValueError, match="not a duration") as caught:
        time_budget.parse_duration(text)
    assert len(str(caught.value)) < 300


def test_a_command_line_that_is_not_utf8_gives_one_message(capsys):
    flag = b"--start=\xff\x1b[2J".decode("utf-8", "surrogateescape")
    assert command(sample.main, SampleSettings, [flag]) == 2
    message = capsys.readouterr().err
    assert "--start=\\udcff\\x1b[2J: must be text" in message and "Traceback" not in message


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"prompt\.txt is not UTF-8: byte 3 is 0xff"):
        read_prompt(f"FILE:{path}")


def test_a_stop_text_of_a_million_characters_never_matches():
    stream = StreamedSample(GPT2, "a" * 1_000_000)
    text = "".join(stream.feed(token) for token in GPT2.encode("Era uma vez a").tolist()) + stream.flush()
    assert text == "Era uma vez a"


# Text files


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 7, 1 << 20])
def test_invalid_utf8_is_found_with_blocks_of_any_size(tmp_path, block):
    for invalid in (
        b"\xff",
        b"\xc3",
        b"\xe2\x82",
        b"\xf0\x9f\xa6",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
    ):
        for prefix in (b"", b"a", "é\U0001f984".encode(), b"\xef\xbb\xbf"):
            path = tmp_path / "text.txt"
            path.write_bytes(prefix + invalid + b"z")
            with pytest.raises(UnicodeDecodeError) as reference:
                (prefix + invalid + b"z").decode("utf-8")
            message = rf"text\.txt is not UTF-8 .* at offset {reference.value.start} "
            with pytest.raises(ValueError, match=message):
                list(read_file(path, block))


@pytest.mark.parametrize(
    "text", ["\n" * 50, "\r\n" * 50, "\1" * 50, "a\r\nb\rc\nd" * 9, "\ufeff\ufeffabc" * 9, "\U0001f984" * 50]
)
@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_a_corpus_of_unusual_characters_is_decoded_unchanged(tmp_path, text, kind):
    (tmp_path / "text.txt").write_bytes(text.encode())
    prepare_text(files_text(find_files([tmp_path / "text.txt"]), "text"), tmp_path / "made", kind, 0.2)
    corpus = open_corpus(tmp_path / "made", 1)
    ids = np.concatenate([*corpus.train.token_files, *corpus.val.token_files])
    assert corpus.tokenizer.decode(ids) == text.removeprefix("\ufeff")


def test_a_line_of_64_mb_needs_less_than_64_mb_of_memory(tmp_path):
    arguments = [sys.executable, str(LONG_LINE_SCRIPT), str(64 << 20), "char", str(tmp_path / "made")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    before, peak = map(int, re.findall(r"\d+", result.stdout.rpartition("resident:")[2]))
    assert peak - before < 64, result.stdout


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")]
)
def test_only_out_of_memory_errors_get_a_message(error, capsys):
    def fail(resolved):
        with OomReport():
            raise error

    assert command(fail, SampleSettings, []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory: ") and "Traceback" not in message
    with pytest.raises(RuntimeError, match="a bug"):
        error = RuntimeError("a bug")
        command(fail, SampleSettings, [])


@pytest.mark.parametrize(
    "flag", ["--n_layer=1e9", "--n_embd=1e308", "--batch_size=1e15", "--block_size=1e15", "--n_head=1e30"]
)
def test_an_impossible_size_is_refused_before_it_is_allocated(flag):
    with pytest.raises(ValueError, match="must be between"):
        resolve(TrainSettings, [flag])
