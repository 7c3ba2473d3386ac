"""Checkpoints: written atomically, verified when read, pruned."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, run_code, start_script

from fradique.checkpointing import checkpoint, run_files
from fradique.checkpointing.checkpoint import Checkpoint
from fradique.io import files


def make_checkpoint(step=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Checkpoint(
        config={"n_layer": 1},
        model={"a": torch.randn(4, 5, generator=generator), "b": torch.randn(7, generator=generator)},
        optimizer={"step/a": torch.tensor(3.0), "exp_avg/a": torch.randn(4, 5, generator=generator)},
        state={"step": step, "best_val_loss": 0.1 + 0.2, "scaler": {}},
    )


def assert_same_checkpoint(first, second):
    assert first.config == second.config and first.state == second.state
    for a, b in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_can_be_written_and_read_back(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "step-00000003", make_checkpoint())
    assert_same_checkpoint(checkpoint.read_checkpoint(tmp_path / "step-00000003"), make_checkpoint())


def test_non_contiguous_tensors_are_read_back_correctly(tmp_path):
    transposed = make_checkpoint()
    transposed.model["a"] = torch.arange(20.0).view(4, 5).t()
    checkpoint.write_checkpoint(tmp_path / "c", transposed)
    assert torch.equal(
        checkpoint.read_checkpoint(tmp_path / "c").model["a"], torch.arange(20.0).view(4, 5).t()
    )


def test_writing_again_replaces_the_checkpoint_folder(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", make_checkpoint(1))
    checkpoint.write_checkpoint(tmp_path / "best", make_checkpoint(2, seed=9))
    assert_same_checkpoint(checkpoint.read_checkpoint(tmp_path / "best"), make_checkpoint(2, seed=9))
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_checkpoints_contain_no_pickles(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "c", make_checkpoint())
    for path in (tmp_path / "c").iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())


FILES = ["model.safetensors", "model.json", "optimizer.safetensors", "state.json", "manifest.json"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
def test_a_checkpoint_with_a_damaged_file_is_skipped(tmp_path, name, damage):
    for step in (1, 2):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make_checkpoint(step))
    damage(tmp_path / "step-00000002" / name)
    warnings = []
    assert checkpoint.newest_checkpoint(tmp_path, warnings.append).name == "step-00000001"
    assert len(warnings) == 1 and "step-00000002" in warnings[0]
    # in manifest.json the flipped bit may be in the checksum of another file
    if not (name == "manifest.json" and damage is flip_bit):
        assert name in warnings[0]


@pytest.mark.parametrize("name", FILES[:4])
def test_a_checkpoint_with_a_file_of_another_run_is_skipped(tmp_path, name):
    """The file itself is valid, and its tensors have the same shapes."""
    for step in (1, 2):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make_checkpoint(step))
    other_run = make_checkpoint(3, seed=7)
    other_run.config["dropout"] = 0.5
    checkpoint.write_checkpoint(tmp_path / "other", other_run)
    (tmp_path / "step-00000002" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    warnings = []
    assert checkpoint.newest_checkpoint(tmp_path, warnings.append).name == "step-00000001"
    assert name in warnings[0]


def test_resuming_is_rejected_if_all_checkpoints_are_damaged(tmp_path):
    checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, 1), make_checkpoint())
    (tmp_path / "step-00000001" / "model.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint to resume from: all of them are damaged"):
        checkpoint.newest_checkpoint(tmp_path, lambda text: None)


def test_pruning_keeps_the_last_steps_in_numeric_order(tmp_path):
    for step in (5, 100_000_000, 20, 99_999_999):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make_checkpoint(step))
    names = [p.name for p in checkpoint.step_folders(tmp_path)]
    assert names == ["step-00000005", "step-00000020", "step-99999999", "step-100000000"]
    checkpoint.prune_checkpoints(tmp_path, 2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == names[2:]


def test_best_is_a_copy_that_pruning_keeps(tmp_path):
    checkpoint.save_and_prune(tmp_path, make_checkpoint(1), best=True, keep=2)
    flip_bit(tmp_path / "step-00000001" / "model.safetensors")
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    for step in (2, 3, 4):
        checkpoint.save_and_prune(tmp_path, make_checkpoint(step), best=False, keep=2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000003", "step-00000004"]
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1


def test_best_is_written_before_the_step_checkpoint(tmp_path, monkeypatch):
    """After a crash between the two, no step checkpoint refers to a best/ that does not exist."""
    write_checkpoint = checkpoint.write_checkpoint

    def crash(folder, saved, writer):
        if folder.name.startswith("step-"):
            raise OSError("crash")
        write_checkpoint(folder, saved, writer)

    monkeypatch.setattr(checkpoint, "write_checkpoint", crash)
    with pytest.raises(OSError, match="crash"):
        checkpoint.save_and_prune(tmp_path, make_checkpoint(4), best=True, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_recovery_leaves_other_files_alone(tmp_path):
    names = [".diary.txt.12.tmp", ".draft.tmp", ".draft.tmp.png", ".idea", ".notes.old", ".notes.txt.tmp"]
    names += [".samples.txt.tmp", ".todo.json.12.tmp", ".todo.json.old"]
    for name in names:
        (tmp_path / name).write_text("mine")
    checkpoint.recover_run_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_recovery_removes_temporary_files_of_every_kind(tmp_path):
    for name in (*run_files.TOP_FILES, run_files.MARKER):
        with files.atomic_path(tmp_path / name, keep_suffix=name.endswith(".png")) as temporary:
            temporary.write_text("half")
            shutil.copy(temporary, tmp_path / "copy")
        (tmp_path / name).unlink()
        (tmp_path / "copy").rename(temporary)
    checkpoint.recover_run_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_after_the_resumed_step_are_set_aside(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make_checkpoint(step))
    checkpoint.set_aside_later_checkpoints(tmp_path, 10)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000010"]
    assert (tmp_path / "damaged-step-00000030").is_dir()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    checkpoint.save_and_prune(tmp_path, make_checkpoint(1), best=True, keep=2)
    nonfinite = make_checkpoint(2)
    nonfinite.model["a"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="step 2 was not saved, because its weights are not finite"):
        checkpoint.save_and_prune(tmp_path, nonfinite, best=True, keep=2)
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("failing", ["save_file", "checksum", "fsync", "replace_folder"])
def test_a_failed_write_leaves_only_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    checkpoint.write_checkpoint(tmp_path / "best", make_checkpoint(1))

    def fail(*_):
        raise OSError(28, "No space left on device")

    owners = {"save_file": checkpoint.safetensors.torch, "checksum": files, "fsync": files}
    monkeypatch.setattr(owners.get(failing, checkpoint), failing, fail)
    with pytest.raises(
        ValueError, match=r"could not be written: .*No space left.*Earlier checkpoints are untouched"
    ):
        checkpoint.write_checkpoint(tmp_path / "best", make_checkpoint(2))
    monkeypatch.undo()
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_full_disk_is_reported_and_changes_nothing(tmp_path):
    """The process may write at most 4 kB per file, as with a disk quota."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fradique.checkpointing import checkpoint, run_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small = checkpoint.Checkpoint({{}}, {{"a": torch.zeros(8)}}, {{}}, {{"step": 1}})
large = checkpoint.Checkpoint({{}}, {{"a": torch.zeros(8192)}}, {{}}, {{"step": 2}})
run = Path({str(tmp_path)!r})
checkpoint.write_checkpoint(run / "best", small)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.write_checkpoint(run / "best", large)
except ValueError as error:
    print(error)
assert checkpoint.read_checkpoint(run / "best").state["step"] == 1
assert [p.name for p in run.iterdir()] == ["best"], list(run.iterdir())
"""
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    assert "could not be written" in result.stdout


SAVE_FOREVER = """
import itertools, sys, torch
from pathlib import Path
from fradique.checkpointing import checkpoint
run = Path(sys.argv[1])
checkpoint.recover_run_folder(run)
for step in itertools.count(1):
    saved = checkpoint.Checkpoint({}, {"a": torch.full((2000,), float(step))}, {}, {"step": step})
    checkpoint.save_and_prune(run, saved, best=True, keep=2)
    print("saved", flush=True)
"""


def test_kill_9_leaves_no_incomplete_checkpoint(tmp_path):
    """A process that saves checkpoints in a loop is killed at 12 different moments."""
    for attempt in range(12):
        with start_script("-c", SAVE_FOREVER, tmp_path) as process:
            for _ in range(attempt // 2 + 1):
                assert process.lines.readline() == "saved\n"
            time.sleep(0.0004 * attempt)
            process.kill()
            assert process.wait() == [-signal.SIGKILL]
        checkpoint.recover_run_folder(tmp_path)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        for folder in tmp_path.iterdir():
            saved = checkpoint.read_checkpoint(folder)
            assert (saved.model["a"] == saved.state["step"]).all()


def test_recovery_restores_a_folder_that_was_being_replaced(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", make_checkpoint(1))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    (tmp_path / ".best.123.tmp").mkdir()
    (tmp_path / ".best.123.tmp" / ".tmpTjOVeG").touch()  # of safetensors
    (tmp_path / "..run.json.123.tmp").touch()
    checkpoint.recover_run_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1


def test_all_tensors_that_do_not_match_are_listed():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    tensors = {"a": torch.zeros(3, 2), "c": torch.zeros(1), "d": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        checkpoint.check_tensors_match(expected, tensors, "x.safetensors")
    message = str(error.value)
    assert "x.safetensors does not fit this model:\n" in message
    assert "a has shape (3, 2), and (2, 3) in this model" in message
    assert "b is missing" in message and "d is not in this model" in message
