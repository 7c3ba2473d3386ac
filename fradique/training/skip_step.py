"""Steps that would damage a run: a loss or gradient norm that is not finite, or far above the last ones.

Such a step stops the run, or is skipped (`--skip_nonfinite`).
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fradique.training.trainer import LossHistory, Trainer

MIN_HISTORY = 32  # steps, before any is called a spike
MAX_SKIPPED_IN_A_ROW = 100  # after so many the run is not learning any more


def find_anomaly(history: LossHistory, loss: float, norm: float, sigmas: float) -> str | None:
    """What is wrong with a step's loss and gradient norm, as part of a sentence; None if nothing is.

    `sigmas`: a value so many standard deviations above the mean of the last steps is a spike; 0: none is.
    """
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"the {name} is not finite"
    for name, value, last in (("loss", loss, history.losses), ("gradient norm", norm, history.norms)):
        if sigmas and len(last) >= MIN_HISTORY:
            limit = fmean(last) + sigmas * pstdev(last)
            if value > limit:
                return f"the {name} jumps to {value:.4g}, above {limit:.4g} ({sigmas:g} standard deviations)"
    return None


def check_finite(t: Trainer, step: int, loss: float | Tensor, norm: float | Tensor = 0.0) -> None:
    """Raise ValueError if the loss or the gradient norm is not finite.

    With float16 the norm may overflow: the GradScaler skips such a step.
    """
    if not math.isfinite(loss):
        raise ValueError(stop_message(t, step, "the loss is not finite"))
    if not math.isfinite(norm) and t.runtime.dtype != torch.float16:
        raise ValueError(stop_message(t, step, "the gradient is not finite"))


def stop_message(t: Trainer, step: int, reason: str) -> str:
    """The message for a step that stops the run."""
    dtype_advice = ", dtype=bfloat16 or float32" if t.runtime.dtype != torch.float32 else ""
    return (
        f"step {step}: {reason}; the run stops here and its checkpoints in {t.folder} are good. Try a lower "
        f"learning_rate, more warmup_iters, a smaller grad_clip{dtype_advice}, or --skip_nonfinite=True to "
        "skip such steps; continue from the last checkpoint with --init_from=resume"
    )


def accept_step(t: Trainer, loss: Tensor, norm: Tensor) -> bool:
    """Whether to apply the update of a step; False to skip it.

    Raises ValueError if the step has to stop the run. On CUDA, unless steps may be skipped, the values are
    only checked when they are logged: looking at them earlier would wait for the GPU at every step.
    """
    settings, history, step = t.settings, t.state.past, t.state.step + 1
    if not (settings.skip_nonfinite or settings.spike_sigmas):
        if t.runtime.device.type != "cuda":
            check_finite(t, step, loss, norm)
        return True
    (loss,) = t.runtime.sum(loss.item() / t.runtime.world)  # not finite on one rank: not finite on all
    norm = norm.item()
    if t.scaler.is_enabled() and not math.isfinite(norm):
        return True  # overflow in float16: the GradScaler skips the update
    anomaly = find_anomaly(history, loss, norm, settings.spike_sigmas)
    if anomaly is None:
        history.remember(loss, norm) if settings.spike_sigmas else history.accept()
        return True
    if not settings.skip_nonfinite:
        raise ValueError(stop_message(t, step, anomaly))
    history.skip()
    if history.in_a_row >= MAX_SKIPPED_IN_A_ROW:
        reason = f"{anomaly}, and {history.in_a_row} steps in a row were skipped"
        raise ValueError(stop_message(t, step, reason))
    t.log.warn(f"step {step}: {anomaly}; step skipped ({history.skipped - 1} skipped so far)")
    return False
