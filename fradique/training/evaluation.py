"""Loss of a model on a split: on fixed windows, or on the whole split with perplexity and bits per byte.

The ranks share the work and get the same numbers. Nothing is random: equal weights give equal losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from fradique.data.dataset import Split, Window
from fradique.distributed import process_group
from fradique.runtime.device import Runtime

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

IDLE_BATCH = (torch.zeros(1, 1, dtype=torch.int64),) * 2  # for a rank that has no batch while others do


@dataclass(frozen=True)
class SplitLoss:
    """The mean loss over some windows of a split."""

    loss: float  # nats per token, over all ranks
    window_seconds: tuple[float, ...] = field(default=(), compare=False)  # per window, for each batch here


@dataclass(frozen=True)
class SplitMetrics:
    """A model on a whole split; each token is predicted once (except the first of each shard)."""

    loss: float  # nats per token
    perplexity: float  # e^loss
    bits_per_byte: float  # of the UTF-8 text: comparable across tokenizers

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte"
        )


@torch.no_grad()
def mean_loss(
    model: nn.Module, split: Split, windows: Sequence[Window], batch_size: int, runtime: Runtime
) -> SplitLoss:
    """Mean cross-entropy over the targets of `windows`, `batch_size` windows at a time.

    For a prefix decoder the loss of a window is the mean over the tokens after its prefix.
    """
    total, count, start = 0.0, 0, time.monotonic()
    window_seconds = []
    batch_size = min(batch_size, -(-len(windows) // runtime.world))  # at least one batch for each rank
    training = model.training
    model.eval()
    batches = split.batches(windows, batch_size, runtime.rank, runtime.world)
    for batch in process_group.lockstep(batches) if runtime.sharded else batches:
        x, y = runtime.to_device(*(batch or IDLE_BATCH))
        with runtime.autocast():
            loss = model(x, y, with_logits=False)[1]
        if batch is None:  # the other ranks needed this rank's shard of the model, not its loss
            continue
        total += loss.item() * y.numel()
        count += y.numel()
        now = time.monotonic()
        window_seconds.append((now - start) / len(y))
        start = now
    model.train(training)
    total, count = runtime.sum(total, count)
    return SplitLoss(total / count, tuple(window_seconds))


def estimate_loss(t: Trainer) -> dict[str, SplitLoss]:
    """Loss of "train" and "val" on eval_iters batches of windows spread over each: always the same ones."""
    settings = t.settings
    batch_size = t.runtime.max_eval_rows(settings.batch_size, settings.block_size)
    losses = {}
    for name, split in (("train", t.corpus.train), ("val", t.corpus.val)):
        windows = split.fixed_windows(settings.block_size, settings.eval_iters * settings.batch_size)
        losses[name] = mean_loss(t.model, split, windows, batch_size, t.runtime)
    return losses


def evaluate_val_split(t: Trainer) -> SplitMetrics:
    """Loss, perplexity and bits per byte on the whole validation split, in adjacent windows."""
    split, block_size = t.corpus.val, t.settings.block_size
    batch_size = t.runtime.max_eval_rows(t.settings.batch_size, block_size)
    loss = mean_loss(t.model, split, split.all_windows(block_size), batch_size, t.runtime).loss
    text_bytes = split.count_text_bytes(t.corpus.tokenizer) * split.targets / split.tokens
    bits = loss * split.targets / math.log(2)
    return SplitMetrics(loss, perplexity(loss), bits / text_bytes)


def perplexity(loss: float) -> float:
    """e^loss, limited to what a float can hold."""
    return math.exp(min(loss, 700.0))
