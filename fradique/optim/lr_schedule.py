"""Learning rate schedules, as pure functions of the step.

A schedule maps the progress after warm-up (0 to 1) to a factor between 0 and 1; only `wsd` uses `decay_frac`.
`learning_rate` combines warm-up, schedule, peak and floor. In a run with a time budget its argument `total`
comes from `estimate_total_steps`.
"""

import math


def cosine(progress: float, decay_frac: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017), as in nanoGPT."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float, decay_frac: float) -> float:
    """Linear from 1 to 0."""
    return 1.0 - progress


def wsd(progress: float, decay_frac: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1, then linear to 0 over the last fraction `decay_frac`."""
    return min(1.0, (1.0 - progress) / decay_frac) if decay_frac > 0 else 1.0


def constant(progress: float, decay_frac: float) -> float:
    """Always 1."""
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
    """The learning rate of a step, counted from 0. With the schedule "cosine" it equals nanoGPT's get_lr.

    It rises linearly to `peak` over `warmup` steps, follows the schedule to `floor` at step `total`, and then
    stays at `floor`. With the schedule "constant" it stays at `peak`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return floor + (peak - floor) * SCHEDULES[schedule](progress, decay_frac)


def estimate_total_steps(step: int, elapsed: float, budget: float) -> float:
    """Number of steps in `budget` seconds, if `step` steps took `elapsed` seconds; inf if step is 0."""
    return step * budget / elapsed if step > 0 and elapsed > 0 else math.inf
