"""The lock of a run folder, and run folders that are moved, deleted or damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT, flags, losses, run_script, run_training

import train
from fradique.checkpointing import checkpoint
from fradique.io import folder_lock
from fradique.training import setup

LOCK_SCRIPT = """
import sys, time
from pathlib import Path
from fradique.io.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process, which has locked `tmp_path`."""
    command = [sys.executable, "-c", LOCK_SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_locked_by_another_process_is_refused(other_process, tmp_path):
    with pytest.raises(
        ValueError, match=rf"in use by process {other_process.pid} on .*choose another --out_dir"
    ):
        folder_lock.FolderLock(tmp_path)
    assert f"process {other_process.pid}" in folder_lock.lock_holder(tmp_path)


def test_sigkill_releases_the_lock(other_process, tmp_path):
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert folder_lock.lock_holder(tmp_path) is None
    folder_lock.FolderLock(tmp_path).release()


def test_a_released_lock_can_be_taken_again(tmp_path):
    lock = folder_lock.FolderLock(tmp_path)
    assert folder_lock.lock_holder(tmp_path)
    lock.release()
    lock.release()
    assert folder_lock.lock_holder(tmp_path) is None
    folder_lock.FolderLock(tmp_path).release()


def test_asking_for_the_holder_creates_no_file(tmp_path):
    assert folder_lock.lock_holder(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_a_released_lock_does_not_name_its_last_holder(tmp_path):
    folder_lock.FolderLock(tmp_path).release()
    assert (tmp_path / folder_lock.LOCK_FILE).read_text() == ""


def test_a_query_of_the_holder_does_not_make_locking_fail(tmp_path, monkeypatch):
    """`lock_holder` in another process holds the lock for an instant."""
    answers, real_try_lock = [False, False], folder_lock._try_lock
    monkeypatch.setattr(
        folder_lock, "_try_lock", lambda file: answers.pop() if answers else real_try_lock(file)
    )
    folder_lock.FolderLock(tmp_path).release()
    assert answers == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00{", b"[1]", b'{"host": 3}'])
def test_a_damaged_lock_file_reports_another_process(tmp_path, content):
    lock = folder_lock.FolderLock(tmp_path)
    (tmp_path / folder_lock.LOCK_FILE).write_bytes(content)
    assert folder_lock.lock_holder(tmp_path) == "another process"
    lock.release()


@pytest.mark.parametrize(
    "option", [[], ["--overwrite"], ["--init_from=resume"]], ids=["new", "overwrite", "resume"]
)
def test_a_second_run_in_a_folder_is_refused(settings, option):
    """The first run continues to its end."""
    first_run = setup.setup_training(settings)
    try:
        checkpoint.save_and_prune(Path(settings.out_dir), make_checkpoint(first_run), best=True, keep=2)
        arguments = [f"--out_dir={settings.out_dir}"] if "resume" in str(option) else flags(settings)
        result = run_script("train.py", *arguments, *option)
        assert result.returncode == 2 and result.stderr.count("error:") == 1
        assert f"process {os.getpid()} on" in result.stderr and "Traceback" not in result.stderr
        assert train.train(first_run) == 0
    finally:
        first_run.close()
    assert len(losses(settings.out_dir)) == settings.max_iters


def make_checkpoint(t):
    tensors = {name: p.detach() for name, p in t.model.named_parameters()}
    config = {"vocab_size": t.model.config.vocab_size}
    return checkpoint.Checkpoint(config, tensors, {}, {"step": 0})


def before_step(monkeypatch, step, action):
    """Have `action` called before a training step."""
    real_train_step = train.train_step

    def train_step(t, lr):
        if t.state.step == step:
            action()
        return real_train_step(t, lr)

    monkeypatch.setattr(train, "train_step", train_step)


def test_a_run_continues_in_its_moved_folder(settings, tmp_path, monkeypatch, capsys):
    undisturbed = replace(settings, out_dir=str(tmp_path / "still"))
    run_training(undisturbed)
    moved = tmp_path / "elsewhere, à côté"
    before_step(monkeypatch, 7, lambda: Path(settings.out_dir).rename(moved))
    status, t = run_training(settings)
    assert status == 0 and not Path(settings.out_dir).exists()
    assert losses(moved) == losses(undisturbed.out_dir)
    newest = checkpoint.newest_checkpoint(moved, warn=pytest.fail)
    assert newest.name == "step-00000020" and (moved / "best").is_dir()
    assert f"was moved to {moved}: the run continues there" in capsys.readouterr().err
    assert t.folder == moved


def test_a_run_whose_folder_was_deleted_continues_saving(settings, monkeypatch, capsys):
    before_step(monkeypatch, 7, lambda: shutil.rmtree(settings.out_dir))
    assert run_training(settings)[0] == 0
    folder = Path(settings.out_dir)
    assert "was deleted: the run continues in a new folder" in capsys.readouterr().err
    assert checkpoint.newest_checkpoint(folder, warn=pytest.fail).name == "step-00000020"
    assert {path.name for path in folder.iterdir()} >= {"settings.json", "tokenizer.json", "metrics.jsonl"}
    assert min(losses(folder)) > 7 and max(losses(folder)) == 20
    result = run_script("train.py", "--init_from=resume", f"--out_dir={folder}", "--max_iters=22")
    assert result.returncode == 0, result.stderr


def test_a_clock_that_is_set_back_has_no_effect(settings, tmp_path, monkeypatch):
    run_training(settings)
    set_back = replace(settings, out_dir=str(tmp_path / "set back"))
    times = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    monkeypatch.setattr(time, "time_ns", lambda: next(times) * 10**9)
    run_training(set_back)
    assert losses(set_back.out_dir) == losses(settings.out_dir)


def test_ten_thousand_damaged_checkpoints_are_skipped(settings, tmp_path):
    run_training(replace(settings, max_iters=5, lr_decay_iters=20))
    folder = Path(settings.out_dir)
    for step in range(10, 10_000):  # without a manifest
        (folder / f"step-{step:08d}").mkdir()
    result = run_script("train.py", "--init_from=resume", f"--out_dir={folder}", "--max_iters=20")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "skipped 9,990 checkpoints in all" in result.stderr and result.stderr.count("warning:") < 10
    assert max(losses(folder)) == 20


@pytest.mark.parametrize("name", ["com espaços e acentuação é", "a'b\"c", "-dash", "日本語 🖋", "x" * 200])
def test_a_run_folder_may_have_any_name(settings, tmp_path, name):
    settings = replace(settings, out_dir=str(tmp_path / name), max_iters=5)
    assert run_training(settings)[0] == 0
    result = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=7")
    assert result.returncode == 0, result.stderr
    assert max(losses(settings.out_dir)) == 7


def test_a_checkpoint_of_another_run_is_skipped(settings, tmp_path, capsys):
    """The checkpoint is complete and has a valid manifest, but with the id of another run."""
    run_training(replace(settings, max_iters=10, keep_checkpoints=5))
    second_run = replace(settings, out_dir=str(tmp_path / "other"), seed=7, max_iters=10)
    run_training(second_run)
    folder = Path(settings.out_dir)
    shutil.rmtree(folder / "step-00000010")
    shutil.copytree(Path(second_run.out_dir) / "step-00000010", folder / "step-00000010")
    _, t = run_training(replace(settings, init_from="resume", max_iters=12))
    assert "step-00000010 is a checkpoint of another run" in capsys.readouterr().err
    run_ids = {json.loads((p / "manifest.json").read_text())["run"] for p in checkpoint.step_folders(folder)}
    assert run_ids == {json.loads((folder / "settings.json").read_text())["run"]}
    assert min(losses(folder)) == 1 and t.state.step == 12
