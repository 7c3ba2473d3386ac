"""Logits and loss against the equations in numpy: every config file, and settings that no file has."""

import numpy as np
import pytest
from architectures import NAMES, ids, random_model, small
from gpt_equations import cross_entropy, reference_logits

from model import GPTConfig


def check_against_equations(config: GPTConfig) -> None:
    model = random_model(config).double()
    idx, targets = ids(2, config.block_size), ids(2, config.block_size, seed=4)
    logits, loss = model(idx, targets)
    expected = np.stack([reference_logits(model, row, config.prefix_len) for row in idx.numpy()])
    exact = config.position not in ("rope", "sinusoidal")  # their angles are computed in float32
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=0, atol=1e-10 if exact else 2e-5)
    first = max(0, config.prefix_len - 1)  # the last token of the prefix predicts the next one
    terms = [cross_entropy(expected[b, first:], targets[b, first:].numpy()) for b in range(2)]
    assert loss.item() == pytest.approx(np.mean(terms), abs=1e-10 if exact else 1e-5)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_config_file_models_equal_the_equations(name, flash, architecture):
    check_against_equations(architecture(name, flash=flash))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "none", "norm": "rmsnorm"},
        {"position": "none", "norm_place": "deepnorm", "bias": False},
        {"norm_place": "post", "norm": "rmsnorm", "embd_norm": True},
        {"norm_place": "post", "parallel_block": True, "position": "relative"},
        {"norm_place": "deepnorm", "parallel_block": True, "n_layer": 3},
        {"prefix_len": 5, "position": "learned"},
        {"prefix_len": 1, "position": "learned"},
        {"prefix_len": 15, "position": "alibi"},
        {"prefix_len": 5, "position": "relative", "n_kv_head": 2},
        {"sliding_window": 1, "position": "learned"},
        {"sliding_window": 5, "position": "alibi", "n_head": 6, "n_embd": 48},
        {"sliding_window": 16, "position": "learned"},
        {"qk_norm": True, "position": "relative", "n_kv_head": 1},
        {"qk_norm": True, "position": "alibi", "bias": False},
        {"logit_softcap": 0.7, "tie_weights": False},
        {"activation": "relu2", "n_inner": 7},
        {"activation": "swiglu", "n_inner": 7, "parallel_block": True},
        {"position": "alibi", "n_head": 3, "n_embd": 30},
        {"position": "rope", "rope_theta": 100.0, "n_head": 1},
        {"ngram_max": 2, "ngram_rows": 1000, "tie_weights": False},
        {"ngram_max": 5, "ngram_rows": 7, "embd_norm": True, "prefix_len": 5},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_other_settings_equal_the_equations(changes):
    check_against_equations(small(**changes))
