"""Export a model to a folder that transformers opens with AutoModelForCausalLM and AutoTokenizer.

transformers reads model.safetensors, config.json, generation_config.json, tokenizer.json and
tokenizer_config.json. fradique_tokenizer.json is for --init_from=<folder>, which restores our tokenizer.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fradique.io.files import absolute_path, broken_link, format_json, replace_folder
from fradique.pretrained.hf_config import config_to_hf, unsupported_settings
from fradique.pretrained.hf_weights import GPT2, LAYOUTS, Layout, to_hf
from fradique.pretrained.weight_files import FRADIQUE_TOKENIZER_FILE
from fradique.tokenizer import bpe
from fradique.tokenizer.tokenizer import CharTokenizer, Tokenizer
from model import GPTConfig

CREATOR = "fradique"  # in the metadata of model.safetensors: marks an export that --overwrite may replace
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
    tokenizer: Tokenizer | None,
    folder: Path,
    overwrite: bool = False,
) -> Layout:
    """Write a model to `folder`. Returns the layout, which is a model class of transformers.

    `tensors` have the names of GPT.named_parameters(). With `overwrite`, an earlier export in `folder` is
    replaced. Raises ValueError if no supported class of transformers has this architecture, if the tokenizer
    has more tokens than the embedding, if `folder` is not empty, or if a file cannot be written; `folder` is
    then unchanged.
    """
    layout = choose_layout(config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {config.vocab_size}: the "
            "tokenizer is not the one of this model"
        )
    if link := broken_link(folder.expanduser()):
        raise ValueError(f"{link} is a symbolic link that leads nowhere: remove it, or choose another folder")
    folder = absolute_path(folder.expanduser())
    _check_folder(folder, overwrite)
    if layout is GPT2 and not config.bias:
        config, tensors = replace(config, bias=True), _add_zero_biases(tensors)
    _write_folder(folder, to_hf(tensors, config, layout), _json_files(config, layout, tokenizer))
    return layout


def choose_layout(config: GPTConfig) -> Layout:
    """The layout of the model class that has this architecture.

    Raises ValueError with the settings that each class does not support.
    """
    unsupported = {layout: unsupported_settings(config, layout) for layout in LAYOUTS}
    for layout, settings in unsupported.items():
        if not settings:
            return layout
    reasons = [f"{layout.name} does not support {', '.join(unsupported[layout])}" for layout in LAYOUTS]
    raise ValueError(
        "this architecture cannot be exported, because no class of transformers has it: "
        f"{'; '.join(reasons)}. The run folder has the weights as safetensors, with our names"
    )


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless `folder` is new or empty, or is an earlier export that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    is_export = folder.is_dir() and _is_export(folder)
    if not (overwrite and is_export):
        raise ValueError(
            f"{folder} already exists and is not empty: choose another folder"
            + (", or use --overwrite to replace the model in it" if is_export else "")
        )


def _is_export(folder: Path) -> bool:
    """Whether `export_model` has written all files in `folder`."""
    if not {path.name for path in folder.iterdir()} <= EXPORT_FILES:
        return False
    try:
        with safetensors.safe_open(folder / "model.safetensors", framework="pt") as weights:
            return (weights.metadata() or {}).get("creator") == CREATOR
    except (OSError, safetensors.SafetensorError):
        return False


def _add_zero_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` and biases of zero for all linear layers and norms; GPT2LMHeadModel always has biases."""
    biases = {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.size(0))
        for name, tensor in tensors.items()
        if ".h." in name or ".ln_f." in name  # not the embeddings and lm_head
    }
    return tensors | biases


def _write_folder(folder: Path, tensors: dict[str, Tensor], json_files: dict[str, dict[str, Any]]) -> None:
    """Write all files to a temporary folder and rename it to `folder`. Raises ValueError if this fails."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = temporary / "model.safetensors"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt", "creator": CREATOR})
        for name, value in json_files.items():
            (temporary / name).write_text(format_json(value), encoding="utf-8", newline="\n")
        # save_file lets only the owner read the file
        shutil.copymode(temporary / "config.json", weights)
        replace_folder(temporary, folder, EXPORT_FILES)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _json_files(config: GPTConfig, layout: Layout, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    """File name -> content of all JSON files."""
    end_of_text = tokenizer.end_of_text if tokenizer else None
    # None is written too: without the keys, transformers uses the ids of GPT-2's or LLaMA's own vocabulary
    special_ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    generation = {"do_sample": True, "temperature": 0.8}  # the defaults of sample.py
    contents = {
        "config.json": config_to_hf(config, layout) | special_ids,
        "generation_config.json": generation if end_of_text is None else special_ids | generation,
    }
    if tokenizer is None:
        return contents
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
    }
    if end_of_text is not None:
        name = tokenizer.document_separator or bpe.END_OF_TEXT
        tokenizer_config |= {"bos_token": name, "eos_token": name}
    return contents | {
        "tokenizer.json": tokenizer_to_hf(tokenizer),
        "tokenizer_config.json": tokenizer_config,
        FRADIQUE_TOKENIZER_FILE: tokenizer.to_json(),
    }


def tokenizer_to_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json for Hugging Face's package `tokenizers`, which gives the same ids.

    There is one difference: without a separator of documents, <|endoftext|> in a text is ordinary for us, but
    the special token for Hugging Face.
    """
    if not isinstance(tokenizer, CharTokenizer):
        return bpe.to_hf_json(tokenizer.merges, tokenizer.document_separator or bpe.END_OF_TEXT)
    split_characters = {
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
        "pre_tokenizer": split_characters,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # "<unk>" is not in the vocabulary, so an unknown character raises an error, as in our tokenizer
        "model": {
            "type": "WordLevel",
            "vocab": {char: i for i, char in enumerate(tokenizer.chars)},
            "unk_token": "<unk>",
        },
    }
