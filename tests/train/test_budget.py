"""A time budget ends a run in time."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import (
    run_training,
    stop_at,
)

import train
from fradique.checkpointing import checkpoint, metrics_file
from fradique.data import dataset
from fradique.runtime import device
from fradique.training import evaluation, logger, outputs, setup, time_budget


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a tenth of a second in each step, by one for 700 windows evaluated (there are
    about as many), by `waits` in their batches, and not else."""
    now = SimpleNamespace(seconds=1000.0, waits=iter(()), windows=1.0)
    stand_in = SimpleNamespace(monotonic=lambda: now.seconds, time_ns=time.time_ns)
    for module in (train, setup, time_budget, evaluation, outputs, logger):
        monkeypatch.setattr(module, "time", stand_in)
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
    _, t = run_training(replace(settings, init_from="resume", time_budget=f"{seconds + 0.01}s"))
    assert t.state.step == 31  # no time was left
