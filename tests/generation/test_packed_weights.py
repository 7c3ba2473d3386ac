"""Packed bfloat16 weights: the logits of bfloat16 weights, and which models are packed."""

import pytest
import torch
from architectures import NAMES, ids, random_model

from fradique.generation import packed_weights
from fradique.generation.kv_cache import KVCache
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
needs_packing = pytest.mark.skipif(not packed_weights.can_pack(), reason="this CPU cannot pack weights")


def model():
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


@needs_packing
def test_packed_logits_equal_bfloat16_logits():
    packed, plain = model(), model().to(torch.bfloat16)
    packed_weights.pack_weights(packed)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    idx = torch.arange(64).view(2, 32) % 40
    with torch.no_grad():
        actual, expected, exact = packed(idx)[0], plain(idx)[0], model()(idx)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(actual.float(), exact, rtol=0, atol=0.02)


@needs_packing
@pytest.mark.parametrize("name", NAMES)
def test_packed_logits_equal_bfloat16_in_every_architecture(name, architecture):
    packed, plain = (random_model(architecture(name)) for _ in range(2))
    packed_weights.pack_weights(packed)
    plain.to(torch.bfloat16)
    idx = ids(2, 16)
    with torch.no_grad():
        expected = plain(idx, idx)[0].float()
        cache = KVCache(packed.config, 2, idx.device, torch.bfloat16)
        for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
            logits = packed(idx[:, start:end], idx[:, start:end], cache)[0].float()
            error = (logits - expected[:, start:end]).abs().max()
            assert error <= 0.03 * expected.abs().max()


@needs_packing
@pytest.mark.parametrize("rows", [1, 5])
def test_a_packed_model_generates_with_a_cache(rows):
    packed = model()
    packed_weights.pack_weights(packed)
    tokens = packed.generate(torch.zeros(rows, 1, dtype=torch.long), 40, temperature=0)
    assert tokens.shape == (rows, 41) and (tokens < 40).all()
    assert torch.equal(tokens[0], tokens[-1])


@needs_packing
def test_hooks_run_on_packed_layers():
    """PackedBlock calls its layers as modules, so that their hooks run."""
    packed, calls = model(), []
    packed_weights.pack_weights(packed)
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        layer = packed.transformer["h"][0].get_submodule(name)
        layer.register_forward_hook(lambda module, inputs, output: calls.append(module))
    packed(torch.zeros(1, 1, dtype=torch.long))
    assert len(calls) == len(set(calls)) == 6


def test_small_models_and_other_devices_are_not_packed():
    assert not packed_weights.should_pack(model(), torch.device("cpu"))
    with torch.device("meta"):
        large = GPT(GPTConfig())
    assert packed_weights.should_pack(large, torch.device("cpu")) == packed_weights.can_pack()
    assert not packed_weights.should_pack(large, torch.device("cuda"))
