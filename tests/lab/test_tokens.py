"""What may come next: probabilities against torch's and numpy's, and the pictures of them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import run_lab, run_training

from lab import tokens
from model import GPT, GPTConfig

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def test_probabilities_at_a_temperature_are_those_of_the_divided_logits():
    for temperature in (0.5, 1.0, 3.0):
        weights = np.exp(LOGITS.numpy() / temperature)
        found = tokens.distribution(LOGITS, temperature)
        np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-12)


def test_limits_take_away_the_unlikely_and_share_out_what_they_had():
    # softmax: 0.644, 0.237, 0.087, 0.032
    for limits, left in (({"top_k": 2}, 2), ({"top_p": 0.9}, 3), ({"min_p": 0.3}, 2), ({"top_p": 0.5}, 1)):
        found = tokens.distribution(LOGITS, **limits)
        assert (found > 0).sum() == left and found.sum() == pytest.approx(1)
        np.testing.assert_allclose(found[:left], tokens.distribution(LOGITS[:left]), rtol=1e-12)


def test_entropy_is_in_bits():
    assert tokens.entropy(np.array([0.5, 0.25, 0.25, 0.0])) == 1.5
    assert tokens.entropy(np.array([1.0, 0.0])) == 0.0
    assert tokens.entropy(np.full(8, 1 / 8)) == 3.0


def test_the_loss_of_each_token_adds_up_to_the_models_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=8))
    ids = torch.randint(10, (12,))
    found = tokens.foresee(tokens.logits_of(model, ids[None], 12), ids.numpy(), count=12)
    loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    assert found.loss.mean() == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(found.chances.sum(1), 1, atol=1e-12)
    for i, token in enumerate(ids[1:].tolist()):
        assert found.alternatives[i, found.rank[i]] == token  # it stands where its rank says
        assert found.chances[i, found.rank[i]] == pytest.approx(found.probability[i])
        assert found.loss[i] == pytest.approx(-np.log(found.probability[i]))


def test_ids_of_a_padded_vocabulary_have_no_part():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    ids = torch.tensor([[1, 2, 3]])
    logits = tokens.logits_of(model, ids, 10)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits, model(ids, ids)[0][0, :, :10].double())
    assert F.softmax(logits, -1).sum(-1).tolist() == pytest.approx([1.0] * 3)


def test_the_command_writes_pictures_a_page_and_arrays(settings, tmp_path):
    run_training(settings)
    to = tmp_path / "next"
    words = [f"--out_dir={settings.out_dir}", f"--to={to}", f"--save_arrays={tmp_path / 'x'}"]
    done = run_lab("lab.tokens", "--start=amor\ncas", "--top=8", *words)
    assert done.returncode == 0, done.stderr
    written = [Path(path).name for path in re.findall(r"^wrote (.+)$", done.stdout, re.M)]
    assert sorted(written) == ["next.gif", "next.html", "next.png", "x.npz"]
    with Image.open(to.with_suffix(".gif")) as movie:
        assert movie.n_frames > 20
    text = to.with_suffix(".html").read_text(encoding="utf-8")
    assert "⏎" in text and "rank" in text and text.count('class="token"') == 8
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["loss"].shape == (7,)
    assert arrays["probabilities of temperature 1"].sum() == pytest.approx(1)
    for word, message in (
        ("--temperatures=0.5,warm", "numbers with commas between them"),
        ("--temperatures=0", "each above 0"),
        ("--start=日", "is not among the"),
    ):
        refused = run_lab("lab.tokens", f"--out_dir={settings.out_dir}", word)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
