"""nanoGPT's ckpt.pt: the loaded model, its tokenizer, and inconsistent checkpoints."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from weight_folders import (
    NANOGPT_ARGS,
    build_model,
    equal_tensors,
    load_error,
    nanogpt_state,
    random_ids,
    save_nanogpt,
)

from fradique.pretrained import loader
from fradique.tokenizer import tokenizer
from model import GPTConfig


def nanogpt_logits(state, args, idx):
    """nanoGPT's forward pass in float64, (B, T) -> (B, T, V), from its state dict, without our code."""
    C, H = args["n_embd"], args["n_head"]
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    future = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
    for layer in range(args["n_layer"]):
        h = f"h.{layer}"
        q, k, v = linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).split(C, dim=2)
        heads = []
        for columns in torch.arange(C).split(C // H):
            scores = torch.einsum("btc,bsc->bts", q[..., columns], k[..., columns]) / math.sqrt(C // H)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            heads.append(torch.einsum("bts,bsc->btc", weights, v[..., columns]))
        x = x + linear(f"{h}.attn.c_proj", torch.cat(heads, dim=-1))
        hidden = linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))
        x = x + linear(f"{h}.mlp.c_proj", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return norm("ln_f", x) @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_of_nanogpt_gives_its_logits(bias, zipped):
    state = save_nanogpt(state=nanogpt_state(bias), zipped=zipped)
    weights = loader.load_weights("ckpt.pt")
    assert weights.config == GPTConfig(**NANOGPT_ARGS, bias=bias, activation="gelu")
    idx = random_ids(31, 3, 16)
    logits = build_model(weights)(idx, idx)[0]
    assert (logits - nanogpt_logits(state, NANOGPT_ARGS, idx)).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_names_with_wrapper_prefixes_and_masks_give_the_same_weights(prefix):
    """Of torch.compile and DDP, in either order."""
    state = save_nanogpt()
    expected = loader.load_weights("ckpt.pt").tensors
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    compiled = {f"{prefix}{name}": tensor for name, tensor in (state | masks).items()}
    Path("nano").mkdir()
    save_nanogpt("nano/ckpt.pt", compiled, {"bias": True})
    assert equal_tensors(loader.load_weights("nano").tensors, expected)


def test_tensors_that_contradict_model_args_are_reported():
    state = nanogpt_state()
    del state["transformer.h.1.mlp.c_fc.bias"]
    save_nanogpt(state=state | {"lm_head.weight": torch.zeros(31, 16)}, args={"block_size": 8})
    message = load_error("ckpt.pt")
    assert "h.1.mlp.c_fc.bias is missing" in message and "lm_head.weight differs" in message
    assert "wpe.weight has shape (16, 16), expected (8, 16)" in message


def test_invalid_model_args_are_reported():
    save_nanogpt(args={"n_kv_head": 1, "n_layer": "two", "bias": 1, "dropout": "x"})
    message = load_error("ckpt.pt")
    assert "nanoGPT has no 'n_kv_head'" in message and "n_layer = 'two' is not a whole number" in message
    assert "bias = 1 is neither True nor False" in message and "dropout = 'x' is not a number" in message
    save_nanogpt(args={"n_head": 0})
    assert "n_head = 0 must be at least 1" in load_error("ckpt.pt")
    save_nanogpt(model_args=[1])
    assert "model_args" in load_error("ckpt.pt")


def test_the_tokenizer_of_the_corpus_is_used_if_it_fits():
    save_nanogpt()
    assert loader.load_weights("ckpt.pt").tokenizer is None
    chars = [chr(ord("A") + i) for i in range(31)]
    meta = {"vocab_size": 31, "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
    Path("data/book").mkdir(parents=True)
    Path("data/book/meta.pkl").write_bytes(pickle.dumps(meta))
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.CharTokenizer("".join(chars))
    # the corpus was prepared again from another text
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("abc"), "data/book/tokenizer.json")
    assert loader.load_weights("ckpt.pt").tokenizer is None
    # a tokenizer in the folder of ckpt.pt
    tokenizer.save_tokenizer(tokenizer.CharTokenizer("".join(reversed(chars))), "tokenizer.json")
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.CharTokenizer("".join(reversed(chars)))


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_with_gpt2s_vocabulary_size_the_tokenizer_is_gpt2s(vocab_size):
    state = nanogpt_state()
    state["lm_head.weight"] = state["transformer.wte.weight"] = torch.ones(vocab_size, 16)
    save_nanogpt(state=state, args={"vocab_size": vocab_size})
    assert loader.load_weights("ckpt.pt").tokenizer == tokenizer.GPT2Tokenizer()
