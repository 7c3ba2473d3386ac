"""Weights out: a folder that transformers opens with no code of ours.

`AutoModelForCausalLM` and `AutoTokenizer` read what `write` leaves: model.safetensors, config.json,
generation_config.json, tokenizer.json and tokenizer_config.json. Ours lies beside them, so that
`--init_from=<folder>` brings model and tokenizer back.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fradique.io import files as file_io
from fradique.pretrained import hf_config, hf_weights
from fradique.pretrained.hf_weights import GPT2, LAYOUTS, Layout
from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers

FRADIQUE_TOKENIZER_FILE = "fradique_tokenizer.json"
EXPORT_FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    FRADIQUE_TOKENIZER_FILE,
}


def export_model(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    tokenizer: tokenizers.Tokenizer | None,
    folder: Path,
    overwrite: bool = False,
) -> Layout:
    """Write the model of these GPTConfig fields and tensors into `folder`, whole or not at all.

    Returns the class that it was written as. Raises ValueError, before anything is written, where no class
    of transformers has the architecture (with the settings in the way), where the tokenizer is larger than
    the embedding, or where `folder` holds something.
    """
    config = hf_config.DEFAULTS | config
    layout = choose_layout(config)
    if tokenizer is not None and tokenizer.vocab_size > config["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {config['vocab_size']}: they "
            "do not belong together"
        )
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        exported = folder.is_dir() and {path.name for path in folder.iterdir()} <= EXPORT_FILES
        if not (overwrite and exported):
            raise ValueError(
                f"{folder} is there already and holds something: choose another folder"
                + (", or give --overwrite to replace the model in it" if exported else "")
            )
    tensors, config = _as_the_class_has_them(tensors, config, layout)
    theirs = hf_weights.to_hf(tensors, layout, config)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        safetensors.torch.save_file(theirs, beside / "model.safetensors", metadata={"format": "pt"})
        for name, content in _json_files(config, layout, tokenizer).items():
            (beside / name).write_text(file_io.format_json(content), encoding="utf-8")
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
        file_io.replace_folder(beside, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return layout


def choose_layout(config: dict[str, Any]) -> Layout:
    """The class that has this architecture. Raises ValueError with what stands in the way of the nearest."""
    found = {layout.name: hf_config.unsupported_settings(config, layout) for layout in LAYOUTS}
    nearest = min(LAYOUTS, key=lambda layout: len(found[layout.name]))
    if not found[nearest.name]:
        return nearest
    raise ValueError(
        "no class of transformers that this program writes has this architecture. In the way of "
        + "; and of ".join(f"{name}: {', '.join(reasons)}" for name, reasons in found.items())
        + ". The run folder itself holds the weights, as safetensors under our names"
    )


def _as_the_class_has_them(
    tensors: dict[str, Tensor], config: dict[str, Any], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """GPT-2's class always has biases: of a model without, they are zeros. The MLP's width is written out."""
    inner = tensors["transformer.h.0.mlp.c_proj.weight"].size(1)
    tensors = dict(tensors)
    if layout is GPT2 and not config["bias"]:
        for name in list(tensors):
            if ".h." in name or ".ln_f." in name:
                bias = tensors[name].new_zeros(tensors[name].size(0))
                tensors[name.removesuffix("weight") + "bias"] = bias
    return tensors, config | {"n_inner": inner}


def _json_files(
    config: dict[str, Any], layout: Layout, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, dict[str, Any]]:
    end = tokenizer.end_of_text if tokenizer else None
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
    }  # None: the class's own ids are not of this vocabulary
    files = {
        "config.json": hf_config.config_to_hf(config, layout) | special,
        "generation_config.json": {key: value for key, value in special.items() if value is not None}
        | {"do_sample": True, "temperature": 0.8},
    }
    if tokenizer is None:
        return files
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["block_size"],
        "clean_up_tokenization_spaces": False,
    }
    if end is not None:
        about |= {"bos_token": bpe.END_OF_TEXT, "eos_token": bpe.END_OF_TEXT}
    return files | {
        "tokenizer.json": tokenizer_to_hf(tokenizer),
        "tokenizer_config.json": about,
        FRADIQUE_TOKENIZER_FILE: tokenizer.to_json(),
    }


def tokenizer_to_hf(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The tokenizer in the format of Hugging Face `tokenizers`; it encodes to the same ids."""
    if not isinstance(tokenizer, tokenizers.CharTokenizer):
        return bpe.to_hf_json(tokenizer.merges)
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": each,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # the unknown token is one that no text has: a character outside the vocabulary is an error there too
        "model": {
            "type": "WordLevel",
            "vocab": {char: i for i, char in enumerate(tokenizer.chars)},
            "unk_token": "<unk>",
        },
    }
