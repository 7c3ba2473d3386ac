"""Steps that would spoil a run are noticed, and left out where that is asked for."""

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


def test_what_is_not_finite_is_named():
    past = trainer.LossHistory()
    assert skip_step.find_anomaly(past, 1.0, 1.0, 0.0) is None
    for value in (math.nan, math.inf, -math.inf):
        assert skip_step.find_anomaly(past, value, 1.0, 0.0) == "the loss is not finite"
        assert skip_step.find_anomaly(past, 1.0, value, 0.0) == "the gradient is not finite"


def test_a_leap_is_measured_against_the_last_steps():
    """The oracle is the standard library's statistics over the same numbers."""
    generator = torch.Generator().manual_seed(0)
    past, all_losses = trainer.LossHistory(), []
    for _ in range(300):
        loss = 3 + 0.1 * torch.randn((), generator=generator).item()
        past.remember(loss, 1.0 + loss / 10)
        all_losses.append(loss)
    last = all_losses[-128:]
    assert past.losses == last and len(past.norms) == 128
    limit = statistics.mean(last) + 5 * statistics.pstdev(last)
    assert skip_step.find_anomaly(past, limit - 1e-6, 1.3, 5) is None
    assert skip_step.find_anomaly(past, limit + 1e-6, 1.3, 5).startswith("the loss jumps to")
    assert skip_step.find_anomaly(past, 3.0, 99.0, 5).startswith("the gradient norm jumps to 99")
    assert skip_step.find_anomaly(past, 1e9, 1e9, 0) is None


def test_few_steps_are_not_enough_to_call_anything_a_leap():
    past = trainer.LossHistory(losses=[3.0] * 31, norms=[1.0] * 31)
    assert skip_step.find_anomaly(past, 99.0, 1.0, 3) is None
    past.remember(3.0, 1.0)
    assert skip_step.find_anomaly(past, 99.0, 1.0, 3)


class Poisoned:
    """A model whose loss is multiplied by `factors[n]` at the n-th forward pass that trains."""

    def __init__(self, forward, factors):
        self.forward, self.factors, self.count = forward, factors, 0

    def __call__(self, *words, **options):
        logits, loss = self.forward(*words, **options)
        self.count += 1
        return logits, loss * self.factors.get(self.count, 1.0)


def poison(monkeypatch, factors):
    real = setup.setup_training

    def set_up(*words, **options):
        t = real(*words, **options)
        t.forward = Poisoned(t.forward, factors)
        return t

    monkeypatch.setattr(setup, "setup_training", set_up)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_the_run_before_it_spoils_anything(settings, monkeypatch, factor):
    poison(monkeypatch, {8: factor})
    with pytest.raises(ValueError, match=r"step 8: the (loss|gradient) is not finite.*--skip_nonfinite=True"):
        run_training(settings)
    folder = checkpoint.newest_checkpoint(Path(settings.out_dir), warn=pytest.fail)
    held = checkpoint.read_checkpoint(folder)
    assert held.state["step"] == 5 and checkpoint.all_finite(held.model)
    assert max(losses(settings.out_dir)) == 7


def test_steps_that_are_not_finite_are_left_out_counted_and_logged(settings, monkeypatch, capsys):
    poison(monkeypatch, {3: math.nan, 8: math.inf})
    status, t = run_training(replace(settings, skip_nonfinite=True, dropout=0.0))
    records = [r for r in metrics_file.read_metrics(Path(settings.out_dir)) if "tokens_per_second" in r]
    assert status == 0 and t.state.past.skipped == 2
    assert [r["step"] for r in records if "loss" not in r] == [3, 8]
    assert [r.get("skipped", 0) for r in records] == [0] * 2 + [1] * 5 + [2] * 13
    assert all(torch.isfinite(p).all() for p in t.model.parameters())
    said = capsys.readouterr()
    assert "step 3: the loss is not finite; step skipped (0 skipped so far)" in said.err
    assert "step 8" in said.err and "(1 skipped so far)" in said.err
    for line in (Path(settings.out_dir) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN or Infinity, which are no JSON


def test_a_step_that_is_left_out_changes_nothing(settings, monkeypatch):
    """Up to the next step the weights are those of a run that ended before it."""
    short = replace(settings, max_iters=7, lr_decay_iters=20, skip_nonfinite=True)
    _, before = run_training(short)
    poison(monkeypatch, {8: math.nan})
    longer = replace(short, max_iters=8, out_dir=f"{settings.out_dir}-8")
    _, after = run_training(longer)
    assert after.state.step == 8
    for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_learns_nothing_any_more_stops(settings, monkeypatch):
    monkeypatch.setattr(skip_step, "MAX_SKIPPED_IN_A_ROW", 4)
    poison(monkeypatch, dict.fromkeys(range(6, 100), math.nan))
    with pytest.raises(ValueError, match=r"step 9: .*4 steps in a row were skipped"):
        run_training(replace(settings, skip_nonfinite=True))


def test_a_spike_is_left_out_or_stops_the_run(settings, monkeypatch):
    """The same poison: a hundredfold loss, after enough steps to know better."""
    long = replace(settings, max_iters=40, eval_interval=100, spike_sigmas=8.0, dropout=0.0)
    poison(monkeypatch, {38: 100.0})
    with pytest.raises(ValueError, match="step 38: the loss jumps to"):
        run_training(long)
    monkeypatch.undo()
    poison(monkeypatch, {38: 100.0})
    status, t = run_training(replace(long, out_dir=f"{long.out_dir}-2", skip_nonfinite=True))
    assert status == 0 and t.state.past.skipped == 1


def test_what_a_run_remembers_of_its_steps_survives_a_stop(settings):
    """Else a resumed run would judge leaps otherwise than one that was never stopped."""
    parts = replace(settings, max_iters=20, lr_decay_iters=20, spike_sigmas=6.0, skip_nonfinite=True)
    _, whole = run_training(parts)
    stopped = replace(parts, out_dir=f"{settings.out_dir}-2")
    run_training(replace(stopped, max_iters=10))
    _, resumed = run_training(replace(stopped, init_from="resume"))
    assert resumed.state.past == whole.state.past and len(whole.state.past.losses) == 20
    assert losses(stopped.out_dir) == losses(parts.out_dir)
