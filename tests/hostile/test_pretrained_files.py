"""Damaged and malicious Hugging Face folders: the index, safetensors headers, and config.json."""

import json
import math
import struct

import pytest
from damaged_files import edit_json, error_of
from faults import seeds

from fradique.pretrained import loader
from sample import load_model

HUGE = 2**63


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "..", "", "a\0", 7, [], {}, None]
)
def test_an_index_cannot_name_a_file_outside_its_folder(gpt2, name):
    (gpt2 / "model.safetensors").rename(gpt2.parent / "model.safetensors")
    index = {"weight_map": {"wte.weight": name, "wpe.weight": "x.safetensors"}}
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps(index))
    error_of(loader.load_weights, str(gpt2), match="model.safetensors.index.json is damaged")


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    """A tensor in the header of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"wte.weight": entry([HUGE, HUGE], 0, 8)},
        {"wte.weight": entry([2], 0, HUGE)},
        {"wte.weight": entry([2], 8, 0)},
        {"wte.weight": entry([-2], 0, 8)},
        {"wte.weight": entry([1.5], 0, 8)},
        {"wte.weight": entry([2], 0, 8, "X99")},
        {"wte.weight": entry([2], 0, 8), "overlapping": entry([2], 4, 12)},
        {"wte.weight": entry([2], 0, 8), "outside": entry([2], 8, 16)},
        {"wte.weight": entry([1], 0, 8, "I64")},
        {"wte.weight": entry([8], 0, 8, "F8_E4M3")},
        {"wte.weight": entry([16], 0, 8, "F4")},
        {"wte.weight": entry([0, 64], 0, 0), "wpe.weight": entry([8, 0], 0, 0), "h.0.x": entry([2], 0, 8)},
        {},
        [],
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_an_invalid_safetensors_header_is_refused(gpt2, header, with_config):
    text = json.dumps(header).encode()
    (gpt2 / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    if not with_config:
        (gpt2 / "config.json").unlink()
    error_of(loader.load_weights, str(gpt2), match=gpt2)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_impossible_length_is_refused(gpt2, length):
    (gpt2 / "model.safetensors").write_bytes(struct.pack("<Q", length) + seeds.HF_WEIGHTS[8:])
    error_of(loader.load_weights, str(gpt2), match="model.safetensors is truncated")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 10**30),
        ("n_embd", 10**12),
        ("vocab_size", 10**12),
        ("n_head", 0),
        ("n_head", 2.0),
        ("n_positions", "8"),
        ("model_type", []),
        ("model_type", {}),
        ("activation_function", []),
        ("n_inner", 10**15),
    ],
)
def test_an_invalid_config_json_is_refused(gpt2, key, value):
    edit_json(gpt2 / "config.json", key, to=value)
    error_of(load_model, str(gpt2), match=gpt2)


@pytest.mark.parametrize("rope_theta", [10**400, math.inf, True])
def test_a_llama_with_an_invalid_rope_theta_is_refused(gpt2, rope_theta):
    llama = json.loads(seeds.hf_json()[2])["config.json"]
    (gpt2 / "config.json").write_text(json.dumps(llama | {"rope_theta": rope_theta}))
    error_of(load_model, str(gpt2), match="rope_theta")
