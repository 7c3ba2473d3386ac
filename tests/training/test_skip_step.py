"""Steps with a loss or gradient that is not finite, or a spike: the run stops, or skips them if asked to."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import losses, run_training

from fradique.checkpointing import checkpoint, metrics_file
from fradique.training import setup, skip_step, trainer


def test_the_anomaly_is_the_value_that_is_not_finite():
    history = trainer.LossHistory()
    assert skip_step.find_anomaly(history, 1.0, 1.0, 0.0) is None
    for value in (math.nan, math.inf, -math.inf):
        assert skip_step.find_anomaly(history, value, 1.0, 0.0) == "the loss is not finite"
        assert skip_step.find_anomaly(history, 1.0, value, 0.0) == "the gradient is not finite"


def test_a_spike_is_measured_against_the_last_128_steps():
    """The limit is computed with the standard library's statistics of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    history, all_losses = trainer.LossHistory(), []
    for _ in range(300):
        loss = 3 + 0.1 * torch.randn((), generator=generator).item()
        history.remember(loss, 1.0 + loss / 10)
        all_losses.append(loss)
    last = all_losses[-128:]
    assert history.losses == last and len(history.norms) == 128
    limit = statistics.mean(last) + 5 * statistics.pstdev(last)
    assert skip_step.find_anomaly(history, limit - 1e-6, 1.3, 5) is None
    assert skip_step.find_anomaly(history, limit + 1e-6, 1.3, 5).startswith("the loss jumps to")
    assert skip_step.find_anomaly(history, 3.0, 99.0, 5).startswith("the gradient norm jumps to 99")
    assert skip_step.find_anomaly(history, 1e9, 1e9, 0) is None


def test_no_spike_is_reported_with_fewer_than_32_steps():
    history = trainer.LossHistory(losses=[3.0] * 31, norms=[1.0] * 31)
    assert skip_step.find_anomaly(history, 99.0, 1.0, 3) is None
    history.remember(3.0, 1.0)
    assert skip_step.find_anomaly(history, 99.0, 1.0, 3)


class ScaledForward:
    """The forward pass of training; the loss of its n-th call is multiplied by `factors[n]`."""

    def __init__(self, forward, factors):
        self.forward, self.factors, self.count = forward, factors, 0

    def __call__(self, *arguments, **options):
        logits, loss = self.forward(*arguments, **options)
        self.count += 1
        return logits, loss * self.factors.get(self.count, 1.0)


def scale_losses(monkeypatch, factors):
    """Multiply the loss of step n by `factors[n]`, counted from the start of the process."""
    real_setup = setup.setup_training

    def setup_training(*arguments, **options):
        t = real_setup(*arguments, **options)
        t.forward = ScaledForward(t.forward, factors)
        return t

    monkeypatch.setattr(setup, "setup_training", setup_training)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_nonfinite_step_stops_the_run_and_is_not_saved(settings, monkeypatch, factor):
    scale_losses(monkeypatch, {8: factor})
    with pytest.raises(ValueError, match=r"step 8: the (loss|gradient) is not finite.*--skip_nonfinite=True"):
        run_training(settings)
    folder = checkpoint.newest_checkpoint(Path(settings.out_dir), warn=pytest.fail)
    saved = checkpoint.read_checkpoint(folder)
    assert saved.state["step"] == 5 and checkpoint.all_finite(saved.model)
    assert max(losses(settings.out_dir)) == 7


def test_nonfinite_steps_are_skipped_counted_and_logged(settings, monkeypatch, capsys):
    scale_losses(monkeypatch, {3: math.nan, 8: math.inf})
    status, t = run_training(replace(settings, skip_nonfinite=True, dropout=0.0))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "tokens_per_second" in r]
    assert status == 0 and t.state.past.skipped == 2
    assert [r["step"] for r in records if "loss" not in r] == [3, 8]
    assert [r.get("skipped", 0) for r in records] == [0] * 2 + [1] * 5 + [2] * 13
    assert all(torch.isfinite(p).all() for p in t.model.parameters())
    output = capsys.readouterr()
    assert "step 3: the loss is not finite; step skipped (0 skipped so far)" in output.err
    assert "step 8" in output.err and "(1 skipped so far)" in output.err
    for line in (Path(settings.out_dir) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not valid JSON


def test_a_skipped_step_does_not_change_the_weights(settings, monkeypatch):
    """After a skipped step 8 the weights are those of a run that ended at step 7."""
    short = replace(settings, max_iters=7, lr_decay_iters=20, skip_nonfinite=True)
    _, before = run_training(short)
    scale_losses(monkeypatch, {8: math.nan})
    longer = replace(short, max_iters=8, out_dir=f"{settings.out_dir}-8")
    _, after = run_training(longer)
    assert after.state.step == 8
    for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_many_skipped_steps_in_a_row_stop_the_run(settings, monkeypatch):
    monkeypatch.setattr(skip_step, "MAX_SKIPPED_IN_A_ROW", 4)
    scale_losses(monkeypatch, dict.fromkeys(range(6, 100), math.nan))
    with pytest.raises(ValueError, match=r"step 9: .*4 steps in a row were skipped"):
        run_training(replace(settings, skip_nonfinite=True))


def test_a_spike_stops_the_run_or_is_skipped(settings, monkeypatch):
    """The loss of step 38 is multiplied by 100: late enough for a spike to be detected."""
    long = replace(settings, max_iters=40, eval_interval=100, spike_sigmas=8.0, dropout=0.0)
    scale_losses(monkeypatch, {38: 100.0})
    with pytest.raises(ValueError, match="step 38: the loss jumps to"):
        run_training(long)
    monkeypatch.undo()
    scale_losses(monkeypatch, {38: 100.0})
    status, t = run_training(replace(long, out_dir=f"{long.out_dir}-2", skip_nonfinite=True))
    assert status == 0 and t.state.past.skipped == 1


def test_a_resumed_run_has_the_loss_history_of_the_first(settings):
    """Otherwise a resumed run would detect other spikes than an uninterrupted one."""
    full = replace(settings, max_iters=20, lr_decay_iters=20, spike_sigmas=6.0, skip_nonfinite=True)
    _, uninterrupted = run_training(full)
    interrupted = replace(full, out_dir=f"{settings.out_dir}-2")
    run_training(replace(interrupted, max_iters=10))
    _, resumed = run_training(replace(interrupted, init_from="resume"))
    assert resumed.state.past == uninterrupted.state.past and len(uninterrupted.state.past.losses) == 20
    assert losses(interrupted.out_dir) == losses(full.out_dir)
