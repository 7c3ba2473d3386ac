"""Steps that would spoil a run: a loss or gradient that is not finite, or leaps far above the last ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fradique.training.trainer import LossHistory, Trainer

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer
MIN_HISTORY = 32  # of them, before any is called a leap
MAX_SKIPPED_IN_A_ROW = 100  # skipped steps in a row: the run learns nothing any more


def find_anomaly(past: LossHistory, loss: float, norm: float, sigmas: float) -> str | None:
    """What is wrong with a step's loss and the norm of its gradient, as part of a sentence; None where
    nothing is. `sigmas`: how many standard deviations above the last steps is a leap; 0: leaps may pass."""
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"the {name} is not finite"
    for name, value, last in (("loss", loss, past.losses), ("norm of the gradient", norm, past.norms)):
        if sigmas and len(last) >= MIN_HISTORY and value > (limit := _limit(last, sigmas)):
            return f"the {name} leaps to {value:.4g}, above {limit:.4g} ({sigmas:g} deviations)"
    return None


def _limit(last: Sequence[float], sigmas: float) -> float:
    return fmean(last) + sigmas * pstdev(last)


def check_finite(t: Trainer, step: int, loss: float | Tensor, norm: float | Tensor = 0.0) -> None:
    """Raise ValueError where the loss (or, but for float16, which skips such steps, the gradient) is not
    finite."""
    what = None
    if not math.isfinite(norm) and t.runtime.dtype != torch.float16:
        what = "gradient"
    if not math.isfinite(loss):
        what = "loss"
    if what:
        raise ValueError(stop_message(t, step, f"the {what} is not finite"))


def stop_message(t: Trainer, step: int, why: str) -> str:
    """What to say of a step that stops the run."""
    return (
        f"step {step}: {why}; the run stops here and its checkpoints in {t.settings.out_dir} are good. Try a "
        "lower learning_rate, more warmup_iters, a smaller grad_clip"
        + (", dtype=bfloat16 or float32" if t.runtime.dtype != torch.float32 else "")
        + ", or --skip_nonfinite=True to leave such steps out; go on from the last checkpoint with "
        "--init_from=resume"
    )


def accept_step(t: Trainer, loss: Tensor, norm: Tensor) -> bool:
    """Whether a step may be taken; False for one that is to be left out.

    Raises ValueError for one that has to stop the run. A card is not waited for where nothing is to be left
    out: the log looks at its losses.
    """
    s, past, step = t.settings, t.state.past, t.state.step + 1
    if not (s.skip_nonfinite or s.spike_sigmas):
        if t.runtime.device.type != "cuda":
            check_finite(t, step, loss, norm)
        return True
    (loss,) = t.runtime.sum(loss.item() / t.runtime.world)  # not finite anywhere: not finite for all
    norm = norm.item()
    if t.scaler.is_enabled() and not math.isfinite(norm):
        return True  # float16's overflow, of which the scaler takes care
    why = find_anomaly(past, loss, norm, s.spike_sigmas)
    if why is None:
        past.remember(loss, norm) if s.spike_sigmas else past.forgive()
        return True
    if not s.skip_nonfinite:
        raise ValueError(stop_message(t, step, why))
    past.skip()
    if past.in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise ValueError(stop_message(t, step, f"{why}, and {past.in_a_row} steps in a row were left out"))
    t.log.warn(f"step {step}: {why}; it is left out, as {past.skipped - 1} before it")
    return False
