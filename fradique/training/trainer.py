"""What changes from step to step of a run, beside weights and optimizer: state.json."""

from __future__ import annotations

import math
import reprlib
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fradique.checkpointing import run_folder
from fradique.data import dataset, sampler
from fradique.runtime import device
from fradique.training import logger, time_budget

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

HISTORY_STEPS = 128  # steps that a leap is measured against (as in OLMo 2, §3.3.2: Team OLMo 2024)


@dataclass
class LossHistory:
    """What a run remembers of its last good steps, and what it has skipped: kept in state.json."""

    losses: list[float] = field(default_factory=list)  # of up to REMEMBERED steps; none where leaps may pass
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0

    @classmethod
    def read(cls, values: Any) -> LossHistory | None:
        """From what state.json holds; None where it can not be so."""
        if not isinstance(values, dict) or not values.keys() <= {"losses", "norms", "skipped", "in_a_row"}:
            return None
        past = cls(**values)
        counts = all(type(n) is int and n >= 0 for n in (past.skipped, past.in_a_row))
        lists = (past.losses, past.norms)
        numbers = all(
            isinstance(held, list)
            and len(held) <= HISTORY_STEPS
            and all(type(x) is float and math.isfinite(x) for x in held)
            for held in lists
        )
        return past if counts and numbers else None

    def remember(self, loss: float, norm: float) -> None:
        self.forgive()
        self.losses = [*self.losses, loss][-HISTORY_STEPS:]
        self.norms = [*self.norms, norm][-HISTORY_STEPS:]

    def forgive(self) -> None:
        self.in_a_row = 0

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1


@dataclass
class TrainState:
    """What changes from step to step, beside weights and optimizer: kept in state.json."""

    step: int = 0  # updates done
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int = -1
    seconds: float = 0.0  # spent in earlier processes of this run
    closing_seconds: float = 0.0  # that the end of the run was last expected to take
    writing_seconds: float = 0.0  # that the last sample took
    scaler: dict[str, float] = field(default_factory=dict)
    past: LossHistory = field(default_factory=LossHistory)

    @classmethod
    def read(cls, values: dict[str, Any]) -> TrainState:
        """From what state.json holds. Raises ValueError, naming the fields that are missing or wrong."""
        wrong = [
            f"{f.name} = {reprlib.repr(values[f.name])}"
            for f in fields(cls)
            if not _is_valid_field(f, values)
        ]
        if wrong or "step" not in values:
            raise ValueError(
                f"state.json is damaged ({'; '.join(wrong) or 'no step'}): use an earlier checkpoint"
            )
        past = LossHistory.read(values.get("past", {}))
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values} | {"past": past})


def _is_valid_field(one: Field, values: dict[str, Any]) -> bool:
    """Whether a field of TrainState, where `values` have it, is what such a field may be."""
    value = values.get(one.name, one.default)
    if one.name == "past":
        return LossHistory.read(values.get("past", {})) is not None
    if one.name == "scaler":  # torch's own, whose numbers have names
        there = values.get("scaler", {})
        return isinstance(there, dict) and all(
            type(v) in (int, float) and math.isfinite(v) for v in there.values()
        )
    if one.name in ("best_val_loss", "best_step") and value is None:
        return True
    if type(one.default) is float or one.name == "best_val_loss":
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is int and -1 <= value < 1 << 62 and (value >= 0 or one.name == "last_eval_step")


Settings = Any  # train.py's TrainSettings, which this room does not know


@dataclass
class Trainer:
    """What the steps and the evaluations of train.py need."""

    settings: Settings
    runtime: device.Runtime
    corpus: dataset.Corpus
    sampler: sampler.Sampler
    model: Any  # a GPT
    forward: nn.Module  # the model, compiled and shared between processes where that is on
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    state: TrainState
    pace: time_budget.TimeBudget
    log: logger.RunLogger
    held: run_folder.RunLock | None = None  # the folder, where this process writes to it
    saved_step: int = -1  # of the last checkpoint that this process wrote

    def close(self) -> None:
        self.log.close()
        if self.held is not None:
            self.held.lock.release()


def tokens_per_step(settings: Settings) -> int:
    return settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
