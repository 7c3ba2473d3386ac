"""model.json of a checkpoint: missing fields of older runs, and invalid values."""

from dataclasses import asdict

import pytest
import torch

from fradique.pretrained import model_config
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=2000, n_layer=1, n_head=2, n_embd=8)


def tensors():
    return dict(GPT(CONFIG).named_parameters())


def test_every_field_is_read():
    assert model_config.parse_model_config(asdict(CONFIG), tensors(), "model.json") == CONFIG


def test_missing_fields_have_their_defaults():
    values = {
        name: getattr(CONFIG, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    }
    assert model_config.parse_model_config(values, tensors(), "model.json") == CONFIG


def test_all_problems_are_listed():
    changes = {"n_layer": "1", "bias": 0, "norm": None, "rope_theta": float("nan"), "colour": "red"}
    with pytest.raises(ValueError) as error:
        model_config.parse_model_config(asdict(CONFIG) | changes, tensors(), "model.json")
    for line in [
        "n_layer = '1' is not a whole number",
        "bias = 0 is neither True nor False",
        "norm = None is not a string",
        "rope_theta = nan is not a number",
        "there is no setting 'colour'",
    ]:
        assert f"\n  - {line}" in str(error.value)


def test_sizes_that_contradict_the_tensors_are_reported():
    for name in ("n_layer", "n_embd", "n_inner", "vocab_size", "ngram_max", "ngram_rows"):
        changes = {name: 10**6}
        with pytest.raises(ValueError, match=rf"model.json .*\n  - {name} = 1000000 is too large"):
            model_config.parse_model_config(asdict(CONFIG) | changes, tensors(), "model.json")
    meta = {"transformer.wte.weight": torch.empty(2000, 16, device="meta")}
    with pytest.raises(ValueError, match=r"the embedding is \(2000, 16\)"):
        model_config.parse_model_config(asdict(CONFIG), meta, "model.json")


def test_contradictory_sizes_are_reported():
    with pytest.raises(ValueError, match="n_embd = 8 is not divisible by n_head = 3"):
        model_config.parse_model_config(asdict(CONFIG) | {"n_head": 3}, tensors(), "model.json")
