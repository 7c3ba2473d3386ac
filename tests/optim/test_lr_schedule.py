"""Learning-rate schedules: values at single steps, and the total steps of a time budget."""

import math
from itertools import pairwise

import pytest

from fradique.optim import lr_schedule


def rate(step, **changes):
    options = {"schedule": "cosine", "peak": 1.0, "floor": 0.1, "warmup": 10, "total": 110, "decay_frac": 0.5}
    return lr_schedule.learning_rate(step, **options | changes)


def test_cosine_equals_nanogpts_formula_at_every_step():
    for step in range(200):
        if step < 10:
            expected = 1.0 * (step + 1) / (10 + 1)
        elif step > 110:
            expected = 0.1
        else:
            expected = 0.1 + 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) * 0.9
        assert rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", lr_schedule.SCHEDULES)
def test_every_schedule_warms_up_and_falls_from_the_peak(schedule):
    rates = [rate(step, schedule=schedule) for step in range(300)]
    assert rates[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert rates[10] == 1.0
    assert all(0.1 - 1e-12 <= r <= 1.0 for r in rates[10:])
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decaying_schedules_end_at_the_floor(schedule):
    assert rate(110, schedule=schedule) == pytest.approx(0.1)
    assert rate(10_000, schedule=schedule) == pytest.approx(0.1)


def test_constant_stays_at_the_peak():
    assert rate(10_000, schedule="constant") == 1.0


def test_linear_is_half_way_down_in_the_middle():
    assert rate(60, schedule="linear") == pytest.approx(0.55)


def test_wsd_is_constant_and_then_decays_linearly():
    assert rate(59, schedule="wsd") == 1.0
    assert rate(85, schedule="wsd") == pytest.approx(0.55)
    assert rate(105, schedule="wsd", decay_frac=0.0) == 1.0


def test_without_warmup_the_first_step_uses_the_peak():
    assert rate(0, warmup=0) == 1.0


def test_a_run_shorter_than_its_warmup_only_rises():
    assert [rate(step, warmup=10, total=5) for step in range(5)] == [(s + 1) / 11 for s in range(5)]


def test_with_a_budget_progress_is_the_elapsed_fraction():
    total = lr_schedule.estimate_total_steps(step=30, elapsed=15.0, budget=60.0)
    assert 30 / total == pytest.approx(15 / 60)
    assert lr_schedule.estimate_total_steps(0, 0.0, 60.0) == math.inf
    assert rate(0, warmup=0, total=math.inf) == 1.0
