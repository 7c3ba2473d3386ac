"""The fast forms of attention and cross-entropy against the equations and autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import COMPILING, IN_GRAPH, normal, same_with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from fradique.nn import attention, cross_entropy, functional
from model import GPT, GPTConfig, plain_attention

pytestmark = COMPILING


def q_k_v(B=2, H=3, T=10, D=8, kv_heads=None, dtype=torch.float32):
    heads = (H, kv_heads or H, kv_heads or H)
    return [normal(B, h, T, D, seed=i, dtype=dtype).requires_grad_() for i, h in enumerate(heads)]


def equation(q, k, v, mask=None, keep=None, share=1.0):
    """Attention in float64, with the probabilities that `keep` drops; autograd differentiates it."""
    q, k, v = (a.double() for a in (q, k, v))
    k, v = (a.repeat_interleave(q.size(1) // k.size(1), dim=1) for a in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    T = q.size(2)
    seen = mask if mask is not None else torch.ones(T, T, dtype=torch.bool).tril()
    scores = scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen.double()
    probs = scores.softmax(-1)
    return (probs if keep is None else probs * keep.double() / share) @ v


MASKS = {
    "causal": lambda: None,
    "seen": lambda: torch.ones(10, 10, dtype=torch.bool).tril().triu(-3),
    "added": lambda: torch.full((10, 10), -math.inf).triu(1)[None, None] + normal(1, 3, 10, 10, seed=5),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_the_equation(mask, kv_heads, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(attention, "MAX_SAVED_T", 4)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 4)  # 10 = 4 + 4 + 2
    q, k, v = q_k_v(kv_heads=kv_heads)
    mask = MASKS[mask]()
    found = attention._cpu_attention(q, k, v, mask, 0.0)
    same_with_gradients(found, equation(q, k, v, mask), (q, k, v), 1e-6)


def test_attention_drops_what_its_masks_say(monkeypatch):
    kept = []
    draw = functional.dropout_mask
    monkeypatch.setattr(functional, "dropout_mask", lambda *args: kept.append(draw(*args)) or kept[-1])
    q, k, v = q_k_v()
    found = attention.attention(q, k, v, None, 0.3)
    assert len(kept) == 1
    keep = (kept[0] != 0).view(2, 3, 10, 10)
    assert 0.5 < keep.float().mean() < 0.9
    same_with_gradients(found, equation(q, k, v, None, keep, functional.keep_prob(0.3)), (q, k, v), 2e-6)


def test_the_gradient_of_an_added_mask_is_that_of_the_equation():
    q, k, v = q_k_v()
    mask = normal(1, 3, 10, 10, seed=5).requires_grad_()
    found, expected = attention._cpu_attention(q, k, v, mask, 0.0), equation(q, k, v, mask)
    same_with_gradients(found, expected, (q, mask), 1e-6)


def test_attention_in_bfloat16_is_near_the_equation():
    q, k, v = q_k_v(T=40, dtype=torch.bfloat16)
    same_with_gradients(attention.attention(q, k, v), equation(q, k, v), (q, k, v), 0.03)


def test_attention_over_a_long_context_equals_the_equation(monkeypatch):
    monkeypatch.setattr(attention, "KEY_BLOCK", 4)
    q, k, v = q_k_v()
    found = attention._FlashAttention.apply(q, k, v)
    same_with_gradients(found, equation(q, k, v), (q, k, v), 1e-6)


def test_a_long_bfloat16_context_without_dropout_takes_that_way(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SAVED_T", 16)
    q, k, v = q_k_v(T=40, kv_heads=1, dtype=torch.bfloat16)
    found = attention.attention(q, k, v)
    assert "FlashAttention" in type(found.grad_fn).__name__
    same_with_gradients(found, equation(q, k, v), (q, k, v), 0.03)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_a_compiled_graph_equals_the_equation(mask):
    q, k, v = q_k_v(kv_heads=1)
    mask = MASKS[mask]()
    compiled = torch.compile(attention._cpu_attention, backend=IN_GRAPH)
    same_with_gradients(compiled(q, k, v, mask, 0.0), equation(q, k, v, mask), (q, k, v), 1e-6)


def test_dropout_in_compiled_attention_is_that_of_its_bytes():
    q, k, v = q_k_v()
    torch.manual_seed(3)
    found = torch.compile(attention.attention, backend=IN_GRAPH)(q, k, v, None, 0.3)
    torch.manual_seed(3)
    keep = torch.ops.fradique.random_bytes(torch.empty(2, 3, 10, 10)) >= round(0.3 * 256)
    same_with_gradients(found, equation(q, k, v, None, keep, functional.keep_prob(0.3)), (q, k, v), 2e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("at_once", [1 << 24, 7 * 11])
def test_cross_entropy_by_chunks_equals_that_of_all_logits(softcap, at_once, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", {"cpu": at_once})
    monkeypatch.setattr(cross_entropy, "MAX_FP32_LOGITS", {"cpu": 3 * 11})
    x, weight = normal(4, 5, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    targets = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(2))
    targets[0, :3] = targets[3, 4] = -1
    found = cross_entropy.linear_cross_entropy(x, weight, targets, softcap)
    logits = x.double() @ weight.double().t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    for _ in range(2):  # going back twice gives the same
        gradients = (torch.autograd.grad(3 * y, (x, weight), retain_graph=True) for y in (found, expected))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_cross_entropy_by_chunks_of_a_target_that_nothing_is_left_of():
    """The target's probability is 0 in float32; its loss is 200."""
    x, weight = torch.full((4, 1), 200.0), torch.zeros(1 << 14, 1)
    weight[3] = 1.0
    found = cross_entropy.linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found, torch.tensor(200.0))


def test_cross_entropy_by_chunks_without_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", {"cpu": 2 * 11})
    monkeypatch.setattr(cross_entropy, "MAX_FP32_LOGITS", {"cpu": 11})
    x, weight, targets = normal(5, 6), normal(11, 6, seed=1), torch.arange(5)
    expected = F.cross_entropy(x @ weight.t(), targets)
    torch.testing.assert_close(cross_entropy.linear_cross_entropy(x, weight, targets), expected)


class Largest(TorchDispatchMode):
    """Notes the largest float32 tensor with a side of `vocab` that any operation makes."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.numbers = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            made = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
            if made and tensor.dim() == 2 and tensor.size(1) == self.vocab:
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("with_logits", [False, True])
def test_float32_holds_half_of_a_large_vocabularys_logits_at_a_time(with_logits):
    config = GPTConfig(block_size=32, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)
    model, idx = GPT(config), torch.arange(64).view(2, 32)
    with Largest(50304) as seen, torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx, with_logits=with_logits)[1]
        loss.backward()
    assert (
        seen.numbers <= 32 * 50304
    ) != with_logits  # with the logits there is all of them: the test can fail


def same_losses_with_gradients(losses, model):
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_same_with_and_without_logits():
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=20000, n_layer=2, n_head=2, n_embd=16, prefix_len=4)
    model = GPT(config)
    idx, targets = (torch.from_numpy(np.random.default_rng(i).integers(20000, size=(2, 16))) for i in (0, 1))
    losses = []
    for with_logits in (True, False):
        logits, loss = model(idx, targets, with_logits=with_logits)
        assert (logits is None) != with_logits
        losses.append(loss)
    same_losses_with_gradients(losses, model)


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less():
    def run(checkpointing):
        torch.manual_seed(0)
        config = GPTConfig(block_size=32, vocab_size=31, n_layer=4, n_head=2, n_embd=16, dropout=0.2)
        model = GPT(config).train()
        model.gradient_checkpointing = checkpointing
        idx, kept = torch.arange(64).view(2, 32) % 31, []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model(idx, idx)[1]
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(kept)

    (loss, gradients, kept), (same_loss, same_gradients, fewer) = run(False), run(True)
    assert torch.equal(loss, same_loss)
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert fewer < kept / 3


def test_attention_in_float32_equals_plain_attention():
    q, k, v = q_k_v()
    torch.testing.assert_close(attention.attention(q, k, v), plain_attention(q, k, v), rtol=0, atol=1e-6)


def test_the_loss_in_a_compiled_graph_is_that_of_the_equation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=20000, n_layer=1, n_head=2, n_embd=16))
    idx = torch.arange(32).view(2, 16)
    compiled = torch.compile(model, backend=IN_GRAPH)
    losses = [model(idx, idx)[1], compiled(idx, idx, with_logits=False)[1]]
    same_losses_with_gradients(losses, model)


def test_a_loss_without_gradients_does_no_work_for_them():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    x, weight, targets = normal(8, 4), normal(20000, 4, seed=1).requires_grad_(), torch.arange(8)
    with torch.no_grad(), Products() as products:
        cross_entropy.linear_cross_entropy(x, weight, targets)
    assert products.count == 1  # the logits, and nothing of their gradients
