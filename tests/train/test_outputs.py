"""Evaluations, checkpoints and files of a run."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import before_steps, flags, run_script, run_training

import train
from fradique.checkpointing import checkpoint, metrics_file
from fradique.io import files
from fradique.runtime import device
from fradique.training import evaluation, outputs, setup
from train import TrainSettings


def test_final_metrics_cover_the_whole_validation_split(settings):
    """The expected values come from the definition, token by token; only the model is the project's."""
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


def test_choices_that_make_a_run_slow_give_a_warning(settings, monkeypatch, capsys):
    monkeypatch.setattr(device, "emulates_bf16", lambda device: True)
    run_training(replace(settings, max_iters=1, dtype="bfloat16"))
    assert capsys.readouterr().err.count("warning: dtype=bfloat16: this cpu has no bfloat16 arithmetic") == 1


def test_evaluations_of_the_same_weights_are_equal(settings):
    t = setup.setup_training(replace(settings, eval_only=True))
    assert evaluation.estimate_loss(t) == evaluation.estimate_loss(t)
    assert evaluation.evaluate_val_split(t) == evaluation.evaluate_val_split(t)
    assert t.model.training


def test_the_best_checkpoint_has_the_lowest_validation_loss(settings):
    """The learning rate is so high that the model gets worse, so the best step is not the last."""
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


def test_keep_checkpoints_is_the_number_of_checkpoints_kept(settings):
    run_training(replace(settings, keep_checkpoints=3))
    names = sorted(p.name for p in Path(settings.out_dir).glob("step-*"))
    assert names == ["step-00000010", "step-00000015", "step-00000020"]


def test_without_always_save_only_better_or_last_step_is_saved(settings):
    diverging = replace(
        settings, learning_rate=0.5, lr_schedule="constant", warmup_iters=0, keep_checkpoints=9
    )
    run_training(replace(diverging, always_save_checkpoint=False))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "eval_val_loss" in r]
    improved = [
        r["step"]
        for i, r in enumerate(records)
        if r["eval_val_loss"] < min([x["eval_val_loss"] for x in records[:i]], default=math.inf)
    ]
    expected = {f"step-{step:08d}" for step in [*improved, 20]}
    assert {p.name for p in Path(settings.out_dir).glob("step-*")} == expected


def test_early_stopping_ends_a_run_without_improvement(settings, capsys):
    diverging = replace(
        settings, learning_rate=0.5, lr_schedule="constant", max_iters=10**6, early_stop_evals=3
    )
    status, t = run_training(replace(diverging, warmup_iters=0))
    assert status == 0
    assert t.state.evals_since_best == 3 and t.state.step < 200
    assert "no better validation loss in 3 evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_a_nonfinite_loss_or_gradient_stops_the_run(settings, monkeypatch, quantity):
    real_step = train.train_step

    def step_with_infinity(t, lr):
        weight = t.model.transformer["h"][0].mlp.c_fc.weight
        if t.state.step == 12 and quantity == "loss":
            weight.data.fill_(math.nan)
        elif t.state.step == 12:
            weight.register_hook(lambda gradient: gradient * math.inf)
        return real_step(t, lr)

    monkeypatch.setattr(train, "train_step", step_with_infinity)
    with pytest.raises(
        ValueError, match=f"step 13: the {quantity} is not finite.*learning_rate.*init_from=resume"
    ):
        run_training(settings)
    folders = checkpoint.step_folders(Path(settings.out_dir))
    assert folders[-1].name == "step-00000010"
    assert all(checkpoint.all_finite(checkpoint.read_checkpoint(folder).model) for folder in folders)


def test_a_nonfinite_validation_loss_stops_the_run(settings):
    diverging = replace(
        settings, learning_rate=1e30, max_iters=1, eval_interval=1, warmup_iters=0, grad_clip=0.0
    )
    with pytest.raises(ValueError, match=r"step 1: the loss is not finite.*learning_rate"):
        run_training(diverging)
    assert [p.name for p in checkpoint.step_folders(Path(settings.out_dir))] == ["step-00000000"]


def test_eval_only_prints_the_losses_and_writes_no_file(settings, capsys):
    result = run_script("train.py", *flags(replace(settings, eval_only=True)))
    assert result.returncode == 0, result.stderr
    assert re.search(r"train loss \d.*val loss \d", result.stdout)
    assert re.search(
        r"whole validation split: loss \d\.\d+, perplexity \d+\.\d+, \d\.\d+ bits per byte", result.stdout
    )
    assert not Path(settings.out_dir).exists()


@pytest.mark.loss_plot
def test_a_run_folder_is_self_contained(settings):
    run_training(replace(settings, sample_interval=10))
    folder = Path(settings.out_dir)
    names = {p.name for p in folder.iterdir()}
    assert {"settings.json", "tokenizer.json", "metrics.jsonl", "samples.txt", "best", "loss.png"} <= names
    saved = files.read_json_object(folder / "settings.json")
    assert saved["settings"]["n_layer"] == 2 and saved["versions"]["torch"] == torch.__version__
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


@pytest.mark.loss_plot
def test_the_loss_plot_is_redrawn_at_each_evaluation(settings, tmp_path, monkeypatch):
    """Before each step after an evaluation, loss.png equals a plot of the current metrics.jsonl."""
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


@pytest.mark.parametrize(
    ("changes", "total_steps", "message"),
    [
        (
            {"warmup_iters": 2000},
            30,
            r"warmup_iters = 2000 .* run of 30 steps.* only to 9\.0e-06 of 6\.0e-04\. Use --warmup_iters=1$",
        ),
        ({"warmup_iters": 500}, 500, "Use --warmup_iters=25$"),
        (
            {"warmup_iters": 100, "lr_decay_iters": 100, "eval_interval": 5},
            1000,
            "lr_decay_iters = 100 is not above warmup_iters = 100",
        ),
        ({"warmup_iters": 1}, 1999, r"eval_interval = 2000 is above the 1999 .* Use --eval_interval=399$"),
    ],
)
def test_a_schedule_that_the_run_does_not_reach_gives_a_warning(changes, total_steps, message):
    settings = replace(TrainSettings(), **changes)
    assert any(re.search(message, text) for text in outputs.schedule_warnings(settings, total_steps))


def test_a_schedule_within_the_run_gives_no_warning():
    settings = replace(TrainSettings(), warmup_iters=99, eval_interval=100)
    assert outputs.schedule_warnings(settings, 100) == []
    constant = replace(TrainSettings(), decay_lr=False, eval_interval=1)
    assert outputs.schedule_warnings(constant, 30) == []


def test_a_run_warns_once_about_its_schedule(settings, capsys):
    run_training(replace(settings, warmup_iters=2000))
    assert capsys.readouterr().err.count("warning: warmup_iters = 2000") == 1
