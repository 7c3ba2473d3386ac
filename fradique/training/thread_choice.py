"""How many threads of the CPU train a run: chosen by timing, and again when the pace of the training drops.

Alone on a machine, all threads are usually the fastest. Beside other programs they are not, because in each
operation all threads wait for the one whose core another program uses: see fradique/runtime/openmp.py.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

TRIAL_SECONDS, MAX_ROUNDS = 1.0, 3  # how long the numbers of threads are timed in turn, about
# Fewer threads must take less than this share of the time: with differences of chance, all threads stay, so
# that a run on an idle machine repeats itself to the last bit.
MIN_GAIN = 0.9
SLOWDOWN = 1.25  # times the step time after the last choice: reason enough to choose again
WINDOW_SECONDS, WINDOW_STEPS = 2.0, 5  # the pace is the median of at least so many steps
# Seconds between two choices. Each that changes nothing doubles them.
FIRST_INTERVAL, MAX_INTERVAL = 10.0, 160.0
RECOMPILE_SECONDS = 120.0  # a compiled run changes its threads if that saves more: it has to compile again


def candidates(available: int) -> tuple[int, ...]:
    """The numbers of threads that are tried: all, half of them, and one."""
    return tuple(sorted({available, max(1, available // 2), 1}, reverse=True))


def time_candidates(
    counts: Sequence[int], time_pass: Callable[[int], float], trial_seconds: float = TRIAL_SECONDS
) -> dict[int, float]:
    """The median seconds of a pass with each number of threads.

    time_pass: computes one pass with so many threads and returns its seconds. The numbers take turns, so that
    a short disturbance does not hit one of them alone. The first pass after a change starts threads: it is
    not counted, unless a pass takes so long that this does not matter.
    """
    first = {count: time_pass(count) for count in counts}
    spent = dict(first)  # seconds of all passes with each number
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(MAX_ROUNDS):
        for count in counts:
            if spent[count] < trial_seconds / len(counts):
                spent[count] += time_pass(count)
                times[count].append(time_pass(count))
                spent[count] += times[count][-1]
    return {count: statistics.median(times[count] or [first[count]]) for count in counts}


def fastest(seconds: dict[int, float]) -> int:
    """The number of threads to use: the first one, unless another is clearly faster."""
    default = next(iter(seconds))
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < MIN_GAIN * seconds[default] else default


class ThreadChoice:
    """The number of threads of a run, and when it is to be chosen again.

    With one candidate there is no choice, and nothing is timed.
    """

    def __init__(self, counts: Sequence[int], chosen: int = 0, pace: float = 0.0) -> None:
        """counts: the candidates, all threads first. chosen, pace: of an earlier process of this run; 0:
        not chosen yet.
        """
        self.counts = tuple(counts)
        self.chosen = min(chosen, self.counts[0]) or self.counts[0]
        self.pace = pace  # seconds per step after the last choice; 0.0: not measured yet
        self._window: list[float] = []  # seconds of the last steps
        self._interval = FIRST_INTERVAL
        self._next_choice = time.monotonic() + FIRST_INTERVAL

    def choose(self, time_pass: Callable[[int], float], min_saving: float = 0.0) -> dict[int, float]:
        """Time the candidates and choose. Returns the seconds of a pass with each.

        min_saving: the share of the time that a change must save.
        """
        seconds = time_candidates(self.counts, time_pass)
        best = fastest(seconds)
        if 1 - seconds[best] / seconds[self.chosen] < min_saving:
            best = self.chosen
        changed, self.chosen = best != self.chosen, best
        self._interval = FIRST_INTERVAL if changed else min(2 * self._interval, MAX_INTERVAL)
        self._next_choice = time.monotonic() + self._interval
        self.pace, self._window = 0.0, []
        return seconds

    def is_due(self, step_seconds: float) -> bool:
        """Record a training step. Returns True if the number of threads should be chosen again.

        That is if the pace has dropped, or if fewer than all threads are used: the other programs may have
        ended, which the pace does not show. But not too soon after the last choice.
        """
        if len(self.counts) == 1:
            return False
        self._window.append(step_seconds)
        if len(self._window) < WINDOW_STEPS or sum(self._window) < WINDOW_SECONDS:
            return False
        pace, self._window = statistics.median(self._window), []
        self.pace = min(self.pace or pace, pace)
        dropped = pace > SLOWDOWN * self.pace
        return (dropped or self.chosen < self.counts[0]) and time.monotonic() >= self._next_choice


# In a run


@functools.cache
def available_threads() -> int:
    """The number of threads that torch uses unless told otherwise. To be called before the first choice."""
    return torch.get_num_threads()


def prepare(t: Trainer, time_pass: Callable[[], float]) -> ThreadChoice:
    """Choose and set the number of threads of a run, once its model is set up.

    time_pass: computes a forward and backward pass and returns its seconds. The setting `threads` decides, if
    it is given; in a resumed run, the last choice. Under torchrun the processes share the CPU already.
    """
    state, setting = t.state, t.settings.threads
    available = available_threads()
    if t.runtime.device.type != "cpu" or t.runtime.world > 1 or t.settings.eval_only or setting:
        choice = ThreadChoice((setting or available,))
    else:
        choice = ThreadChoice(candidates(available), state.threads, state.pace)
    torch.set_num_threads(choice.chosen)
    if len(choice.counts) > 1 and not state.threads:
        seconds = choice.choose(lambda count: _timed(count, time_pass))
        torch.set_num_threads(choice.chosen)
        t.log.info(f"threads: {choice.chosen}{_describe(choice, seconds)}")
    return choice


def watch(t: Trainer, time_pass: Callable[[], float]) -> None:
    """After a training step: choose the number of threads again if the pace has dropped.

    A compiled run has to compile again for another number: it changes only if enough time is left for that.
    """
    choice, before = t.threads, t.threads.chosen
    if not choice.is_due(t.budget.step_seconds):
        return
    min_saving = 0.0
    if t.state.compiled:
        left = t.budget.seconds_left(t.settings.max_iters - t.state.step)
        min_saving = RECOMPILE_SECONDS / max(left, 1e-9)
    with t.budget.pause():
        seconds = choice.choose(lambda count: _timed(count, time_pass), min_saving)
        torch.set_num_threads(choice.chosen)
    if choice.chosen != before:
        t.log.info(f"threads: {before} -> {choice.chosen}, which is faster now{_describe(choice, seconds)}")


def _timed(count: int, time_pass: Callable[[], float]) -> float:
    """The seconds of a pass with so many threads."""
    torch.set_num_threads(count)
    return time_pass()


def _describe(choice: ThreadChoice, seconds: dict[int, float]) -> str:
    """The seconds of a pass with each number of threads, for the log."""
    others = [f"with {n}: {1000 * s:.0f} ms" for n, s in seconds.items() if n != choice.chosen]
    return f" (a pass takes {1000 * seconds[choice.chosen]:.0f} ms, {', '.join(others)})"
