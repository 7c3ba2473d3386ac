"""Embeddings in two dimensions: synthetic clusters, and the initial model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import run_lab, run_training

from fradique.training import setup

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("plotly", reason="the pages need plotly")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")

from lab import embeddings


def random_clusters(n_clusters=3, cluster_size=20, width=16, seed=0):
    """Points (n, width) around distant centers, and the cluster of each (n,)."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(n_clusters, width)) * 10
    clusters = np.repeat(np.arange(n_clusters), cluster_size)
    return centers[clusters] + rng.normal(size=(len(clusters), width)), clusters


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_clusters_stay_separate(method):
    points, clusters = random_clusters()
    projected = embeddings.project(points, method)
    assert projected.shape == (60, 2)
    distances = np.linalg.norm(projected[:, None] - projected[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (clusters[distances.argmin(1)] == clusters).all()  # the nearest neighbor is in the same cluster
    assert np.array_equal(projected, embeddings.project(points, method))  # deterministic


def test_pca_equals_the_projection_on_singular_vectors():
    points, _ = random_clusters(seed=1)
    centered = points - points.mean(0)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ axes[:2].T
    projected = embeddings.project(points, "pca")
    for i in range(2):  # the sign of an axis is arbitrary
        np.testing.assert_allclose(np.abs(projected[:, i]), np.abs(expected[:, i]), atol=1e-9)


def test_the_initial_model_equals_that_of_a_new_run(settings):
    t = setup.setup_training(settings)
    t.close()
    initial = embeddings.initial_model(t.model.config, settings.seed)
    for name, tensor in t.model.state_dict().items():
        assert torch.equal(initial.state_dict()[name], tensor), name


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_command_draws_before_and_after_training(settings, tmp_path, position):
    run_training(replace(settings, position=position))
    options = [f"--to={tmp_path / 'e'}", f"--save_arrays={tmp_path / 'x.npz'}"]
    result = run_lab("lab.embeddings", f"--out_dir={settings.out_dir}", *options)
    assert result.returncode == 0, result.stderr
    arrays = np.load(tmp_path / "x.npz")
    n = len(arrays["tokens"])
    assert arrays["tokens tsne before training"].shape == arrays["tokens pca after training"].shape == (n, 2)
    assert ("positions pca after training" in arrays) == (position == "learned")
    assert (tmp_path / "e.png").stat().st_size > 20_000
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "t-SNE, before training" in text and "vowel" in text
    result = run_lab("lab.embeddings", f"--out_dir={settings.out_dir}", "--groups=vogais")
    assert result.returncode == 2 and "name=characters" in result.stderr
