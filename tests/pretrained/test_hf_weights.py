"""Conversion between Hugging Face's tensors and ours, and messages about tensors that do not fit."""

import pytest
import torch
from safetensors.torch import load_file
from weight_folders import edit_tensors, equal_tensors, load_error, randomize, save_gpt2

from fradique.pretrained import hf_weights, loader
from model import GPT, GPTConfig


def test_to_hugging_face_and_back_is_identical():
    torch.manual_seed(0)
    config = GPTConfig(block_size=9, vocab_size=11, n_layer=3, n_head=2, n_embd=8)
    tensors = {name: p.detach() for name, p in randomize(GPT(config)).named_parameters()}
    assert equal_tensors(hf_weights.from_hf(hf_weights.to_hf(tensors, config)), tensors)
    assert all(tensor.is_contiguous() for tensor in hf_weights.to_hf(tensors, config).values())
    folder, _ = save_gpt2()
    stored = load_file(folder / "model.safetensors")
    config = loader.load_weights(str(folder)).config
    assert equal_tensors(hf_weights.to_hf(hf_weights.from_hf(stored), config), stored)


def test_converting_a_name_that_gpt2_does_not_have_raises():
    tensors = {"transformer.h.0.attn.rotary": torch.ones(1)}
    with pytest.raises(ValueError, match=r"h\.0\.attn\.rotary is not a tensor of GPT2LMHeadModel"):
        hf_weights.from_hf(tensors)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.rotary is not a tensor of GPT2LMHeadModel"):
        hf_weights.to_hf(tensors, GPTConfig())


def test_a_parameter_with_missing_tensors_raises():
    query = {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}
    with pytest.raises(
        ValueError,
        match=r"is there, but not layers\.0\.self_attn\.k_proj\.weight, layers\.0\.self_attn\.v_proj\.weight",
    ):
        hf_weights.from_hf(query, hf_weights.LLAMA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    folder, _ = save_gpt2()
    expected = {name: t.to(dtype).float() for name, t in loader.load_weights(str(folder)).tensors.items()}
    edit_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    loaded = loader.load_weights(str(folder)).tensors
    assert equal_tensors(loaded, expected) and {t.dtype for t in loaded.values()} == {torch.float32}


def test_all_problems_of_the_tensors_are_listed():
    folder, _ = save_gpt2()

    def damage(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.1.attn.rotary"] = torch.ones(3)
        tensors["transformer.h.7.ln_1.bias"] = torch.ones(32)
        tensors["transformer.wpe.weight"] = torch.ones(79, 32)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(96, 32)  # stored as (in, out)
        tensors["transformer.ln_f.weight"][5] = float("nan")
        tensors["transformer.ln_f.bias"][5] = float("-inf")
        tensors["transformer.h.0.ln_1.bias"] = torch.ones(32, dtype=torch.int8)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    edit_tensors(folder, damage)
    message = load_error(folder)
    for line in [
        "h.1.ln_2.bias is missing",
        "h.1.attn.rotary is not a tensor of this GPT2LMHeadModel",
        "h.7.ln_1.bias is not a tensor of this GPT2LMHeadModel",
        "wpe.weight has shape (79, 32), expected (80, 32)",
        "h.0.attn.c_attn.weight has shape (96, 32), expected (32, 96)",
        "ln_f.weight contains NaN or infinity",
        "ln_f.bias contains NaN or infinity",
        "h.0.ln_1.bias has dtype torch.int8",
        "lm_head.weight differs from wte.weight",
    ]:
        assert f"\n  - {line}" in message
    assert message.startswith("hf cannot be used, 9 problems:")


def test_an_output_layer_of_another_dtype_is_not_tied():
    folder, _ = save_gpt2()
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].half()}))
    assert "lm_head.weight differs" in load_error(folder)
