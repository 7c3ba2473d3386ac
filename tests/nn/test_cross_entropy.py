"""linear_cross_entropy against torch's cross_entropy: values, gradients, memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import COMPILING, IN_GRAPH, normal
from torch.utils._python_dispatch import TorchDispatchMode

from fradique.nn import cross_entropy
from model import GPT, GPTConfig

pytestmark = COMPILING


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("max_logits", [1 << 24, 7 * 11])
def test_chunked_cross_entropy_equals_torch(softcap, max_logits, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", {"cpu": max_logits})
    monkeypatch.setattr(cross_entropy, "MAX_FP32_LOGITS", {"cpu": 3 * 11})
    x, weight = normal(4, 5, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    targets = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(2))
    targets[0, :3] = targets[3, 4] = -1
    actual = cross_entropy.linear_cross_entropy(x, weight, targets, softcap)
    logits = x.double() @ weight.double().t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
    for _ in range(2):  # the second backward pass gives the same gradients
        gradients = (torch.autograd.grad(3 * y, (x, weight), retain_graph=True) for y in (actual, expected))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_target_of_probability_0_has_a_finite_loss():
    """The target's probability rounds to 0 in float32; its loss is 200."""
    x, weight = torch.full((4, 1), 200.0), torch.zeros(1 << 14, 1)
    weight[3] = 1.0
    actual = cross_entropy.linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(actual, torch.tensor(200.0))


def test_chunked_cross_entropy_without_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", {"cpu": 2 * 11})
    monkeypatch.setattr(cross_entropy, "MAX_FP32_LOGITS", {"cpu": 11})
    x, weight, targets = normal(5, 6), normal(11, 6, seed=1), torch.arange(5)
    expected = F.cross_entropy(x @ weight.t(), targets)
    torch.testing.assert_close(cross_entropy.linear_cross_entropy(x, weight, targets), expected)


def test_a_loss_without_gradients_computes_one_product():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    x, weight, targets = normal(8, 4), normal(20000, 4, seed=1).requires_grad_(), torch.arange(8)
    with torch.no_grad(), Products() as products:
        cross_entropy.linear_cross_entropy(x, weight, targets)
    assert products.count == 1  # the logits, without their gradients


class MaxFloat32(TorchDispatchMode):
    """Records the size of the largest float32 matrix (rows, vocab) that an operation returns."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.numel = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            fp32 = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
            if fp32 and tensor.dim() == 2 and tensor.size(1) == self.vocab:
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("with_logits", [False, True])
def test_at_most_half_of_the_logits_are_float32_at_a_time(with_logits):
    config = GPTConfig(block_size=32, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)
    model, idx = GPT(config), torch.arange(64).view(2, 32)
    with MaxFloat32(50304) as recorder, torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx, with_logits=with_logits)[1]
        loss.backward()
    # with_logits=True stores all logits in float32: this shows that the recorder finds them
    assert (recorder.numel <= 32 * 50304) != with_logits


# Loss of a model


def assert_same_loss_and_gradients(losses, model):
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_loss_is_the_same_with_and_without_logits():
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=20000, n_layer=2, n_head=2, n_embd=16, prefix_len=4)
    model = GPT(config)
    idx, targets = (torch.from_numpy(np.random.default_rng(i).integers(20000, size=(2, 16))) for i in (0, 1))
    losses = []
    for with_logits in (True, False):
        logits, loss = model(idx, targets, with_logits=with_logits)
        assert (logits is None) != with_logits
        losses.append(loss)
    assert_same_loss_and_gradients(losses, model)


def test_compiled_loss_equals_eager_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=20000, n_layer=1, n_head=2, n_embd=16))
    idx = torch.arange(32).view(2, 16)
    compiled = torch.compile(model, backend=IN_GRAPH)
    losses = [model(idx, idx)[1], compiled(idx, idx, with_logits=False)[1]]
    assert_same_loss_and_gradients(losses, model)
