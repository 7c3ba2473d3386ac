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
from fradique.training.thread_choice import ThreadChoice
from fradique.training.time_budget import TimeBudget
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings

# A step is compared with this many earlier steps to detect a spike (OLMo 2, Team OLMo 2024, section 3.3.2).
HISTORY_STEPS = 128


@dataclass
class LossHistory:
    """Losses and gradient norms of the last accepted steps, and how many steps were skipped."""

    losses: list[float] = field(default_factory=list)  # at most HISTORY_STEPS; empty if spike_sigmas is 0
    norms: list[float] = field(default_factory=list)  # of the same steps as `losses`
    skipped: int = 0  # in the whole run
    in_a_row: int = 0  # skipped since the last accepted step

    @classmethod
    def read(cls, values: Any) -> LossHistory | None:
        """The history from its entry in state.json; None if `values` is not a valid entry."""
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
        """Count an accepted step, and keep its loss and gradient norm to compare later steps with them."""
        self.accept()
        self.losses = [*self.losses, loss][-HISTORY_STEPS:]
        self.norms = [*self.norms, norm][-HISTORY_STEPS:]

    def skip(self) -> None:
        """Count a skipped step."""
        self.skipped += 1
        self.in_a_row += 1


@dataclass
class TrainState:
    """What changes from step to step, besides weights and optimizer state. Saved in state.json."""

    step: int = 0  # steps done
    best_val_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    last_eval_step: int = -1
    eval_windows: int = 0  # at most, of each split in an evaluation; 0: eval_iters * batch_size
    eval_fingerprint: str = ""  # of the corpus and the windows of the best loss; "": an older version's
    learning_rate: float = 0.0  # AdamW's in the last step; 0: none was made, or not saved
    muon_learning_rate: float = 0.0  # Muon's, likewise
    # The next six are as read from a checkpoint. Their current values are in Trainer.budget, Trainer.threads
    # and Trainer.scaler, from where Trainer.state_dict saves them.
    seconds: float = 0.0  # elapsed in earlier processes of this run
    closing_seconds: float = 0.0  # TimeBudget.finish_seconds
    writing_seconds: float = 0.0  # TimeBudget.sample_seconds
    threads: int = 0  # ThreadChoice.chosen; 0: not chosen
    pace: float = 0.0  # ThreadChoice.pace
    compiled: bool | None = None  # whether the model of the run is compiled; None: not chosen, or not saved
    scaler: dict[str, float] = field(default_factory=dict)  # GradScaler.state_dict()
    past: LossHistory = field(default_factory=LossHistory)

    @classmethod
    def read(cls, values: dict[str, Any]) -> TrainState:
        """The state from the content of state.json.

        Only `step` must be there; other fields have defaults. Raises ValueError naming the invalid fields.
        """
        invalid = [
            f"{f.name} = {reprlib.repr(values[f.name])}"
            for f in fields(cls)
            if not _is_valid_field(f, values)
        ]
        if invalid or "step" not in values:
            problems = "; ".join(invalid) or "no step"
            raise ValueError(f"state.json is damaged ({problems}): use an earlier checkpoint")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**known | {"past": LossHistory.read(values.get("past", {}))})


def _is_valid_field(f: Field, values: dict[str, Any]) -> bool:
    """Whether the value of a field of TrainState is valid, or missing in `values`."""
    value = values.get(f.name, f.default)
    if f.name == "past":
        return LossHistory.read(values.get("past", {})) is not None
    if f.name == "scaler":
        scaler = values.get("scaler", {})
        return isinstance(scaler, dict) and all(
            type(v) in (int, float) and math.isfinite(v) for v in scaler.values()
        )
    if f.name in ("best_val_loss", "best_step", "compiled") and value is None:
        return True
    if f.name == "compiled":
        return type(value) is bool
    if f.name == "eval_fingerprint":
        return isinstance(value, str)
    if type(f.default) is float or f.name == "best_val_loss":
        return type(value) in (int, float) and abs(value) < 1e300
    minimum = -1 if f.name == "last_eval_step" else 0
    return type(value) is int and minimum <= value < 1 << 62


@dataclass
class Trainer:
    """Everything that the training loop uses. `setup.setup_training` makes it."""

    settings: TrainSettings
    runtime: Runtime
    corpus: Corpus
    sampler: Sampler
    model: GPT
    forward: nn.Module  # the model, compiled and wrapped in DDP if the run uses these
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    state: TrainState
    budget: TimeBudget
    log: RunLogger
    folder: Path  # the run folder; changes if somebody moves the folder
    threads: ThreadChoice = field(default_factory=lambda: ThreadChoice((torch.get_num_threads(),)))
    lock: run_folder.RunLock | None = None  # None on ranks other than 0, and with eval_only
    saved_step: int = -1  # step of the last checkpoint, written or resumed from; -1: none
    schedule_checked: bool = False  # whether outputs.warn_about_schedule was called

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an effective batch."""
        return tokens_per_step(self.settings)

    def state_dict(self) -> dict[str, Any]:
        """The content of state.json."""
        threads = {"threads": self.threads.chosen, "pace": self.threads.pace}
        return asdict(self.state) | self.budget.state() | threads | {"scaler": self.scaler.state_dict()}

    def close(self) -> None:
        """Close the log and release the run folder."""
        self.log.close()
        if self.lock is not None:
            self.lock.lock.release()


def tokens_per_step(settings: TrainSettings) -> int:
    """Tokens in an effective batch, over all ranks."""
    return settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
