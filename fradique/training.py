"""A run that is set up: what its loop, its log and its checkpoints work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fradique import dataset, metrics, run, runtime
from fradique.state import TrainState

Settings = Any  # train.py's TrainSettings, which this room does not know


@dataclass
class Training:
    """What the steps and the evaluations of train.py need."""

    settings: Settings
    runtime: runtime.Runtime
    corpus: dataset.Corpus
    sampler: dataset.Sampler
    model: Any  # a GPT
    forward: nn.Module  # the model, compiled and shared between processes where that is on
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    state: TrainState
    pace: metrics.Pace
    log: metrics.RunLog
    held: run.Held | None = None  # the folder, where this process writes to it
    saved_step: int = -1  # of the last checkpoint that this process wrote

    def close(self) -> None:
        self.log.close()
        if self.held is not None:
            self.held.lock.release()


def tokens_per_step(settings: Settings) -> int:
    return settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
