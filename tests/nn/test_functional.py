"""Dropout, gelu, RMSNorm and RoPE on a CPU, against their equations and autograd."""

import math

import pytest
import torch
from support import COMPILING, IN_GRAPH, assert_same_with_gradients, normal

from fradique.nn import functional

pytestmark = COMPILING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.99])
def test_dropout_keeps_the_expected_fraction(dtype, p):
    torch.manual_seed(0)
    count = 200_003  # not a multiple of 8
    x = torch.ones(count, dtype=dtype, requires_grad=True)
    y = functional.dropout(x, p, True)
    keep_prob = functional.keep_prob(p)
    assert abs(keep_prob - (1 - p)) <= 1 / 256 and keep_prob < 1
    fraction = (y != 0).double().mean().item()
    assert abs(fraction - keep_prob) < 5 * math.sqrt(keep_prob * (1 - keep_prob) / count)
    assert set(y.tolist()) == {0.0, torch.tensor(1 / keep_prob, dtype=dtype).item()}
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)


def test_dropout_mask_compares_each_byte_correctly():
    all_bytes = torch.arange(256, dtype=torch.uint8).view(torch.int64)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "_random_bytes", lambda count: all_bytes.clone())
            keep = functional.dropout_mask(torch.Size([256]), 51 / 256, dtype)
        assert keep.unique().tolist() == [-1, 0]
        assert (keep != 0).sum() == 256 - 51


def test_dropout_uses_torchs_generator():
    x = torch.ones(1000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(functional.dropout(x, 0.5, True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert functional.dropout(x, 0.5, False) is x and functional.dropout(x, 0.0, True) is x


def test_two_compiled_dropouts_have_different_masks():
    def two_dropouts(x):
        return functional.dropout(x * 1.0, 0.5, True), functional.dropout(x + 0.0, 0.5, True)

    x = torch.ones(4096, requires_grad=True)
    a, b = torch.compile(two_dropouts, backend=IN_GRAPH)(x)
    equal_fraction = ((a != 0) == (b != 0)).float().mean()
    assert 0.4 < equal_fraction < 0.6
    (grad,) = torch.autograd.grad(a.sum() + b.sum(), x)
    torch.testing.assert_close(grad, (a + b).detach())


def test_compiled_gelu_equals_the_formula():
    x = normal(300).double().requires_grad_()
    y = torch.compile(functional.gelu, backend=IN_GRAPH)(x)
    expected = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(a.sum(), x)[0] for a in (y, expected)))


@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 7, 6)])
def test_rms_norm_equals_the_equation(shape, form):
    x, weight = normal(*shape).requires_grad_(), normal(shape[-1], seed=1).requires_grad_()
    norm = functional.rms_norm
    if form == "compiled":
        norm = torch.compile(norm, backend=IN_GRAPH)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_same_with_gradients(norm(x, weight, 1e-3), expected, [x, weight], 2e-6)
    with torch.no_grad():
        torch.testing.assert_close(functional.rms_norm(x, weight, 1e-3).double(), expected, rtol=0, atol=2e-6)


def test_rms_norm_with_frozen_weight_and_strided_gradient():
    x, weight = normal(2, 3, 4, 8).transpose(1, 2).requires_grad_(), normal(8, seed=1)
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_same_with_gradients(functional.rms_norm(x, weight, 1e-5), expected, [x], 2e-6)
    actual, expected = (a.transpose(1, 2) for a in (functional.rms_norm(x, weight, 1e-5), expected))
    assert_same_with_gradients(actual, expected, [x], 2e-6)


@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_equals_complex_multiplication(dtype, form):
    x = normal(2, 6, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()  # (B, H, T, D), not contiguous
    angles = normal(6, 4, seed=1)
    apply_rope = (
        torch.compile(functional.apply_rope, backend=IN_GRAPH)
        if form == "compiled"
        else functional.apply_rope
    )
    actual = apply_rope(x, angles.cos(), angles.sin())
    rotated = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(
        torch.ones(6, 4).double(), angles.double()
    )
    assert actual.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 0.02  # its gradient is rounded to bfloat16
    assert_same_with_gradients(actual, torch.cat((rotated.real, rotated.imag), dim=-1), [x], tolerance)
