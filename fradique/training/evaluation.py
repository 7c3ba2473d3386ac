"""Loss of a model on a split: on some fixed windows, or on the whole split with perplexity and bits per byte.

The ranks divide the windows among themselves, and all get the same results. Nothing is random: equal weights
give equal losses.
"""

from __future__ import annotations

import hashlib
import json
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
from fradique.tokenizer.tokenizer import tokenizer_checksum

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

# Inputs and targets (1, 1) for a rank of a sharded model that has no batch left while other ranks do: it must
# run the forward pass, because they need its shard of the weights.
_ZERO = torch.zeros(1, 1, dtype=torch.int64)
DUMMY_BATCH = (_ZERO, _ZERO)


@dataclass(frozen=True)
class SplitLoss:
    """The mean loss over some windows of a split."""

    loss: float  # nats per token, over all ranks
    # seconds per window, one number for each batch of this rank; empty if it had no batch
    window_seconds: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class SplitMetrics:
    """The result on a whole split. Each token is predicted once, except the first of each token file."""

    loss: float  # nats per token
    perplexity: float  # e^loss
    bits_per_byte: float  # per byte of the UTF-8 text, so that tokenizers can be compared

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte"
        )


@torch.no_grad()
def mean_loss(
    model: nn.Module, split: Split, windows: Sequence[Window], batch_size: int, runtime: Runtime
) -> SplitLoss:
    """Mean cross-entropy over the targets of `windows` on all ranks, at most `batch_size` windows at a time.

    For a prefix LM the loss of a window is the mean over the tokens after its prefix.
    """
    total, count, start = 0.0, 0, time.monotonic()  # total: sum of the losses; count: number of targets
    window_seconds = []
    # at most a rank's share of the windows, so that they are divided over all ranks
    batch_size = min(batch_size, math.ceil(len(windows) / runtime.world))
    training = model.training
    model.eval()
    batches = split.batches(windows, batch_size, runtime.rank, runtime.world)
    for batch in process_group.lockstep(batches) if runtime.sharded else batches:
        x, y = runtime.to_device(*(batch or DUMMY_BATCH))
        with runtime.autocast():
            _, loss = model(x, y, with_logits=False)
        if batch is None:
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
    """The losses of the splits "train" and "val", on eval_iters * batch_size windows of each.

    The windows are spread evenly over the split and are the same in every evaluation.
    """
    return {
        "train": mean_loss_on_fixed_windows(t, t.corpus.train),
        "val": mean_loss_on_fixed_windows(t, t.corpus.val),
    }


def mean_loss_on_fixed_windows(t: Trainer, split: Split) -> SplitLoss:
    """The loss on eval_iters * batch_size windows of a split; see `estimate_loss`."""
    settings = t.settings
    batch_size = t.runtime.max_eval_rows(settings.batch_size, settings.block_size)
    windows = split.fixed_windows(settings.block_size, settings.eval_iters * settings.batch_size)
    return mean_loss(t.model, split, windows, batch_size, t.runtime)


def eval_fingerprint(t: Trainer) -> str:
    """A SHA-256 that is equal if validation losses can be compared: same corpus, same evaluation windows."""
    settings, corpus = t.settings, t.corpus
    n_windows = settings.eval_iters * settings.batch_size
    parts = [corpus.train.fingerprint(), corpus.val.fingerprint(), tokenizer_checksum(corpus.tokenizer)]
    parts += [settings.block_size, min(n_windows, corpus.val.count_windows(settings.block_size))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def evaluate_val_split(t: Trainer) -> SplitMetrics:
    """Loss, perplexity and bits per byte on the whole validation split, in adjacent windows."""
    split, block_size = t.corpus.val, t.settings.block_size
    batch_size = t.runtime.max_eval_rows(t.settings.batch_size, block_size)
    loss = mean_loss(t.model, split, split.all_windows(block_size), batch_size, t.runtime).loss
    # the first token of each file is not predicted: leave out its share of the bytes
    text_bytes = split.count_text_bytes(t.corpus.tokenizer) * split.targets / split.tokens
    bits = loss * split.targets / math.log(2)
    return SplitMetrics(loss, perplexity(loss), bits / text_bytes)


def perplexity(loss: float) -> float:
    """e^loss; for losses above 700, e^700: a larger power would overflow a float."""
    return math.exp(min(loss, 700.0))
