"""Tiny pretrained weights for the tests: Hugging Face folders of GPT-2, and nanoGPT's ckpt.pt."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fradique.checkpointing import checkpoint
from fradique.pretrained import loader
from model import GPT

GPT2_SIZES = {"n_positions": 80, "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
NANOGPT_ARGS = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}


def randomize(model, std=0.2):
    """Add noise to every parameter, so that no bias is 0 and no norm's weight is 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def gpt2_model(**changes):
    """A GPT-2 of transformers with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(**GPT2_SIZES | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    return randomize(GPT2LMHeadModel(config))


def save_gpt2(folder="hf", **changes):
    """Save a random GPT-2 with transformers. Returns the folder and the model."""
    model = gpt2_model(**changes)
    model.save_pretrained(folder)
    return Path(folder), model


def edit_tensors(folder, change):
    """Call `change` with the dict of a folder's tensors, and save the dict again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build_model(weights):
    model = GPT(weights.config)
    checkpoint.copy_parameters(model, weights.tensors, weights.source)
    return model.eval()


def random_ids(vocab_size, *shape):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(3))


def load_error(source, **options):
    """The message of the ValueError that loading `source` raises."""
    with pytest.raises(ValueError) as caught:
        loader.load_weights(str(source), **options)
    return str(caught.value)


def equal_tensors(left, right):
    """Whether two dicts have the same names and bit-identical tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def nanogpt_state(bias=True):
    """The state dict of a random nanoGPT model. The names are written out, not taken from our code."""
    generator = torch.Generator().manual_seed(11)
    C, shapes = NANOGPT_ARGS["n_embd"], {}
    for layer in range(NANOGPT_ARGS["n_layer"]):
        h = f"transformer.h.{layer}"
        shapes |= {f"{h}.ln_1.weight": (C,), f"{h}.ln_2.weight": (C,)}
        shapes |= {f"{h}.attn.c_attn.weight": (3 * C, C), f"{h}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{h}.mlp.c_fc.weight": (4 * C, C), f"{h}.mlp.c_proj.weight": (C, 4 * C)}
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
    shapes["transformer.wpe.weight"] = (NANOGPT_ARGS["block_size"], C)
    shapes["lm_head.weight"] = (NANOGPT_ARGS["vocab_size"], C)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return state | {"transformer.wte.weight": state["lm_head.weight"]}  # tied: one tensor, two names


def save_nanogpt(path="ckpt.pt", state=None, args=(), zipped=True, **content):
    """Write a ckpt.pt as nanoGPT's train.py does, with changes. Returns its state dict."""
    state = nanogpt_state() if state is None else state
    optimizer_state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}
    content = {
        "model": state,
        "optimizer": {"state": optimizer_state, "param_groups": []},
        "model_args": NANOGPT_ARGS | {"bias": "transformer.ln_f.bias" in state} | dict(args),
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.2),
        "config": {"dataset": "book", "learning_rate": 1e-3, "out_dir": "out"},
    } | content
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return state
