"""Trainer: everything that the training loop uses; TrainState: what changes from step to step."""

from __future__ import annotations

import math
import reprlib
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fradique.checkpointing import run_folder
from fradique.data.dataset import Corpus
from fradique.data.sampler import Sampler
from fradique.runtime.device import Runtime
from fradique.training.logger import RunLogger
from fradique.training.time_budget import TimeBudget
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings

HISTORY_STEPS = 128  # steps that a spike is compared with (as in OLMo 2, section 3.3.2: Team OLMo 2024)


@dataclass
class LossHistory:
    """Losses and gradient norms of the last accepted steps, and how many steps were skipped."""

    losses: list[float] = field(default_factory=list)  # up to HISTORY_STEPS; empty if spike_sigmas is 0
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0  # skipped steps since the last accepted one

    @classmethod
    def read(cls, values: Any) -> LossHistory | None:
        """The history in state.json; None if `values` cannot be one."""
        if not isinstance(values, dict) or not values.keys() <= {"losses", "norms", "skipped", "in_a_row"}:
            return None
        history = cls(**values)
        counts_valid = all(type(n) is int and n >= 0 for n in (history.skipped, history.in_a_row))
        lists_valid = all(
            isinstance(numbers, list)
            and len(numbers) <= HISTORY_STEPS
            and all(type(x) is float and math.isfinite(x) for x in numbers)
            for numbers in (history.losses, history.norms)
        )
        return history if counts_valid and lists_valid else None

    def accept(self) -> None:
        """Count an accepted step."""
        self.in_a_row = 0

    def remember(self, loss: float, norm: float) -> None:
        """Count an accepted step, and keep its numbers to compare later steps with."""
        self.accept()
        self.losses = [*self.losses, loss][-HISTORY_STEPS:]
        self.norms = [*self.norms, norm][-HISTORY_STEPS:]

    def skip(self) -> None:
        """Count a skipped step."""
        self.skipped += 1
        self.in_a_row += 1


@dataclass
class TrainState:
    """What changes from step to step, besides weights and optimizer state: saved as state.json."""

    step: int = 0  # updates done
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int = -1
    seconds: float = 0.0  # elapsed in earlier processes of this run
    closing_seconds: float = 0.0  # TimeBudget.finish_seconds
    writing_seconds: float = 0.0  # TimeBudget.sample_seconds
    scaler: dict[str, float] = field(default_factory=dict)
    past: LossHistory = field(default_factory=LossHistory)

    @classmethod
    def read(cls, values: dict[str, Any]) -> TrainState:
        """The state in state.json. Raises ValueError naming the fields that are missing or invalid."""
        wrong = [
            f"{f.name} = {reprlib.repr(values[f.name])}"
            for f in fields(cls)
            if not _is_valid_field(f, values)
        ]
        if wrong or "step" not in values:
            problems = "; ".join(wrong) or "no step"
            raise ValueError(f"state.json is damaged ({problems}): use an earlier checkpoint")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**known | {"past": LossHistory.read(values.get("past", {}))})


def _is_valid_field(f: Field, values: dict[str, Any]) -> bool:
    """Whether a field of TrainState has a possible value in `values`, or is missing there."""
    value = values.get(f.name, f.default)
    if f.name == "past":
        return LossHistory.read(values.get("past", {})) is not None
    if f.name == "scaler":  # the state of torch's GradScaler: numbers by name
        scaler = values.get("scaler", {})
        return isinstance(scaler, dict) and all(
            type(v) in (int, float) and math.isfinite(v) for v in scaler.values()
        )
    if f.name in ("best_val_loss", "best_step") and value is None:
        return True
    if type(f.default) is float or f.name == "best_val_loss":
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is int and -1 <= value < 1 << 62 and (value >= 0 or f.name == "last_eval_step")


@dataclass
class Trainer:
    """What the steps, evaluations, checkpoints and logs of a run use; made by `setup.setup_training`."""

    settings: TrainSettings
    runtime: Runtime
    corpus: Corpus
    sampler: Sampler
    model: GPT
    forward: nn.Module  # the model, compiled and wrapped in DDP where these are on
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    state: TrainState
    budget: TimeBudget
    log: RunLogger
    folder: Path  # the run folder; it follows when somebody moves the folder
    lock: run_folder.RunLock | None = None  # on the rank that writes to the folder
    saved_step: int = -1  # step of the last checkpoint of this process

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an effective batch."""
        return tokens_per_step(self.settings)

    def state_dict(self) -> dict[str, Any]:
        """The content of state.json."""
        return asdict(self.state) | self.budget.state() | {"scaler": self.scaler.state_dict()}

    def close(self) -> None:
        """Close the log and release the run folder."""
        self.log.close()
        if self.lock is not None:
            self.lock.lock.release()


def tokens_per_step(settings: TrainSettings) -> int:
    """Tokens in an effective batch, over all ranks."""
    return settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
