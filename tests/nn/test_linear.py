"""The linear function and its gradients, against torch and float64."""

import pytest
import torch
import torch.nn.functional as F
from support import normal

from fradique.nn import linear
from model import GPT, GPTConfig


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (10, 3), (8, 16), (9, 4)])
def test_contiguous_copy_equals_its_input(shape, dtype, monkeypatch):
    monkeypatch.setattr(linear, "TILE", 4)  # 10 = 4 + 4 + 2
    x = normal(*shape[::-1], dtype=torch.bfloat16).t()
    actual = linear.contiguous_copy(x, dtype)
    assert actual.is_contiguous() and actual.dtype == (dtype or x.dtype)
    assert torch.equal(actual, x.to(actual.dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", [(6, 24), (24, 6), (5, 5)])
def test_linear_and_its_gradients_equal_float64(outputs, inputs, bias, monkeypatch):
    """Under autocast: bfloat16 products, gradients in the dtype of each parameter."""
    monkeypatch.setattr(linear, "MIN_ROWS", 0)
    monkeypatch.setattr(linear, "MIN_WIDTH", 0)
    x, weight = normal(2, 7, inputs).requires_grad_(), normal(outputs, inputs, seed=1).requires_grad_()
    bias_vector = normal(outputs, seed=2).requires_grad_() if bias else None
    leaves = [x, weight] + [bias_vector] * bias
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = linear.linear(x, weight, bias_vector), F.linear(x, weight, bias_vector)
    assert "_Linear" in type(actual.grad_fn).__name__ and torch.equal(actual, plain)
    grad = normal(2, 7, outputs, seed=3).bfloat16()
    actual_grads = torch.autograd.grad(actual, leaves, grad)
    rounded = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    expected_grads = torch.autograd.grad(F.linear(*rounded), rounded, grad.double())
    for leaf, a, b in zip(leaves, actual_grads, expected_grads, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-7)  # bfloat16 has 8 significant bits


def test_small_or_float32_products_use_torch():
    many, few = torch.zeros(linear.MIN_ROWS, 8), torch.zeros(linear.MIN_ROWS - 1, 8)
    wide, narrow = torch.zeros(linear.MIN_WIDTH, 8), torch.zeros(linear.MIN_WIDTH - 1, 8)
    for x, weight, fast in ((many, wide, True), (few, wide, False), (many, narrow, False)):
        with torch.autocast("cpu", torch.bfloat16):
            actual = linear.linear(x, weight.requires_grad_())
        assert ("_Linear" in type(actual.grad_fn).__name__) == fast
        float32_output = linear.linear(x, weight)
        assert "_Linear" not in type(float32_output.grad_fn).__name__


def test_model_gradients_equal_those_of_torch_linear(monkeypatch):
    """All gradients of a model, with torch's weight gradient and with ours."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=16))
    idx = torch.randint(32, (4, 16))
    grads = []
    for minimum in (linear.MIN_WIDTH, 0):
        monkeypatch.setattr(linear, "MIN_WIDTH", minimum)
        monkeypatch.setattr(linear, "MIN_ROWS", minimum)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, plain in grads[0].items():
        actual = grads[1][name]
        assert (actual - plain).norm() <= 1e-2 * plain.norm(), name
        assert actual.is_contiguous() and actual.dtype == torch.float32
