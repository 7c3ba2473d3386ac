"""The attention kernels against the equation in float64 under autograd."""

import math

import pytest
import torch
from support import COMPILING, IN_GRAPH, assert_same_with_gradients, normal

from fradique.nn import attention, functional
from model import plain_attention

pytestmark = COMPILING


def random_qkv(B=2, H=3, T=10, D=8, kv_heads=None, dtype=torch.float32):
    heads = (H, kv_heads or H, kv_heads or H)
    return [normal(B, h, T, D, seed=i, dtype=dtype).requires_grad_() for i, h in enumerate(heads)]


def reference_attention(q, k, v, mask=None, keep=None, keep_prob=1.0):
    """Attention in float64 with the dropout mask `keep`; autograd computes its gradients."""
    q, k, v = (a.double() for a in (q, k, v))
    k, v = (a.repeat_interleave(q.size(1) // k.size(1), dim=1) for a in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    T = q.size(2)
    mask = mask if mask is not None else torch.ones(T, T, dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    probs = scores.softmax(-1)
    return (probs if keep is None else probs * keep.double() / keep_prob) @ v


MASKS = {
    "causal": lambda: None,
    "bool": lambda: torch.ones(10, 10, dtype=torch.bool).tril().triu(-3),
    "additive": lambda: torch.full((10, 10), -math.inf).triu(1)[None, None] + normal(1, 3, 10, 10, seed=5),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_the_reference(mask, kv_heads, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(attention, "query_block", lambda T, itemsize: 4)  # 10 = 4 + 4 + 2
    q, k, v = random_qkv(kv_heads=kv_heads)
    mask = MASKS[mask]()
    actual = attention._cpu_attention(q, k, v, mask, 0.0)
    assert_same_with_gradients(actual, reference_attention(q, k, v, mask), (q, k, v), 1e-6)


def test_attention_dropout_applies_the_drawn_mask(monkeypatch):
    masks = []
    original = functional.dropout_mask
    monkeypatch.setattr(functional, "dropout_mask", lambda *args: masks.append(original(*args)) or masks[-1])
    q, k, v = random_qkv()
    actual = attention.attention(q, k, v, None, 0.3)
    assert len(masks) == 1
    keep = (masks[0] != 0).view(2, 3, 10, 10)
    assert 0.5 < keep.float().mean() < 0.9
    expected = reference_attention(q, k, v, None, keep, functional.keep_prob(0.3))
    assert_same_with_gradients(actual, expected, (q, k, v), 2e-6)


def test_attention_mask_gradient_equals_the_reference():
    q, k, v = random_qkv()
    mask = normal(1, 3, 10, 10, seed=5).requires_grad_()
    actual, expected = attention._cpu_attention(q, k, v, mask, 0.0), reference_attention(q, k, v, mask)
    assert_same_with_gradients(actual, expected, (q, mask), 1e-6)


def test_float32_attention_equals_plain_attention():
    q, k, v = random_qkv()
    torch.testing.assert_close(attention.attention(q, k, v), plain_attention(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("T", "blocked"), [(191, False), (192, True), (500, True), (513, False)])
def test_medium_contexts_are_computed_in_blocks(T, blocked):
    q, k, v = random_qkv(T=T, kv_heads=1)
    actual = attention.attention(q, k, v)
    assert ("BlockedAttention" in type(actual.grad_fn).__name__) == blocked
    assert_same_with_gradients(actual, reference_attention(q, k, v), (q, k, v), 1e-5)


def test_bfloat16_attention_is_near_the_reference():
    q, k, v = random_qkv(T=40, dtype=torch.bfloat16)
    assert_same_with_gradients(attention.attention(q, k, v), reference_attention(q, k, v), (q, k, v), 0.03)


def test_long_context_attention_equals_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "KEY_BLOCK", 4)
    q, k, v = random_qkv()
    actual = attention._FlashAttention.apply(q, k, v)
    assert_same_with_gradients(actual, reference_attention(q, k, v), (q, k, v), 1e-6)


def test_long_bfloat16_contexts_use_flash_attention(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SAVED_T", 16)
    q, k, v = random_qkv(T=40, kv_heads=1, dtype=torch.bfloat16)
    actual = attention.attention(q, k, v)
    assert "FlashAttention" in type(actual.grad_fn).__name__
    assert_same_with_gradients(actual, reference_attention(q, k, v), (q, k, v), 0.03)


@pytest.mark.parametrize("mask", MASKS)
def test_compiled_attention_equals_the_reference(mask):
    q, k, v = random_qkv(kv_heads=1)
    mask = MASKS[mask]()
    compiled = torch.compile(attention._cpu_attention, backend=IN_GRAPH)
    assert_same_with_gradients(
        compiled(q, k, v, mask, 0.0), reference_attention(q, k, v, mask), (q, k, v), 1e-6
    )


def test_compiled_attention_dropout_applies_the_drawn_mask():
    q, k, v = random_qkv()
    torch.manual_seed(3)
    actual = torch.compile(attention.attention, backend=IN_GRAPH)(q, k, v, None, 0.3)
    torch.manual_seed(3)
    keep = torch.ops.fradique.random_bytes(torch.empty(2, 3, 10, 10)) >= round(0.3 * 256)
    expected = reference_attention(q, k, v, None, keep, functional.keep_prob(0.3))
    assert_same_with_gradients(actual, expected, (q, k, v), 2e-6)
