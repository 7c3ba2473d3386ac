"""TODO."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def penalize_repetition(logits: Tensor, idx: Tensor, penalty: float) -> Tensor:
    """Make tokens of idx (B, T) less likely: divide positive logits, multiply negative ones (CTRL, §4.1)."""
    if penalty == 1.0:
        return logits
    n_vocab = logits.size(1)
    wide = F.pad(logits, (0, 1))  # (B, V + 1): the last column takes ids of a padded vocabulary, and goes
    idx = idx.clamp(max=n_vocab)
    seen = wide.gather(1, idx)  # (B, T)
    return wide.scatter(1, idx, torch.where(seen > 0, seen / penalty, seen * penalty))[:, :n_vocab]


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, (B,), from logits (B, V). Temperature 0 is greedy.

    Raises ValueError where a CPU draws from logits that are not finite.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: none overflows
    probs = F.softmax(filter_logits(logits, top_k, top_p, min_p), dim=-1)
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    # torch's own draws a number for each token of the vocabulary, which a CPU does slowly; one is enough
    edges = probs.cumsum(dim=-1)  # token t is drawn where edges[t - 1] <= u < edges[t]
    total = edges[:, -1:].contiguous()
    if not total.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or it has diverged")
    u = torch.rand(total.shape, device=logits.device, generator=generator) * total
    token = torch.searchsorted(edges, u, right=True)
    return token.minimum(torch.searchsorted(edges, total))[:, 0]  # u may have been rounded up to the total


def filter_logits(
    logits: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set the logits (B, V) of tokens that may not be drawn to -inf. At least one token is always left.

    In this order, each on what the one before left: top_k, the k likeliest; top_p, the fewest whose
    probabilities reach p (Holtzman et al. 2020); min_p, those at least p times as likely as the likeliest
    (Nguyen et al. 2024).
    """
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = F.softmax(ordered, dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what stands before it suffices already
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    return logits
