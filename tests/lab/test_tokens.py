"""Next-token probabilities and scores against torch and numpy, and the images of them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import run_lab, run_training

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from PIL import Image

from lab import tokens
from model import GPT, GPTConfig

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def test_temperature_divides_the_logits():
    for temperature in (0.5, 1.0, 3.0):
        weights = np.exp(LOGITS.numpy() / temperature)
        p = tokens.probabilities(LOGITS, temperature)
        np.testing.assert_allclose(p, weights / weights.sum(), rtol=1e-12)


def test_filters_exclude_tokens_and_renormalize_the_rest():
    # softmax: 0.644, 0.237, 0.087, 0.032
    for filters, n in (({"top_k": 2}, 2), ({"top_p": 0.9}, 3), ({"min_p": 0.3}, 2), ({"top_p": 0.5}, 1)):
        p = tokens.probabilities(LOGITS, **filters)
        assert (p > 0).sum() == n and p.sum() == pytest.approx(1)
        np.testing.assert_allclose(p[:n], tokens.probabilities(LOGITS[:n]), rtol=1e-12)


def test_entropy_is_in_bits():
    assert tokens.entropy_bits(np.array([0.5, 0.25, 0.25, 0.0])) == 1.5
    assert tokens.entropy_bits(np.array([1.0, 0.0])) == 0.0
    assert tokens.entropy_bits(np.full(8, 1 / 8)) == 3.0


def test_token_losses_average_to_the_models_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=8))
    ids = torch.randint(10, (12,))
    scores = tokens.score_tokens(tokens.all_logits(model, ids[None], 12), ids.numpy(), top=12)
    loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    assert scores.loss.mean() == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(scores.top_probabilities.sum(1), 1, atol=1e-12)
    for i, token in enumerate(ids[1:].tolist()):
        assert scores.top_ids[i, scores.rank[i]] == token
        assert scores.top_probabilities[i, scores.rank[i]] == pytest.approx(scores.probability[i])
        assert scores.loss[i] == pytest.approx(-np.log(scores.probability[i]))


def test_padding_ids_of_the_vocabulary_are_excluded():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    ids = torch.tensor([[1, 2, 3]])
    logits = tokens.all_logits(model, ids, 10)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits, model(ids, ids)[0][0, :, :10].double())
    assert F.softmax(logits, -1).sum(-1).tolist() == pytest.approx([1.0] * 3)


def test_the_command_writes_images_a_page_and_arrays(settings, tmp_path):
    run_training(settings)
    to = tmp_path / "next"
    options = [f"--out_dir={settings.out_dir}", f"--to={to}", f"--save_arrays={tmp_path / 'x'}"]
    result = run_lab("lab.tokens", "--start=amor\ncas", "--top=8", *options)
    assert result.returncode == 0, result.stderr
    written = [Path(path).name for path in re.findall(r"^wrote (.+)$", result.stdout, re.M)]
    assert sorted(written) == ["next.gif", "next.html", "next.png", "x.npz"]
    with Image.open(to.with_suffix(".gif")) as gif:
        assert gif.n_frames > 20
    text = to.with_suffix(".html").read_text(encoding="utf-8")
    assert "⏎" in text and "rank" in text and text.count('class="token"') == 8
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["loss"].shape == (7,)
    assert arrays["probabilities of temperature 1"].sum() == pytest.approx(1)
    for option, message in (
        ("--temperatures=0.5,warm", "comma-separated numbers"),
        ("--temperatures=0", "each must be above 0"),
        ("--start=日", "is not among the"),
    ):
        result = run_lab("lab.tokens", f"--out_dir={settings.out_dir}", option)
        assert result.returncode == 2 and message in result.stderr, result.stderr
