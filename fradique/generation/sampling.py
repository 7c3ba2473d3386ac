"""From logits to a token: repetition penalty, temperature, top-k, top-p and min-p.

Shapes: B batch, T tokens, V vocab_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def penalize_repetition(logits: Tensor, idx: Tensor, penalty: float) -> Tensor:
    """Lower the logits (B, V) of the tokens in idx (B, T): positive logits are divided by the penalty,
    negative ones multiplied (CTRL, Keskar et al. 2019, §4.1)."""
    if penalty == 1.0:
        return logits
    n_vocab = logits.size(1)
    padded = F.pad(logits, (0, 1))  # (B, V + 1): the last column receives ids >= V, and is removed again
    idx = idx.clamp(max=n_vocab)
    previous_logits = padded.gather(1, idx)  # (B, T)
    return padded.scatter(
        1, idx, torch.where(previous_logits > 0, previous_logits / penalty, previous_logits * penalty)
    )[:, :n_vocab]


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V) -> one token id for each row, (B,). Temperature 0 is greedy.

    Raises ValueError if the logits are not finite (checked on a CPU only).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        # subtract the maximum first: a small temperature then cannot overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probs = F.softmax(filter_logits(logits, top_k, top_p, min_p), dim=-1)
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    # torch.multinomial draws a random number for each of V tokens, which is slow on a CPU; one is enough:
    # token t is sampled if cdf[t - 1] <= u < cdf[t]
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()  # (B, 1)
    if not total.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")
    u = torch.rand(total.shape, device=logits.device, generator=generator) * total
    token = torch.searchsorted(cdf, u, right=True)
    return token.minimum(torch.searchsorted(cdf, total))[:, 0]  # rounding may make u equal to the total


def filter_logits(
    logits: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set the logits (B, V) of excluded tokens to -inf. At least one token of each row remains.

    The filters apply in this order, each to what the previous one left: top_k, the k most probable tokens;
    top_p, the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020); min_p, the tokens
    at least p times as probable as the most probable one (Nguyen et al. 2024).
    """
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probs = F.softmax(sorted_logits, dim=-1)
        excluded = probs.cumsum(dim=-1) - probs >= top_p  # the more probable tokens already reach top_p
        excluded[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), float("-inf"))
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    return logits
