"""Damaged and malicious checkpoints: model.json, the tensors, state.json and the manifest."""

import json
import math

import numpy as np
import pytest
from damaged_files import STEP, error_of, load_newest, replace_checkpoint_file
from faults import seeds, targets
from safetensors.numpy import load as load_safetensors

from fradique.checkpointing import checkpoint
from fradique.training.trainer import TrainState


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 10**30),
        ("n_layer", -1),
        ("n_embd", 10**9),
        ("vocab_size", 10**12),
        ("block_size", "8"),
        ("n_head", 2.0),
        ("n_head", True),
        ("bias", "x"),
        ("norm", []),
        ("norm", "x"),
        ("dropout", math.nan),
        ("dropout", None),
        ("rope_theta", 0),
        ("logit_softcap", math.inf),
        ("colour", "red"),
        ("lora_alpha", "x"),
        ("lora_alpha", math.nan),
    ],
)
def test_an_invalid_model_json_is_refused(run, key, value):
    replace_checkpoint_file(run, "model.json", json.dumps(seeds.MODEL | {key: value}).encode())
    error_of(load_newest, run, match=run)


# Tensors


def test_weights_that_are_not_finite_are_refused(run):
    for number in (math.nan, math.inf):
        tensors = dict(seeds.FRADIQUE_WEIGHTS)
        tensors["transformer.ln_f.weight"] = np.full(8, number, np.float32)
        replace_checkpoint_file(run, "model.safetensors", seeds.to_safetensors(tensors))
        assert "NaN or infinity" in error_of(load_newest, run, match=run)


def test_weights_of_another_dtype_are_refused(run):
    tensors = dict(seeds.FRADIQUE_WEIGHTS)
    tensors["transformer.ln_f.weight"] = np.ones(8, np.float16)
    replace_checkpoint_file(run, "model.safetensors", seeds.to_safetensors(tensors))
    message = error_of(load_newest, run, match="ln_f.weight")
    assert "has dtype torch.float16, and torch.float32 in this model" in message


def test_lora_matrices_of_mismatched_shapes_are_refused(run):
    config = json.dumps(seeds.MODEL | {"lora_alpha": 16.0}).encode()
    layer = "transformer.h.0.attn.c_proj"
    for extra in (
        {f"{layer}.lora_a": seeds.floats(2, 8)},
        {f"{layer}.lora_a": seeds.floats(0, 8), f"{layer}.lora_b": seeds.floats(8, 0)},
        {f"{layer}.lora_a": seeds.floats(2, 8), f"{layer}.lora_b": seeds.floats(8, 3)},
        {"nowhere.lora_a": seeds.floats(2, 8), "nowhere.lora_b": seeds.floats(8, 2)},
    ):
        replace_checkpoint_file(run, "model.json", config)
        replace_checkpoint_file(
            run, "model.safetensors", seeds.to_safetensors(seeds.FRADIQUE_WEIGHTS | extra)
        )
        assert "LoRA" in error_of(load_newest, run, match=run)


def test_a_misshapen_or_nan_optimizer_state_is_refused(run):
    name = "exp_avg/transformer.wte.weight"
    for invalid in (seeds.floats(3), np.full((11, 8), math.nan, np.float32)):
        tensors = load_safetensors((run / STEP / "optimizer.safetensors").read_bytes())
        tensors = {key: array.reshape(array.shape).copy() for key, array in tensors.items()}
        tensors[name] = invalid
        replace_checkpoint_file(run, "optimizer.safetensors", seeds.to_safetensors(tensors))
        error_of(targets.continue_run, run, match=name)


# state.json


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1e30),
        ("step", 10**30),
        ("step", "x"),
        ("step", True),
        ("step", None),
        ("best_val_loss", "x"),
        ("best_val_loss", math.nan),
        ("best_step", 1.5),
        ("evals_since_best", -1),
        ("last_eval_step", -2),
        ("seconds", math.inf),
        ("seconds", None),
        ("closing_seconds", []),
        ("scaler", [1]),
        ("scaler", {"scale": "x"}),
    ],
)
def test_an_invalid_state_is_refused(key, value):
    error_of(TrainState.read, seeds.STATE | {key: value}, match=key)


def test_a_state_needs_only_the_step():
    error_of(TrainState.read, {"seconds": 1.0}, match="no step")
    assert TrainState.read({"step": 5}).step == 5
    assert TrainState.read(seeds.STATE | {"colour": "red"}) == TrainState.read(seeds.STATE)


# Which folders are checkpoints


def newest_checkpoint_warning(run) -> str:
    """The warning about the run's only checkpoint, which is skipped."""
    warnings = []
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.newest_checkpoint(run, warnings.append)
    return warnings[0]


@pytest.mark.parametrize(
    "manifest", [[], {}, {"format": 1}, {"format": 1, "sha256": []}, {"format": 9, "sha256": {}}]
)
def test_a_checkpoint_with_an_invalid_manifest_is_skipped(run, manifest):
    seeds.write_manifest(run / STEP, manifest)
    assert "manifest.json" in newest_checkpoint_warning(run)


def test_a_checkpoint_with_a_folder_for_a_file_is_skipped(run):
    (run / STEP / "model.json").unlink()
    (run / STEP / "model.json").mkdir()
    assert "model.json is missing" in newest_checkpoint_warning(run)


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-" + "9" * 200, "step-", "step--1", "step-1x"])
def test_a_folder_with_a_similar_name_is_not_a_checkpoint(run, name):
    (run / name).mkdir()
    assert [folder.name for folder in checkpoint.step_folders(run)] == [STEP]
