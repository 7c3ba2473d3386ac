"""The KV cache: chunks of a text give the same logits as one forward pass."""

import pytest
import torch
from architectures import NAMES, ids, random_model, tiny

from fradique.generation.kv_cache import KVCache


@pytest.mark.parametrize("flash", [True, False])
def test_cached_chunks_give_the_logits_of_one_pass(flash):
    model, idx = tiny(flash=flash), ids(3, 16)
    expected = model(idx, idx)[0]
    cache = KVCache(model.config, 3, idx.device, torch.float32)
    for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
        logits, _ = model(idx[:, start:end], idx[:, start:end], cache)
        torch.testing.assert_close(logits, expected[:, start:end], rtol=0, atol=1e-5)
    assert cache.length == 16


@pytest.mark.parametrize("name", NAMES)
def test_cached_chunks_equal_one_pass_in_every_architecture(name, architecture):
    for flash in (True, False):
        model, idx = random_model(architecture(name, flash=flash)), ids(2, 16)
        expected = model(idx, idx)[0]
        cache = KVCache(model.config, 2, idx.device, torch.float32)
        for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
            logits, _ = model(idx[:, start:end], idx[:, start:end], cache)
            torch.testing.assert_close(logits, expected[:, start:end], rtol=0, atol=2e-5)
        assert cache.length == 16
