"""From logits to a token: repetition penalty, temperature, top-k, top-p and min-p.

Shapes: B batch, T tokens, V vocab_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Below it sampling is greedy: no other token has a chance, and float32 cannot divide by much smaller numbers.
GREEDY_TEMPERATURE = 1e-4


def penalize_repetition(logits: Tensor, idx: Tensor, penalty: float) -> Tensor:
    """Lower the logits (B, V) of the tokens in idx (B, T): divide positive logits by the penalty, multiply
    negative ones (CTRL, Keskar et al. 2019, §4.1). Ids of V and above are ignored."""
    if penalty == 1.0:
        return logits
    n_vocab = logits.size(1)
    padded = F.pad(logits, (0, 1))  # (B, V + 1): the last column is for the ignored ids
    idx = idx.clamp(max=n_vocab)
    previous = padded.gather(1, idx)  # (B, T): the logits of the tokens in idx
    penalized = torch.where(previous > 0, previous / penalty, previous * penalty)
    return padded.scatter(1, idx, penalized)[:, :n_vocab]


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits (B, V) -> one token id for each row, (B,). Temperature below 1e-4: the most probable token.

    Raises ValueError if the probabilities are not finite. That is checked only on a CPU: on other devices the
    check would have to wait for the device.
    """
    if temperature < GREEDY_TEMPERATURE:
        return logits.argmax(dim=-1)
    if temperature != 1:
        # subtract the maximum first: dividing by a small temperature cannot overflow then
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probs = F.softmax(filter_logits(logits, top_k, top_p, min_p), dim=-1)
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    # torch.multinomial draws V random numbers per row, which is slow on a CPU. One number u is enough:
    # sample the token t with cdf[t - 1] <= u < cdf[t].
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()  # (B, 1)
    if not total.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")
    u = torch.rand(total.shape, device=logits.device, generator=generator) * total
    token = torch.searchsorted(cdf, u, right=True)  # (B, 1)
    last_token = torch.searchsorted(cdf, total)  # the last token with a probability above 0
    return token.minimum(last_token)[:, 0]  # rounding may make u equal to the total, and token V


def filter_logits(
    logits: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set the logits (B, V) of excluded tokens to -inf. At least one token of each row remains.

    The filters apply in this order, each to the tokens that the previous ones keep:
    - top_k keeps the k most probable tokens;
    - top_p keeps the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2020);
    - min_p keeps the tokens at least p times as probable as the most probable one (Nguyen et al. 2024).
    """
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probs = F.softmax(sorted_logits, dim=-1)
        # in sorted order: exclude a token if the more probable ones already sum to top_p
        sorted_excluded = probs.cumsum(dim=-1) - probs >= top_p
        sorted_excluded[:, 0] = False
        excluded = torch.zeros_like(sorted_excluded).scatter(1, order, sorted_excluded)  # in order of ids
        logits = logits.masked_fill(excluded, float("-inf"))
    if min_p is not None:
        threshold = logits.amax(-1, keepdim=True) + math.log(min_p)  # a factor of p is a difference of log p
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return logits
