"""TODO."""

import math
import re
import reprlib
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeBudget:
    """How long a run has taken, how fast it goes, and whether its time is up.

    The clock counts all of it, importing and evaluating too; the speed counts training alone.
    """

    def __init__(self, started: float, earlier: float, budget: float | None) -> None:
        self.started, self.earlier, self.budget = started, earlier, budget
        self.now = earlier  # seconds, as all ranks agreed last
        self.closing = 0.0  # seconds that what follows the last step is expected to take
        self.begun = 0.0  # when training began
        self.last_step = 0.0  # seconds
        self.writing = 0.0  # seconds that the last sample took
        self.marked, self.marked_step, self.away = time.monotonic(), 0, 0.0

    def elapsed(self) -> float:
        return self.earlier + time.monotonic() - self.started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training: evaluation, checkpoints, samples."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.away += time.monotonic() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of training: the next is expected to take as long."""
        start = time.monotonic()
        yield
        self.last_step = time.monotonic() - start

    def mark(self, step: int) -> None:
        self.marked, self.marked_step, self.away = time.monotonic(), step, 0.0

    def step_seconds(self, step: int) -> float:
        """Seconds a step since the last mark, without the time aside. Marks."""
        spent = time.monotonic() - self.marked - self.away
        per_step = max(spent, 1e-9) / max(1, step - self.marked_step)
        self.mark(step)
        return per_step

    @property
    def too_short(self) -> bool:
        """Whether what follows the last step would take more than half of the budget."""
        return self.budget is not None and self.closing > (self.budget - self.begun) / 2

    @property
    def ends(self) -> float:
        """When training has to be over. Half of the time is for it in any case: a run that has only evaluated
        is of no use, and how long the end takes may have been foretold on a machine that was busy."""
        return self.budget - min(self.closing, (self.budget - self.begun) / 2)

    def time_is_up(self) -> bool:
        """Whether one more step would leave too little time for what follows the last."""
        return self.budget is not None and self.now + self.last_step >= self.ends


def format_duration(seconds: float) -> str:
    """75.3 -> 1m15s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )


DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str) -> float | None:
    """90, 90s, 10m, 1h30m -> seconds; "" -> None. Raises ValueError where it is no length of time."""
    if not text:
        return None
    parts = DURATION.fullmatch(text.strip().lower())
    total = (
        sum(float(p or 0) * unit for p, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
        if parts
        else 0
    )
    if not 0 < total < math.inf:
        raise ValueError(f"time_budget = {reprlib.repr(text)} is no length of time: write 90s, 10m or 1h30m")
    return total
