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
from fradique.training.time_budget import EVALUATION_SHARE, MIN_WINDOWS, fitting_windows

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

MIN_BATCHES = 8  # of a final measurement, for the standard error
# Inputs and targets (1, 1) for a rank of a sharded model that has no batch left while other ranks do: it must
# run the forward pass, because they need its shard of the weights.
_ZERO = torch.zeros(1, 1, dtype=torch.int64)
DUMMY_BATCH = (_ZERO, _ZERO)


@dataclass(frozen=True)
class SplitLoss:
    """The mean loss over some windows of a split."""

    loss: float  # nats per token, over all ranks
    tokens: int = field(default=0, compare=False)  # targets
    standard_error: float = field(default=0.0, compare=False)  # of the loss, if the windows are a sample
    # seconds per window, one number for each batch of this rank; empty if it had no batch
    window_seconds: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class SplitMetrics:
    """The result on a split, or on windows that are spread evenly over it.

    Each token of the split, or of the windows, is predicted once, except the first of each token file.
    """

    loss: float  # nats per token
    perplexity: float  # e^loss
    bits_per_byte: float  # per byte of the UTF-8 text, so that tokenizers can be compared
    standard_error: float = 0.0  # of the loss, if only a part was measured; 0 for the whole split
    tokens: int = 0  # predicted
    split_tokens: int = 0  # that the whole split would predict

    @property
    def is_whole(self) -> bool:
        """Whether the whole split was measured."""
        return self.tokens == self.split_tokens

    def __str__(self) -> str:
        error = f" ± {self.standard_error:.4f}" if self.standard_error else ""
        part = "" if self.is_whole else f" on {self.tokens:,} of {self.split_tokens:,} tokens"
        return (
            f"loss {self.loss:.4f}{error}{part}, perplexity {self.perplexity:.3f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )


@torch.no_grad()
def mean_loss(
    model: nn.Module, split: Split, windows: Sequence[Window], batch_size: int, runtime: Runtime
) -> SplitLoss:
    """Mean cross-entropy over the targets of `windows` on all ranks, at most `batch_size` windows at a time.

    For a prefix LM the loss of a window is the mean over the tokens after its prefix.
    """
    total, count, start = 0.0, 0, time.monotonic()  # total: sum of the losses; count: number of targets
    batch_losses = []
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
        batch_losses.append(loss.item())
        total += batch_losses[-1] * y.numel()
        count += y.numel()
        now = time.monotonic()
        window_seconds.append((now - start) / len(y))
        start = now
    model.train(training)
    squares = sum(loss**2 for loss in batch_losses)
    total, count, n, losses, squares = runtime.sum(
        total, count, len(batch_losses), sum(batch_losses), squares
    )
    variance = max(0.0, squares / n - (losses / n) ** 2)  # of the batches' losses
    error = math.sqrt(variance / (n - 1)) if n > 1 else 0.0
    return SplitLoss(total / count, int(count), error, tuple(window_seconds))


def estimate_loss(t: Trainer) -> dict[str, SplitLoss]:
    """The losses of the splits "train" and "val", on eval_iters * batch_size windows of each.

    The windows are spread evenly over the split and are the same in every evaluation.
    """
    return {
        "train": mean_loss_on_fixed_windows(t, t.corpus.train),
        "val": mean_loss_on_fixed_windows(t, t.corpus.val),
    }


def mean_loss_on_fixed_windows(t: Trainer, split: Split) -> SplitLoss:
    """The loss on `count_eval_windows` windows of a split; see `estimate_loss`."""
    block_size = t.settings.block_size
    batch_size = t.runtime.max_eval_rows(t.settings.batch_size, block_size)
    windows = split.fixed_windows(block_size, count_eval_windows(t))
    return mean_loss(t.model, split, windows, batch_size, t.runtime)


def count_eval_windows(t: Trainer) -> int:
    """The number of windows of each split in an evaluation, if the split has so many."""
    most = t.settings.eval_iters * t.settings.batch_size
    return min(most, t.state.eval_windows or most)


def limit_windows(t: Trainer) -> None:
    """With a time budget: give each evaluation so few windows that it takes at most EVALUATION_SHARE of it.

    A resumed run keeps its number of windows. All ranks call this before the first evaluation.
    """
    splits, block_size, budget = (t.corpus.train, t.corpus.val), t.settings.block_size, t.budget
    if budget.limit is not None and not t.state.eval_windows:
        windows = t.corpus.val.fixed_windows(block_size, MIN_WINDOWS * t.runtime.world)
        seconds: tuple[float, ...] = ()
        for _ in range(2):  # the first time, memory is allocated
            seconds = mean_loss(t.model, t.corpus.val, windows, MIN_WINDOWS, t.runtime).window_seconds
        (slowest,) = t.runtime.max(max(seconds, default=0.0))
        share = EVALUATION_SHARE * budget.limit / len(splits)
        t.state.eval_windows = fitting_windows(share, slowest / t.runtime.world, count_eval_windows(t))
    budget.eval_windows = sum(min(count_eval_windows(t), split.count_windows(block_size)) for split in splits)


def eval_fingerprint(t: Trainer) -> str:
    """A SHA-256 that is equal if validation losses can be compared: same corpus, same evaluation windows."""
    settings, corpus = t.settings, t.corpus
    parts = [corpus.train.fingerprint(), corpus.val.fingerprint(), tokenizer_checksum(corpus.tokenizer)]
    parts += [settings.block_size, min(count_eval_windows(t), corpus.val.count_windows(settings.block_size))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def evaluate_val_split(t: Trainer, max_windows: int | None = None) -> SplitMetrics:
    """Loss, perplexity and bits per byte on the whole validation split, in adjacent windows.

    max_windows: if the split has more windows, only so many of them, spread evenly over it.
    """
    split, block_size = t.corpus.val, t.settings.block_size
    batch_size = t.runtime.max_eval_rows(t.settings.batch_size, block_size)
    is_whole = max_windows is None or max_windows >= split.count_windows(block_size)
    if is_whole:
        windows: Sequence[Window] = split.all_windows(block_size)
    else:
        windows = split.fixed_windows(block_size, max_windows)
        batch_size = max(1, min(batch_size, len(windows) // MIN_BATCHES))
    measured = mean_loss(t.model, split, windows, batch_size, t.runtime)
    # the first token of each file is not predicted: leave out its share of the bytes
    text_bytes = split.count_text_bytes(t.corpus.tokenizer) * split.targets / split.tokens
    bits = measured.loss * split.targets / math.log(2)
    return SplitMetrics(
        loss=measured.loss,
        perplexity=perplexity(measured.loss),
        bits_per_byte=bits / text_bytes,
        standard_error=0.0 if is_whole else measured.standard_error,
        tokens=split.targets if is_whole else measured.tokens,
        split_tokens=split.targets,
    )


def perplexity(loss: float) -> float:
    """e^loss; for losses above 700, e^700: a larger power would overflow a float."""
    return math.exp(min(loss, 700.0))
