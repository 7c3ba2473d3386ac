"""Attention and its gradient, fast on each device.

Equal to softmax(q kᵀ / √D + mask) v with dropout, which the tests compare it with. On CUDA and MPS it is
torch's scaled_dot_product_attention. For training on a CPU that is slow: dropout disables its fused kernel,
and the backward pass of the fused kernel takes longer than the matrix products it saves. There this module
has its own autograd functions.

Shapes: B batch, H heads, T queries, S keys, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fradique.nn import functional

# On a CPU: up to this T the probabilities are computed in one block
MAX_SAVED_T = 512
QUERY_BLOCK, KEY_BLOCK = 256, 128  # block sizes for a longer T, so that a block fits the cache


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where query t, at position S - T + t, attends to key s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + mask) v, with dropout p on the probabilities: (B, H, T, D).

    q (B, H, T, D); k, v (B, H or fewer with grouped queries, S, D). mask: None for causal; bool (T, S), True
    where the query attends to the key; or (1, H, T, S), added to the scores.
    """
    T, S = q.size(2), k.size(2)
    if T == 1 and mask is None and not p and q.size(1) == k.size(1):  # a decode step needs no mask
        return F.scaled_dot_product_attention(q, k, v)
    cpu_training = q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and T == S
    if cpu_training and (p or q.dtype == torch.bfloat16):
        if p or T <= MAX_SAVED_T:
            return _cpu_attention(q, k, v, mask, p)
        if mask is None and not torch.compiler.is_compiling():
            return _FlashAttention.apply(*_repeat_kv(q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    causal = mask is None and T == S
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal, enable_gqa=grouped)


def _repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with the key and value heads repeated, H of each."""
    group = q.size(1) // k.size(1)
    return (q, k, v) if group == 1 else (q, *(x.repeat_interleave(group, dim=1) for x in (k, v)))


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """`attention` for training on a CPU, T = S; eager or compiled."""
    q, k, v = _repeat_kv(q, k, v)
    T = q.size(2)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(T, T, dtype=q.dtype).masked_fill_(~mask, -math.inf)[None, None]
    if torch.compiler.is_compiling():
        mask = _causal_bias(T, torch.float32) if mask is None else mask.float()
        return _FusibleAttention.apply(q, k, v, mask, p)
    return _BlockedAttention.apply(q, k, v, None if mask is None else mask.to(q.dtype), p)


def _causal_bias(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size): 0 on and below the diagonal, -inf above, to be added to scores."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:])


class _BlockedAttention(torch.autograd.Function):
    """Attention in blocks of queries; the probabilities are saved for the backward pass.

    The gradient is FlashAttention's (Dao et al. 2022, appendix B): dS = P ∘ (dP - t), where t, the sum of
    P ∘ dP over the keys, equals the sum of dO ∘ O over D. The factors 1 / √D and 1 / keep_prob are applied to
    q and v, which are smaller than the scores. mask: None for causal, or (1, 1 or H, T, T) of q's dtype.
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
        block = T if T <= MAX_SAVED_T else QUERY_BLOCK
        causal = _causal_bias(block, q.dtype) if mask is None else None
        out, saved = torch.empty_like(q), []
        for start in range(0, T, block):
            end = min(T, start + block)
            S = end if mask is None else T  # a causal block attends to no later key
            scores = torch.bmm(q[:, start:end], k[:, :S].transpose(1, 2))  # (B H, rows, S)
            if mask is None:
                scores[:, :, start:].add_(causal[: end - start, : end - start])
            else:
                scores.view(B, H, end - start, T).add_(mask[:, :, start:end])
            probs = torch.softmax(scores, dim=-1)
            dropped = probs
            if p:
                keep = functional.dropout_mask(probs.shape, p, probs.dtype)
                dropped = functional.apply_mask(probs, keep)
            out[:, start:end] = torch.bmm(dropped, v[:, :S])
            saved += [probs, dropped]
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.shape, ctx.block, ctx.mask_shape = (B, H, T, -1), block, mask is not None and mask.shape
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        q, k, v, out, *saved = ctx.saved_tensors
        B, H, T, _ = ctx.shape
        grad = _merge_heads(grad)
        t = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)  # (B H, T, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_mask = grad.new_zeros(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        for start, probs, dropped in zip(range(0, T, ctx.block), saved[::2], saved[1::2], strict=True):
            end, S = min(T, start + ctx.block), probs.size(2)
            grad_block = grad[:, start:end]
            d_scores = torch.bmm(grad_block, v[:, :S].transpose(1, 2)).mul_(dropped)
            d_scores.sub_(probs * t[:, start:end])  # (B H, rows, S)
            if d_mask is not None:
                shape = d_mask[:, :, start:end].shape
                d_mask[:, :, start:end] = d_scores.view(B, H, -1, T).sum_to_size(shape)
            dq[:, start:end] = torch.bmm(d_scores, k[:, :S])
            dk[:, :S] += torch.bmm(d_scores.transpose(1, 2), q[:, start:end])
            dv[:, :S] += torch.bmm(dropped.transpose(1, 2), grad_block)
        dq.mul_(ctx.scale)
        if ctx.v_scale != 1.0:
            dv.mul_(ctx.v_scale)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), d_mask, None


class _FusibleAttention(torch.autograd.Function):
    """`_BlockedAttention` without blocks or in-place operations, written so that inductor can fuse it.

    With a handwritten gradient the probabilities are saved in q's dtype; autograd would save them in float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:  # noqa: ANN001
        ctx.scale, ctx.v_scale = 1 / math.sqrt(q.size(-1)), 1 / functional.keep_prob(p) if p else 1.0
        q, v = q * ctx.scale, v * ctx.v_scale
        scores = q @ k.transpose(-2, -1)  # (B, H, T, T)
        # a float32 mask is added: inductor generates slow code for masked_fill
        probs = F.softmax(scores.float() + mask, dim=-1).to(q.dtype)
        dropped = probs
        if p:
            random_bytes = torch.ops.fradique.random_bytes(scores)
            dropped = probs * (random_bytes.float() >= functional.drop_threshold(p))
        out = dropped @ v
        ctx.save_for_backward(q, k, v, out, probs, dropped)
        ctx.mask_shape = mask.shape
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        q, k, v, out, probs, dropped = ctx.saved_tensors
        t = (grad.float() * out.float()).sum(-1, keepdim=True)  # (B, H, T, 1)
        d_dropped = grad @ v.transpose(-2, -1)
        d_scores = (d_dropped.float() * dropped.float() - probs.float() * t).to(q.dtype)
        dq, dk = d_scores @ k * ctx.scale, d_scores.transpose(-2, -1) @ q
        dv = dropped.transpose(-2, -1) @ grad * ctx.v_scale
        d_mask = d_scores.float().sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, d_mask, None


class _FlashAttention(torch.autograd.Function):
    """Causal attention: the forward pass is torch's flash kernel for CPUs; the backward pass recomputes the
    probabilities from the saved log-sum-exps, in blocks of keys (Dao et al. 2022, alg. 4)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN001
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = flash(q, k, v, 0.0, True)  # (B, H, T, D), (B, H, T)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        q, k, v, out, log_sums = ctx.saved_tensors
        B, H, T, D = q.shape
        scale = 1 / math.sqrt(D)
        t = _merge_heads((grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype))  # (B H, T, 1)
        log_sums = log_sums.reshape(B * H, T, 1).to(q.dtype)
        q, k, v, grad = _merge_heads(q * scale), _merge_heads(k), _merge_heads(v), _merge_heads(grad)
        causal = _causal_bias(KEY_BLOCK, q.dtype)
        dq = torch.zeros(q.shape)  # float32: a sum over the blocks
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for start in range(0, T, KEY_BLOCK):
            end = min(T, start + KEY_BLOCK)
            # the queries that attend to these keys; contiguous, or every product below would copy them
            q_later, grad_later = (x[:, start:].contiguous() for x in (q, grad))
            probs = torch.bmm(q_later, k[:, start:end].transpose(1, 2))  # (B H, T - start, keys)
            probs[:, : end - start].add_(causal[: end - start, : end - start])
            probs.sub_(log_sums[:, start:]).exp_()
            dv[:, start:end] = torch.bmm(probs.transpose(1, 2), grad_later)
            d_scores = torch.bmm(grad_later, v[:, start:end].transpose(1, 2))
            d_scores.sub_(t[:, start:]).mul_(probs)
            dk[:, start:end] = torch.bmm(d_scores.transpose(1, 2), q_later)
            dq[:, start:] += torch.bmm(d_scores, k[:, start:end])
        dq = dq.mul_(scale).to(q.dtype)
        return dq.view(B, H, T, D), dk.view(B, H, T, D), dv.view(B, H, T, D)
