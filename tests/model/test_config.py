"""GPTConfig: messages for invalid settings, and random combinations of settings."""

import random
import re

import numpy as np
import pytest
import torch
from architectures import TINY, ids, random_model, small
from gpt_equations import reference_logits

from fradique.generation.kv_cache import KVCache
from model import GPT, GPTConfig

VALUES = {
    "n_layer": [1, 2],
    "n_head": [1, 2, 4, 6],
    "n_kv_head": [0, 0, 1, 2, 3],
    "head_dim": [2, 4, 4, 8, 8, 3],
    "remainder": [0] * 15 + [1],
    "n_inner": [0, 5],
    "prefix_len": [0, 0, 0, 1, 5, 8],
    "sliding_window": [0, 0, 0, 1, 3, 20],
    "norm": ["layernorm", "rmsnorm"],
    "norm_place": ["pre", "post", "deepnorm"],
    "position": ["learned", "sinusoidal", "rope", "alibi", "relative", "none"],
    "activation": ["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"],
    "logit_softcap": [0.0, 2.0],
    "ngram_max": [1, 1, 1, 2, 4],
    "ngram_rows": [1, 50],
}
SWITCHES = ("bias", "qk_norm", "embd_norm", "parallel_block", "tie_weights", "flash")
VALUES |= {name: [True, False] for name in SWITCHES}
SEEDS = range(200)


def random_config(seed: int) -> GPTConfig:
    rng = random.Random(seed)
    settings = {name: rng.choice(values) for name, values in VALUES.items()}
    settings["n_embd"] = settings["n_head"] * settings.pop("head_dim") + settings.pop("remainder")
    return GPTConfig(block_size=8, vocab_size=31, **settings)


def is_consistent(c: GPTConfig) -> bool:
    """Whether settings in range are consistent: the rules of `GPTConfig.problems`, written independently."""
    return not (
        c.n_embd % c.n_head
        or (c.position == "rope" and c.n_embd // c.n_head % 2)
        or (c.position == "sinusoidal" and c.n_embd % 2)
        or (c.n_kv_head and c.n_head % c.n_kv_head)
        or (c.prefix_len and c.sliding_window)
        or c.prefix_len >= c.block_size
    )


def test_random_configs_cover_every_value_and_some_invalid():
    valid = [config for config in map(random_config, SEEDS) if is_consistent(config)]
    assert 80 < len(valid) < len(SEEDS) - 60
    for name in GPTConfig.names():
        for value in set(VALUES.get(name, [])) - ({8} if name == "prefix_len" else set()):
            assert sum(getattr(config, name) == value for config in valid) >= 3, (name, value)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_configs_are_rejected_or_equal_the_equations(seed):
    config = random_config(seed)
    if not is_consistent(config):
        with pytest.raises(ValueError) as error:
            GPT(config)
        assert config.problems() and str(error.value) == "; ".join(config.problems())
        return
    assert config.problems() == []
    model, idx = random_model(config), ids(2, 8)
    logits, loss = model(idx, idx)
    assert logits.isfinite().all() and loss.isfinite()
    for row, expected in zip(idx.numpy(), logits.detach().numpy(), strict=True):
        actual = reference_logits(model, row, config.prefix_len)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)

    t = max(5, config.prefix_len)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 31
    assert torch.equal(model(changed, changed)[0][:, :t], logits[:, :t])

    cache = KVCache(config, 2, idx.device, torch.float32)
    for start, end in [(0, 5), (5, 6), (6, 8)]:
        chunk, _ = model(idx[:, start:end], idx[:, start:end], cache)
        torch.testing.assert_close(chunk, logits[:, start:end], rtol=0, atol=2e-5)


# Messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_kv_head": 3},
            "n_head = 4 is not a multiple of n_kv_head = 3: .* (use one of n_kv_head = 1, 2, 4)",
        ),
        ({"n_kv_head": 8}, "n_head = 4 is not a multiple of n_kv_head = 8"),
        ({"n_embd": 12, "position": "rope"}, "n_embd / n_head = 3 is odd"),
        ({"n_embd": 33, "n_head": 3, "position": "sinusoidal"}, "needs an even n_embd, not 33"),
        (
            {"prefix_len": 4, "sliding_window": 8},
            "prefix_len = 4 and sliding_window = 8 contradict each other",
        ),
        ({"prefix_len": 16}, "prefix_len = 16 must be less than block_size = 16"),
        ({"prefix_len": 17}, "prefix_len = 17 must be less than block_size = 16"),
        ({"logit_softcap": -1.0}, "logit_softcap = -1.0 must be at least 0"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0 must be above 0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan must be above 0"),
        ({"norm": "batchnorm"}, "norm = 'batchnorm' must be one of layernorm, rmsnorm"),
        ({"norm_place": "sandwich"}, "norm_place = 'sandwich' must be one of pre, post, deepnorm"),
        (
            {"position": "xpos"},
            "position = 'xpos' must be one of learned, sinusoidal, rope, alibi, relative, none",
        ),
        (
            {"activation": "mish"},
            "activation = 'mish' must be one of gelu, gelu_tanh, relu, relu2, swiglu, geglu",
        ),
    ],
)
def test_each_invalid_setting_has_a_message(changes, message):
    (problem,) = small(**changes).problems()
    assert all(fragment in problem for fragment in message.split(".* "))
    with pytest.raises(ValueError, match=re.escape(message.split(".* ")[0])):
        GPT(small(**changes))


def test_all_contradictions_are_reported_together():
    invalid = {"n_kv_head": 3, "n_embd": 12, "position": "rope", "prefix_len": 16, "sliding_window": 5}
    invalid |= {"norm": "batchnorm", "norm_place": "sandwich", "activation": "mish", "rope_theta": -1.0}
    problems = small(**invalid, dropout=1.0).problems()
    hints = ("n_kv_head = 3", "is odd", "contradict each other", "must be less", "norm = ", "norm_place = ")
    hints += ("activation = ", "rope_theta = ", "dropout = ")
    for hint in hints:
        assert sum(hint in problem for problem in problems) == 1, hint
    assert len(problems) == len(hints)


def test_all_invalid_sizes_and_names_are_reported_together():
    sizes = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "ngram_max", "ngram_rows"]
    sizes += ["n_kv_head", "n_inner", "prefix_len", "sliding_window", "logit_softcap"]
    names = ["norm", "norm_place", "position", "activation"]
    problems = GPTConfig(**dict.fromkeys(sizes, -1), **dict.fromkeys(names, "?")).problems()
    assert [problem.split(" = ")[0] for problem in problems] == sizes + names


def test_gpt_raises_with_all_problems_of_the_config():
    sizes = {"block_size": 0, "vocab_size": -1, "n_layer": 0, "n_head": 0, "n_embd": 0}
    config = GPTConfig(**sizes, dropout=1.0, activation="sin")
    problems = config.problems()
    for name in [*sizes, "dropout", "activation"]:
        assert sum(problem.startswith(f"{name} = ") for problem in problems) == 1
    with pytest.raises(ValueError) as error:
        GPT(config)
    assert all(problem in str(error.value) for problem in problems)
    assert GPTConfig().problems() == [] and TINY.problems() == []


@pytest.mark.parametrize(
    ("n_embd", "n_head", "nearest"), [(10, 4, "8 or 12"), (3, 4, "4"), (770, 12, "768 or 780")]
)
def test_an_indivisible_width_is_reported_with_valid_ones(n_embd, n_head, nearest):
    (problem,) = GPTConfig(n_embd=n_embd, n_head=n_head).problems()
    assert f"not divisible by n_head = {n_head}" in problem and f"(use n_embd = {nearest})" in problem


def test_config_names_are_its_fields():
    assert GPTConfig.names() == list(vars(GPTConfig()))
