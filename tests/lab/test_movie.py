"""Embeddings kept on the way, and the film of them: known motions, files that can be read again."""

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import flags, run_lab, run_script, run_training

from fradique.checkpointing import embedding_snapshots
from lab import animation, movie

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")


def steps_of(folder):
    return list(embedding_snapshots.snapshot_paths(Path(folder)))


def turned(places, angle, shift):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return places @ turn.T + shift


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(40, 12))


# Snapshots


def test_a_run_keeps_its_embeddings_at_its_intervals_and_at_both_ends(settings):
    _, t = run_training(replace(settings, max_iters=20, snapshot_interval=8, eval_interval=10))
    kept = embedding_snapshots.read_snapshots(Path(settings.out_dir))
    assert [one.step for one in kept] == [0, 8, 16, 20]
    wte, wpe = (t.model.transformer[name].weight.detach() for name in ("wte", "wpe"))
    began, ended = kept[0], kept[-1]
    assert began.tokens.dtype == np.float32 and began.tokens.shape == tuple(wte.shape)
    assert not np.allclose(began.tokens, ended.tokens, atol=1e-3)
    if t.state.best_step == 20:  # else the run ends with the best weights
        np.testing.assert_allclose(ended.tokens, wte.numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(ended.positions, wpe.numpy(), rtol=1e-3, atol=1e-6)


def test_none_are_kept_unasked_and_keeping_them_changes_nothing(settings, tmp_path):
    _, plain = run_training(settings)
    assert not (Path(settings.out_dir) / embedding_snapshots.SNAPSHOT_FOLDER).exists()
    other = replace(settings, out_dir=str(tmp_path / "kept"), snapshot_interval=3)
    _, kept = run_training(other)
    for a, b in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_forgets_what_came_later_and_an_overwritten_one_all(settings):
    settings = replace(settings, snapshot_interval=5, keep_checkpoints=9)
    run_training(settings)
    folder = Path(settings.out_dir)
    for name in ("step-00000015", "step-00000020"):  # as if the run had been stopped at step 10
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    run_training(replace(settings, init_from="resume", max_iters=12))
    assert steps_of(folder) == [0, 5, 10, 12]
    run_training(replace(settings, overwrite=True, max_iters=4))
    assert steps_of(folder) == [0, 4]


def test_a_model_without_positions_has_none_to_keep(settings):
    run_training(replace(settings, max_iters=2, snapshot_interval=1, position="rope"))
    assert all(one.positions is None for one in embedding_snapshots.read_snapshots(Path(settings.out_dir)))


def test_of_a_large_vocabulary_the_first_are_kept(settings, monkeypatch):
    monkeypatch.setattr(embedding_snapshots, "MAX_ROWS", 7)
    run_training(replace(settings, max_iters=1, snapshot_interval=1))
    (first, *_) = embedding_snapshots.read_snapshots(Path(settings.out_dir))
    assert first.tokens.shape[0] == 7 and first.positions.shape[0] == 7


def test_a_snapshot_that_cannot_be_written_is_a_warning(settings, monkeypatch, capsys):
    def fail(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_snapshots, "write_snapshot", fail)
    status, t = run_training(replace(settings, snapshot_interval=5))
    assert status == 0 and t.state.step == 20
    said = capsys.readouterr()
    told = "embeddings cannot be kept for lab.movie: No space left on device"
    assert (said.out + said.err).count(told) == 1


# Compute


def test_alignment_undoes_turning_mirroring_and_shifting(points):
    target = points[:, :2]
    for mirror in (1, -1):
        moved = turned(target * [mirror, 1], 2.0, [5.0, -3.0])
        np.testing.assert_allclose(movie.aligned(moved, target), target, atol=1e-9)


def test_pca_follows_a_point_that_moves(points):
    """All times are seen from the last one's two directions."""
    later = points.copy()
    later[0] += 3.0
    found = movie.paths_of([later, later, points], "pca")
    assert found.shape == (3, 40, 2)
    np.testing.assert_allclose(found[0], found[1])
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    expected = (later - later.mean(0)) @ axes.T
    for i in range(2):
        np.testing.assert_allclose(np.abs(found[0][:, i]), np.abs(expected[:, i]), atol=1e-9)


def test_points_move_rather_than_jump_with_tsne(points):
    """Times that differ little have pictures that differ little; anew each time, they would not."""
    rng = np.random.default_rng(1)
    times = [points, points + 0.01 * rng.normal(size=points.shape)]
    times.append(times[1] + 0.01 * rng.normal(size=points.shape))
    found = movie.paths_of(times, "tsne", perplexity=5.0)
    size = np.linalg.norm(found - found.mean(1, keepdims=True), axis=-1).mean()
    for before, after in itertools.pairwise(found[1:]):  # the first goes on from an unfinished one
        assert np.linalg.norm(after - before, axis=-1).mean() < 0.25 * size


def test_between_snapshots_points_go_straight():
    places = np.array([[[0.0, 0.0]], [[2.0, 4.0]], [[2.0, 0.0]]])
    found = movie.between(places, 5)
    assert found[:, 0].tolist() == [[0, 0], [1, 2], [2, 4], [2, 2], [2, 0]]
    assert movie.between(places, 3).tolist() == places.tolist()


# Films


def test_a_gif_has_all_its_frames_and_their_times(tmp_path):
    frames = [np.zeros((20, 31, 3), np.uint8) for i in range(6)]
    for i, frame in enumerate(frames):
        frame[:, i] = 255, 120, 0
    animation.gif(frames, tmp_path / "x.gif", seconds=0.2, hold=1.0)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames == 6 and picture.size == (31, 20)
        lengths = []
        for i in range(6):
            picture.seek(i)
            lengths.append(picture.info["duration"])
            assert np.array_equal(np.asarray(picture.convert("RGB")), frames[i])
        assert lengths == [200] * 5 + [1200]


def test_an_mp4_has_all_its_frames(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="MP4 needs imageio-ffmpeg")
    frames = [np.full((33, 64, 3), 20 * i, np.uint8) for i in range(7)]
    animation.mp4(frames, tmp_path / "x.mp4", seconds=0.1)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "x.mp4"]
    done = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=True
    )
    told = done.stderr.decode()
    assert "Video: h264" in told and "64x32" in told and "10 fps" in told
    read = np.frombuffer(done.stdout, np.uint8).reshape(7, 32, 64).mean((1, 2))
    np.testing.assert_allclose(read, [20 * i for i in range(7)], atol=4)


@pytest.mark.parametrize("how", ["pca", "tsne"])
def test_the_command_writes_film_and_arrays(settings, how):
    settings = replace(settings, snapshot_interval=10)
    run_training(settings)
    folder = Path(settings.out_dir)
    arrays = folder / "movie.npz"
    words = [f"--how={how}", "--seconds=1", "--fps=4", f"--save_arrays={arrays}"]
    done = run_lab("lab.movie", f"--out_dir={folder}", *words)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder / 'movie.gif'}" in done.stdout
    with Image.open(folder / "movie.gif") as picture:
        assert picture.n_frames == 4
    held = np.load(arrays)
    assert held["tokens"].shape[0] == 4 and held["tokens"].shape[2] == 2
    assert held["steps"].tolist()[0] == 0 and held["steps"].tolist()[-1] == 20
    assert len(held["names"]) == len(held["groups"]) == held["tokens"].shape[1]


def test_what_a_film_lacks_is_told(settings, tmp_path):
    done = run_lab("lab.movie", f"--out_dir={tmp_path / 'nothing'}")
    assert done.returncode == 2 and "no trained model in" in done.stderr
    run_training(settings)
    done = run_lab("lab.movie", f"--out_dir={settings.out_dir}")
    assert done.returncode == 2 and "train with --snapshot_interval=50" in done.stderr
    few = replace(settings, overwrite=True, max_iters=0, snapshot_interval=5)
    done = run_script("train.py", *flags(few))
    assert done.returncode == 0, done.stderr
    done = run_lab("lab.movie", f"--out_dir={settings.out_dir}")
    assert done.returncode == 2 and "a film needs two" in done.stderr
