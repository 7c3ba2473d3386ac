"""Hugging Face's config.json: missing keys, unsupported settings, and damaged files."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from weight_folders import GPT2_SIZES, edit_config, load_error, save_gpt2

from fradique.pretrained import hf_config, hf_weights, loader
from model import POSITIVE_SIZES, GPTConfig


def test_every_unsupported_setting_is_listed():
    folder, _ = save_gpt2()
    changes = {
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
        "tie_word_embeddings": None,
    }
    edit_config(folder, **changes)
    message = load_error(folder)
    assert str(folder / "config.json") in message
    for name, value in changes.items():
        assert f"{name} = {value!r}, and only " in message


@pytest.mark.parametrize("value", [0, -1, "12", None, 1.5, True, []])
def test_an_invalid_size_is_reported(value):
    folder, _ = save_gpt2()
    edit_config(folder, n_embd=value)
    assert f"n_embd = {value!r} is not a size" in load_error(folder)


def test_an_explicit_default_n_inner_becomes_0():
    folder, _ = save_gpt2()
    edit_config(folder, n_inner=4 * GPT2_SIZES["n_embd"])
    assert loader.load_weights(str(folder)).config.n_inner == 0


def test_missing_keys_have_the_defaults_of_gpt2():
    folder, _ = save_gpt2()
    Path(folder / "config.json").write_text(json.dumps({**GPT2_SIZES, "architectures": ["GPT2LMHeadModel"]}))
    assert loader.load_weights(str(folder)).config.activation == "gelu_tanh"


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", ""])
def test_a_damaged_config_is_reported(text):
    folder, _ = save_gpt2()
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"{folder / 'config.json'} is damaged" in load_error(folder)


def test_every_field_of_gptconfig_is_checked_or_written():
    converted = {*POSITIVE_SIZES, "bias", "dropout", "n_inner", "tie_weights", "rope_theta", "n_kv_head"}
    converted |= {"ngram_rows", "ngram_dropout"}  # without effect if there are no n-grams, which is checked
    checked = {field.name for field in fields(GPTConfig)} - converted - {"flash"}  # which affects speed only
    for layout in hf_weights.LAYOUTS:
        assert checked <= hf_config.SUPPORTED_VALUES[layout.name].keys()
    assert hf_config.unsupported_settings(GPTConfig(), hf_weights.GPT2) == []
