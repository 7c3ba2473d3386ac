"""Load the weights of a run folder, of Hugging Face's GPT-2 or LLaMA, or of nanoGPT's ckpt.pt.

The files may come from somebody else. Everything in them is checked before it is returned, and no code in a
pickle is run.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fradique.checkpointing.checkpoint import newest_checkpoint, read_checkpoint, step_folders, step_of
from fradique.checkpointing.run_folder import SETTINGS_FILE, TOKENIZER_FILE, load_run_tokenizer
from fradique.io.files import find_beside_project, is_plain_name, read_json_object
from fradique.nn.lora import merge_lora
from fradique.pretrained import hf_weights, hub, model_config, weight_files
from fradique.pretrained.hf_config import config_from_hf
from fradique.pretrained.hf_tokenizer import GPT2_VOCAB_SIZE, fits_embedding, read_hf_tokenizer
from fradique.pretrained.hf_weights import GPT2, Layout
from fradique.tokenizer.meta_pkl import read_meta_pkl
from fradique.tokenizer.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from model import POSITIVE_SIZES, GPTConfig

GPT2_HEAD_DIM = 64  # of every published GPT-2
# (n_layer, n_embd, block_size, vocab_size) of gpt2, gpt2-medium, gpt2-large and gpt2-xl.
PUBLISHED_GPT2_SIZES = {
    (12, 768, 1024, 50257),
    (24, 1024, 1024, 50257),
    (36, 1280, 1024, 50257),
    (48, 1600, 1024, 50257),
}
NANOGPT_FIELDS = (*POSITIVE_SIZES, "dropout", "bias")  # the fields of nanoGPT's GPTConfig


@dataclass(frozen=True)
class PretrainedWeights:
    """The weights of a model, its configuration, and its tokenizer."""

    config: GPTConfig
    tensors: dict[str, Tensor]  # by the names of GPT.named_parameters(): without a tied lm_head.weight
    tokenizer: Tokenizer | None  # None: unknown
    source: str  # what the user named, for messages


def load_weights(
    source: str, checkpoint: str = "best", warn: Callable[[str], None] = warnings.warn
) -> PretrainedWeights:
    """Load weights from files or from the Hugging Face hub.

    source: a run folder or one of its checkpoints, nanoGPT's ckpt.pt or its folder, a folder in Hugging
        Face's layout, a `.safetensors` file, or a name on the hub.
    checkpoint: which checkpoint of a run folder to load: "best", "newest", or a step number.
    warn: called with a message for each damaged checkpoint that "newest" skips.

    The tensors of nanoGPT and Hugging Face become float32. Raises ValueError if `source` does not exist, is
    damaged, or is a model that is not supported.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return load_hf_file(path, source) if path.suffix == ".safetensors" else load_pickle(path, source)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return load_checkpoint(path, path.parent, source)
        if (path / SETTINGS_FILE).exists() or (path / "best").exists() or step_folders(path):
            return load_run(path, source, checkpoint, warn)
        if (path / "ckpt.pt").exists():
            return load_pickle(path / "ckpt.pt", source)
        if weight_files.has_weights(path):
            return load_hf_folder(path, source)
    elif hub.is_hub_name(path, source):
        folder = hub.download_weights(source)
        if weight_files.has_weights(folder):
            return load_hf_folder(folder, source)
    raise ValueError(
        f"{source} {'contains no weights' if path.is_dir() else 'is no file or folder here'}. "
        "Weights can be loaded from a run folder (out/<run>) or one of its checkpoints, nanoGPT's ckpt.pt, "
        "GPT-2 or LLaMA in Hugging Face's layout (a folder with config.json and model.safetensors, or a "
        f".safetensors file), or the hub by name: {', '.join(hub.HUB_NAMES)}, owner/name"
    )


def check_tokenizer_matches(weights: PretrainedWeights, tokenizer: Tokenizer, corpus: Path) -> None:
    """Raise ValueError if the weights cannot be used with `corpus`, a folder that `tokenizer` encoded."""
    expected, vocab_size = weights.tokenizer, weights.config.vocab_size
    if expected is not None and not expected.has_same_vocabulary(tokenizer):
        raise ValueError(
            f"the weights of {weights.source} were trained with another tokenizer ({expected.kind}, "
            f"{expected.vocab_size} tokens) than {corpus} is encoded with ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} tokens): prepare the corpus with the tokenizer of the weights, or "
            "choose another corpus"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{corpus} is encoded with {tokenizer.vocab_size} tokens and the weights of {weights.source} "
            f"have an embedding of {vocab_size}: choose another corpus, or other weights"
        )


# Run folders


def load_run(run: Path, source: str, checkpoint: str, warn: Callable[[str], None]) -> PretrainedWeights:
    """Load a checkpoint of a run folder. The arguments and errors are those of `load_weights`."""
    if checkpoint == "newest":
        return load_checkpoint(newest_checkpoint(run, warn), run, source)
    folders = {"best": run / "best"} if (run / "best").is_dir() else {}
    folders |= {str(step_of(folder)): folder for folder in step_folders(run)}
    # a step number may have leading zeros, as in the names of the folders
    name = str(int(checkpoint)) if re.fullmatch("[0-9]{1,18}", checkpoint) else checkpoint
    if name not in folders:
        raise ValueError(
            f"{run} has no checkpoint {checkpoint!r}; it has "
            + (f"{', '.join(folders)}. Try --checkpoint=newest" if folders else "none yet")
        )
    return load_checkpoint(folders[name], run, source)


def load_checkpoint(folder: Path, run: Path, source: str) -> PretrainedWeights:
    """Load a checkpoint folder and the tokenizer of its run folder. LoRA is merged into the weights."""
    saved = read_checkpoint(folder, with_optimizer=False)
    tokenizer = load_run_tokenizer(run)
    values, tensors = merge_lora(saved.config, saved.model, str(folder))
    config = model_config.parse_model_config(values, tensors, str(folder / "model.json"))
    return PretrainedWeights(config, tensors, tokenizer, source)


# Hugging Face


def load_hf_folder(folder: Path, source: str) -> PretrainedWeights:
    """Load a folder in Hugging Face's layout."""
    layout, config = _read_hf_config(folder)
    tensors = weight_files.open_weight_folder(folder, layout.prefix)
    return _convert_hf(tensors, layout, config, folder, source)


def load_hf_file(path: Path, source: str) -> PretrainedWeights:
    """Load a .safetensors file, and the config.json and the tokenizer of its folder if they exist."""
    layout, config = _read_hf_config(path.parent)
    tensors = weight_files.TensorFiles([path], layout.prefix)
    return _convert_hf(tensors, layout, config, path.parent, source)


def load_pickle(path: Path, source: str) -> PretrainedWeights:
    """Load nanoGPT's ckpt.pt, or a state dict with Hugging Face's names, such as pytorch_model.bin."""
    content = weight_files.load_plain_pickle(path)
    if isinstance(content, dict) and {"model", "model_args"} <= content.keys():
        return load_nanogpt_checkpoint(content, path, source)
    layout, config = _read_hf_config(path.parent)
    tensors = weight_files.strip_prefixes(content, path, layout.prefix)
    return _convert_hf(tensors, layout, config, path.parent, source)


def _read_hf_config(folder: Path) -> tuple[Layout, GPTConfig | None]:
    """The layout and the GPTConfig of the model in a folder; (GPT2, None) if it has no config.json."""
    path = folder / "config.json"
    if not path.exists():
        return GPT2, None
    return config_from_hf(read_json_object(path), str(path))


def _convert_hf(
    tensors: Mapping[str, Tensor], layout: Layout, config: GPTConfig | None, folder: Path, source: str
) -> PretrainedWeights:
    """Check tensors that have Hugging Face's names without prefix, and convert them to our names.

    config: None if it must be derived from the shapes of the tensors. folder: where the tokenizer may be.
    """
    config = config or _gpt2_config_from_shapes(tensors, source)
    hf_weights.check_tensors(tensors, config, source, layout)
    if problems := config.problems():
        raise ValueError(f"{source} is not a usable model: {'; '.join(problems)}")
    tokenizer = read_hf_tokenizer(folder, config.vocab_size)
    converted = hf_weights.from_hf(tensors, layout, tied=config.tie_weights)
    return PretrainedWeights(config, converted, tokenizer, source)


def _gpt2_config_from_shapes(tensors: Mapping[str, Tensor], source: str) -> GPTConfig:
    """The GPTConfig of a published GPT-2 without a config.json.

    The shapes of the tensors do not show the number of heads and the activation: of another model they could
    only be guessed. Raises ValueError for other sizes.
    """
    layers = [int(match[0]) for name in tensors if (match := hf_weights.LAYER.search(name))]
    vocab_size, n_embd = _matrix_shape(tensors.get("wte.weight"))
    block_size, _ = _matrix_shape(tensors.get("wpe.weight"))
    n_layer = 1 + max(layers, default=-1)
    if (n_layer, n_embd, block_size, vocab_size) not in PUBLISHED_GPT2_SIZES:
        raise ValueError(
            f"{source}: its folder has no config.json, and the shapes of its tensors are not those of gpt2, "
            "gpt2-medium, gpt2-large or gpt2-xl; put its config.json beside it"
        )
    return GPTConfig(
        block_size=block_size,
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_head=n_embd // GPT2_HEAD_DIM,
        n_embd=n_embd,
        activation="gelu_tanh",
    )


def _matrix_shape(tensor: Tensor | None) -> tuple[int, int]:
    """The shape of a matrix; (0, 0) if `tensor` is None or no matrix."""
    return tuple(tensor.shape) if tensor is not None and tensor.dim() == 2 else (0, 0)


# nanoGPT


def load_nanogpt_checkpoint(content: dict[str, Any], path: Path, source: str) -> PretrainedWeights:
    """Convert the content of nanoGPT's ckpt.pt. The tokenizer is that of its folder, or of its corpus."""
    tensors = weight_files.strip_prefixes(content["model"], path, GPT2.prefix)
    config = _nanogpt_config(content["model_args"], tensors, path)
    hf_weights.check_tensors(tensors, config, source, conv1d=False)
    train_config = content.get("config")
    dataset = train_config.get("dataset") if isinstance(train_config, dict) else None
    folders = [path.parent]
    if is_plain_name(dataset):
        folders.append(find_beside_project(Path("data") / dataset))
    tokenizer = _find_tokenizer(folders, config.vocab_size)
    return PretrainedWeights(config, hf_weights.from_hf(tensors, conv1d=False), tokenizer, source)


def _nanogpt_config(model_args: Any, tensors: Mapping[str, Tensor], path: Path) -> GPTConfig:
    """The GPTConfig with the values of nanoGPT's model_args. Raises ValueError with all problems."""
    if not isinstance(model_args, dict):
        raise ValueError(f"{path} is not a ckpt.pt of nanoGPT: its model_args are not a dict")
    # the model_args of the oldest files have no dropout and no bias
    values = {"dropout": 0.0, "bias": "ln_f.bias" in tensors} | model_args
    problems = [f"nanoGPT has no {name!r}" for name in values if name not in NANOGPT_FIELDS]
    values = {name: values.get(name) for name in NANOGPT_FIELDS}
    problems += model_config.field_problems(values)
    if not problems:
        config = GPTConfig(**values, activation="gelu")  # nn.GELU(), the exact form
        problems = config.problems()
    if problems:
        raise ValueError(
            f"{path}: its model_args are not those of a nanoGPT model:\n  - " + "\n  - ".join(problems)
        )
    return config


def _find_tokenizer(folders: list[Path], vocab_size: int) -> Tokenizer | None:
    """The first tokenizer in `folders`, or GPT-2's if there is none, as nanoGPT chooses it.

    None if it does not fit an embedding of `vocab_size` rows.
    """
    for folder in folders:
        if (folder / TOKENIZER_FILE).exists():
            tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        elif (folder / "meta.pkl").exists():
            tokenizer = read_meta_pkl(folder / "meta.pkl")
        else:
            continue
        return tokenizer if fits_embedding(tokenizer.vocab_size, vocab_size) else None
    return GPT2Tokenizer() if fits_embedding(GPT2_VOCAB_SIZE, vocab_size) else None
