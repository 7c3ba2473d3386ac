"""Attention and its gradient, fast on each device.

The result equals softmax(q kᵀ / √D + mask) v with dropout; the tests compare the two. CUDA, MPS and inference
use torch's scaled_dot_product_attention. Training on a CPU mostly uses the autograd functions below, because
torch's function is slow there: it computes the scores of later keys too, and dropout disables its fused
kernel. In bfloat16 the backward pass of that kernel is slower than the matrix products that it saves.

Shapes: B batch, H heads, T queries, S keys, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fradique.nn import functional

# Training on a CPU: up to MAX_SAVED_T tokens the probabilities are saved for the backward pass; without
# dropout, in float32 from MIN_BLOCKED_T on. Beyond, they are saved with dropout; without it they are computed
# again, in bfloat16 in blocks of KEY_BLOCK keys.
MIN_BLOCKED_T, MAX_SAVED_T = 192, 512
KEY_BLOCK = 128


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where query t, at position S - T + t, attends to key s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def visible_keys(queries: Tensor, S: int, prefix: int, window: int) -> Tensor:
    """(T, S), True where the query at each of the positions `queries` (T,) attends to the key.

    To earlier keys and its own; within the first `prefix` tokens to later ones too (prefix LM); only to the
    last `window` keys, if that is not 0.
    """
    queries, keys = queries[:, None], torch.arange(S, device=queries.device)
    visible = keys <= queries
    if prefix > 1:
        visible = visible | (keys < prefix)
    if 0 < window < S:
        visible = visible & (keys > queries - window)
    return visible


def query_block(T: int, itemsize: int) -> int:
    """Queries in a block whose probabilities are computed together. itemsize: bytes of an element.

    The scores of later keys than the last query's are not computed: small blocks save work. Milliseconds of
    a forward and backward pass on two threads (B, H, T, D = 8, 3, 256, 64; AVX2, float32): 25.1 in one block,
    19.8 and 16.0 in blocks of 128 and 64 queries, 17.4 of 32; torch's function 22.6.
    """
    if itemsize < 4:  # these products are faster, and are slowed down by small blocks
        return T if T <= MAX_SAVED_T else 256
    return 64 if T <= MAX_SAVED_T else 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + mask) v, with dropout p on the probabilities: (B, H, T, D).

    q (B, H, T, D); k, v (B, H, S, D), or with fewer heads (grouped-query attention). mask: None for causal;
    bool (T, S), True where the query attends to the key; or (1, H, T, S), added to the scores.
    """
    T, S = q.size(2), k.size(2)
    if T == 1 and mask is None and not p and q.size(1) == k.size(1):
        return F.scaled_dot_product_attention(q, k, v)  # the newest token attends to all keys
    cpu_training = q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and T == S
    compiling, low_precision = torch.compiler.is_compiling(), q.dtype == torch.bfloat16
    blocked = MIN_BLOCKED_T <= T and mask is None and not compiling  # leaves out later keys
    if cpu_training and (p or low_precision or blocked):  # otherwise torch's function is fast enough
        if p or T <= MAX_SAVED_T:
            return _cpu_attention(q, k, v, mask, p)
        if low_precision and mask is None and not compiling:
            return _FlashAttention.apply(*_repeat_kv(q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    causal = mask is None and T == S
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal, enable_gqa=grouped)


def _repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v with each head repeated for the query heads that share it: H heads each."""
    group = q.size(1) // k.size(1)
    if group == 1:
        return q, k, v
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """`attention` for training on a CPU, where T = S; eager or compiled."""
    q, k, v = _repeat_kv(q, k, v)
    T = q.size(2)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(T, T, dtype=q.dtype).masked_fill_(~mask, -math.inf)[None, None]
    if torch.compiler.is_compiling():
        mask = _causal_bias(T, torch.float32) if mask is None else mask.float()
        return _FusibleAttention.apply(q, k, v, mask, p)
    return _BlockedAttention.apply(q, k, v, None if mask is None else mask.to(q.dtype), p)


def _causal_bias(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size), added to scores: 0 on and below the diagonal, -inf above."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:])


class _BlockedAttention(torch.autograd.Function):
    """Attention in blocks of queries; saves the probabilities for the backward pass.

    The gradient of the scores is FlashAttention's (Dao et al. 2022, appendix B): dS = P ∘ (dP - delta). Here
    delta is the sum of P ∘ dP over the keys. It is computed as the sum of dO ∘ O over the D dimensions.
    The factors 1 / √D and 1 / keep_prob multiply q and v, which have fewer elements than the scores and
    probabilities. mask: None for causal, or (1, 1 or H, T, T) in q's dtype.
    """

    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        p: float,
    ):
        B, H, T, _ = q.shape
        ctx.scale, ctx.v_scale = 1 / math.sqrt(q.size(-1)), 1 / functional.keep_prob(p) if p else 1.0
        q, k, v = _merge_heads(q * ctx.scale), _merge_heads(k), _merge_heads(v * ctx.v_scale if p else v)
        block = min(T, query_block(T, q.element_size()))
        causal_bias = _causal_bias(block, q.dtype) if mask is None else None
        out, saved = torch.empty_like(q), []
        for start in range(0, T, block):
            end = min(T, start + block)
            S = end if mask is None else T  # causal: no query of this block attends to a later key
            scores = torch.bmm(q[:, start:end], k[:, :S].transpose(1, 2))  # (B H, end - start, S)
            if mask is None:
                scores[:, :, start:].add_(causal_bias[: end - start, : end - start])
            else:
                scores.view(B, H, end - start, T).add_(mask[:, :, start:end])
            probs = probs_after_dropout = torch.softmax(scores, dim=-1)
            if p:
                keep = functional.dropout_mask(probs.shape, p, probs.dtype)
                probs_after_dropout = functional.apply_mask(probs, keep)
            out[:, start:end] = torch.bmm(probs_after_dropout, v[:, :S])
            saved += [probs, probs_after_dropout]
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.shape, ctx.block = (B, H, T, -1), block
        ctx.mask_shape = None if mask is None else mask.shape
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        q, k, v, out, *saved = ctx.saved_tensors
        B, H, T, _ = ctx.shape
        grad = _merge_heads(grad)
        delta = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)  # (B H, T, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_mask = grad.new_zeros(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        for i, start in enumerate(range(0, T, ctx.block)):
            probs, probs_after_dropout = saved[2 * i], saved[2 * i + 1]
            end, S = min(T, start + ctx.block), probs.size(2)
            grad_block = grad[:, start:end]
            d_scores = torch.bmm(grad_block, v[:, :S].transpose(1, 2)).mul_(probs_after_dropout)
            d_scores.sub_(probs * delta[:, start:end])  # (B H, end - start, S)
            if d_mask is not None:
                shape = d_mask[:, :, start:end].shape
                d_mask[:, :, start:end] = d_scores.view(B, H, -1, T).sum_to_size(shape)
            dq[:, start:end] = torch.bmm(d_scores, k[:, :S])
            dk[:, :S] += torch.bmm(d_scores.transpose(1, 2), q[:, start:end])
            dv[:, :S] += torch.bmm(probs_after_dropout.transpose(1, 2), grad_block)
        dq.mul_(ctx.scale)
        if ctx.v_scale != 1.0:
            dv.mul_(ctx.v_scale)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), d_mask, None


class _FusibleAttention(torch.autograd.Function):
    """`_BlockedAttention` without blocks or in-place operations, so that inductor can fuse its operations.

    The gradient is written by hand to save the probabilities in q's dtype; autograd would save float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:  # noqa: ANN001
        ctx.scale, ctx.v_scale = 1 / math.sqrt(q.size(-1)), 1 / functional.keep_prob(p) if p else 1.0
        q, v = q * ctx.scale, v * ctx.v_scale
        scores = q @ k.transpose(-2, -1)  # (B, H, T, T)
        # the mask is added because inductor generates slow code for masked_fill
        probs = probs_after_dropout = F.softmax(scores.float() + mask, dim=-1).to(q.dtype)
        if p:
            random_bytes = torch.ops.fradique.random_bytes(scores)
            probs_after_dropout = probs * (random_bytes.float() >= functional.drop_threshold(p))
        out = probs_after_dropout @ v
        ctx.save_for_backward(q, k, v, out, probs, probs_after_dropout)
        ctx.mask_shape = mask.shape
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        q, k, v, out, probs, probs_after_dropout = ctx.saved_tensors
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)  # (B, H, T, 1)
        d_probs = grad @ v.transpose(-2, -1)  # of the probabilities after dropout
        d_scores = (d_probs.float() * probs_after_dropout.float() - probs.float() * delta).to(q.dtype)
        dq, dk = d_scores @ k * ctx.scale, d_scores.transpose(-2, -1) @ q
        dv = probs_after_dropout.transpose(-2, -1) @ grad * ctx.v_scale
        d_mask = d_scores.float().sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, d_mask, None


class _FlashAttention(torch.autograd.Function):
    """Causal attention without dropout. The forward pass is torch's flash kernel for CPUs; the backward pass
    recomputes the probabilities from the saved log-sum-exps, in blocks of keys (Dao et al. 2022, alg. 4)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN001
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = flash(q, k, v, dropout_p=0.0, is_causal=True)  # (B, H, T, D), (B, H, T)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        q, k, v, out, logsumexp = ctx.saved_tensors
        B, H, T, D = q.shape
        scale = 1 / math.sqrt(D)
        delta = _merge_heads((grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype))  # (B H, T, 1)
        logsumexp = logsumexp.reshape(B * H, T, 1).to(q.dtype)
        q, k, v, grad = _merge_heads(q * scale), _merge_heads(k), _merge_heads(v), _merge_heads(grad)
        causal_bias = _causal_bias(KEY_BLOCK, q.dtype)
        dq = torch.zeros(q.shape)  # float32, because it is summed over the blocks
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for start in range(0, T, KEY_BLOCK):
            end = min(T, start + KEY_BLOCK)
            # only later queries attend to these keys; made contiguous once, or each bmm below would copy them
            q_later, grad_later = q[:, start:].contiguous(), grad[:, start:].contiguous()
            scores = torch.bmm(q_later, k[:, start:end].transpose(1, 2))  # (B H, T - start, end - start)
            scores[:, : end - start].add_(causal_bias[: end - start, : end - start])
            probs = scores.sub_(logsumexp[:, start:]).exp_()
            dv[:, start:end] = torch.bmm(probs.transpose(1, 2), grad_later)
            d_scores = torch.bmm(grad_later, v[:, start:end].transpose(1, 2))
            d_scores.sub_(delta[:, start:]).mul_(probs)
            dk[:, start:end] = torch.bmm(d_scores.transpose(1, 2), q_later)
            dq[:, start:] += torch.bmm(d_scores, k[:, start:end])
        dq = dq.mul_(scale).to(q.dtype)
        return dq.view(B, H, T, D), dk.view(B, H, T, D), dv.view(B, H, T, D)
