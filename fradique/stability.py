"""Steps that would spoil a run: a loss or gradient that is not finite, or leaps far above the last ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fradique.training import Training

REMEMBERED = 128  # steps that a leap is measured against (as in OLMo 2, §3.3.2: Team OLMo 2024)
ENOUGH = 32  # of them, before any is called a leap
TOO_MANY = 100  # skipped steps in a row: the run learns nothing any more


@dataclass
class Past:
    """What a run remembers of its last good steps, and what it has skipped: kept in state.json."""

    losses: list[float] = field(default_factory=list)  # of up to REMEMBERED steps; none where leaps may pass
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0

    @classmethod
    def read(cls, values: Any) -> Past | None:
        """From what state.json holds; None where it can not be so."""
        if not isinstance(values, dict) or not values.keys() <= {"losses", "norms", "skipped", "in_a_row"}:
            return None
        past = cls(**values)
        counts = all(type(n) is int and n >= 0 for n in (past.skipped, past.in_a_row))
        lists = (past.losses, past.norms)
        numbers = all(
            isinstance(held, list)
            and len(held) <= REMEMBERED
            and all(type(x) is float and math.isfinite(x) for x in held)
            for held in lists
        )
        return past if counts and numbers else None

    def remember(self, loss: float, norm: float) -> None:
        self.forgive()
        self.losses = [*self.losses, loss][-REMEMBERED:]
        self.norms = [*self.norms, norm][-REMEMBERED:]

    def forgive(self) -> None:
        self.in_a_row = 0

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1


def trouble(past: Past, loss: float, norm: float, sigmas: float) -> str | None:
    """What is wrong with a step's loss and the norm of its gradient, as part of a sentence; None where
    nothing is. `sigmas`: how many standard deviations above the last steps is a leap; 0: leaps may pass."""
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"the {name} is not finite"
    for name, value, last in (("loss", loss, past.losses), ("norm of the gradient", norm, past.norms)):
        if sigmas and len(last) >= ENOUGH and value > (limit := _limit(last, sigmas)):
            return f"the {name} leaps to {value:.4g}, above {limit:.4g} ({sigmas:g} deviations)"
    return None


def _limit(last: Sequence[float], sigmas: float) -> float:
    return fmean(last) + sigmas * pstdev(last)


def check_finite(t: Training, step: int, loss: float | Tensor, norm: float | Tensor = 0.0) -> None:
    """Raise ValueError where the loss (or, but for float16, which skips such steps, the gradient) is not
    finite."""
    what = None
    if not math.isfinite(norm) and t.runtime.dtype != torch.float16:
        what = "gradient"
    if not math.isfinite(loss):
        what = "loss"
    if what:
        raise ValueError(unsound(t, step, f"the {what} is not finite"))


def unsound(t: Training, step: int, why: str) -> str:
    """What to say of a step that stops the run."""
    return (
        f"step {step}: {why}; the run stops here and its checkpoints in {t.settings.out_dir} are good. Try a "
        "lower learning_rate, more warmup_iters, a smaller grad_clip"
        + (", dtype=bfloat16 or float32" if t.runtime.dtype != torch.float32 else "")
        + ", or --skip_nonfinite=True to leave such steps out; go on from the last checkpoint with "
        "--init_from=resume"
    )


def is_sound(t: Training, loss: Tensor, norm: Tensor) -> bool:
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
    why = trouble(past, loss, norm, s.spike_sigmas)
    if why is None:
        past.remember(loss, norm) if s.spike_sigmas else past.forgive()
        return True
    if not s.skip_nonfinite:
        raise ValueError(unsound(t, step, why))
    past.skip()
    if past.in_a_row >= TOO_MANY:
        raise ValueError(unsound(t, step, f"{why}, and {past.in_a_row} steps in a row were left out"))
    t.log.warn(f"step {step}: {why}; it is left out, as {past.skipped - 1} before it")
    return False
