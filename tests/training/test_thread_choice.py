"""The number of threads that train a run, on a simulated machine: no test depends on how busy this one is."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import fake_clock
import pytest
import torch
from support import run_training, stop_at

import train
from fradique.training import setup, thread_choice
from fradique.training.thread_choice import ThreadChoice, candidates, fastest, time_candidates


class Machine:
    """A simulated CPU: how long a pass takes with a number of threads, and how long all passes took."""

    def __init__(self, seconds, first=0.0):
        self.seconds = seconds  # {threads: seconds of a pass}
        self.first = first  # seconds that the first pass after a change takes longer
        self.passes = []
        self.now = 0.0

    def time_pass(self, count):
        seconds = self.seconds[count] + (self.first if self.passes[-1:] != [count] else 0.0)
        self.passes.append(count)
        self.now += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock of thread_choice."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(thread_choice, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.mark.parametrize(
    ("available", "counts"), [(1, (1,)), (2, (2, 1)), (3, (3, 1)), (8, (8, 4, 1)), (64, (64, 32, 1))]
)
def test_all_threads_half_of_them_and_one_are_tried(available, counts):
    assert candidates(available) == counts


def test_fewer_threads_are_used_only_if_clearly_faster():
    assert fastest({2: 1.0, 1: 0.95}) == 2
    assert fastest({2: 1.0, 1: 0.85}) == 1
    assert fastest({8: 1.0, 4: 0.6, 1: 0.8}) == 4


def test_the_first_pass_after_a_change_is_not_counted():
    machine = Machine({2: 0.02, 1: 0.03}, first=0.1)
    assert time_candidates((2, 1), machine.time_pass) == {2: 0.02, 1: 0.03}


def test_a_short_disturbance_changes_nothing():
    machine = Machine({2: 0.02, 1: 0.03})

    def time_pass(count):
        disturbed = 5 <= len(machine.passes) < 7
        return machine.time_pass(count) + (0.1 if disturbed else 0.0)

    assert fastest(time_candidates((2, 1), time_pass)) == 2


def test_a_hopeless_number_of_threads_is_timed_no_more():
    """On a machine limited to a part of one core, many threads can be a hundred times as slow."""
    machine = Machine({64: 0.5, 32: 0.2, 1: 0.004})
    seconds = time_candidates((64, 32, 1), machine.time_pass)
    assert fastest(seconds) == 1
    assert machine.passes.count(64) == 1 and machine.now < 1.5


def test_long_passes_are_timed_once():
    machine = Machine({8: 10.0, 4: 12.0, 1: 40.0})
    assert fastest(time_candidates((8, 4, 1), machine.time_pass)) == 8
    assert machine.passes == [8, 4, 1]


def steps(choice, clock, seconds, step_seconds):
    """Train for so many seconds. Returns after how many of them a new choice was due; None: never."""
    start = clock.seconds
    while clock.seconds - start < seconds:
        clock.seconds += step_seconds
        if choice.is_due(step_seconds):
            return clock.seconds - start
    return None


def test_a_drop_of_the_pace_leads_to_a_new_choice(clock):
    choice = ThreadChoice((2, 1))
    assert steps(choice, clock, 60, 0.04) is None
    assert steps(choice, clock, 60, 0.046) is None  # a little slower: no reason
    assert steps(choice, clock, 60, 0.09) < 6


def test_a_slow_single_step_does_not_lead_to_a_new_choice(clock):
    choice = ThreadChoice((2, 1))
    steps(choice, clock, 20, 0.04)
    for _ in range(20):
        assert steps(choice, clock, 0.5, 0.5) is None
        assert steps(choice, clock, 4, 0.04) is None


def test_with_fewer_threads_the_choice_is_repeated(clock):
    """The pace on one thread does not show that the other program has ended."""
    choice = ThreadChoice((2, 1))
    choice.choose(Machine({2: 0.09, 1: 0.05}).time_pass)
    assert choice.chosen == 1
    waits = []
    for _ in range(6):
        waits.append(round(steps(choice, clock, 500, 0.05)))
        choice.choose(Machine({2: 0.09, 1: 0.05}).time_pass)
    assert waits[0] <= 13 and waits == sorted(waits)  # each choice that changes nothing doubles the interval
    assert 155 < waits[-1] < 165


def test_one_candidate_is_no_choice(clock):
    choice = ThreadChoice((1,))
    assert steps(choice, clock, 60, 0.04) is None and steps(choice, clock, 60, 4.0) is None


def test_a_change_must_save_enough():
    choice = ThreadChoice((2, 1))
    choice.choose(Machine({2: 0.10, 1: 0.08}).time_pass, min_saving=0.3)
    assert choice.chosen == 2
    choice.choose(Machine({2: 0.10, 1: 0.06}).time_pass, min_saving=0.3)
    assert choice.chosen == 1


@pytest.fixture
def machine(monkeypatch):
    """Two threads for a run of train.py on a simulated clock, and another program that comes and goes.

    A step takes 0.05 s on two threads and 0.08 s on one; while the other program runs, 0.2 s and 0.08 s.
    """
    machine = SimpleNamespace(
        busy=lambda step: False, threads=2, clock=fake_clock.install(monkeypatch.setattr)
    )
    fake_time = SimpleNamespace(monotonic=lambda: machine.clock.seconds)
    monkeypatch.setattr(thread_choice, "time", fake_time)
    monkeypatch.setattr(thread_choice, "available_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(machine, "threads", count))
    machine.step = 0

    def step_seconds():
        return 0.08 if machine.threads == 1 else 0.2 if machine.busy(machine.step) else 0.05

    def time_pass(t, model):
        machine.clock.seconds += step_seconds()
        return step_seconds()

    real_step = train.train_step

    def train_step(t, lr):
        machine.clock.seconds += step_seconds() - 0.1  # fake_clock adds 0.1 s
        machine.step = t.state.step
        return real_step(t, lr)

    monkeypatch.setattr(setup, "time_pass", time_pass)
    monkeypatch.setattr(train, "train_step", train_step)
    return machine


def run_steps(settings, machine, steps):
    """Train. Returns the simulated seconds."""
    start = machine.clock.seconds
    run_training(replace(settings, max_iters=steps, eval_interval=10**6, eval_iters=1, log_interval=10**6))
    return machine.clock.seconds - start


def test_on_an_idle_machine_all_threads_train(settings, machine, capsys):
    assert run_steps(settings, machine, 400) < 400 * 0.05 + 3
    assert machine.threads == 2
    assert "threads: 2 (a pass takes 50 ms, with 1: 80 ms)" in capsys.readouterr().out


def test_a_busy_machine_is_no_slower_than_on_one_thread(settings, machine, capsys):
    machine.busy = lambda step: True
    assert run_steps(settings, machine, 800) < 1.06 * 800 * 0.08 + 3
    assert "threads: 1 (a pass takes 80 ms, with 2: 200 ms)" in capsys.readouterr().out


def test_threads_follow_another_program_that_comes_and_goes(settings, machine, capsys):
    machine.busy = lambda step: 150 <= step < 550
    seconds = run_steps(settings, machine, 900)
    assert seconds < 1.1 * (500 * 0.05 + 400 * 0.08) + 10
    assert machine.threads == 2
    output = capsys.readouterr().out
    assert output.count("threads: 2 -> 1, which is faster now") == 1
    assert output.count("threads: 1 -> 2, which is faster now") == 1


def test_a_number_in_the_settings_is_used_without_a_trial(settings, machine, capsys):
    machine.busy = lambda step: True
    for count in (1, 2, 3):
        run_steps(replace(settings, threads=count, overwrite=True), machine, 60)
        assert machine.threads == count
    assert "a pass takes" not in capsys.readouterr().out


def test_a_resumed_run_keeps_its_number_of_threads(settings, machine, monkeypatch, capsys):
    """It has to continue to the last bit, which another number of threads would change."""
    machine.busy = lambda step: True
    with monkeypatch.context() as patch:
        stop_at(patch, 20, signal.SIGTERM)
        run_steps(settings, machine, 40)
    machine.busy, machine.threads = (lambda step: False), 2
    capsys.readouterr()
    run_steps(replace(settings, init_from="resume"), machine, 40)
    assert machine.threads == 1
    assert "a pass takes" not in capsys.readouterr().out


def test_the_pace_is_compared_with_that_before_the_resume(settings, machine, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 100, signal.SIGTERM)
        run_steps(settings, machine, 1000)
    machine.busy = lambda step: True
    run_steps(replace(settings, init_from="resume"), machine, 300)
    assert "threads: 2 -> 1, which is faster now" in capsys.readouterr().out


def test_eval_only_times_nothing(settings, machine, capsys):
    t = setup.setup_training(replace(settings, eval_only=True))
    assert train.report_evaluation(t) == 0
    t.close()
    assert "a pass takes" not in capsys.readouterr().out
