"""Bad steps: the loss or the gradient norm is not finite, or far above those of the last steps (a spike).

A bad step stops the run. With --skip_nonfinite it is skipped.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fradique.training.trainer import LossHistory, Trainer

MIN_HISTORY = 32  # steps that are needed for a mean and a standard deviation to detect spikes
MAX_SKIPPED_IN_A_ROW = 100  # after so many skipped steps the run stops: the weights will not recover


def find_anomaly(history: LossHistory, loss: float, norm: float, sigmas: float) -> str | None:
    """What is wrong with a step, for the middle of a message; None if nothing is wrong.

    sigmas: a loss or norm is a spike if it is more than so many standard deviations above the mean of the
    last steps; 0: spikes are not detected.
    """
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    for name, value, last_values in (
        ("loss", loss, history.losses),
        ("gradient norm", norm, history.norms),
    ):
        if sigmas and len(last_values) >= MIN_HISTORY:
            limit = fmean(last_values) + sigmas * pstdev(last_values)
            if value > limit:
                return f"the {name} jumps to {value:.4g}, above {limit:.4g} ({sigmas:g} standard deviations)"
    return None


def check_finite(t: Trainer, step: int, loss: float | Tensor, norm: float | Tensor = 0.0) -> None:
    """Raise ValueError if the loss or the gradient norm is not finite.

    In float16 the norm may overflow without an error, because the GradScaler skips such a step.
    """
    if not math.isfinite(loss):
        raise ValueError(stop_message(t, step, "the loss is not finite"))
    if not math.isfinite(norm) and t.runtime.dtype != torch.float16:
        raise ValueError(stop_message(t, step, "the gradient is not finite"))


def stop_message(t: Trainer, step: int, reason: str) -> str:
    """The error message for a bad step that stops the run."""
    dtype_advice = ", dtype=bfloat16 or float32" if t.runtime.dtype != torch.float32 else ""
    return (
        f"step {step}: {reason}; the run stops here. Its checkpoints in {t.folder} are intact. Try a lower "
        f"learning_rate, more warmup_iters, a smaller grad_clip{dtype_advice}, or --skip_nonfinite=True to "
        "skip such steps; continue from the last checkpoint with --init_from=resume"
    )


def accept_step(t: Trainer, loss: Tensor, norm: Tensor) -> bool:
    """Whether to apply the update of a step; False: skip it. Counts accepted and skipped steps.

    loss: this rank's loss. Raises ValueError if the step has to stop the run. On CUDA, if neither
    skip_nonfinite nor spike_sigmas is set, the values are checked only when they are logged: reading them
    here would wait for the GPU at every step.
    """
    settings, history, step = t.settings, t.state.past, t.state.step + 1
    if not (settings.skip_nonfinite or settings.spike_sigmas):
        if t.runtime.device.type != "cuda":
            check_finite(t, step, loss, norm)
        return True
    # the mean over the ranks: all ranks decide alike, and it is not finite if the loss of any rank is not
    (loss,) = t.runtime.sum(loss.item() / t.runtime.world)
    norm = norm.item()
    if t.scaler.is_enabled() and not math.isfinite(norm):
        return True  # an overflow in float16: train_step and the GradScaler skip the update
    anomaly = find_anomaly(history, loss, norm, settings.spike_sigmas)
    if anomaly is None:
        if settings.spike_sigmas:
            history.remember(loss, norm)
        else:
            history.accept()
        return True
    if not settings.skip_nonfinite:
        raise ValueError(stop_message(t, step, anomaly))
    history.skip()
    if history.in_a_row >= MAX_SKIPPED_IN_A_ROW:
        reason = f"{anomaly}, and {history.in_a_row} steps in a row were skipped"
        raise ValueError(stop_message(t, step, reason))
    t.log.warn(f"step {step}: {anomaly}; step skipped ({history.skipped - 1} skipped so far)")
    return False
