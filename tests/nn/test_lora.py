"""Freezing and LoRA: which parameters are trained, and merging LoRA into the weights."""

import dataclasses

import pytest
import torch
from torch import nn

from fradique.nn import lora
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=8)


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(dataclasses.replace(TINY, **changes))


def ids(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def trained(model):
    return {name.removeprefix("transformer.") for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(ids(4, 8), ids(4, 8).roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def plain_model(model):
    """A model without LoRA, with the merged weights."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = dataclasses.asdict(model.config) | lora.lora_metadata(model)
    config, tensors = lora.merge_lora(config, tensors)
    plain = GPT(GPTConfig(**config))
    plain.load_state_dict(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    return plain.eval()


# freeze


@pytest.mark.parametrize(
    ("names", "frozen"),
    [
        ("wte", lambda name: name == "wte.weight"),
        ("wte, wpe,h.0-1", lambda name: name.startswith(("wte.", "wpe.", "h.0.", "h.1."))),
        ("h.1", lambda name: name.startswith("h.1.")),
        ("h.0-2.attn", lambda name: ".attn." in name),
        ("h.2.mlp.c_fc.bias", lambda name: name == "h.2.mlp.c_fc.bias"),
        ("h.1-99", lambda name: name.startswith(("h.1.", "h.2."))),
        ("ln_f,", lambda name: name.startswith("ln_f.")),
        ("h", lambda name: name.startswith("h.")),
    ],
)
def test_freeze_freezes_exactly_the_named_parameters(names, frozen):
    model = tiny()
    all_names = trained(model)
    lora.freeze(model, names)
    assert all_names - trained(model) == {name for name in all_names if frozen(name)} != set()


def test_freezing_layer_1_keeps_layer_10_trainable():
    model = tiny(n_layer=11)
    lora.freeze(model, "h.1")
    assert any(name.startswith("h.10.") for name in trained(model))


def test_only_parameters_that_are_not_frozen_change():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora.freeze(model, "wte,h.0")
    train(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        name for name in before if not name.startswith(("transformer.wte", "transformer.h.0."))
    }


@pytest.mark.parametrize("names", ["wtf", "h.3", "h.7-9", "attn", "h.0.attention,lm_head"])
def test_unknown_names_are_reported_with_valid_ones(names):
    with pytest.raises(
        ValueError, match=r"no parameter of this model matches .*; use wte, wpe, ln_f, h\.0-2"
    ):
        lora.freeze(tiny(), names)


# LoRA


def test_adding_lora_does_not_change_the_logits():
    model = tiny().eval()
    expected = model(ids(2, 8), ids(2, 8))[0]
    lora.add_lora(model, 4, 8.0, "c_attn,c_proj,c_fc")
    assert torch.equal(model(ids(2, 8), ids(2, 8))[0], expected)


def test_only_lora_matrices_are_trained():
    model = tiny()
    lora.add_lora(model, 2, 8.0, "c_attn,mlp.c_proj")
    assert trained(model) == {
        f"h.{layer}.{layer_name}.lora_{matrix}"
        for layer in range(3)
        for layer_name in ("attn.c_attn", "mlp.c_proj")
        for matrix in "ab"
    }
    assert lora.count_trainable(model) == 3 * 2 * (8 + 24 + 32 + 8)
    initial_loss = model(ids(4, 8), ids(4, 8).roll(-1, 1))[1].item()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    assert model(ids(4, 8), ids(4, 8).roll(-1, 1))[1].item() < initial_loss - 0.05
    for name, p in model.named_parameters():
        assert torch.equal(p, initial[name]) == (not p.requires_grad), name


def test_lora_layer_equals_the_formula():
    torch.manual_seed(0)
    linear = nn.Linear(5, 3).double()
    layer = lora.LoRALinear(linear, rank=2, alpha=6.0)
    with torch.no_grad():
        layer.lora_b.normal_()
    x = torch.randn(4, 5, dtype=torch.float64)
    w, b, lora_a, lora_b = (
        p.detach().numpy() for p in (linear.weight, linear.bias, layer.lora_a, layer.lora_b)
    )
    expected = x.numpy() @ w.T + b + 3.0 * (x.numpy() @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(layer(x).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert layer.weight is linear.weight and layer.bias is linear.bias


def test_merged_weights_give_the_same_logits():
    model = tiny()
    lora.add_lora(model, 4, 8.0, "c_attn,c_proj,c_fc")
    train(model)
    model.eval()
    plain = plain_model(model)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(
        plain(ids(2, 8), ids(2, 8))[0], model(ids(2, 8), ids(2, 8))[0], rtol=0, atol=1e-5
    )
    assert (plain(ids(2, 8), ids(2, 8))[0] - tiny().eval()(ids(2, 8), ids(2, 8))[0]).abs().max() > 0.01


def test_merging_without_lora_changes_nothing():
    config, tensors = {"n_layer": 1}, {"x": torch.ones(2)}
    assert lora.merge_lora(config, tensors) == (config, tensors)
    assert lora.lora_metadata(tiny()) == {}


@pytest.mark.parametrize("targets", ["c_attm", "c_attn,wte", "attn", "", ",", "ln_1"])
def test_unknown_targets_are_reported_with_valid_ones(targets):
    with pytest.raises(ValueError, match=r"attn\.c_attn, attn\.c_proj, mlp\.c_fc, mlp\.c_proj"):
        lora.add_lora(tiny(), 2, 4.0, targets)


def test_generation_with_lora_equals_uncached():
    model = tiny().eval()
    lora.add_lora(model, 2, 4.0, "c_attn")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(generator=torch.Generator().manual_seed(2))
    with_cache = model.generate(ids(1, 3), 20, temperature=0)
    assert torch.equal(with_cache, model.generate(ids(1, 3), 20, temperature=0, use_cache=False))
