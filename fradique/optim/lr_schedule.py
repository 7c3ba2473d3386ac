"""Step -> learning rate: pure functions.

A schedule is a factor between 0 and 1 over the part of the run that follows the warm-up. `learning_rate`
puts warm-up, factor, peak and floor together. Where a clock and not a count ends the run, `steps_by_clock`
gives the `total`: the steps that the run would have at its present pace.
"""

import math


def cosine(progress: float, decay_frac: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017); nanoGPT's."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float, decay_frac: float) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - progress


def wsd(progress: float, decay_frac: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1, then a straight line to 0 over the last `decay_frac`."""
    return min(1.0, (1.0 - progress) / decay_frac) if decay_frac > 0 else 1.0


def constant(progress: float, decay_frac: float) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": wsd, "constant": constant}


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    floor: float,
    warmup: int,
    total: float,
    decay_frac: float = 0.5,
) -> float:
    """The learning rate of `step` (from 0). With "cosine" it equals nanoGPT's get_lr in every step.

    It rises in a straight line over `warmup` steps to `peak`, follows the schedule until step `total`,
    and stays at `floor` from there on ("constant" stays at `peak`).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return floor + (peak - floor) * SCHEDULES[schedule](progress, decay_frac)


def estimate_total_steps(step: int, elapsed: float, budget: float) -> float:
    """Steps in a run of `budget` seconds of which `step` steps have taken `elapsed`: inf before the first."""
    return step * budget / elapsed if step > 0 and elapsed > 0 else math.inf
