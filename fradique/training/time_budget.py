"""The clock of a run: how long it has taken, how fast it trains, and when --time_budget ends training."""

from __future__ import annotations

import math
import re
import reprlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fradique.runtime.device import Runtime

SAFETY_FACTOR = 1.1  # the estimate for the finish of a run is this many times the measured time
# Of the time budget, the most that each of these takes during training. An evaluation that is due too early
# after the last one is left out, and so are its checkpoint, a loss plot, or a sample.
SHARES = {"evaluation": 0.03, "loss plot": 0.01, "sample": 0.01}
FINAL_SHARE = 0.03  # of the final measurement, if it does not have to be on the whole validation split
EVALUATION_SHARE = (
    0.01  # of a single evaluation of both splits: it gets fewer windows if it would take longer
)
MIN_WINDOWS = 16  # of an evaluation, even if it takes longer
# Hours, minutes and seconds, each an optional group: 1h30m, 90s, 90.
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


class TimeBudget:
    """Elapsed time, training speed, and whether a run of limited time has to finish.

    The training loop reports steps, pauses, evaluations and samples. The elapsed time includes all of them,
    and importing torch. The speed counts training steps only.

    The finish of a run comes after its last step: an evaluation, a checkpoint, the final measurement on the
    validation split, and a sample. The seconds that it needs are estimated from earlier evaluations and
    samples, and training ends that many seconds before the limit. What is not training gets only a share of
    the time, a tenth in all: see SHARES and FINAL_SHARE.
    """

    def __init__(
        self,
        started: float,
        limit: float | None = None,
        *,
        val_windows: int = 0,
        world: int = 1,
        measure_whole: bool = True,
    ) -> None:
        """started: time.monotonic() at the start of the process. limit: seconds; None: no limit.

        val_windows: windows of the validation split. world: processes that share the evaluations.
        measure_whole: whether the final measurement uses the whole validation split, however long it takes.
        """
        self.started, self.limit = started, limit
        self.val_windows, self.world, self.measure_whole = val_windows, world, measure_whole
        self.eval_windows = 0  # windows of an evaluation, both splits together
        self.final_windows = val_windows  # windows of the final measurement
        self._next_time: dict[str, float] = {}  # a key of SHARES -> elapsed seconds at which it may run again
        self.earlier = 0.0  # seconds that earlier processes of this run took
        self.now = 0.0  # elapsed seconds at the last synchronize()
        # elapsed seconds at the end of the evaluation at step 0; stays 0 in a run that was resumed after it
        self.training_began = 0.0
        self.step_seconds = 0.0  # of the last step
        self.sample_seconds = 0.0  # of the last sample
        self.finish_seconds = 0.0  # estimate for the finish
        self.mark(0)  # sets _mark_time, _mark_step and _paused_seconds

    def resume(self, elapsed: float, finish_seconds: float, sample_seconds: float) -> None:
        """Continue from the values that an earlier process saved with `state`."""
        self.earlier = self.now = elapsed
        self.finish_seconds, self.sample_seconds = finish_seconds, sample_seconds

    def state(self) -> dict[str, float]:
        """The clock's entries of state.json, whose names are those of TrainState's fields."""
        return {
            "seconds": self.elapsed(),
            "closing_seconds": self.finish_seconds,
            "writing_seconds": self.sample_seconds,
        }

    def elapsed(self) -> float:
        """Seconds that the run has taken, including its earlier processes if it was resumed."""
        return self.earlier + time.monotonic() - self.started

    # Events

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager for what is not training: evaluations, checkpoints, samples."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager that times a training step. The next one is expected to take as long."""
        start = time.monotonic()
        yield
        self.step_seconds = time.monotonic() - start

    def evaluated(self, seconds_per_window: float, other_seconds: float = 0.0) -> None:
        """Estimate the finish after an evaluation, and choose how many windows the final measurement has.

        seconds_per_window: of one process. other_seconds: what logging, the loss plot and the checkpoint took
        after the evaluation.
        """
        seconds_per_window /= self.world
        if self.limit is not None and not self.measure_whole:
            self.final_windows = fitting_windows(
                FINAL_SHARE * self.limit, seconds_per_window, self.val_windows
            )
        evaluation_seconds = seconds_per_window * (self.eval_windows + self.final_windows)
        self.finish_seconds = SAFETY_FACTOR * (evaluation_seconds + other_seconds + self.sample_seconds)

    def spent(self, task: str, seconds: float) -> None:
        """Record that a task of SHARES took `seconds`, the same number on all ranks."""
        self._next_time[task] = self.now + seconds / SHARES[task]

    def allows(self, task: str) -> bool:
        """Whether a task of SHARES may run without exceeding its share; always without a limit.

        The same on all ranks, as of the last synchronize().
        """
        return self.limit is None or self.now >= self._next_time.get(task, 0.0)

    def sampled(self, seconds: float) -> None:
        """Record how long a sample took."""
        self.sample_seconds = seconds

    def begin_training(self) -> None:
        """Record that the evaluation at step 0 is over."""
        self.training_began = self.elapsed()

    # Speed

    def mark(self, step: int) -> None:
        """Measure the speed from this step on."""
        self._mark_time, self._mark_step = time.monotonic(), step
        self._paused_seconds = 0.0  # since the mark

    def seconds_per_step(self, step: int) -> float:
        """Mean seconds per step since the last mark, without pauses. Sets a new mark at `step`."""
        training_seconds = time.monotonic() - self._mark_time - self._paused_seconds
        seconds = max(training_seconds, 1e-9) / max(1, step - self._mark_step)  # positive: it is a divisor
        self.mark(step)
        return seconds

    # The limit

    @property
    def too_short(self) -> bool:
        """Whether the limit is too short: the finish would take more than half of the time between the
        evaluation at step 0 and the limit."""
        return self.limit is not None and self.finish_seconds > (self.limit - self.training_began) / 2

    @property
    def training_ends(self) -> float:
        """Elapsed seconds at which training has to end. Only for a run with a limit.

        At least half of the time is for training, even if the run then exceeds its limit: a run that only
        evaluates is useless, and the estimate of the finish is too high if the machine was busy.
        """
        return self.limit - min(self.finish_seconds, (self.limit - self.training_began) / 2)

    def seconds_left(self, steps: int) -> float:
        """Seconds that training still takes: until the limit, or for this many steps as long as the last."""
        if self.limit is None:
            return steps * self.step_seconds
        return self.training_ends - self.elapsed()

    def synchronize(self, runtime: Runtime) -> None:
        """Set the clock to its maximum over the ranks, so that `is_over` is the same on all of them.

        If one rank stopped and another continued, both would wait for each other forever.
        """
        self.now, self.finish_seconds, self.training_began, self.step_seconds = runtime.max(
            self.elapsed(), self.finish_seconds, self.training_began, self.step_seconds
        )

    def is_over(self) -> bool:
        """Whether one more step would leave too little time for the finish; as of the last synchronize()."""
        return self.limit is not None and self.now + self.step_seconds >= self.training_ends


def fitting_windows(seconds: float, seconds_per_window: float, available: int) -> int:
    """How many windows can be evaluated in `seconds`: all that are available, or else a power of two.

    At least MIN_WINDOWS, if there are so many. A power of two, so that runs on machines of similar speed
    measure the same windows.
    """
    if available * seconds_per_window <= seconds:
        return available
    fitting = seconds / seconds_per_window
    return min(available, max(MIN_WINDOWS, 1 << int(math.log2(max(fitting, 1.0)))))


def parse_duration(text: str, name: str = "time_budget") -> float | None:
    """Seconds of a duration such as 90, 90s, 10m or 1h30m; None for "".

    name: of the setting, for the message of the ValueError that other texts raise.
    """
    if not text:
        return None
    total = 0.0
    if match := DURATION.fullmatch(text.strip().lower()):
        hours, minutes, seconds = (float(number or 0) for number in match.groups())
        total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total < math.inf:
        raise ValueError(f"{name} = {reprlib.repr(text)} is not a duration: write 90s, 10m or 1h30m")
    return total


def format_duration(seconds: float) -> str:
    """Seconds as text: 7.5 -> 7.5s, 75.3 -> 1m15s, 3700 -> 1h01m."""
    total_seconds = round(seconds)
    if total_seconds < 60:
        return f"{seconds:.1f}s"
    if total_seconds < 3600:
        return f"{total_seconds // 60}m{total_seconds % 60:02d}s"
    return f"{total_seconds // 3600}h{total_seconds % 3600 // 60:02d}m"
