"""Embeddings in two dimensions: clusters planted beforehand, groups, and the model as it began."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import run_lab, run_training

from fradique.tokenizer import tokenizer as tokenizers
from fradique.training import setup
from lab import embeddings
from lab.token_groups import groups

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")


def planted(n_clusters=3, each=20, width=16, seed=0):
    """Points around centres that stand far from one another, and whose cluster each is."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_clusters, width)) * 10
    which = np.repeat(np.arange(n_clusters), each)
    return centres[which] + rng.normal(size=(len(which), width)), which


@pytest.mark.parametrize("how", ["pca", "tsne"])
def test_planted_clusters_are_separated(how):
    points, which = planted()
    places = embeddings.project(points, how)
    assert places.shape == (60, 2)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (which[distances.argmin(1)] == which).all()  # each one's nearest neighbour is of its cluster
    again = embeddings.project(points, how)
    assert np.array_equal(places, again)


def test_pca_is_that_of_the_singular_values():
    points, _ = planted(seed=1)
    centred = points - points.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    found = embeddings.project(points, "pca")
    for i in range(2):  # an axis may point either way
        np.testing.assert_allclose(np.abs(found[:, i]), np.abs(expected[:, i]), atol=1e-9)


def test_characters_fall_into_kinds():
    tokenizer = tokenizers.CharTokenizer("aéBç7, \n")
    assert groups(tokenizer, range(8)).tolist() == [
        "vowel", "vowel", "capital", "consonant", "digit", "punctuation", "space", "space",
    ]  # fmt: skip
    assert groups(tokenizer, range(3), "as=aé;rest=xyz").tolist() == ["as", "as", "other"]
    with pytest.raises(ValueError, match='say "name=characters;name=characters"'):
        groups(tokenizer, range(3), "aé")


def test_pieces_of_bpe_fall_into_kinds():
    tokenizer = tokenizers.GPT2Tokenizer()
    pieces = {
        " the": "space before",
        "ing": "inside a word",
        " Lisbon": "capital",
        "2024": "digits",
        "!": "punctuation",
    }
    for piece, kind in pieces.items():
        (token, *others) = tokenizer.encode(piece).tolist()
        if not others:
            assert groups(tokenizer, [token]).tolist() == [kind], piece


def test_before_training_is_what_train_began_with(settings):
    t = setup.setup_training(settings)
    t.close()
    began = embeddings.before_training(t.model.config, settings.seed)
    for name, tensor in t.model.state_dict().items():
        assert torch.equal(began.state_dict()[name], tensor), name


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_command_draws_before_and_after(settings, tmp_path, position):
    run_training(replace(settings, position=position))
    words = [f"--out_dir={settings.out_dir}", f"--to={tmp_path / 'e'}", f"--save_arrays={tmp_path / 'x.npz'}"]
    done = run_lab("lab.embeddings", *words)
    assert done.returncode == 0, done.stderr
    arrays = np.load(tmp_path / "x.npz")
    n = len(arrays["tokens"])
    assert arrays["tokens tsne before training"].shape == arrays["tokens pca after training"].shape == (n, 2)
    assert ("positions pca after training" in arrays) == (position == "learned")
    assert (tmp_path / "e.png").stat().st_size > 20_000
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "t-SNE, before training" in text and "vowel" in text
    refused = run_lab("lab.embeddings", f"--out_dir={settings.out_dir}", "--groups=vogais")
    assert refused.returncode == 2 and "name=characters" in refused.stderr
