"""The animation of embeddings: known motions, the files that the command writes, and its errors."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import flags, run_lab, run_script, run_training

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")

from PIL import Image

from lab import movie


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(40, 12))


def test_alignment_undoes_rotation_mirroring_and_shift(points):
    target = points[:, :2]
    cos, sin = np.cos(2.0), np.sin(2.0)
    rotation = np.array([[cos, -sin], [sin, cos]])
    for mirror in (1, -1):
        moved = (target * [mirror, 1]) @ rotation.T + [5.0, -3.0]
        np.testing.assert_allclose(movie.align(moved, target), target, atol=1e-9)


def test_pca_projects_all_snapshots_on_the_axes_of_the_last(points):
    moved = points.copy()
    moved[0] += 3.0
    projected = movie.project_snapshots([moved, moved, points], "pca")
    assert projected.shape == (3, 40, 2)
    np.testing.assert_allclose(projected[0], projected[1])
    axes = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][:2]
    expected = (moved - moved.mean(0)) @ axes.T
    for i in range(2):  # the sign of an axis is arbitrary
        np.testing.assert_allclose(np.abs(projected[0][:, i]), np.abs(expected[:, i]), atol=1e-9)


def test_points_move_smoothly_with_tsne(points):
    """Snapshots that differ little have similar projections; independent t-SNEs would not."""
    rng = np.random.default_rng(1)
    snapshots = [points, points + 0.01 * rng.normal(size=points.shape)]
    snapshots.append(snapshots[1] + 0.01 * rng.normal(size=points.shape))
    projected = movie.project_snapshots(snapshots, "tsne", perplexity=5.0)
    size = np.linalg.norm(projected - projected.mean(1, keepdims=True), axis=-1).mean()
    for before, after in itertools.pairwise(projected[1:]):  # the first t-SNE has not converged
        assert np.linalg.norm(after - before, axis=-1).mean() < 0.25 * size


def test_interpolation_between_snapshots_is_linear():
    points = np.array([[[0.0, 0.0]], [[2.0, 4.0]], [[2.0, 0.0]]])
    frames = movie.interpolate(points, 5)
    assert frames[:, 0].tolist() == [[0, 0], [1, 2], [2, 4], [2, 2], [2, 0]]
    assert movie.interpolate(points, 3).tolist() == points.tolist()


@pytest.mark.parametrize("how", ["pca", "tsne"])
def test_the_command_writes_the_animation_and_arrays(settings, how):
    settings = replace(settings, snapshot_interval=10)
    run_training(settings)
    folder = Path(settings.out_dir)
    path = folder / "movie.npz"
    options = [f"--how={how}", "--seconds=1", "--fps=4", f"--save_arrays={path}"]
    result = run_lab("lab.movie", f"--out_dir={folder}", *options)
    assert result.returncode == 0, result.stderr
    assert f"wrote {folder / 'movie.gif'}" in result.stdout
    with Image.open(folder / "movie.gif") as gif:
        assert gif.n_frames == 4
    arrays = np.load(path)
    assert arrays["tokens"].shape[0] == 4 and arrays["tokens"].shape[2] == 2
    assert arrays["steps"].tolist()[0] == 0 and arrays["steps"].tolist()[-1] == 20
    assert len(arrays["names"]) == len(arrays["groups"]) == arrays["tokens"].shape[1]


def test_missing_runs_and_snapshots_are_reported(settings, tmp_path):
    result = run_lab("lab.movie", f"--out_dir={tmp_path / 'nothing'}")
    assert result.returncode == 2 and "no trained model in" in result.stderr
    run_training(settings)
    result = run_lab("lab.movie", f"--out_dir={settings.out_dir}")
    assert result.returncode == 2 and "train with --snapshot_interval=50" in result.stderr
    one_snapshot = replace(settings, overwrite=True, max_iters=0, snapshot_interval=5)
    result = run_script("train.py", *flags(one_snapshot))
    assert result.returncode == 0, result.stderr
    result = run_lab("lab.movie", f"--out_dir={settings.out_dir}")
    assert result.returncode == 2 and "An animation needs at least two" in result.stderr
