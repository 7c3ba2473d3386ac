"""The loop and its promises: reproducible, resumable to the last bit, stopped cleanly, no rubbish saved."""

import copy
import math
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import (
    ROOT,
    before_steps,
    flags,
    losses,
    run_script,
    run_training,
    same_folder,
    stop_at,
    torchrun,
)

import train
from configurator import command
from fradique.checkpointing import checkpoint, metrics_file
from fradique.data import dataset
from fradique.io import files
from fradique.optim import optimizer
from fradique.runtime import device
from fradique.training import evaluation, logger, setup, time_budget

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"
)


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
    assert re.search(r"SIG(TERM|INT): saved step \d+; continue with: python train.py --init_from=resume", said)
    step = int(re.search(r"saved step (\d+)", said).group(1))
    assert (
        checkpoint.read_checkpoint(checkpoint.step_folder(Path(settings.out_dir), step)).state["step"] == step
    )


def test_training_learns(settings):
    run_training(replace(settings, max_iters=150, dropout=0.0, eval_interval=50))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "eval_val_loss" in r]
    assert records[0]["eval_val_loss"] == pytest.approx(math.log(19), abs=0.4)
    assert records[-1]["eval_val_loss"] < 1.5  # words in random order have about 0.5 nats a character


def test_gradient_accumulation_equals_one_large_batch(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=5)
    run_training(replace(settings, batch_size=8))
    other = replace(settings, out_dir=str(tmp_path / "b"), batch_size=2, gradient_accumulation_steps=4)
    run_training(other)
    for step, loss in losses(settings.out_dir).items():
        assert losses(other.out_dir)[step] == pytest.approx(loss, abs=1e-5)


def test_a_step_cut_into_slices_equals_the_whole_step(settings, tmp_path, monkeypatch):
    found = []
    for at_once in (1, 1 << 20):
        monkeypatch.setattr(device, "CPU_MAX_TOKENS", at_once)
        folder = tmp_path / str(at_once)
        run_training(replace(settings, dropout=0.0, out_dir=str(folder)))
        found.append(list(losses(folder).values()))
    assert len(found[0]) == settings.max_iters
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_run(settings, tmp_path):
    other = replace(
        settings, gradient_checkpointing=True, dropout=0.2, out_dir=str(tmp_path / "checkpointed")
    )
    settings = replace(settings, dropout=0.2)
    run_training(settings)
    run_training(other)
    assert losses(settings.out_dir) == losses(other.out_dir) != {}


def test_a_step_is_the_textbook_step(settings):
    """Loss, clipped gradient and AdamW of one step against plain torch on the same batch and weights."""
    settings = replace(settings, dropout=0.0, grad_clip=0.5, eval_only=True)
    t = setup.setup_training(settings)
    twin = copy.deepcopy(t.model)
    x, y = t.corpus.train.read(t.sampler.windows(0, 4))
    logits = twin(x, y)[0]
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
    for p in twin.parameters():
        p.grad *= min(1.0, 0.5 / (norm.item() + 1e-6))
    groups = optimizer.parameter_groups(dict(twin.named_parameters()), settings.weight_decay)
    torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=False, foreach=False).step()
    got, got_norm = train.train_step(t, 0.01)
    assert got.item() == pytest.approx(loss.item(), abs=1e-6)
    assert got_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(t.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_dropout_depends_on_seed_and_step_alone(settings):
    t = setup.setup_training(replace(settings, eval_only=True, learning_rate=1e-9))
    first = train.train_step(t, 0.0)[0].item()
    torch.rand(100)  # whatever else draws numbers
    again = train.train_step(t, 0.0)[0].item()
    t.model.eval()
    x, y = t.corpus.train.read(t.sampler.windows(0, 4))
    assert first == again != t.model(x, y)[1].item()


def test_the_final_figures_are_those_of_the_whole_split(settings):
    """Against the definition, computed token by token with nothing of ours but the model."""
    _, t = run_training(replace(settings, max_iters=4, eval_interval=2))
    final = metrics_file.read_metrics(Path(settings.out_dir))[-1]
    ids = torch.from_numpy(np.fromfile(Path(settings.data_dir) / "tiny" / "val.bin", "<u2").astype("int64"))
    best = checkpoint.read_checkpoint(Path(settings.out_dir) / "best")
    checkpoint.copy_parameters(t.model, best.model, "best")
    t.model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            inputs = ids[start : start + 16][: len(ids) - 1 - start]
            targets = ids[start + 1 : start + 1 + len(inputs)]
            logits = t.model(inputs[None], targets[None])[0][0].double()
            total -= torch.log_softmax(logits, -1)[torch.arange(len(inputs)), targets].sum().item()
    n = len(ids) - 1
    text = t.corpus.tokenizer.decode(ids.tolist())
    size = len(text.encode()) * n / len(ids)
    assert final["final_loss"] == pytest.approx(total / n, abs=1e-5)
    assert final["final_perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
    assert final["final_bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-5)


def test_evaluations_of_the_same_weights_are_equal(settings):
    t = setup.setup_training(replace(settings, eval_only=True))
    assert evaluation.estimate_loss(t) == evaluation.estimate_loss(t)
    assert evaluation.evaluate_val_split(t) == evaluation.evaluate_val_split(t)
    assert t.model.training


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(settings):
    """With a learning rate that ruins the model after a while, the best is not the last."""
    settings = replace(settings, learning_rate=0.5, lr_schedule="constant", warmup_iters=15, min_lr=0.0)
    run_training(settings)
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "eval_val_loss" in r]
    best = min(records, key=lambda r: r["eval_val_loss"])
    state = checkpoint.read_checkpoint(Path(settings.out_dir) / "best").state
    assert (
        state["step"]
        == best["step"]
        == metrics_file.read_metrics(Path(settings.out_dir))[-1]["best_step"]
        < 20
    )
    assert state["best_val_loss"] == best["eval_val_loss"]


def test_the_last_checkpoints_are_kept(settings):
    run_training(replace(settings, keep_checkpoints=3))
    names = sorted(p.name for p in Path(settings.out_dir).glob("step-*"))
    assert names == ["step-00000010", "step-00000015", "step-00000020"]


def test_without_always_save_only_better_steps_and_the_last_are_saved(settings):
    bad = replace(settings, learning_rate=0.5, lr_schedule="constant", warmup_iters=0, keep_checkpoints=9)
    run_training(replace(bad, always_save_checkpoint=False))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "eval_val_loss" in r]
    improved = [
        r["step"]
        for i, r in enumerate(records)
        if r["eval_val_loss"] < min([x["eval_val_loss"] for x in records[:i]], default=math.inf)
    ]
    expected = {f"step-{step:08d}" for step in [*improved, 20]}
    assert {p.name for p in Path(settings.out_dir).glob("step-*")} == expected


def test_early_stopping_ends_a_run_that_gets_no_better(settings, capsys):
    ruined = replace(settings, learning_rate=0.5, lr_schedule="constant", max_iters=10**6, early_stop_evals=3)
    status, t = run_training(replace(ruined, warmup_iters=0))
    assert status == 0
    assert t.state.evals_since_best == 3 and t.state.step < 200
    assert "no better validation loss in 3 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoints(
    settings, monkeypatch, where
):
    real = train.train_step

    def poisoned(t, lr):
        weight = t.model.transformer["h"][0].mlp.c_fc.weight
        if t.state.step == 12 and where == "loss":
            weight.data.fill_(math.nan)
        elif t.state.step == 12:
            weight.register_hook(lambda gradient: gradient * math.inf)
        return real(t, lr)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(
        ValueError, match=f"step 13: the {where} is not finite.*learning_rate.*init_from=resume"
    ):
        run_training(settings)
    folders = checkpoint.step_folders(Path(settings.out_dir))
    assert folders[-1].name == "step-00000010"
    assert all(checkpoint.all_finite(checkpoint.read_checkpoint(folder).model) for folder in folders)


def test_a_validation_loss_that_is_not_finite_stops_the_run_with_the_same_message(settings):
    ruined = replace(
        settings, learning_rate=1e30, max_iters=1, eval_interval=1, warmup_iters=0, grad_clip=0.0
    )
    with pytest.raises(ValueError, match=r"step 1: the loss is not finite.*learning_rate"):
        run_training(ruined)
    assert [p.name for p in checkpoint.step_folders(Path(settings.out_dir))] == ["step-00000000"]


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


def scaled(settings):
    """A run that scales its loss as float16 does, on a CPU."""
    t = setup.setup_training(settings)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return t


def test_a_scaled_loss_gives_the_same_training(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=6, eval_interval=6)
    run_training(settings)
    t = scaled(replace(settings, out_dir=str(tmp_path / "b")))
    train.train(t)
    t.close()
    assert t.scaler.get_scale() == 4096.0  # it grew twice
    for step, loss in losses(settings.out_dir).items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-5)
    state = checkpoint.read_checkpoint(tmp_path / "b" / "step-00000006").state
    assert state["scaler"]["scale"] == 4096.0
    run_training(
        replace(settings, out_dir=str(tmp_path / "b"), init_from="resume", max_iters=8)
    )  # in float32


def test_two_processes_resume_to_the_last_bit(settings, tmp_path):
    """The words under which two ranks go on are the same as for one."""
    whole = replace(settings, out_dir=str(tmp_path / "whole"), gradient_accumulation_steps=2, max_iters=10)
    parts = replace(whole, out_dir=str(tmp_path / "parts"))
    assert torchrun(2, *flags(whole)).returncode == 0
    # the schedule must not know of the shorter run
    assert torchrun(2, *flags(replace(parts, max_iters=5, lr_decay_iters=10))).returncode == 0
    done = torchrun(2, "--init_from=resume", f"--out_dir={parts.out_dir}", "--max_iters=10")
    assert done.returncode == 0, done.stderr
    assert losses(parts.out_dir) == losses(whole.out_dir)
    assert same_folder(*(Path(x.out_dir) / "step-00000010" for x in (whole, parts)))


def test_eval_only_reports_and_writes_nothing(settings, capsys):
    done = run_script("train.py", *flags(replace(settings, eval_only=True)))
    assert done.returncode == 0, done.stderr
    assert re.search(r"train loss \d.*val loss \d", done.stdout)
    assert re.search(
        r"whole validation split: loss \d\.\d+, perplexity \d+\.\d+, \d\.\d+ bits per byte", done.stdout
    )
    assert not Path(settings.out_dir).exists()


def test_a_run_folder_stands_by_itself(settings):
    run_training(replace(settings, sample_interval=10))
    folder = Path(settings.out_dir)
    names = {p.name for p in folder.iterdir()}
    assert {"settings.json", "tokenizer.json", "metrics.jsonl", "samples.txt", "best", "loss.png"} <= names
    about = files.read_json_object(folder / "settings.json")
    assert about["settings"]["n_layer"] == 2 and about["versions"]["torch"] == torch.__version__
    samples = (folder / "samples.txt").read_text()
    assert re.findall(r"^=== step (\d+) ===$", samples, re.MULTILINE) == ["10", "20", "20"]
    record = next(r for r in metrics_file.read_metrics(folder) if "loss" in r)
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "seconds",
        "tokens_per_second",
        "mfu",
    } <= record.keys()


def test_the_loss_curve_is_drawn_anew_at_each_evaluation(settings, tmp_path, monkeypatch):
    """Each time it is the picture of all that metrics.jsonl holds by then."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    from fradique.training import loss_plot

    folder, pictures = Path(settings.out_dir), []

    def compare(t=None):
        if t is None or t.state.step % settings.eval_interval == 0:
            loss_plot.save_plot([loss_plot.read_curves(folder)], tmp_path / "now.png")
            pictures.append((folder / "loss.png").read_bytes())
            assert pictures[-1] == (tmp_path / "now.png").read_bytes()

    before_steps(monkeypatch, compare)
    run_training(replace(settings, max_iters=10))
    compare()
    assert len(set(pictures)) == 3


def test_resume_takes_the_settings_of_the_run_and_lets_flags_win(settings, tmp_path):
    run_training(settings)
    done = run_script(
        "train.py",
        "--init_from=resume",
        f"--out_dir={settings.out_dir}",
        "--max_iters=22",
        "--print_settings",
    )
    assert re.search(r"^n_layer = 2 +# .*settings.json$", done.stdout, re.MULTILINE)
    assert re.search(r"^max_iters = 22 +# --max_iters$", done.stdout, re.MULTILINE)
    done = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=22")
    assert done.returncode == 0, done.stderr
    assert "going on at step 20" in done.stdout
    assert max(losses(settings.out_dir)) == 22


def test_a_run_that_was_overwritten_can_be_resumed(settings):
    run_training(replace(settings, max_iters=5))
    run_training(replace(settings, max_iters=5, overwrite=True))
    done = run_script("train.py", "--init_from=resume", f"--out_dir={settings.out_dir}", "--max_iters=6")
    assert done.returncode == 0, done.stderr


def test_a_damaged_newest_checkpoint_is_passed_over(settings, capsys):
    _, undisturbed = run_training(settings)
    folder = Path(settings.out_dir)
    path = folder / "step-00000020" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    _, resumed = run_training(replace(settings, init_from="resume"))
    assert same_model(resumed, undisturbed)
    assert re.search(r"warning: .*step-00000020/model.safetensors is damaged", capsys.readouterr().err)


def test_training_goes_on_from_another_run(settings, tmp_path):
    run_training(settings)
    tuned = replace(
        settings, init_from=settings.out_dir, out_dir=str(tmp_path / "tuned"), n_layer=7, block_size=8
    )
    _, t = run_training(tuned)
    assert t.model.config.n_layer == 2 and t.model.config.block_size == 8
    assert files.read_json_object(tmp_path / "tuned" / "settings.json")["settings"]["n_layer"] == 2
    best = checkpoint.read_checkpoint(Path(settings.out_dir) / "best").state["best_val_loss"]
    first = next(r for r in metrics_file.read_metrics(tmp_path / "tuned") if "eval_val_loss" in r)
    assert first["eval_val_loss"] == pytest.approx(best, abs=0.3)


def test_a_failing_compiler_gives_one_warning_and_the_same_numbers(settings, tmp_path, monkeypatch, capsys):
    run_training(settings)

    def broken(model):
        def fail(*_, **__):
            raise RuntimeError("no compiler today")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    other = replace(settings, out_dir=str(tmp_path / "b"), compile=True)
    run_training(other)
    assert capsys.readouterr().err.count("torch.compile failed (RuntimeError: no compiler today)") == 1
    assert losses(other.out_dir) == losses(settings.out_dir)


@needs_compiler
def test_a_compiled_run_equals_the_eager_run(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=6, n_layer=1)
    run_training(settings)
    done = run_script(
        "train.py", *flags(replace(settings, out_dir=str(tmp_path / "b"), compile=True)), timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed" not in done.stderr
    for step, loss in losses(settings.out_dir).items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-4)


def test_bfloat16_follows_float32_from_afar(settings, tmp_path):
    settings = replace(settings, dropout=0.0, dtype="float32")
    run_training(settings)
    other = replace(settings, out_dir=str(tmp_path / "b"), dtype="bfloat16")
    _, t = run_training(other)
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    for step, loss in losses(settings.out_dir).items():
        assert losses(other.out_dir)[step] == pytest.approx(loss, abs=0.05)


def test_plain_attention_trains_as_the_fused_does(settings, tmp_path):
    settings = replace(settings, dropout=0.0)
    run_training(settings)
    other = replace(settings, out_dir=str(tmp_path / "b"), flash=False)
    run_training(other)
    for step, loss in losses(settings.out_dir).items():
        assert losses(other.out_dir)[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (4, 1)])
def test_two_processes_give_the_losses_of_one(settings, tmp_path, batch_size, accumulation):
    """Two micro-batches are shared between the processes; a single one is cut in two."""
    settings = replace(
        settings, dropout=0.0, batch_size=batch_size, gradient_accumulation_steps=accumulation, max_iters=10
    )
    run_training(settings)
    other = replace(settings, out_dir=str(tmp_path / "two"))
    done = torchrun(2, *flags(other))
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("going") <= 1
    alone, together = losses(settings.out_dir), losses(other.out_dir)
    assert alone.keys() == together.keys()
    for step, loss in alone.items():
        assert together[step] == pytest.approx(loss, abs=1e-5)
    last = [metrics_file.read_metrics(Path(s.out_dir))[-1] for s in (settings, other)]
    assert last[0]["final_loss"] == pytest.approx(last[1]["final_loss"], abs=1e-5)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a tenth of a second in each step, by one for 700 windows evaluated (there are
    about as many), by `waits` in their batches, and not else."""
    now = SimpleNamespace(seconds=1000.0, waits=iter(()), windows=1.0)
    stand_in = SimpleNamespace(monotonic=lambda: now.seconds, time_ns=time.time_ns)
    monkeypatch.setattr(logger, "time", stand_in)
    monkeypatch.setattr(train, "time", stand_in)
    monkeypatch.setattr(evaluation, "time", stand_in)
    monkeypatch.setattr(train, "START", 1000.0)
    step, batches = train.train_step, dataset.Split.batches

    def slow_step(*words):
        now.seconds += 0.1
        return step(*words)

    def slow_batches(self, *words):
        for x, y in batches(self, *words):
            now.seconds += now.windows * len(y) / 700 + next(now.waits, 0.0)
            yield x, y

    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(dataset.Split, "batches", slow_batches)
    return now


def test_a_time_budget_ends_the_run_in_time_with_the_schedule_at_its_floor(settings, clock):
    settings = replace(settings, time_budget="20s", max_iters=1, eval_interval=1000, log_interval=10)
    settings = replace(settings, lr_schedule="linear", warmup_iters=5, min_lr=0.0, eval_iters=10**6)
    status, t = run_training(settings)
    assert status == 0
    assert 18.0 < clock.seconds - 1000.0 <= 20.0  # the whole budget, the last evaluation included
    assert 140 < t.state.step < 190  # the clock, not max_iters, ended it
    rates = {r["step"]: r["lr"] for r in metrics_file.read_metrics(Path(settings.out_dir)) if "lr" in r}
    assert rates[10] > 0.8 * settings.learning_rate and min(rates.values()) < 0.1 * settings.learning_rate
    assert list(rates.values()) == sorted(rates.values(), reverse=True)


def test_a_time_budget_is_kept_with_long_steps_and_evaluations_on_the_way(settings, clock):
    for name, interval in (("a", 7), ("b", 10), ("c", 33)):
        clock.seconds = 1000.0
        own = replace(
            settings, out_dir=f"{settings.out_dir}-{name}", time_budget="20s", eval_interval=interval
        )
        run_training(replace(own, eval_iters=10**6))
        assert clock.seconds - 1000.0 <= 20.0


@pytest.mark.parametrize("budget", ["60s", "15s"])
def test_a_slow_batch_of_an_evaluation_does_not_shorten_the_run(settings, clock, budget):
    """A first one that takes nine seconds more, as on a machine that was busy then."""
    clock.waits = iter([9.0])
    end = 1000.0 + time_budget.parse_duration(budget)
    run_training(replace(settings, time_budget=budget, eval_interval=100, eval_iters=10**6))
    assert end - 2.0 < clock.seconds <= end


def test_ranks_agree_on_whether_time_is_up(settings):
    """All that decides is the same for them: here another rank had the slower step."""
    t = setup.setup_training(replace(settings, time_budget="1h"))
    t.close()
    asked = []

    class Slower(device.Runtime):
        def max(self, *values):
            asked.append(values)
            return [value if value != 0.25 else 7200.0 for value in values]

    t.runtime = Slower(t.runtime.device, t.runtime.dtype, compile=False)
    t.budget.step_seconds = 0.25
    assert train.is_finished(t)
    assert asked and t.budget.step_seconds == 7200.0


def test_a_budget_that_evaluations_alone_would_fill_is_half_used_for_training(settings, clock, capsys):
    """One before and one behind, of seven seconds each, and fourteen to do all in."""
    clock.windows = 7.0
    run_training(replace(settings, time_budget="14s", eval_interval=10**6, eval_iters=10**6))
    last = metrics_file.read_metrics(Path(settings.out_dir))[-1]
    assert 30 <= last["step"] <= 36  # half of the seven seconds that were left, in steps of a tenth
    assert f"warning: {last['step']} steps were made: the evaluations alone take" in capsys.readouterr().err


def test_an_evaluation_is_the_same_however_many_windows_are_taken_at_once(settings, monkeypatch):
    t = setup.setup_training(settings)
    found = []
    for tokens in (4096, 64, 1):
        monkeypatch.setattr(device, "CPU_MAX_TOKENS", tokens)
        estimates = [split.loss for split in evaluation.estimate_loss(t).values()]
        found.append([*estimates, evaluation.evaluate_val_split(t).loss])
    t.close()
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_a_time_budget_goes_on_where_the_stopped_run_was(settings, clock, monkeypatch):
    settings = replace(settings, time_budget="20s", eval_interval=1000)
    stop_at(monkeypatch, 30)
    run_training(settings)
    seconds = checkpoint.read_checkpoint(checkpoint.step_folders(Path(settings.out_dir))[-1]).state["seconds"]
    assert 3.0 <= seconds <= 4.0
    monkeypatch.undo()
    monkeypatch.setattr(train, "START", time.monotonic())
    _, t = run_training(replace(settings, init_from="resume", time_budget=f"{seconds + 0.01}s"))
    assert t.state.step == 31  # no time was left


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on_under_its_id(settings, tmp_path):
    """Offline, in two processes: each writes a log of its own, under the id that the run folder keeps."""
    pytest.importorskip("wandb")
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    folder = Path(settings.out_dir)
    begin = flags(replace(settings, wandb_log=True, wandb_project="p", max_iters=3))
    for words in (begin, ["--init_from=resume", f"--out_dir={folder}", "--max_iters=5"]):
        done = run_script("train.py", *words, env=env)
        assert done.returncode == 0, done.stderr
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))  # the folders are named by the time
    assert [path.name for path in logs] == [f"run-{(folder / 'wandb_id.txt').read_text()}.wandb"] * 2
    contents = [path.read_bytes() for path in logs]
    assert b"eval_val_loss" in contents[0]
    steps = [{int(n) for n in re.findall(rb"\x05_step\x82\x01\x01(\d)", content)} for content in contents]
    assert steps == [{0, 1, 2, 3}, {4, 5}]  # of the protobufs of which such a log is made
