"""The time budget: durations, the clock, and when training ends."""

import pytest

from fradique.training import time_budget


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), (" 2M ", 120), ("1h1m1s", 3661)],
)
def test_durations_are_parsed(text, seconds):
    assert time_budget.parse_duration(text) == seconds


def test_an_empty_duration_is_none():
    assert time_budget.parse_duration("") is None


@pytest.mark.parametrize("text", ["soon", "0", "0s", "-5m", "10 m", "5d", "m", "1m1h", "nan", "inf"])
def test_an_invalid_duration_is_rejected(text):
    with pytest.raises(ValueError, match="is not a duration: write 90s, 10m or 1h30m"):
        time_budget.parse_duration(text)


def test_pauses_count_for_the_elapsed_time_but_not_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])
    budget = time_budget.TimeBudget(started=90.0, limit=60.0)
    budget.resume(5.0, 0.0, 0.0)
    assert budget.elapsed() == 15.0
    budget.mark(0)
    now[0] += 4.0
    with budget.pause():
        now[0] += 10.0
    assert budget.seconds_per_step(8) == pytest.approx(0.5)
    now[0] += 1.0
    assert budget.seconds_per_step(9) == pytest.approx(1.0)
    assert budget.elapsed() == 30.0


def test_a_long_finish_leaves_half_of_the_time_for_training():
    """The estimate may come from a machine that was busy, and the run will be late in any case."""
    budget = time_budget.TimeBudget(started=0.0, limit=60.0)
    budget.training_began, budget.finish_seconds, budget.now = 20.0, 300.0, 39.0
    assert not budget.is_over() and budget.too_short and budget.training_ends == 40.0
    budget.now = 40.0
    assert budget.is_over()


def test_training_ends_when_only_the_finish_is_left():
    budget = time_budget.TimeBudget(started=0.0, limit=60.0)
    budget.now, budget.finish_seconds = 50.0, 9.0
    assert not budget.is_over()
    budget.finish_seconds = 10.0
    assert budget.is_over()
    assert not time_budget.TimeBudget(0.0).is_over()
