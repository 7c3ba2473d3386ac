"""Packed weights write what the model writes, as far as bfloat16 can tell."""

import pytest
import torch

from fradique.generation import packed_weights
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
needs_packing = pytest.mark.skipif(not packed_weights.can_pack(), reason="this CPU has no bfloat16 products")


def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


@needs_packing
def test_packed_logits_are_those_of_bfloat16_weights():
    packed, plain = model(), model().to(torch.bfloat16)
    packed_weights.pack_weights(packed)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    idx = torch.arange(64).view(2, 32) % 40
    with torch.no_grad():
        found, expected, exact = packed(idx)[0], plain(idx)[0], model()(idx)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.02)


@needs_packing
@pytest.mark.parametrize("rows", [1, 5])
def test_a_packed_model_writes_with_its_cache(rows):
    packed = model()
    packed_weights.pack_weights(packed)
    written = packed.generate(torch.zeros(rows, 1, dtype=torch.long), 40, temperature=0)
    assert written.shape == (rows, 41) and (written < 40).all()
    assert torch.equal(written[0], written[-1])


def test_a_small_model_and_another_device_are_left_alone():
    assert not packed_weights.should_pack(model(), torch.device("cpu"))
    with torch.device("meta"):
        large = GPT(GPTConfig())
    assert packed_weights.should_pack(large, torch.device("cpu")) == packed_weights.can_pack()
    assert not packed_weights.should_pack(large, torch.device("cuda"))
