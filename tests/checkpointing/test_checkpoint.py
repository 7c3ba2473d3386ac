import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT

from fradique.checkpointing import checkpoint
from fradique.checkpointing.checkpoint import Checkpoint
from fradique.io import files


def make(step=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Checkpoint(
        config={"n_layer": 1},
        model={"a": torch.randn(4, 5, generator=generator), "b": torch.randn(7, generator=generator)},
        optimizer={"step/a": torch.tensor(3.0), "exp_avg/a": torch.randn(4, 5, generator=generator)},
        state={"step": step, "best_val_loss": 0.1 + 0.2, "scaler": {}},
    )


def same(one, two):
    assert one.config == two.config and one.state == two.state
    for a, b in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "step-00000003", make())
    same(checkpoint.read_checkpoint(tmp_path / "step-00000003"), make())


def test_tensors_that_are_not_contiguous_are_saved_as_they_look(tmp_path):
    turned = make()
    turned.model["a"] = torch.arange(20.0).view(4, 5).t()
    checkpoint.write_checkpoint(tmp_path / "c", turned)
    assert torch.equal(
        checkpoint.read_checkpoint(tmp_path / "c").model["a"], torch.arange(20.0).view(4, 5).t()
    )


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", make(1))
    checkpoint.write_checkpoint(tmp_path / "best", make(2, seed=9))
    same(checkpoint.read_checkpoint(tmp_path / "best"), make(2, seed=9))
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_nothing_that_is_written_is_a_pickle(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "c", make())
    for path in (tmp_path / "c").iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())


FILES = ["model.safetensors", "model.json", "optimizer.safetensors", "state.json", "manifest.json"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    for step in (1, 2):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make(step))
    damage(tmp_path / "step-00000002" / name)
    warnings = []
    assert checkpoint.newest_checkpoint(tmp_path, warnings.append).name == "step-00000001"
    assert len(warnings) == 1 and "step-00000002" in warnings[0]
    if not (name == "manifest.json" and damage is flip):  # there the sum of another file may differ instead
        assert name in warnings[0]


@pytest.mark.parametrize("name", FILES[:4])
def test_a_file_of_another_run_is_named_and_the_checkpoint_before_is_used(tmp_path, name):
    """Whole by itself, and of the same shape."""
    for step in (1, 2):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make(step))
    other = make(3, seed=7)
    other.config["dropout"] = 0.5
    checkpoint.write_checkpoint(tmp_path / "other", other)
    (tmp_path / "step-00000002" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    warnings = []
    assert checkpoint.newest_checkpoint(tmp_path, warnings.append).name == "step-00000001"
    assert name in warnings[0]


def test_with_all_checkpoints_damaged_there_is_a_message(tmp_path):
    checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, 1), make())
    (tmp_path / "step-00000001" / "model.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint to go on from: all 1 are damaged"):
        checkpoint.newest_checkpoint(tmp_path, lambda text: None)


def test_steps_are_ordered_by_number_and_the_last_are_kept(tmp_path):
    for step in (5, 100_000_000, 20, 99_999_999):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make(step))
    names = [p.name for p in checkpoint.step_folders(tmp_path)]
    assert names == ["step-00000005", "step-00000020", "step-99999999", "step-100000000"]
    checkpoint.prune_checkpoints(tmp_path, 2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == names[2:]


def test_keep_saves_the_best_apart_so_that_no_damage_takes_both(tmp_path):
    checkpoint.save_and_prune(tmp_path, make(1), best=True, last=2)
    flip(tmp_path / "step-00000001" / "model.safetensors")
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    for step in (2, 3, 4):
        checkpoint.save_and_prune(tmp_path, make(step), best=False, last=2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000003", "step-00000004"]
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1


def test_the_best_is_saved_before_the_step_that_says_so(tmp_path, monkeypatch):
    """A crash between the two must not leave a step that believes in a best that is not there."""
    real = checkpoint.write_checkpoint

    def crash(folder, held, way):
        if folder.name.startswith("step-"):
            raise OSError("cut")
        real(folder, held, way)

    monkeypatch.setattr(checkpoint, "write_checkpoint", crash)
    with pytest.raises(OSError, match="cut"):
        checkpoint.save_and_prune(tmp_path, make(4), best=True, last=2)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_recover_leaves_files_of_the_user_alone(tmp_path):
    for name in (".notes.old", ".draft.tmp", ".idea"):
        (tmp_path / name).write_text("mine")
    checkpoint.recover_run_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".draft.tmp", ".idea", ".notes.old"]


def test_checkpoints_after_the_step_that_a_run_goes_on_from_step_aside(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write_checkpoint(checkpoint.step_folder(tmp_path, step), make(step))
    checkpoint.set_aside_later_checkpoints(tmp_path, 10)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000010"]
    assert (tmp_path / "damaged-step-00000030").is_dir()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    checkpoint.save_and_prune(tmp_path, make(1), best=True, last=2)
    bad = make(2)
    bad.model["a"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="weights at step 2 are not finite"):
        checkpoint.save_and_prune(tmp_path, bad, best=True, last=2)
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("failing", ["save_file", "sum_of", "_sync", "move_into_place"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_no_litter(tmp_path, monkeypatch, failing):
    checkpoint.write_checkpoint(tmp_path / "best", make(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    owners = {"save_file": checkpoint.safetensors.torch, "sum_of": checkpoint.reading}
    monkeypatch.setattr(owners.get(failing, checkpoint), failing, full)
    with pytest.raises(
        ValueError, match=r"could not be written: .*No space left.*Earlier checkpoints are untouched"
    ):
        checkpoint.write_checkpoint(tmp_path / "best", make(2))
    monkeypatch.undo()
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_really_full_disk_is_told_and_harms_nothing(tmp_path):
    """The process may write files of at most 4 kB, which is what a quota or a full disk looks like."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fradique.checkpointing import checkpoint
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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout


def test_kill_9_while_saving_never_leaves_a_half_checkpoint(tmp_path):
    """A process saves best/ over and over, and is killed at some moment, 12 times."""
    code = f"""
import sys, torch, itertools
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fradique.checkpointing import checkpoint
run = Path({str(tmp_path)!r})
checkpoint.recover_run_folder(run)
print("ready", flush=True)
for step in itertools.count(1):
    tensors = {{"a": torch.full((2000,), float(step))}}
    saved = checkpoint.Checkpoint({{}}, tensors, {{}}, {{"step": step}})
    checkpoint.save_and_prune(run, saved, best=True, last=2)
"""
    for turn in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.003 + 0.011 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        checkpoint.recover_run_folder(tmp_path)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        for folder in tmp_path.iterdir():
            held = checkpoint.read_checkpoint(folder)
            assert (held.model["a"] == held.state["step"]).all()


def test_recover_puts_back_what_had_stepped_aside(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", make(1))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    (tmp_path / ".best.123.tmp").mkdir()
    checkpoint.recover_run_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert checkpoint.read_checkpoint(tmp_path / "best").state["step"] == 1


def test_fit_lists_every_tensor_that_differs():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    found = {"a": torch.zeros(3, 2), "c": torch.zeros(1), "d": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        checkpoint.check_tensors_match(expected, found, "x.safetensors")
    message = str(caught.value)
    assert "x.safetensors does not fit this model, 3 tensors differ" in message
    assert "a is (3, 2) there and (2, 3) in this model" in message
    assert "b is missing" in message and "d is not in this model" in message


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    files.write_text_atomically(path, "old")

    def broken(*_):
        raise OSError("cut")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="cut"):
        files.write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
