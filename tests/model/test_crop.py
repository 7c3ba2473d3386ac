"""crop_block_size: a shorter context with the same logits."""

import numpy as np
import pytest
import torch
from architectures import ids, random_model, small, tiny
from gpt_equations import reference_logits

from model import GPT, GPTConfig


def test_cropping_keeps_logits_and_rejects_longer_inputs():
    model, idx = tiny(), ids(3, 8)
    expected = model(idx, idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx, idx)[0], expected)
    assert model.config.block_size == 8 and model.transformer["wpe"].weight.shape == (8, 16)
    assert dict(model.named_parameters())["transformer.wpe.weight"].requires_grad
    assert model.generate(idx, 12, temperature=0).shape == (3, 20)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size = 8"):
        model(ids(1, 9))
    with pytest.raises(ValueError, match="block_size = 8 cannot be cropped to 9"):
        model.crop_block_size(9)


@pytest.mark.parametrize("position", ["sinusoidal", "rope", "alibi", "relative", "none"])
def test_cropping_works_without_a_position_table(position):
    model, idx = random_model(small(position=position)), ids(2, 8)
    before, expected = dict(model.named_parameters()), model(idx, idx)[0]
    model.crop_block_size(8)
    assert model.config == small(position=position, block_size=8)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert torch.equal(model(idx, idx)[0], expected)
    assert model.generate(idx, 12, temperature=0).shape == (2, 20)
    with pytest.raises(ValueError, match="9 tokens do not fit block_size = 8"):
        model(ids(2, 9))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_cropping_to_the_prefix_is_rejected(position):
    model = random_model(small(prefix_len=5, position=position))
    for length in (5, 4):
        with pytest.raises(ValueError, match=f"prefix_len = 5 must be less than block_size = {length}"):
            model.crop_block_size(length)
        assert model.config.block_size == 16
        assert model(ids(2, 16))[0].isfinite().all()
    model.crop_block_size(6)
    assert model.config == small(prefix_len=5, position=position, block_size=6)
    idx = ids(2, 6)
    expected = [reference_logits(model, row, 5) for row in idx.numpy()]
    np.testing.assert_allclose(model(idx, idx)[0].detach().numpy(), np.stack(expected), rtol=0, atol=2e-5)


def test_cropping_keeps_frozen_tables_and_the_rng_state():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    model.transformer["wpe"].weight.requires_grad_(False)
    state = torch.get_rng_state()
    model.crop_block_size(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.transformer["wpe"].weight.requires_grad
    assert model.transformer["wpe"].weight.shape == (5, 4)
    for block_size in (0, -3, 6):
        with pytest.raises(ValueError, match="cannot be cropped"):
            model.crop_block_size(block_size)
