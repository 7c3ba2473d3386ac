"""One text in three vocabularies, compared with tiktoken and with a model's parameter count."""

import re

import numpy as np
import pytest
import tiktoken
from support import make_text, run_lab, run_training

from fradique.tokenizer import bpe

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from lab import tokenizers as lab_tokenizers
from model import GPT, GPTConfig

TEXT = make_text(800) + "\nÀ noite, 42 gatos…\n"


def test_each_tokenizer_splits_the_text():
    characters, gpt2, trained_bpe = lab_tokenizers.tokenize_all(TEXT, 300)
    assert len(characters.ids) == len(TEXT) and characters.vocab_size == len(set(TEXT))
    encoding: tiktoken.Encoding = bpe.gpt2_encoding()[1]
    assert gpt2.ids.tolist() == encoding.encode_ordinary(TEXT) and gpt2.vocab_size == 50257
    assert trained_bpe.vocab_size == 300
    for tokenization in (characters, gpt2, trained_bpe):
        assert tokenization.bytes_per_token == len(TEXT.encode()) / len(tokenization.ids)
    assert "".join(characters.labels) == TEXT[:3000].replace(" ", "␣").replace("\n", "⏎")


def test_the_embedding_share_agrees_with_a_model():
    config = GPTConfig(vocab_size=300, n_layer=3, n_head=2, n_embd=64, position="none", bias=False)
    model = GPT(config)
    trained_bpe = lab_tokenizers.tokenize("own", lab_tokenizers.train_bpe([TEXT], 300), TEXT)
    norms = 64 * (2 * 3 + 1)
    share = model.transformer["wte"].weight.numel() / (model.num_params(non_embedding=False) - norms)
    assert trained_bpe.embedding_share(64, 3) == pytest.approx(share, rel=1e-12)


def test_labels_are_laid_out_without_gaps():
    labels = ["abc", "d" * 70, "ef"]
    pieces = lab_tokenizers.wrap_labels(labels, max_characters=74)
    assert "".join(piece.text for piece in pieces) == ("abc" + "d" * 70 + "ef")[:74]
    for piece in pieces:
        assert piece.x >= 0 and piece.x + len(piece.text) <= lab_tokenizers.LINE_LENGTH
    ends = {(piece.x + len(piece.text), piece.line) for piece in pieces}
    assert all(piece.x == 0 or (piece.x, piece.line) in ends for piece in pieces)


def test_the_command_compares_texts_and_runs(settings, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(TEXT, encoding="utf-8")
    run_training(settings)
    options = [
        f"--input={book}",
        "--bpe=300",
        f"--to={tmp_path / 't'}",
        f"--save_arrays={tmp_path / 'x.npz'}",
    ]
    result = run_lab("lab.tokenizers", *options, f"--out_dir={settings.out_dir}")
    assert result.returncode == 0, result.stderr
    assert f"| characters | {len(set(TEXT))} | {len(TEXT):,} |" in result.stdout
    assert re.search(r"^run: \d\.\d+ bits per byte", result.stdout, re.M)
    assert np.load(tmp_path / "x.npz")["characters"].shape == (len(TEXT),)
    assert (tmp_path / "t.png").stat().st_size > 5000
    assert 'class="token"' in (tmp_path / "t.html").read_text(encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    for options, message in (
        ([], "give a text: --input=book.txt"),
        ([f"--input={tmp_path / 'none.txt'}"], "none.txt"),
        ([f"--input={tmp_path / 'empty.txt'}"], "empty"),
        ([f"--input={book}", f"--out_dir={tmp_path}"], "has no finished run"),
    ):
        result = run_lab("lab.tokenizers", *options, f"--to={tmp_path / 'r'}")
        assert result.returncode == 2 and message in result.stderr, result.stderr
