"""Parameter counts, FLOPs, and initial weights."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from architectures import NAMES, ids, small, tiny
from gpt_equations import REFERENCE_ACTIVATIONS

from fradique.generation.kv_cache import KVCache
from model import GPT, GPTConfig

# Parameters


def test_gpt2_has_124439808_parameters():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(vocab_size=50257))
    assert gpt2.num_params(non_embedding=False) == 124_439_808
    assert gpt2.num_params() == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_equals_the_formula(bias):
    V, T, C, L = 31, 16, 16, 2
    weights = V * C + T * C + L * (12 * C * C + 2 * C) + C
    biases = L * (2 * C + 9 * C) + C
    assert tiny(bias=bias).num_params(non_embedding=False) == weights + bias * biases


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_is_the_sum_of_the_layers(name, architecture):
    c = architecture(name)
    C, gated, norm_biases = c.n_embd, c.activation in ("swiglu", "geglu"), c.norm == "layernorm" and c.bias
    kv = 8 * (c.n_kv_head or 4)
    width = 88 if gated else 128
    block = (C + 2 * kv + C) * C + (2 * C + 2 * kv) * c.bias
    block += (3 if gated else 2) * width * C + ((2 if gated else 1) * width + C) * c.bias
    norm_weights = (1 if c.parallel_block else 2) * C + (2 * 8 if c.qk_norm else 0)
    other_norms = C * ((c.norm_place == "pre") + c.embd_norm)
    tables = 31 * C * (1 if c.tie_weights else 2) + {"learned": 16 * C, "relative": 32 * 4}.get(c.position, 0)
    expected = tables + 2 * (block + norm_weights * (1 + norm_biases)) + other_norms * (1 + norm_biases)
    assert GPT(c).num_params(non_embedding=False) == expected


def test_bias_false_removes_all_biases():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]
    assert tiny(bias=False)(ids(1, 4))[0].isfinite().all()


def test_tied_weights_are_one_parameter():
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    idx = ids(2, 16)
    model(idx, idx)[1].backward()
    # rows of tokens that are not in idx: their gradient comes from the output layer only
    absent = sorted(set(range(31)) - set(idx.flatten().tolist()))
    assert absent and (model.transformer["wte"].weight.grad[absent] != 0).all(dim=1).all()


def test_untied_weights_add_one_table():
    tied, untied = GPT(small()), GPT(small(tie_weights=False))
    assert untied.num_params() - tied.num_params() == 31 * 32
    names = dict(untied.named_parameters())
    assert names["lm_head.weight"] is not names["transformer.wte.weight"]
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert not torch.equal(untied.lm_head.weight, untied.transformer["wte"].weight)


@pytest.mark.parametrize("activation", sorted(REFERENCE_ACTIVATIONS))
@pytest.mark.parametrize("n_embd", [4, 8, 12, 32, 100, 128, 768])
def test_mlp_width_is_4_n_embd_or_two_thirds_if_gated(n_embd, activation):
    config = small(n_embd=n_embd, n_layer=1, activation=activation)
    gated = activation in ("swiglu", "geglu")
    minimum = Fraction(8 * n_embd, 3) if gated else 4 * n_embd
    width = next(w for w in range(0, 10_000, 8 if gated else 1) if w >= minimum)
    mlp = GPT(config).transformer["h"][0].mlp
    assert mlp.c_fc.weight.shape == (width * (2 if gated else 1), n_embd)
    assert mlp.c_proj.weight.shape == (n_embd, width)
    mlp = GPT(replace(config, n_inner=20)).transformer["h"][0].mlp
    assert mlp.c_fc.weight.shape[0] == (40 if gated else 20) and mlp.c_proj.weight.shape[1] == 20


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_heads_shrink_attention_and_kv_cache(n_kv_head, bias):
    full, grouped = (GPT(small(bias=bias, n_kv_head=n)) for n in (0, n_kv_head))
    saved = 2 * (4 - n_kv_head) * 8  # rows of k and v: 8 per head
    assert grouped.transformer["h"][0].attn.c_attn.weight.shape == (96 - saved, 32)
    assert full.num_params() - grouped.num_params() == 2 * saved * (32 + bias)
    caches = [KVCache(m.config, 3, torch.device("cpu"), torch.float32) for m in (full, grouped)]
    for cache, heads in zip(caches, (4, n_kv_head), strict=True):
        assert [tensor.shape for tensor in cache.keys + cache.values] == 4 * [(3, heads, 16, 8)]


# FLOPs


def test_flops_equal_the_palm_formula():
    model = tiny()
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 2 * 16 * 16


def test_flops_exclude_tables_and_keys_outside_the_window():
    tied, untied, narrow = (GPT(small(**c)) for c in ({}, {"tie_weights": False}, {"sliding_window": 5}))
    in_blocks = sum(p.numel() for p in tied.transformer["h"].parameters()) + 2 * 32  # + the final norm
    assert tied.flops_per_token() == 6 * (in_blocks + 31 * 32) + 12 * 2 * 32 * 16
    assert untied.flops_per_token() == tied.flops_per_token()
    assert narrow.flops_per_token() == 6 * (in_blocks + 31 * 32) + 12 * 2 * 32 * 5
    assert GPT(small(sliding_window=99)).flops_per_token() == tied.flops_per_token()
    alibi, relative = (GPT(small(position=position)) for position in ("alibi", "relative"))
    assert alibi.flops_per_token() == relative.flops_per_token() == tied.flops_per_token()


# Initial weights


def initial_std(**changes: object) -> dict[str, float]:
    """The standard deviation of each matrix of a model of width 128; q, k and v of c_attn separately."""
    torch.manual_seed(0)
    model = GPT(small(n_embd=128, n_layer=3, **changes))
    matrices = {"wte": model.transformer["wte"].weight, "lm_head": model.lm_head.weight}
    for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        matrices[name] = torch.cat([block.get_submodule(name).weight for block in model.transformer["h"]])
    layers = [block.attn.c_attn for block in model.transformer["h"]]
    qkv = [layer.weight.split(layer.row_splits) for layer in layers]
    for name, weights in zip("qkv", zip(*qkv, strict=True), strict=True):
        matrices[name] = torch.cat(weights)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert all(abs(weight.mean()) < 4 * weight.std() / weight.numel() ** 0.5 for weight in matrices.values())
    return {name: weight.std().item() for name, weight in matrices.items()}


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1}, {"activation": "geglu"}, {"tie_weights": False}])
def test_deepnorm_initializes_with_scaled_xavier(changes):
    std = initial_std(norm_place="deepnorm", **changes)
    kv = 32 * changes.get("n_kv_head", 4)
    inner = 344 if changes.get("activation") == "geglu" else 512
    rows = inner * (2 if changes.get("activation") == "geglu" else 1)
    gain = (2 * 3) ** -0.5  # DeepNorm's β for a decoder-only model, without the constant factor
    expected = {"q": (128, 128, 1), "k": (kv, 128, 1), "v": (kv, 128, gain), "attn.c_proj": (128, 128, gain)}
    expected |= {"mlp.c_fc": (rows, 128, gain), "mlp.c_proj": (128, inner, gain)}
    for name, (fan_out, fan_in, scale) in expected.items():
        assert std[name] == pytest.approx(scale * math.sqrt(2 / (fan_in + fan_out)), rel=0.03), name
    for name in ("wte", "lm_head"):
        assert std[name] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("norm_place", ["pre", "post"])
def test_only_pre_norm_scales_residual_projections(norm_place):
    for name, std in initial_std(norm_place=norm_place, tie_weights=False).items():
        scaled = norm_place == "pre" and name.endswith("c_proj")
        assert std == pytest.approx(0.02 / math.sqrt(2 * 3) if scaled else 0.02, rel=0.05), name


def test_initial_weights_have_gpt2_std():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif ".ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20


def test_initial_loss_is_log_vocab():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=2, n_embd=64))
    loss = model(ids(8, 32, vocab_size=100), ids(8, 32, vocab_size=100, seed=4))[1]
    assert loss.item() == pytest.approx(math.log(100), abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_initial_loss_is_log_vocab_in_every_architecture(name, architecture):
    torch.manual_seed(0)
    model = GPT(architecture(name))
    loss = model(ids(8, 16), ids(8, 16, seed=4))[1]
    assert loss.item() == pytest.approx(math.log(31), abs=0.1)


def test_the_same_seed_gives_the_same_weights():
    for left, right in zip(tiny(1).parameters(), tiny(1).parameters(), strict=True):
        assert torch.equal(left, right)
