"""A resumed run equals an uninterrupted one, to the last bit."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import (
    ROOT,
    before_steps,
    flags,
    losses,
    needs_compiler,
    run_script,
    run_training,
    same_folder,
    stop_at,
    torchrun,
)

import train
from configurator import command
from fradique.checkpointing import checkpoint, metrics_file
from fradique.io import files
from fradique.training import setup


def same_model(a: train.Trainer, b: train.Trainer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def cut_at(monkeypatch, step: int) -> None:
    """Have the run end at a step without a word to it, as a power cut does."""

    def cut(t):
        if t.state.step == step:
            raise RuntimeError("power cut")

    before_steps(monkeypatch, cut)


def interrupted(settings, interrupt, step: int) -> Path:
    """The folder of a run that `interrupt` (stop_at or cut_at) ended at a step."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(RuntimeError, match="power cut") if interrupt is cut_at else nullcontext():
            run_training(settings)
    return Path(settings.out_dir)


def resume(folder: Path) -> None:
    """python train.py --init_from=resume --out_dir=…, in this process."""
    words = ["--init_from=resume", f"--out_dir={folder}"]
    assert command(train.main, train.TrainSettings, words, base=setup.saved_run_settings) == 0


def state_of(folder: Path) -> dict:
    """What state.json of a checkpoint says, but for the clock."""
    state = checkpoint.read_checkpoint(folder).state
    return {name: value for name, value in state.items() if "seconds" not in name}


def told(folder: Path) -> list[dict]:
    """What metrics.jsonl says, but for the clock."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in metrics_file.read_metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    """The last checkpoints, the best and the metrics of two runs that ended are equal to the last bit."""
    last = checkpoint.step_folders(other)[-1].name
    assert checkpoint.step_folders(one)[-1].name == last
    for name in (last, "best"):
        assert same_folder(one / name, other / name), name
        assert state_of(one / name) == state_of(other / name)
    assert told(one) == told(other) and "final_loss" in told(one)[-1]


def test_the_same_settings_give_the_same_run_to_the_last_bit(settings, tmp_path):
    status, one = run_training(settings)
    other = replace(settings, out_dir=str(tmp_path / "other"))
    _, two = run_training(other)
    assert status == 0
    assert losses(settings.out_dir) == losses(other.out_dir)
    assert len(losses(settings.out_dir)) == 20
    assert same_model(one, two)
    _, three = run_training(replace(settings, out_dir=str(tmp_path / "third"), seed=7))
    assert not same_model(one, three)


@pytest.mark.parametrize("step", [0, 3, 5, 13, 19])
def test_resumed_run_equals_uninterrupted_run(settings, tmp_path, monkeypatch, step):
    settings = replace(settings, gradient_accumulation_steps=2)
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    _, undisturbed = run_training(whole)
    stop_at(monkeypatch, step)
    status, _ = run_training(settings)
    monkeypatch.undo()
    assert status == 128 + signal.SIGTERM
    status, resumed = run_training(replace(settings, init_from="resume"))
    assert status == 0
    assert same_model(resumed, undisturbed)
    assert losses(settings.out_dir) == losses(whole.out_dir)
    assert same_folder(*(Path(s.out_dir) / "step-00000020" for s in (settings, whole)))
    evaluations = [
        [
            (r["step"], r["eval_val_loss"])
            for r in metrics_file.read_metrics(Path(s.out_dir))
            if "eval_val_loss" in r
        ]
        for s in (settings, whole)
    ]
    assert evaluations[0] == evaluations[1]


def test_resumed_run_has_the_patience_that_was_left(settings, tmp_path):
    """Evaluations before the interruption count for early_stop_evals: both runs stop at the same step."""
    ruined = replace(settings, learning_rate=0.3, lr_schedule="constant", warmup_iters=0, max_iters=10**6)
    settings = replace(ruined, eval_interval=2, early_stop_evals=3)
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    _, undisturbed = run_training(whole)
    best = undisturbed.state.best_step
    assert undisturbed.state.step == best + 6
    folder = interrupted(settings, stop_at, best + 5)
    assert state_of(checkpoint.step_folders(folder)[-1])["evals_since_best"] == 2
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("interrupt", [stop_at, cut_at])
def test_resumed_run_equals_uninterrupted_run_where_only_better_steps_are_saved(
    settings, tmp_path, interrupt
):
    """A cut run begins again at the last better step, before an evaluation that it had made already."""
    rising = replace(settings, learning_rate=0.05, lr_schedule="constant", warmup_iters=6)
    settings = replace(rising, always_save_checkpoint=False, keep_checkpoints=9)
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    run_training(whole)
    assert not (tmp_path / "whole" / "step-00000010").exists()
    folder = interrupted(settings, interrupt, 13)
    begins = "step-00000014" if interrupt is stop_at else "step-00000005"
    assert checkpoint.step_folders(folder)[-1].name == begins
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")


def test_resumed_run_that_began_with_weights_equals_uninterrupted_run(settings, tmp_path):
    """It goes on in the shape of those weights, and without them."""
    first = Path(settings.out_dir)
    run_training(settings)
    settings = replace(settings, init_from=str(first), out_dir=str(tmp_path / "tuned"), seed=7)
    settings = replace(settings, n_layer=7, block_size=8)
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    run_training(whole)
    folder = interrupted(settings, stop_at, 8)
    shutil.rmtree(first)
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")
    about = files.read_json_object(folder / "settings.json")
    assert about["settings"]["init_from"] == str(first)  # how it began


@needs_compiler
def test_resumed_run_equals_uninterrupted_run_when_compiled(settings, tmp_path, monkeypatch, capsys):
    settings = replace(settings, compile=True, n_layer=1, max_iters=6, eval_interval=3)
    compiled = []
    before_steps(monkeypatch, lambda t: compiled.append(t.forward is not t.model))
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    run_training(whole)
    folder = interrupted(settings, stop_at, 3)
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")
    assert compiled == [True] * 12
    assert "torch.compile failed" not in capsys.readouterr().err


def test_a_run_in_its_second_epoch_resumes_too(settings, tmp_path, monkeypatch):
    """The corpus has about 700 windows: with 64 rows a step the epoch turns within 20 steps."""
    settings = replace(settings, batch_size=64)
    whole = replace(settings, out_dir=str(tmp_path / "whole"))
    _, undisturbed = run_training(whole)
    assert undisturbed.sampler.windows_per_epoch < 20 * 64
    stop_at(monkeypatch, 15)
    run_training(settings)
    monkeypatch.undo()
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert same_model(resumed, undisturbed)


def test_kill_9_at_random_moments_loses_nothing(settings, tmp_path):
    """The process is killed three times, wherever it is; the run ends with the undisturbed run's bits."""
    ruined = replace(settings, learning_rate=0.4, warmup_iters=120, weight_decay=5.0)  # best at about 40
    settings = replace(ruined, max_iters=120, eval_interval=10)
    run_training(replace(settings, out_dir=str(tmp_path / "whole")))
    rng = random.Random(0)
    words = flags(replace(settings, log_interval=1))
    for _ in range(3):
        started = Path(settings.out_dir, "settings.json").exists() and any(
            Path(settings.out_dir).glob("step-*")
        )
        command = [sys.executable, str(ROOT / "train.py"), *words]
        process = subprocess.Popen(
            [*command, "--init_from=resume"] if started else [*command, "--overwrite"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": "", "OMP_NUM_THREADS": "1"},
        )
        seen = 0
        until = rng.randint(5, 35)
        for line in process.stdout:
            seen += line.startswith("step ")
            if seen >= until:
                break
        time.sleep(rng.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    run_training(replace(settings, init_from="resume"))
    assert 0 < state_of(tmp_path / "whole" / "best")["step"] < 80
    assert_same_run(Path(settings.out_dir), tmp_path / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(settings, number, status):
    settings = replace(settings, max_iters=10**6, eval_interval=10**6)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3:"):
            process.send_signal(number)
            break
    said = process.communicate(timeout=60)[0]
    assert process.returncode == status
    assert re.search(
        r"SIG(TERM|INT): saved step \d+; continue with: python train.py --init_from=resume", said
    )
    step = int(re.search(r"saved step (\d+)", said).group(1))
    assert (
        checkpoint.read_checkpoint(checkpoint.step_folder(Path(settings.out_dir), step)).state["step"] == step
    )


def test_the_last_step_is_kept_after_early_stopping_too(settings):
    ruined = replace(settings, learning_rate=0.5, lr_schedule="constant", warmup_iters=0, max_iters=10**6)
    _, t = run_training(replace(ruined, early_stop_evals=2, always_save_checkpoint=False))
    assert checkpoint.step_folder(Path(settings.out_dir), t.state.step).exists()


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(settings):
    settings = replace(settings, keep_checkpoints=2)
    run_training(settings)
    folder = Path(settings.out_dir)
    (folder / "step-00000020" / "model.safetensors").unlink()
    run_training(replace(settings, init_from="resume", max_iters=17, keep_checkpoints=1))
    assert [p.name for p in checkpoint.step_folders(folder)] == ["step-00000017"]
    run_training(replace(settings, init_from="resume"))


def test_a_finished_run_that_is_resumed_ends_once(settings):
    run_training(settings)
    before = [
        {k: v for k, v in r.items() if "seconds" not in k}
        for r in metrics_file.read_metrics(Path(settings.out_dir))
    ]
    run_training(replace(settings, init_from="resume"))
    records = metrics_file.read_metrics(Path(settings.out_dir))
    assert [r["step"] for r in records] == [r["step"] for r in before]
    assert records[-1]["final_loss"] == before[-1]["final_loss"]
    assert (Path(settings.out_dir) / "samples.txt").read_text().count("=== step 20 ===") == 1
    about = files.read_json_object(Path(settings.out_dir) / "settings.json")
    assert about["settings"]["init_from"] == "scratch"  # how it began


def test_two_processes_resume_to_the_last_bit(settings, tmp_path):
    """The words under which two ranks go on are the same as for one."""
    whole = replace(settings, out_dir=str(tmp_path / "whole"), gradient_accumulation_steps=2, max_iters=10)
    parts = replace(whole, out_dir=str(tmp_path / "parts"))
    assert torchrun(2, *flags(whole)).returncode == 0
    # the schedule must not know of the shorter run
    assert torchrun(2, *flags(replace(parts, max_iters=5, lr_decay_iters=10))).returncode == 0
    result = torchrun(2, "--init_from=resume", f"--out_dir={parts.out_dir}", "--max_iters=10")
    assert result.returncode == 0, result.stderr
    assert losses(parts.out_dir) == losses(whole.out_dir)
    assert same_folder(*(Path(x.out_dir) / "step-00000010" for x in (whole, parts)))


def test_resume_takes_the_settings_of_the_run_and_lets_flags_win(settings, tmp_path):
    run_training(settings)
    result = run_script(
        "train.py",
        "--init_from=resume",
        f"--out_dir={settings.out_dir}",
        "--max_iters=22",
        "--print_settings",
    )
    assert re.search(r"^n_layer = 2 +# .*settings.json$", result.stdout, re.MULTILINE)
    assert re.search(r"^max_iters = 22 +# --max_iters$", result.stdout, re.MULTILINE)
    result = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=22")
    assert result.returncode == 0, result.stderr
    assert "resuming at step 20" in result.stdout
    assert max(losses(settings.out_dir)) == 22


def test_a_run_that_was_overwritten_can_be_resumed(settings):
    run_training(replace(settings, max_iters=5))
    run_training(replace(settings, max_iters=5, overwrite=True))
    result = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=6")
    assert result.returncode == 0, result.stderr


def test_a_damaged_newest_checkpoint_is_passed_over(settings, capsys):
    _, undisturbed = run_training(settings)
    folder = Path(settings.out_dir)
    path = folder / "step-00000020" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert same_model(resumed, undisturbed)
    assert re.search(r"warning: .*step-00000020/model.safetensors is damaged", capsys.readouterr().err)


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on_under_its_id(settings, tmp_path):
    """Offline, in two processes: each writes a log of its own, under the id that the run folder keeps."""
    pytest.importorskip("wandb")
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    folder = Path(settings.out_dir)
    begin = flags(replace(settings, wandb_log=True, wandb_project="p", max_iters=3))
    for words in (begin, ["--init_from=resume", f"--out_dir={folder}", "--max_iters=5"]):
        result = run_script("train.py", *words, env=env)
        assert result.returncode == 0, result.stderr
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))  # the folders are named by the time
    assert [path.name for path in logs] == [f"run-{(folder / 'wandb_id.txt').read_text()}.wandb"] * 2
    contents = [path.read_bytes() for path in logs]
    assert b"eval_val_loss" in contents[0]
    steps = [{int(n) for n in re.findall(rb"\x05_step\x82\x01\x01(\d)", content)} for content in contents]
    assert steps == [{0, 1, 2, 3}, {4, 5}]  # of the protobufs of which such a log is made
