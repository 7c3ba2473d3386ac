"""Training steps compared with plain PyTorch, split, compiled, in other dtypes, and on two processes."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import flags, losses, needs_compiler, run_ranks, run_script, run_training

import train
from fradique.checkpointing import checkpoint, metrics_file
from fradique.io import files
from fradique.optim import optimizer
from fradique.runtime import device
from fradique.training import setup


def test_training_lowers_the_validation_loss(settings):
    run_training(replace(settings, max_iters=150, dropout=0.0, eval_interval=50))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "eval_val_loss" in r]
    assert records[0]["eval_val_loss"] == pytest.approx(math.log(19), abs=0.4)
    assert records[-1]["eval_val_loss"] < 1.5  # words in random order have about 0.5 nats per character


def test_gradient_accumulation_equals_one_large_batch(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=5)
    run_training(replace(settings, batch_size=8))
    accumulated = replace(settings, out_dir=str(tmp_path / "b"), batch_size=2, gradient_accumulation_steps=4)
    run_training(accumulated)
    for step, loss in losses(settings.out_dir).items():
        assert losses(accumulated.out_dir)[step] == pytest.approx(loss, abs=1e-5)


def test_splitting_a_step_does_not_change_the_losses(settings, tmp_path, monkeypatch):
    runs = []
    for max_tokens in (1, 1 << 20):
        monkeypatch.setattr(device, "CPU_MAX_TOKENS", max_tokens)
        folder = tmp_path / str(max_tokens)
        run_training(replace(settings, dropout=0.0, out_dir=str(folder)))
        runs.append(list(losses(folder).values()))
    assert len(runs[0]) == settings.max_iters
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_run(settings, tmp_path):
    checkpointed = replace(
        settings, gradient_checkpointing=True, dropout=0.2, out_dir=str(tmp_path / "checkpointed")
    )
    settings = replace(settings, dropout=0.2)
    run_training(settings)
    run_training(checkpointed)
    assert losses(settings.out_dir) == losses(checkpointed.out_dir) != {}


def test_a_step_equals_a_step_in_plain_pytorch(settings):
    """Loss, clipped gradient and AdamW of one step against plain torch on the same batch and weights."""
    settings = replace(settings, dropout=0.0, grad_clip=0.5, eval_only=True)
    t = setup.setup_training(settings)
    reference = copy.deepcopy(t.model)
    x, y = t.corpus.train.read_locations(t.sampler.locations(np.arange(4)), settings.block_size)
    logits = reference(x, y)[0]
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1))
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
    for p in reference.parameters():
        p.grad *= min(1.0, 0.5 / (norm.item() + 1e-6))
    groups = optimizer.parameter_groups(dict(reference.named_parameters()), settings.weight_decay)
    torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=False, foreach=False).step()
    step_loss, step_norm = train.train_step(t, 0.01)
    assert step_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert step_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(t.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_dropout_depends_only_on_seed_and_step(settings):
    t = setup.setup_training(replace(settings, eval_only=True, learning_rate=1e-9))
    first = train.train_step(t, 0.0)[0].item()
    torch.rand(100)  # other code may draw random numbers
    repeated = train.train_step(t, 0.0)[0].item()
    t.model.eval()
    x, y = t.corpus.train.read_locations(t.sampler.locations(np.arange(4)), settings.block_size)
    assert first == repeated != t.model(x, y)[1].item()


def setup_with_scaler(settings):
    """Set up a run on a CPU that scales its loss as with float16."""
    t = setup.setup_training(settings)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return t


def test_loss_scaling_does_not_change_the_losses(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=6, eval_interval=6)
    run_training(settings)
    t = setup_with_scaler(replace(settings, out_dir=str(tmp_path / "b")))
    train.train(t)
    t.close()
    assert t.scaler.get_scale() == 4096.0  # doubled twice
    for step, loss in losses(settings.out_dir).items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-5)
    state = checkpoint.read_checkpoint(tmp_path / "b" / "step-00000006").state
    assert state["scaler"]["scale"] == 4096.0
    run_training(
        replace(settings, out_dir=str(tmp_path / "b"), init_from="resume", max_iters=8)
    )  # in float32


def test_training_can_start_from_the_weights_of_another_run(settings, tmp_path):
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


def test_a_failing_compiler_warns_once_and_losses_are_the_same(settings, tmp_path, monkeypatch, capsys):
    run_training(settings)

    def broken_compile(model):
        def fail(*_, **__):
            raise RuntimeError("no compiler today")

        return fail

    monkeypatch.setattr(torch, "compile", broken_compile)
    compiled = replace(settings, out_dir=str(tmp_path / "b"), compile=True)
    run_training(compiled)
    assert capsys.readouterr().err.count("torch.compile failed (RuntimeError: no compiler today)") == 1
    assert losses(compiled.out_dir) == losses(settings.out_dir)


@needs_compiler
def test_a_compiled_run_equals_the_eager_run(settings, tmp_path):
    settings = replace(settings, dropout=0.0, max_iters=6, n_layer=1)
    run_training(settings)
    result = run_script("train.py", *flags(replace(settings, out_dir=str(tmp_path / "b"), compile=True)))
    assert result.returncode == 0, result.stderr
    assert "torch.compile failed" not in result.stderr
    for step, loss in losses(settings.out_dir).items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-4)


def test_bfloat16_losses_are_close_to_float32(settings, tmp_path):
    settings = replace(settings, dropout=0.0, dtype="float32")
    run_training(settings)
    bfloat16 = replace(settings, out_dir=str(tmp_path / "b"), dtype="bfloat16")
    _, t = run_training(bfloat16)
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    for step, loss in losses(settings.out_dir).items():
        assert losses(bfloat16.out_dir)[step] == pytest.approx(loss, abs=0.05)


def test_unfused_attention_gives_the_same_losses(settings, tmp_path):
    settings = replace(settings, dropout=0.0)
    run_training(settings)
    unfused = replace(settings, out_dir=str(tmp_path / "b"), flash=False)
    run_training(unfused)
    for step, loss in losses(settings.out_dir).items():
        assert losses(unfused.out_dir)[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (4, 1)])
def test_two_processes_give_the_losses_of_one(settings, tmp_path, batch_size, accumulation):
    """Two micro-batches are divided between the processes; a single one is split in two."""
    settings = replace(
        settings, dropout=0.0, batch_size=batch_size, gradient_accumulation_steps=accumulation, max_iters=10
    )
    run_training(settings)
    two_processes = replace(settings, out_dir=str(tmp_path / "two"))
    result = run_ranks(2, *flags(two_processes))
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout
    assert result.stdout.count("tokens per step") == 1  # only rank 0 prints
    expected, actual = losses(settings.out_dir), losses(two_processes.out_dir)
    assert expected.keys() == actual.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, abs=1e-5)
    last = [metrics_file.read_metrics(Path(s.out_dir))[-1] for s in (settings, two_processes)]
    assert last[0]["final_loss"] == pytest.approx(last[1]["final_loss"], abs=1e-5)


def test_a_rank_may_have_no_evaluation_windows(settings):
    """One window per split, and two processes."""
    settings = replace(settings, batch_size=1, gradient_accumulation_steps=2, eval_iters=1, max_iters=2)
    result = run_ranks(2, *flags(settings))
    assert result.returncode == 0, result.stderr
