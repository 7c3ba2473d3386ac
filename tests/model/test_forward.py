"""The forward pass: attention, masks, loss, dropout, gradient checkpointing."""

import math

import numpy as np
import pytest
import torch
from architectures import TINY, ids, seeded, tiny

from fradique.generation.kv_cache import KVCache
from fradique.nn import attention, functional
from model import GPT, GPTConfig, plain_attention

# Attention


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_change_earlier_logits(flash, dtype):
    model = tiny(flash=flash).to(dtype)
    idx = ids(3, 16)
    before = model(idx, idx)[0]
    for t in range(16):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1 + ids(3, 16 - t, vocab_size=29)) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])  # bit for bit
        assert not torch.equal(after[:, t], before[:, t])


def test_fused_attention_equals_plain_attention():
    fused, plain = tiny(flash=True), tiny(flash=False)
    idx, targets = ids(3, 16), ids(3, 16, seed=4)
    results = [model(idx, targets) for model in (fused, plain)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    for _, loss in results:
        loss.backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 7), (3, 7), (6, 7)])
def test_new_queries_attend_to_all_cached_keys(T, S):
    q, k, v = (torch.randn(2, 3, length, 8, generator=seeded(length)) for length in (T, S, S))
    expected = plain_attention(torch.cat([torch.zeros(2, 3, S - T, 8), q], dim=2), k, v)[:, :, S - T :]
    for attend in (plain_attention, attention.attention):
        torch.testing.assert_close(attend(q, k, v), expected, rtol=0, atol=1e-6)


def test_plain_attention_equals_numpy():
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=seeded(i)) for i in range(3))
    actual = plain_attention(q, k, v).numpy()
    for head in range(2):
        for t in range(5):
            scores = k[0, head, : t + 1].numpy() @ q[0, head, t].numpy() / 2.0
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(actual[0, head, t], weights @ v[0, head, : t + 1].numpy(), rtol=1e-12)


def test_plain_attention_gradient_equals_finite_differences():
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    assert torch.autograd.gradcheck(plain_attention, (q, k, v))


def test_causal_mask_allows_keys_up_to_the_query():
    mask = attention.causal_mask(2, 5, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, True, False], [True] * 5]


# Loss and logits


def test_loss_equals_log_softmax_in_numpy():
    model = tiny().double()
    idx, targets = ids(3, 16), ids(3, 16, seed=4)
    targets[0, :5] = targets[2, 15] = -1  # these are ignored
    logits, loss = model(idx, targets)
    logits = logits.detach().numpy()
    terms = []
    for b, t in np.ndindex(3, 16):
        if targets[b, t] >= 0:
            z = logits[b, t] - logits[b, t].max()
            terms.append(np.log(np.exp(z).sum()) - z[targets[b, t]])
    assert len(terms) == 42
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_without_targets_only_last_logits_are_returned():
    model, idx = tiny(), ids(3, 16)
    last, loss = model(idx)
    assert last.shape == (3, 1, 31) and loss is None
    torch.testing.assert_close(last, model(idx, idx)[0][:, -1:], rtol=0, atol=1e-6)


def test_more_tokens_than_block_size_are_rejected():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size = 16"):
        model(ids(1, 17))
    cache = KVCache(TINY, 1, torch.device("cpu"), torch.float32)
    model(ids(1, 10), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size = 16"):
        model(ids(1, 7), cache=cache)
    assert cache.length == 10


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_activations_equal_both_formulas(activation, approximate):
    x = np.linspace(-6, 6, 401)
    if approximate == "none":
        expected = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    else:
        expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    actual = functional.ACTIVATIONS[activation](torch.from_numpy(x))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


# Dropout and gradient checkpointing


@pytest.mark.parametrize("flash", [True, False])
def test_dropout_applies_only_in_training_mode(flash):
    model, idx = tiny(dropout=0.5, flash=flash), ids(3, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    torch.testing.assert_close(model(idx)[0], tiny(dropout=0.0, flash=flash)(idx)[0], rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    for deterministic in (tiny(dropout=0.0).train(), model.eval()):
        assert torch.equal(deterministic(idx)[0], deterministic(idx)[0])


def test_attention_dropout_preserves_the_mean():
    q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)
    v = torch.randn(1, 1, 8, 4, generator=seeded())
    for attend in (plain_attention, attention.attention):
        torch.manual_seed(0)
        samples = torch.stack([attend(q, k, v, None, 0.3) for _ in range(4000)])
        assert samples.std(0).max() > 0.1
        torch.testing.assert_close(samples.mean(0), attend(q, k, v), rtol=0, atol=0.05)


def test_gradient_checkpointing_is_exact_and_saves_memory():
    def run(checkpointing):
        torch.manual_seed(0)
        config = GPTConfig(block_size=32, vocab_size=31, n_layer=4, n_head=2, n_embd=16, dropout=0.2)
        model = GPT(config).train()
        model.gradient_checkpointing = checkpointing
        idx, saved = torch.arange(64).view(2, 32) % 31, []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss = model(idx, idx)[1]
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(saved)

    (loss, gradients, saved), (ckpt_loss, ckpt_gradients, ckpt_saved) = run(False), run(True)
    assert torch.equal(loss, ckpt_loss)
    for a, b in zip(gradients, ckpt_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert ckpt_saved < saved / 3
