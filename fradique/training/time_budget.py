"""The clock of a run: how long it has taken, how fast it trains, and when --time_budget ends it."""

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

SAFETY = 1.1  # the end of a run is expected to take this much longer than measured
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


class TimeBudget:
    """Elapsed time, training speed, and whether a run of limited time has to finish.

    The trainer reports events: steps, pauses, evaluations, samples. The clock counts everything, importing
    torch and evaluating too; the speed counts training alone. After the last step follows the finish: an
    evaluation, a checkpoint, the whole validation split and a sample. Its length is estimated from earlier
    events, and training ends that much before the budget.
    """

    def __init__(self, started: float, limit: float | None = None, *, finish_windows: float = 0.0) -> None:
        """`started`: time.monotonic() at the start of the process; `limit`: seconds, None for no limit;
        `finish_windows`: windows that each process evaluates in the finish."""
        self.started, self.limit, self.finish_windows = started, limit, finish_windows
        self.earlier = 0.0  # seconds that earlier processes of this run took
        self.now = 0.0  # elapsed seconds at the last synchronize()
        self.training_began = 0.0  # elapsed seconds after the evaluation at step 0
        self.step_seconds = 0.0  # of the last step
        self.sample_seconds = 0.0  # of the last sample
        self.finish_seconds = 0.0  # estimate for the finish
        self._mark_time, self._mark_step, self._paused = time.monotonic(), 0, 0.0

    def resume(self, elapsed: float, finish_seconds: float, sample_seconds: float) -> None:
        """Continue from the values of an earlier process, as `state` gives them."""
        self.earlier = self.now = elapsed
        self.finish_seconds, self.sample_seconds = finish_seconds, sample_seconds

    def state(self) -> dict[str, float]:
        """What state.json keeps of the clock."""
        return {
            "seconds": self.elapsed(),
            "closing_seconds": self.finish_seconds,
            "writing_seconds": self.sample_seconds,
        }

    def elapsed(self) -> float:
        """Seconds that the run has taken, in all its processes one after another."""
        return self.earlier + time.monotonic() - self.started

    # Events

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not training: evaluation, checkpoints, samples."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step; the next one is expected to take as long."""
        start = time.monotonic()
        yield
        self.step_seconds = time.monotonic() - start

    def evaluated(self, seconds_per_window: float, other_seconds: float = 0.0) -> None:
        """An evaluation was made; logging, plotting and saving it took `other_seconds`."""
        evaluation = seconds_per_window * self.finish_windows
        self.finish_seconds = SAFETY * (evaluation + other_seconds + self.sample_seconds)

    def sampled(self, seconds: float) -> None:
        """A sample was generated."""
        self.sample_seconds = seconds

    def begin_training(self) -> None:
        """The evaluation at step 0 is over."""
        self.training_began = self.elapsed()

    # Speed

    def mark(self, step: int) -> None:
        """Measure the speed from this step on."""
        self._mark_time, self._mark_step, self._paused = time.monotonic(), step, 0.0

    def seconds_per_step(self, step: int) -> float:
        """Mean seconds per step since the last mark, pauses left out. Sets a new mark."""
        training = time.monotonic() - self._mark_time - self._paused
        seconds = max(training, 1e-9) / max(1, step - self._mark_step)
        self.mark(step)
        return seconds

    # The limit

    @property
    def too_short(self) -> bool:
        """Whether the finish would take more than half of the time that is left for training."""
        return self.limit is not None and self.finish_seconds > (self.limit - self.training_began) / 2

    @property
    def training_ends(self) -> float:
        """Elapsed seconds at which training has to end.

        At least half of the time is for training: a run that only evaluates is useless, and the estimate of
        the finish may come from a machine that was busy.
        """
        return self.limit - min(self.finish_seconds, (self.limit - self.training_began) / 2)

    def synchronize(self, runtime: Runtime) -> None:
        """Agree on one clock across ranks: if one stopped and another went on, both would wait forever."""
        self.now, self.finish_seconds, self.training_began, self.step_seconds = runtime.max(
            self.elapsed(), self.finish_seconds, self.training_began, self.step_seconds
        )

    def is_over(self) -> bool:
        """Whether one more step would leave too little time for the finish; as of the last synchronize()."""
        return self.limit is not None and self.now + self.step_seconds >= self.training_ends


def parse_duration(text: str) -> float | None:
    """90, 90s, 10m, 1h30m -> seconds; "" -> None. Raises ValueError for anything else."""
    if not text:
        return None
    match = DURATION.fullmatch(text.strip().lower())
    groups = match.groups() if match else ()
    total = sum(float(g or 0) * unit for g, unit in zip(groups, (3600, 60, 1), strict=False))
    if not 0 < total < math.inf:
        raise ValueError(f"time_budget = {reprlib.repr(text)} is not a duration: write 90s, 10m or 1h30m")
    return total


def format_duration(seconds: float) -> str:
    """75.3 -> 1m15s."""
    total_seconds = round(seconds)
    if total_seconds < 60:
        return f"{seconds:.1f}s"
    if total_seconds < 3600:
        return f"{total_seconds // 60}m{total_seconds % 60:02d}s"
    return f"{total_seconds // 3600}h{total_seconds % 3600 // 60:02d}m"
