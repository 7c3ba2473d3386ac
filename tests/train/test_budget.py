"""A time budget ends a run in time."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import fake_clock
import pytest
import torch
from support import run_training, stop_at

import train
from fradique.checkpointing import checkpoint, metrics_file
from fradique.runtime import device
from fradique.training import evaluation, setup, time_budget


@pytest.fixture
def clock(monkeypatch):
    return fake_clock.install(monkeypatch.setattr)


def test_a_time_budget_ends_the_run_and_its_schedule_in_time(settings, clock):
    settings = replace(settings, time_budget="20s", max_iters=1, eval_interval=1000, log_interval=10)
    settings = replace(settings, lr_schedule="linear", warmup_iters=5, min_lr=0.0, eval_iters=10**6)
    status, t = run_training(settings)
    assert status == 0
    assert 18.0 < clock.seconds - 1000.0 <= 20.0  # nearly the whole budget, including the last evaluation
    assert 170 < t.state.step < 200  # the clock, not max_iters, ended it
    rates = {r["step"]: r["lr"] for r in metrics_file.read_metrics(Path(settings.out_dir)) if "lr" in r}
    assert rates[10] > 0.8 * settings.learning_rate and min(rates.values()) < 0.1 * settings.learning_rate
    assert list(rates.values()) == sorted(rates.values(), reverse=True)


def test_a_warm_up_longer_than_the_time_budget_gives_a_warning(settings, clock, capsys):
    """The number of steps is estimated after some steps: about 200 of 0.1 s."""
    settings = replace(settings, time_budget="20s", warmup_iters=2000, eval_interval=50, log_interval=10)
    run_training(settings)
    warning = r"warning: warmup_iters = 2000 is not shorter than the run of (1[5-9]|20)\d steps"
    assert len(re.findall(warning, capsys.readouterr().err)) == 1


def test_a_time_budget_includes_evaluations_during_training(settings, clock):
    for name, interval in (("a", 7), ("b", 10), ("c", 33)):
        clock.seconds = 1000.0
        run_settings = replace(
            settings, out_dir=f"{settings.out_dir}-{name}", time_budget="20s", eval_interval=interval
        )
        run_training(replace(run_settings, eval_iters=10**6))
        assert clock.seconds - 1000.0 <= 20.0


@pytest.mark.parametrize("budget", ["60s", "15s"])
def test_a_slow_evaluation_batch_does_not_shorten_the_run(settings, clock, budget):
    """The first batch takes nine seconds longer, as on a machine that is busy for a moment."""
    clock.waits = iter([9.0])
    end = 1000.0 + time_budget.parse_duration(budget)
    run_training(replace(settings, time_budget=budget, eval_interval=100, eval_iters=10**6))
    assert end - 2.0 < clock.seconds <= end


def test_ranks_agree_on_when_the_time_is_over(settings):
    """All ranks decide by the maximum over the ranks: here another rank had the slower step."""
    t = setup.setup_training(replace(settings, time_budget="1h"))
    t.close()
    calls = []

    class SlowerRank(device.Runtime):
        def max(self, *values):
            calls.append(values)
            return [value if value != 0.25 else 7200.0 for value in values]

    t.runtime = SlowerRank(t.runtime.device, t.runtime.dtype)
    t.budget.step_seconds = 0.25
    assert train.is_finished(t)
    assert calls and t.budget.step_seconds == 7200.0


def seconds_of_training(folder):
    """The steps of a run, of 0.1 s each."""
    return metrics_file.read_metrics(Path(folder))[-1]["step"] * 0.1


@pytest.mark.parametrize("windows", [1.0, 20.0, 40.0])
@pytest.mark.parametrize("interval", [1, 20, 10**6])
def test_all_but_training_takes_a_tenth_of_the_time(settings, clock, windows, interval):
    """However slow evaluations are, and however often they are asked for."""
    clock.windows = windows  # seconds for about the whole corpus
    settings = replace(settings, time_budget="200s", eval_interval=interval, eval_iters=10**6)
    run_training(settings)
    assert clock.seconds - 1000.0 <= 200.5
    assert seconds_of_training(settings.out_dir) >= 180


def test_evaluations_stay_frequent_if_they_are_fast(settings, clock):
    run_training(replace(settings, time_budget="100s", eval_interval=100))
    records = metrics_file.read_metrics(Path(settings.out_dir))
    assert [r["step"] for r in records if "eval_val_loss" in r][:8] == list(range(0, 800, 100))


def test_the_final_measurement_of_a_part_has_a_standard_error(settings, clock, capsys):
    clock.windows = 100.0
    run_training(replace(settings, time_budget="60s", eval_interval=10**6))
    final = metrics_file.read_metrics(Path(settings.out_dir))[-1]
    assert final["final_tokens"] == 16 * 16 and final["final_split_tokens"] > 1000
    assert f"± {final['final_standard_error']:.4f} on 256 of {final['final_split_tokens']:,} tokens" in (
        capsys.readouterr().out
    )


def test_the_standard_error_is_that_of_the_batches(settings):
    t = setup.setup_training(settings)
    windows = t.corpus.val.fixed_windows(16, 24)
    measured = evaluation.mean_loss(t.model, t.corpus.val, windows, 4, t.runtime)
    with torch.no_grad():
        batches = [t.model.eval()(x, y)[1].item() for x, y in t.corpus.val.batches(windows, 4)]
    t.close()
    assert len(batches) == 6 and measured.tokens == 24 * 16
    assert measured.standard_error == pytest.approx(statistics.stdev(batches) / 6**0.5, rel=1e-4)


@pytest.mark.parametrize("budget", ["", "30s"])
def test_final_eval_whole_measures_the_whole_split(settings, clock, budget, capsys):
    clock.windows = 100.0
    run_training(replace(settings, time_budget=budget, final_eval="whole", eval_interval=10**6))
    final = metrics_file.read_metrics(Path(settings.out_dir))[-1]
    assert final["final_tokens"] == final["final_split_tokens"] and not final["final_standard_error"]
    assert "whole validation split: loss" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_evaluation_windows(settings, clock, monkeypatch, capsys):
    """On a machine that is faster now, so that the best losses stay comparable."""
    clock.windows = 100.0
    settings = replace(settings, time_budget="60s", eval_iters=100)
    stop_at(monkeypatch, 30)
    _, t = run_training(settings)
    assert t.state.eval_windows == 16
    monkeypatch.undo()
    _, t = run_training(replace(settings, init_from="resume"))
    assert t.state.eval_windows == 16 and "earlier evaluations" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "per_window", "available", "expected"),
    [(1.0, 0.01, 50, 50), (1.0, 0.01, 200, 64), (1.0, 1.0, 200, 16), (1.0, 1.0, 5, 5), (1.0, 0.0, 9, 9)],
)
def test_windows_that_fit_are_all_or_a_power_of_two(seconds, per_window, available, expected):
    assert time_budget.fitting_windows(seconds, per_window, available) == expected


def test_long_evaluations_leave_half_of_the_time_for_training(settings, clock, capsys):
    """The final measurement of the whole split takes longer than the budget."""
    clock.windows = 130.0
    settings = replace(settings, time_budget="14s", eval_interval=10**6, final_eval="whole")
    run_training(replace(settings, eval_iters=1, batch_size=1))
    last = metrics_file.read_metrics(Path(settings.out_dir))[-1]
    assert 30 <= last["step"] <= 60  # half of the seconds that are left after the first evaluation
    assert (
        f"warning: only {last['step']} steps were made: the last evaluations alone" in capsys.readouterr().err
    )


def test_evaluation_does_not_depend_on_the_batch_size(settings, monkeypatch):
    t = setup.setup_training(settings)
    results = []
    for max_tokens in (4096, 64, 1):
        monkeypatch.setattr(device, "CPU_MAX_TOKENS", max_tokens)
        estimates = [split.loss for split in evaluation.estimate_loss(t).values()]
        results.append([*estimates, evaluation.evaluate_val_split(t).loss])
    t.close()
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)


def test_a_resumed_run_counts_the_time_before_the_stop(settings, clock, monkeypatch):
    settings = replace(settings, time_budget="20s", eval_interval=1000)
    stop_at(monkeypatch, 30)
    run_training(settings)
    seconds = checkpoint.read_checkpoint(checkpoint.step_folders(Path(settings.out_dir))[-1]).state["seconds"]
    assert 3.0 <= seconds <= 4.0
    monkeypatch.undo()
    _, t = run_training(replace(settings, init_from="resume", time_budget=f"{seconds + 0.01}s"))
    assert t.state.step == 31  # no time was left


def test_a_finished_run_that_is_resumed_says_so(settings, clock, capsys):
    settings = replace(settings, time_budget="20s", eval_interval=50)
    run_training(settings)
    capsys.readouterr()
    run_training(replace(settings, init_from="resume"))
    assert "the run is finished: it has used 19" in (output := capsys.readouterr().out)
    assert "of time_budget = 20s. To train longer, use --time_budget=40.0s" in output
    run_training(replace(settings, init_from="resume", time_budget="40s"))
    assert "the run is finished" not in capsys.readouterr().out


@pytest.mark.parametrize("log_interval", [10, 10**6])
def test_the_warning_counts_the_steps_that_fit(settings, clock, capsys, log_interval):
    """Start-up and evaluations are not training: 100 s before the first step must not lower the number."""
    settings = replace(settings, time_budget="200s", eval_interval=10**6, log_interval=log_interval)
    t = setup.setup_training(settings, started=clock.seconds - 100.0)
    train.train(t)
    t.close()
    (steps,) = re.findall(r"eval_interval = 1000000 is above the (\d+) steps", capsys.readouterr().err)
    assert int(steps) == pytest.approx(t.state.step, rel=0.1)


@pytest.mark.parametrize("change", [{"lr_schedule": "constant"}, {"time_budget": "20s"}])
def test_an_lr_decay_iters_without_effect_gives_no_warning(settings, clock, capsys, change):
    settings = replace(settings, lr_decay_iters=5, warmup_iters=8, **change)
    run_training(replace(settings, eval_interval=5))
    assert "lr_decay_iters" not in capsys.readouterr().err
