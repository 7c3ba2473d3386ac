"""A clock that only training steps and evaluations move: a time budget ends after the same step everywhere.

As a script it is train.py with this clock, so that `support.run_script` and `run_ranks` can run it.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace

import train
from configurator import command
from fradique.data import dataset
from fradique.distributed import process_group
from fradique.training import autoconfig, evaluation, logger, outputs, setup, time_budget


def install(setattr: Callable) -> SimpleNamespace:
    """Replace the clock of the training code. `setattr`: that of a monkeypatch, or the built-in function.

    A training step takes 0.1 s. An evaluation of 700 windows (about the whole corpus `tiny`) takes `windows`
    seconds, and each of its batches takes the next of `waits` longer. Nothing else takes time. Returns the
    clock, whose `seconds` can be changed.
    """
    clock = SimpleNamespace(seconds=1000.0, waits=iter(()), windows=1.0)
    fake_time = SimpleNamespace(monotonic=lambda: clock.seconds, time_ns=time.time_ns)
    for module in (train, setup, time_budget, evaluation, outputs, logger, autoconfig):
        setattr(module, "time", fake_time)
    setattr(train, "START", clock.seconds)
    real_step, real_batches = train.train_step, dataset.Split.batches

    def slow_step(*arguments):
        clock.seconds += 0.1
        return real_step(*arguments)

    def slow_batches(self, *arguments):
        for x, y in real_batches(self, *arguments):
            clock.seconds += clock.windows * len(y) / 700 + next(clock.waits, 0.0)
            yield x, y

    setattr(train, "train_step", slow_step)
    setattr(dataset.Split, "batches", slow_batches)
    return clock


if __name__ == "__main__":
    install(setattr)
    process_group.exit_process(command(train.main, train.TrainSettings, base=setup.saved_run_settings))
