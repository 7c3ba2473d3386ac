"""Attention weights against transformers, the model's unfused softmax, and closed-form patterns."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import NAMES, random_model

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")

from matplotlib.image import imread
from support import run_lab, run_training
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from fradique.checkpointing import checkpoint
from fradique.pretrained import loader
from lab import attention
from model import GPT, GPTConfig


def test_weights_equal_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    shape = {
        "n_positions": 16,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 50,
        "initializer_range": 0.5,
    }
    config = GPT2Config(**shape, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    hf_model = GPT2LMHeadModel(config).eval()
    hf_model.save_pretrained(tmp_path)
    loaded = loader.load_weights(str(tmp_path))
    model = GPT(loaded.config)
    checkpoint.copy_parameters(model, loaded.tensors, loaded.source)
    ids = torch.randint(50, (1, 11))
    with torch.no_grad():
        expected = torch.cat(hf_model(ids, output_attentions=True).attentions)
    weights = attention.attention_weights(model, ids)
    assert weights.std() > 0.1  # the weights differ between heads and tokens
    np.testing.assert_allclose(weights, expected.numpy(), atol=1e-5)


class RecordSoftmaxes(TorchDispatchMode):
    """Records the output of every softmax of a 4D tensor."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default and out.dim() == 4:
            self.outputs.append(out[0].numpy())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_softmax_of_the_unfused_path(name, architecture):
    model = random_model(architecture(name, flash=True)).eval()
    unfused = random_model(architecture(name, flash=False)).eval()
    unfused.load_state_dict(model.state_dict())
    ids = torch.randint(model.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), RecordSoftmaxes() as softmaxes:
        unfused(ids, prefix=ids.size(1))
        logits = model(ids)[0]
    weights = attention.attention_weights(model, ids)
    assert len(softmaxes.outputs) == model.config.n_layer
    np.testing.assert_allclose(weights, np.stack(softmaxes.outputs), atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], logits)  # the model is unchanged


@pytest.mark.parametrize("position", ["none", "alibi"])
def test_zero_queries_give_uniform_or_alibi_weights(position):
    """With queries of 0, weights depend only on the position: equal, or e^(-slope distance) with ALiBi."""
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4, position=position)
    model = GPT(config)
    with torch.no_grad():
        model.transformer["h"][0].attn.c_attn.weight.zero_()
    weights = attention.attention_weights(model, torch.arange(5)[None])[0, 0]
    distance = np.arange(5)[:, None] - np.arange(5)
    slope = 2**-8 if position == "alibi" else 0.0  # ALiBi with one head (Press et al. 2022)
    pattern = np.where(distance >= 0, np.exp(-slope * distance), 0)
    np.testing.assert_allclose(weights, pattern / pattern.sum(-1, keepdims=True), atol=1e-6)


def test_edges_are_causal_and_sorted_by_weight():
    weights = np.tril(np.random.default_rng(0).random((2, 3, 6, 6)))
    edges = attention.attention_edges(weights, min_weight=0.2)
    assert (edges[:, 3] <= edges[:, 2]).all()
    assert len(edges) == (weights >= 0.2).sum() and (np.diff(edges[:, 4]) >= 0).all()
    for layer, head, query, key, weight in edges:
        assert weights[int(layer), int(head), int(query), int(key)] == weight


def test_the_command_writes_images_pages_and_arrays(settings, tmp_path):
    run_training(settings)
    to = tmp_path / "pictures" / "here"
    result = run_lab(
        "lab.attention", f"--out_dir={settings.out_dir}", "--start=amor casa", f"--to={to}",
        f"--save_arrays={tmp_path / 'x.npz'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = [Path(path) for path in re.findall(r"^wrote (.+)$", result.stdout, re.M)]
    names = {"here.png", "here.html", "here-3d.html", "here-3d.png", "x.npz"}
    assert {path.name for path in written} == names
    assert imread(to.with_suffix(".png")).std() > 0.05
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["weights"].shape == (2, 2, 9, 9)
    assert "".join(arrays["tokens"]) == "amor␣casa"
    for path in (to.with_suffix(".html"), to.with_name("here-3d.html")):
        text = path.read_text(encoding="utf-8")
        assert r"\u2423" in text and len(text) < 15e6  # the prompt's space, as a symbol
        # nothing is loaded from the network
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", text)
    for options, message in (
        (["--layer=2"], "--layer=2: this model has 2 layers, 0 to 1"),
        (["--head=7"], "--head=7: this model has 2 heads, 0 to 1"),
        (["--start=日本"], "is not among the"),
        (["--start=amor amor amor amor"], "prompt too long: 19 tokens, maximum 16. Shorten --start"),
        ([f"--out_dir={tmp_path / 'nowhere'}"], "no trained model in"),
    ):
        result = run_lab("lab.attention", f"--out_dir={settings.out_dir}", "--start=amor", *options)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
