"""How good a model is on a split: mean loss on fixed windows, or on all of it with bits per byte.

The ranks share the work and all get the same numbers. Nothing is drawn at random: two evaluations of the same
weights are equal.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fradique.data.dataset import Corpus, Split, Window
from fradique.distributed import process_group
from fradique.runtime.device import Runtime

IDLE_BATCH = (torch.zeros(1, 1, dtype=torch.int64),) * 2  # what a rank without work computes with


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    split: Split,
    windows: Sequence[Window],
    rows: int,
    place: Runtime,
    seconds: list[float] | None = None,
) -> float:
    """Mean cross-entropy over all targets of `windows`, `rows` of them at a time, in nats a token.

    A prefix decoder predicts only what follows its prefix: of its windows the loss is the mean over that.
    `seconds` gets what a window took, of each batch.
    """
    total, count, start = 0.0, 0, time.monotonic()
    rows = min(rows, -(-len(windows) // place.world))  # something for each rank
    training = model.training
    model.eval()
    share = split.batches(windows, rows, place.rank, place.world)
    for batch in process_group.lockstep(share) if place.sharded else share:
        x, y = place.move(*(batch or IDLE_BATCH))
        with place.autocast():
            loss = model(x, y, with_logits=False)[1]
        if batch is None:  # the others need this rank's part of the model, not its loss
            continue
        total += loss.item() * y.numel()
        count += y.numel()
        if seconds is not None:
            start, before = time.monotonic(), start
            seconds.append((start - before) / len(y))
    model.train(training)
    total, count = place.sum(total, count)
    return total / count


def estimate_loss(
    model: nn.Module,
    corpus: Corpus,
    block_size: int,
    batch_size: int,
    batches: int,
    place: Runtime,
    seconds: list[float] | None = None,
) -> dict[str, float]:
    """Loss of train and val on `batches` batches of windows spread over each: the same ones every time.
    `seconds` as in `mean_loss`."""
    rows, found = place.rows_at_once(batch_size, block_size), {}
    for name, split in (("train", corpus.train), ("val", corpus.val)):
        windows = split.fixed_windows(block_size, batches * batch_size)
        found[name] = mean_loss(model, split, windows, rows, place, seconds)
    return found


@dataclass(frozen=True)
class SplitMetrics:
    """A model on a whole split, each token predicted once (but a shard's first)."""

    loss: float  # nats a token
    perplexity: float  # e^loss
    bits_per_byte: float  # of the UTF-8 text: models with different tokenizers compare

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte"
        )


def perplexity(loss: float) -> float:
    """e^loss, as far as a float can tell it."""
    return math.exp(min(loss, 700.0))


def evaluate_val_split(
    model: nn.Module, corpus: Corpus, block_size: int, batch_size: int, place: Runtime
) -> SplitMetrics:
    """The validation split from end to end, in windows side by side."""
    split = corpus.val
    rows = place.rows_at_once(batch_size, block_size)
    loss = mean_loss(model, split, split.all_windows(block_size), rows, place)
    text_bytes = split.count_text_bytes(corpus.tokenizer) * split.targets / split.tokens
    bits = loss * split.targets / math.log(2)
    return SplitMetrics(loss, perplexity(loss), bits / text_bytes)
