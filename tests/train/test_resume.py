"""A resumed run equals an uninterrupted one, to the last bit."""

import os
import random
import re
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import (
    before_steps,
    flags,
    losses,
    needs_compiler,
    run_ranks,
    run_script,
    run_training,
    same_folder,
    start_script,
    stop_at,
)

import train
from configurator import command
from fradique.checkpointing import checkpoint, metrics_file
from fradique.io import files
from fradique.training import setup


def same_model(a: train.Trainer, b: train.Trainer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def crash_at(monkeypatch, step: int) -> None:
    """End the run at a step without saving, as a power cut does."""

    def crash(t):
        if t.state.step == step:
            raise RuntimeError("power cut")

    before_steps(monkeypatch, crash)


def interrupted_run(settings, interrupt, step: int) -> Path:
    """Train until `interrupt` (stop_at or crash_at) ends the run at a step; returns the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(RuntimeError, match="power cut") if interrupt is crash_at else nullcontext():
            run_training(settings)
    return Path(settings.out_dir)


def resume(folder: Path) -> None:
    """Run `python train.py --init_from=resume --out_dir=…` in this process."""
    arguments = ["--init_from=resume", f"--out_dir={folder}"]
    assert command(train.main, train.TrainSettings, arguments, base=setup.saved_run_settings) == 0


def state_of(folder: Path) -> dict:
    """The state of a checkpoint, without times."""
    state = checkpoint.read_checkpoint(folder).state
    return {name: value for name, value in state.items() if "seconds" not in name}


def metrics_of(folder: Path) -> list[dict]:
    """The records of metrics.jsonl, without times."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in metrics_file.read_metrics(folder)]


def assert_same_run(first: Path, second: Path) -> None:
    """The last and best checkpoints and the metrics of two finished runs are equal to the last bit."""
    last = checkpoint.step_folders(second)[-1].name
    assert checkpoint.step_folders(first)[-1].name == last
    for name in (last, "best"):
        assert same_folder(first / name, second / name), name
        assert state_of(first / name) == state_of(second / name)
    assert metrics_of(first) == metrics_of(second) and "final_loss" in metrics_of(first)[-1]


def test_equal_settings_give_equal_runs_to_the_last_bit(settings, tmp_path):
    status, first = run_training(settings)
    repeated = replace(settings, out_dir=str(tmp_path / "repeated"))
    _, second = run_training(repeated)
    assert status == 0
    assert losses(settings.out_dir) == losses(repeated.out_dir)
    assert len(losses(settings.out_dir)) == 20
    assert same_model(first, second)
    _, with_another_seed = run_training(replace(settings, out_dir=str(tmp_path / "another_seed"), seed=7))
    assert not same_model(first, with_another_seed)


@pytest.mark.parametrize("step", [0, 3, 5, 13, 19])
def test_a_resumed_run_equals_an_uninterrupted_run(settings, tmp_path, monkeypatch, step):
    settings = replace(settings, gradient_accumulation_steps=2)
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    _, expected = run_training(uninterrupted)
    stop_at(monkeypatch, step)
    status, _ = run_training(settings)
    monkeypatch.undo()
    assert status == 128 + signal.SIGTERM
    status, resumed = run_training(replace(settings, init_from="resume"))
    assert status == 0
    assert same_model(resumed, expected)
    assert losses(settings.out_dir) == losses(uninterrupted.out_dir)
    assert same_folder(*(Path(s.out_dir) / "step-00000020" for s in (settings, uninterrupted)))
    evaluations = [
        [
            (r["step"], r["eval_val_loss"])
            for r in metrics_file.read_metrics(Path(s.out_dir))
            if "eval_val_loss" in r
        ]
        for s in (settings, uninterrupted)
    ]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("always_save", [True, False])
@pytest.mark.parametrize("n_lost", [1, 2])
def test_resuming_is_exact_before_the_step_of_best(settings, tmp_path, always_save, n_lost):
    """The newest checkpoints are gone, but best/ is of the last step: the run makes it again."""
    settings = replace(settings, always_save_checkpoint=always_save, keep_checkpoints=9)
    run_training(settings)
    assert state_of(Path(settings.out_dir) / "best")["step"] == 20
    shutil.copytree(settings.out_dir, tmp_path / "uninterrupted")
    for folder in checkpoint.step_folders(Path(settings.out_dir))[-n_lost:]:
        shutil.rmtree(folder)
    resume(Path(settings.out_dir))
    assert_same_run(Path(settings.out_dir), tmp_path / "uninterrupted")


def test_resuming_keeps_the_count_for_early_stopping(settings, tmp_path):
    """Evaluations before the interruption count for early_stop_evals: both runs stop at the same step."""
    diverging = replace(settings, learning_rate=0.3, lr_schedule="constant", warmup_iters=0, max_iters=10**6)
    settings = replace(diverging, eval_interval=2, early_stop_evals=3)
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    _, expected = run_training(uninterrupted)
    best = expected.state.best_step
    assert expected.state.step == best + 6
    folder = interrupted_run(settings, stop_at, best + 5)
    assert state_of(checkpoint.step_folders(folder)[-1])["evals_since_best"] == 2
    resume(folder)
    assert_same_run(folder, tmp_path / "uninterrupted")


@pytest.mark.parametrize("interrupt", [stop_at, crash_at])
def test_resuming_is_exact_if_only_better_steps_are_saved(settings, tmp_path, interrupt):
    """After a crash the run resumes at the last saved step and repeats the evaluation at step 10."""
    unstable = replace(settings, learning_rate=0.05, lr_schedule="constant", warmup_iters=6)
    settings = replace(unstable, always_save_checkpoint=False, keep_checkpoints=9)
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    run_training(uninterrupted)
    assert not (tmp_path / "uninterrupted" / "step-00000010").exists()
    folder = interrupted_run(settings, interrupt, 13)
    newest = "step-00000014" if interrupt is stop_at else "step-00000005"
    assert checkpoint.step_folders(folder)[-1].name == newest
    resume(folder)
    assert_same_run(folder, tmp_path / "uninterrupted")


def test_resuming_is_exact_for_a_run_that_began_with_weights(settings, tmp_path):
    """The run resumes with the shape of the initial weights, after these have been deleted."""
    pretrained = Path(settings.out_dir)
    run_training(settings)
    settings = replace(settings, init_from=str(pretrained), out_dir=str(tmp_path / "tuned"), seed=7)
    settings = replace(settings, n_layer=7, block_size=8)
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    run_training(uninterrupted)
    folder = interrupted_run(settings, stop_at, 8)
    shutil.rmtree(pretrained)
    resume(folder)
    assert_same_run(folder, tmp_path / "uninterrupted")
    saved = files.read_json_object(folder / "settings.json")
    assert saved["settings"]["init_from"] == str(pretrained)  # as at the start of the run


@needs_compiler
@pytest.mark.parametrize("ngram_max", [1, 3])
def test_resuming_is_exact_for_a_compiled_run(settings, tmp_path, monkeypatch, capsys, ngram_max):
    settings = replace(settings, compile=True, n_layer=1, max_iters=6, eval_interval=3, ngram_max=ngram_max)
    compiled = []
    before_steps(monkeypatch, lambda t: compiled.append(t.forward is not t.model))
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    run_training(uninterrupted)
    folder = interrupted_run(settings, stop_at, 3)
    resume(folder)
    assert_same_run(folder, tmp_path / "uninterrupted")
    assert compiled == [True] * 12
    assert "torch.compile failed" not in capsys.readouterr().err


def test_resuming_is_exact_in_the_second_epoch(settings, tmp_path, monkeypatch):
    """The corpus has about 700 windows: with 64 rows per step the second epoch begins within 20 steps."""
    settings = replace(settings, batch_size=64)
    uninterrupted = replace(settings, out_dir=str(tmp_path / "uninterrupted"))
    _, expected = run_training(uninterrupted)
    assert expected.sampler.windows_per_epoch < 20 * 64
    stop_at(monkeypatch, 15)
    run_training(settings)
    monkeypatch.undo()
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert same_model(resumed, expected)


def test_resuming_is_exact_after_kill_9_at_random_moments(settings, tmp_path):
    """The process is killed at three random moments; the run ends like an uninterrupted one, bit for bit."""
    overfitting = replace(settings, learning_rate=0.4, warmup_iters=120, weight_decay=5.0)  # best at about 40
    settings = replace(overfitting, max_iters=120, eval_interval=10)
    run_training(replace(settings, out_dir=str(tmp_path / "uninterrupted")))
    rng = random.Random(0)
    arguments = flags(replace(settings, log_interval=1))
    for _ in range(3):
        has_checkpoint = Path(settings.out_dir, "settings.json").exists() and any(
            Path(settings.out_dir).glob("step-*")
        )
        option = "--init_from=resume" if has_checkpoint else "--overwrite"
        with start_script("train.py", *arguments, option) as process:
            steps = 0
            kill_after = rng.randint(5, 35)
            for line in process.lines:
                steps += line.startswith("step ")
                if steps >= kill_after:
                    break
            time.sleep(rng.random() / 50)
            process.kill()
            process.wait()
    run_training(replace(settings, init_from="resume"))
    assert 0 < state_of(tmp_path / "uninterrupted" / "best")["step"] < 80
    assert_same_run(Path(settings.out_dir), tmp_path / "uninterrupted")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_sets_the_exit_status(settings, number, status):
    settings = replace(settings, max_iters=10**6, eval_interval=10**6)
    with start_script("train.py", *flags(settings)) as process:
        for line in process.lines:
            if line.startswith("step 3:"):
                os.kill(process.pids[0], number)
                break
        output = process.lines.read()
        assert process.wait() == [status]
    assert re.search(
        r"SIG(TERM|INT): saved step \d+; continue with: python train.py --init_from=resume", output
    )
    step = int(re.search(r"saved step (\d+)", output).group(1))
    assert (
        checkpoint.read_checkpoint(checkpoint.step_folder(Path(settings.out_dir), step)).state["step"] == step
    )


def test_early_stopping_saves_the_last_step(settings):
    diverging = replace(settings, learning_rate=0.5, lr_schedule="constant", warmup_iters=0, max_iters=10**6)
    _, t = run_training(replace(diverging, early_stop_evals=2, always_save_checkpoint=False))
    assert checkpoint.step_folder(Path(settings.out_dir), t.state.step).exists()


def test_pruning_does_not_count_a_damaged_newer_checkpoint(settings):
    settings = replace(settings, keep_checkpoints=2)
    run_training(settings)
    folder = Path(settings.out_dir)
    (folder / "step-00000020" / "model.safetensors").unlink()
    run_training(replace(settings, init_from="resume", max_iters=17, keep_checkpoints=1))
    assert [p.name for p in checkpoint.step_folders(folder)] == ["step-00000017"]
    run_training(replace(settings, init_from="resume"))


def test_resuming_a_finished_run_adds_no_second_ending(settings, capsys):
    run_training(settings)
    before = [
        {k: v for k, v in r.items() if "seconds" not in k}
        for r in metrics_file.read_metrics(Path(settings.out_dir))
    ]
    capsys.readouterr()
    run_training(replace(settings, init_from="resume"))
    assert "the run is finished: it has made 20 of max_iters = 20 steps" in capsys.readouterr().out
    records = metrics_file.read_metrics(Path(settings.out_dir))
    assert [r["step"] for r in records] == [r["step"] for r in before]
    assert records[-1]["final_loss"] == before[-1]["final_loss"]
    assert (Path(settings.out_dir) / "samples.txt").read_text().count("=== step 20 ===") == 1
    saved = files.read_json_object(Path(settings.out_dir) / "settings.json")
    assert saved["settings"]["init_from"] == "scratch"  # as at the start of the run


@pytest.mark.parametrize("ngram_max", [1, 3])
def test_resuming_is_exact_on_two_processes(settings, tmp_path, ngram_max):
    """Two ranks resume with the same arguments as one."""
    uninterrupted = replace(
        settings, out_dir=str(tmp_path / "uninterrupted"), gradient_accumulation_steps=2, max_iters=10
    )
    uninterrupted = replace(uninterrupted, ngram_max=ngram_max)
    resumed = replace(uninterrupted, out_dir=str(tmp_path / "resumed"))
    assert run_ranks(2, *flags(uninterrupted)).returncode == 0
    # the shorter run needs the schedule of the full one: hence lr_decay_iters
    assert run_ranks(2, *flags(replace(resumed, max_iters=5, lr_decay_iters=10))).returncode == 0
    result = run_ranks(2, "--init_from=resume", f"--out_dir={resumed.out_dir}", "--max_iters=10")
    assert result.returncode == 0, result.stderr
    assert losses(resumed.out_dir) == losses(uninterrupted.out_dir)
    assert same_folder(
        *(Path(run_settings.out_dir) / "step-00000010" for run_settings in (uninterrupted, resumed))
    )


def test_resuming_uses_saved_settings_and_flags_override_them(settings, tmp_path):
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


def test_an_overwritten_run_can_be_resumed(settings):
    run_training(replace(settings, max_iters=5))
    run_training(replace(settings, max_iters=5, overwrite=True))
    result = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=6")
    assert result.returncode == 0, result.stderr


def test_resuming_skips_a_damaged_newest_checkpoint(settings, capsys):
    _, expected = run_training(settings)
    folder = Path(settings.out_dir)
    path = folder / "step-00000020" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert same_model(resumed, expected)
    assert re.search(r"warning: .*step-00000020/model.safetensors is damaged", capsys.readouterr().err)


def test_a_resumed_run_logs_to_wandb_under_the_same_id(settings, tmp_path):
    """Offline, in two processes: each writes its own log, under the id saved in the run folder."""
    pytest.importorskip("wandb")
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    folder = Path(settings.out_dir)
    start = flags(replace(settings, wandb_log=True, wandb_project="p", max_iters=3))
    for arguments in (start, ["--init_from=resume", f"--out_dir={folder}", "--max_iters=5"]):
        result = run_script("train.py", *arguments, env=env)
        assert result.returncode == 0, result.stderr
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))  # the folders are named by the time
    assert [path.name for path in logs] == [f"run-{(folder / 'wandb_id.txt').read_text()}.wandb"] * 2
    contents = [path.read_bytes() for path in logs]
    assert b"eval_val_loss" in contents[0]
    steps = [{int(n) for n in re.findall(rb"\x05_step\x82\x01\x01(\d)", content)} for content in contents]
    assert steps == [{0, 1, 2, 3}, {4, 5}]  # the _step field of the protobuf records in the log
