"""Export to a folder that transformers opens with AutoModelForCausalLM and AutoTokenizer.

Files: model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json; and
fradique_tokenizer.json, so that --init_from=<folder> restores our tokenizer.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fradique.io import files
from fradique.pretrained import hf_config, hf_weights
from fradique.pretrained.hf_weights import GPT2, LAYOUTS, Layout
from fradique.pretrained.weight_files import FRADIQUE_TOKENIZER_FILE
from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers
from model import GPTConfig

EXPORT_FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    FRADIQUE_TOKENIZER_FILE,
}


def export_model(
    config: GPTConfig,
    tensors: dict[str, Tensor],
    tokenizer: tokenizers.Tokenizer | None,
    folder: Path,
    overwrite: bool = False,
) -> Layout:
    """Write a model to `folder`, complete or not at all. Returns the model class that it was written as.

    `tensors` have the names of GPT.named_parameters(). With `overwrite` an earlier export in `folder` is
    replaced. Raises ValueError, before anything is written, if no class of transformers has the architecture
    (with the settings that prevent it), if the tokenizer is larger than the embedding, or if `folder` is not
    empty.
    """
    layout = choose_layout(config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {config.vocab_size}: they do "
            "not belong together"
        )
    folder = folder.expanduser().resolve()
    _check_folder(folder, overwrite)
    if layout is GPT2 and not config.bias:
        config, tensors = replace(config, bias=True), _add_zero_biases(tensors)
    _write_folder(folder, hf_weights.to_hf(tensors, config, layout), _json_files(config, layout, tokenizer))
    return layout


def choose_layout(config: GPTConfig) -> Layout:
    """The model class that has this architecture.

    Raises ValueError with the settings that prevent each class from having it.
    """
    reasons = {layout.name: hf_config.unsupported_settings(config, layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        if not reasons[layout.name]:
            return layout
    raise ValueError(
        "this architecture cannot be exported: no supported class of transformers has it. Not in "
        + "; not in ".join(f"{name}: {', '.join(settings)}" for name, settings in reasons.items())
        + ". The weights themselves are in the run folder, as safetensors with our names"
    )


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if exporting to `folder` would replace something that is not to be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    is_export = folder.is_dir() and {path.name for path in folder.iterdir()} <= EXPORT_FILES
    if not (overwrite and is_export):
        raise ValueError(
            f"{folder} already exists and is not empty: choose another folder"
            + (", or give --overwrite to replace the model in it" if is_export else "")
        )


def _add_zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with biases of zero in all layers and norms: GPT-2's class always has biases."""
    biases = {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.size(0))
        for name, tensor in tensors.items()
        if ".h." in name or ".ln_f." in name
    }
    return tensors | biases


def _write_folder(folder: Path, tensors: dict[str, Tensor], json_files: dict[str, dict[str, Any]]) -> None:
    """Write all files to a temporary folder and rename that to `folder`. Raises ValueError if it fails."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = temporary / "model.safetensors"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        for name, value in json_files.items():
            (temporary / name).write_text(files.format_json(value), encoding="utf-8")
        shutil.copymode(temporary / "config.json", weights)  # safetensors files are private by default
        files.replace_folder(temporary, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _json_files(
    config: GPTConfig, layout: Layout, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, dict[str, Any]]:
    """File name -> content."""
    end = tokenizer.end_of_text if tokenizer else None
    # None overrides the defaults of the class, which are ids of another vocabulary
    special_ids = {"bos_token_id": end, "eos_token_id": end}
    generation = {"do_sample": True, "temperature": 0.8}
    contents = {
        "config.json": hf_config.config_to_hf(config, layout) | special_ids,
        "generation_config.json": generation if end is None else special_ids | generation,
    }
    if tokenizer is None:
        return contents
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
    }
    if end is not None:
        tokenizer_config |= {"bos_token": bpe.END_OF_TEXT, "eos_token": bpe.END_OF_TEXT}
    return contents | {
        "tokenizer.json": tokenizer_to_hf(tokenizer),
        "tokenizer_config.json": tokenizer_config,
        FRADIQUE_TOKENIZER_FILE: tokenizer.to_json(),
    }


def tokenizer_to_hf(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of Hugging Face `tokenizers` that encodes to the same ids."""
    if not isinstance(tokenizer, tokenizers.CharTokenizer):
        return bpe.to_hf_json(tokenizer.merges)
    each_character = {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": each_character,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # "<unk>" is not in the vocabulary, so that a character outside it is an error, as in our tokenizer
        "model": {
            "type": "WordLevel",
            "vocab": {char: i for i, char in enumerate(tokenizer.chars)},
            "unk_token": "<unk>",
        },
    }
