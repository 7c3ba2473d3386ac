"""Embeddings saved during training, for lab.movie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import run_training

from fradique.checkpointing import embedding_snapshots


def test_snapshots_are_saved_at_intervals_start_and_end(settings):
    run_training(replace(settings, max_iters=20, snapshot_interval=8, eval_interval=10))
    snapshots = embedding_snapshots.read_snapshots(Path(settings.out_dir))
    assert [snapshot.step for snapshot in snapshots] == [0, 8, 16, 20]
    weights = safetensors.torch.load_file(Path(settings.out_dir) / "step-00000020" / "model.safetensors")
    wte, wpe = (weights[f"transformer.{name}.weight"] for name in ("wte", "wpe"))
    first, last = snapshots[0], snapshots[-1]
    assert first.tokens.dtype == np.float32 and first.tokens.shape == tuple(wte.shape)
    assert not np.allclose(first.tokens, last.tokens, atol=1e-3)
    np.testing.assert_allclose(last.tokens, wte.numpy(), rtol=1e-3, atol=1e-6)  # snapshots are float16
    np.testing.assert_allclose(last.positions, wpe.numpy(), rtol=1e-3, atol=1e-6)


def test_snapshots_are_off_by_default_and_do_not_change_training(settings, tmp_path):
    _, without_snapshots = run_training(settings)
    assert not (Path(settings.out_dir) / embedding_snapshots.SNAPSHOT_FOLDER).exists()
    _, with_snapshots = run_training(
        replace(settings, out_dir=str(tmp_path / "with_snapshots"), snapshot_interval=3)
    )
    for a, b in zip(without_snapshots.model.parameters(), with_snapshots.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_or_overwriting_removes_obsolete_snapshots(settings):
    settings = replace(settings, snapshot_interval=5, keep_checkpoints=9)
    run_training(settings)
    folder = Path(settings.out_dir)
    for name in ("step-00000015", "step-00000020"):  # as if the run had been stopped at step 10
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    run_training(replace(settings, init_from="resume", max_iters=12))
    assert list(embedding_snapshots.snapshot_paths(folder)) == [0, 5, 10, 12]
    run_training(replace(settings, overwrite=True, max_iters=4))
    assert list(embedding_snapshots.snapshot_paths(folder)) == [0, 4]


def test_snapshots_with_rope_have_no_positions(settings):
    run_training(replace(settings, max_iters=2, snapshot_interval=1, position="rope"))
    snapshots = embedding_snapshots.read_snapshots(Path(settings.out_dir))
    assert all(snapshot.positions is None for snapshot in snapshots)


def test_only_the_first_tokens_of_a_large_vocabulary_are_saved(settings, monkeypatch):
    monkeypatch.setattr(embedding_snapshots, "MAX_ROWS", 7)
    run_training(replace(settings, max_iters=1, snapshot_interval=1))
    (first, *_) = embedding_snapshots.read_snapshots(Path(settings.out_dir))
    assert first.tokens.shape[0] == 7 and first.positions.shape[0] == 7


def test_a_snapshot_that_cannot_be_written_only_warns(settings, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_snapshots, "write_snapshot", fail)
    status, t = run_training(replace(settings, snapshot_interval=5))
    assert status == 0 and t.state.step == 20
    output = capsys.readouterr()
    warning = "embeddings cannot be saved for lab.movie: No space left on device"
    assert (output.out + output.err).count(warning) == 1


def test_a_snapshot_of_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    (tmp_path / embedding_snapshots.SNAPSHOT_FOLDER).mkdir()
    path = tmp_path / embedding_snapshots.SNAPSHOT_FOLDER / "step-00000001.safetensors"
    safetensors.torch.save_file({"tokens": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match=r"step-00000001\.safetensors is damaged"):
        embedding_snapshots.read_snapshots(tmp_path)
