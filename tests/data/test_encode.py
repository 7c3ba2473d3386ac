"""The text sample for training a BPE, and the memory of the encoder."""

import random
import subprocess
import sys

import numpy as np
import pytest
from corpus_helpers import STORY, text_of
from support import ROOT

from fradique.data import encode
from fradique.data.build import prepare_text
from fradique.data.splits import Part


def sample_of(string):
    """The sample of a text that is all training split."""
    return encode.BPESample(text_of(string, 90), [Part("train", 0, len(string))])


def test_a_bpe_is_trained_on_the_training_blocks_only():
    parts = [Part("train", 0, 200), Part("val", 200, 300), Part("train", 300, len(STORY))]
    assert "".join(encode.BPESample(text_of(STORY, 70), parts)) == STORY[:200] + STORY[300:]


def test_a_bpe_is_trained_on_all_of_a_small_text():
    sample = encode.BPESample(text_of(STORY, 100), [Part("train", 0, 700), Part("val", 700, len(STORY))])
    assert "".join(sample) == STORY[:700]
    assert sample.n_chars == 700


def test_a_bpe_is_trained_on_pieces_throughout_a_large_text(monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_CHARS", 2000)
    monkeypatch.setattr(encode, "SAMPLE_PIECE", 100)
    string = " ".join(f"{i:05d}" for i in range(5000))
    numbers = [int(word) for word in "".join(sample_of(string)).split()]
    assert 300 <= len(numbers) <= 360
    assert max(np.diff(numbers)) < 500 and numbers[-1] > 4500


def test_many_distinct_words_make_the_bpe_sample_smaller(monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_PIECE", 100)
    monkeypatch.setattr(encode, "SAMPLE_WORD_BYTES", 3000)
    distinct = " ".join(f"{i:05d}" for i in range(5000))
    assert 1500 < len("".join(sample_of(distinct))) < 3200
    repeated = "lua mar " * 5000
    assert "".join(sample_of(repeated)) == repeated


def test_notes_report_a_bpe_sample_and_a_smaller_vocabulary(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_CHARS", 500)
    monkeypatch.setattr(encode, "SAMPLE_PIECE", 100)
    meta = prepare_text(text_of(STORY), tmp_path, "bpe:9000")
    notes = capsys.readouterr().err
    assert "the BPE was trained on a sample of" in notes
    assert f"too small for 9,000 tokens: the BPE has {meta['vocab_size']:,} tokens" in notes


def test_empty_documents_count_towards_the_size_of_a_batch():
    batches = encode.batch_pieces((("train", None) for _ in range(10_000)), 10_000)
    assert max(map(len, batches)) <= 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """A process that prepares 20 MB more has about the same peak memory."""
    code = (
        "import sys; from pathlib import Path; from fradique.data import build, encode\n"
        "from fradique.data.text import files_text\n"
        "encode.MAX_THREADS = 2\n"
        "build.prepare_text(files_text([Path(sys.argv[1])], ''), Path(sys.argv[2]), sys.argv[3])\n"
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0]\n"
        "print(int(peak.split()[1]) // 1024)\n"
    )
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghiéã", k=rng.randint(1, 9))) for _ in range(3000)]
    peaks = []
    for megabytes in (8, 28):
        path = tmp_path / f"{megabytes}.txt"
        line = " ".join(rng.choices(words, k=20_000)) + "\n"
        path.write_text(line * (megabytes * 1_000_000 // len(line.encode())), encoding="utf-8")
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "out"), kind]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    assert peaks[1] < 250 and peaks[1] - peaks[0] < 16, peaks
