"""Load a model from a run folder, Hugging Face's GPT-2 or LLaMA, or nanoGPT's ckpt.pt.

The source may come from somebody else: everything is checked before anything is returned, and only plain data
is unpickled.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fradique.checkpointing import checkpoint as checkpoints
from fradique.checkpointing.run_folder import SETTINGS_FILE, TOKENIZER_FILE
from fradique.io import files
from fradique.nn import lora
from fradique.pretrained import hf_config, hf_weights, hub, model_config, weight_files
from fradique.pretrained.hf_weights import GPT2, Layout
from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers
from model import POSITIVE_SIZES, GPTConfig

GPT2_VOCAB_SIZE = 50257
NANOGPT_FIELDS = (*POSITIVE_SIZES, "dropout", "bias")  # of its GPTConfig


@dataclass(frozen=True)
class PretrainedWeights:
    """A model as `load_weights` returns it."""

    config: GPTConfig
    tensors: dict[str, Tensor]  # by the names of GPT.named_parameters(): without a tied lm_head.weight
    tokenizer: tokenizers.Tokenizer | None  # None: not known
    source: str  # for messages


def load_weights(
    source: str, checkpoint: str = "best", warn: Callable[[str], None] = warnings.warn
) -> PretrainedWeights:
    """Load `source`: a run folder or one of its checkpoints, nanoGPT's ckpt.pt or a folder with it, a Hugging
    Face folder, a `.safetensors` file, or a name on the hub.

    `checkpoint` chooses among those of a run: "best", "newest", or a step number. Tensors of other programs
    become float32. Raises ValueError if `source` does not exist, is damaged, or is another kind of model.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return load_hf_file(path, source) if path.suffix == ".safetensors" else load_pickle(path, source)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return load_checkpoint(path, path.parent, source)
        if (path / SETTINGS_FILE).exists() or (path / "best").exists() or checkpoints.step_folders(path):
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


def check_tokenizer_matches(
    weights: PretrainedWeights, tokenizer: tokenizers.Tokenizer, corpus: Path
) -> None:
    """Raise ValueError if a corpus, encoded with `tokenizer`, cannot be used with the weights."""
    expected, vocab_size = weights.tokenizer, weights.config.vocab_size
    if expected is not None and expected != tokenizer:
        raise ValueError(
            f"the weights of {weights.source} were trained with another tokenizer ({expected.kind}, "
            f"{expected.vocab_size} tokens) than {corpus} is encoded with ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} tokens): prepare the corpus with the tokenizer of the weights, or "
            "choose another corpus"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{corpus} is encoded with {tokenizer.vocab_size} tokens and the weights of {weights.source} "
            f"have an embedding of {vocab_size}: they do not belong together"
        )


# Run folders


def load_run(run: Path, source: str, checkpoint: str, warn: Callable[[str], None]) -> PretrainedWeights:
    """Load the chosen checkpoint of a run; `warn` is called for damaged ones that "newest" skips."""
    if checkpoint == "newest":
        return load_checkpoint(checkpoints.newest_checkpoint(run, warn), run, source)
    folders = {"best": run / "best"} if (run / "best").is_dir() else {}
    folders |= {str(int(folder.name[5:])): folder for folder in checkpoints.step_folders(run)}
    name = str(int(checkpoint)) if re.fullmatch("[0-9]{1,18}", checkpoint) else checkpoint
    if name not in folders:
        raise ValueError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(folders) or 'none yet'}")
    return load_checkpoint(folders[name], run, source)


def load_checkpoint(folder: Path, run: Path, source: str) -> PretrainedWeights:
    """Load a checkpoint folder, with LoRA merged, and the tokenizer of its run folder."""
    saved = checkpoints.read_checkpoint(folder, with_optimizer=False)
    tokenizer = tokenizers.load_tokenizer(run / TOKENIZER_FILE) if (run / TOKENIZER_FILE).exists() else None
    values, tensors = lora.merge_lora(saved.config, saved.model, str(folder))
    config = model_config.parse_model_config(values, tensors, str(folder / "model.json"))
    return PretrainedWeights(config, tensors, tokenizer, source)


# Hugging Face


def load_hf_folder(folder: Path, source: str) -> PretrainedWeights:
    """Load a folder in Hugging Face's layout."""
    layout, config = _read_hf_config(folder)
    tensors = weight_files.open_weight_folder(folder, layout.prefix)
    return _convert_hf(tensors, layout, config, folder, source)


def load_hf_file(path: Path, source: str) -> PretrainedWeights:
    """Load a .safetensors file, with the config.json and the tokenizer of its folder if they exist."""
    layout, config = _read_hf_config(path.parent)
    tensors = weight_files.TensorFiles([path], layout.prefix)
    return _convert_hf(tensors, layout, config, path.parent, source)


def load_pickle(path: Path, source: str) -> PretrainedWeights:
    """Load nanoGPT's ckpt.pt, or a state dict of Hugging Face's such as pytorch_model.bin."""
    content = weight_files.load_plain_pickle(path)
    if isinstance(content, dict) and {"model", "model_args"} <= content.keys():
        return load_nanogpt_checkpoint(content, path, source)
    layout, config = _read_hf_config(path.parent)
    tensors = weight_files.strip_prefixes(content, path, layout.prefix)
    return _convert_hf(tensors, layout, config, path.parent, source)


def _read_hf_config(folder: Path) -> tuple[Layout, GPTConfig | None]:
    """The model class and the GPTConfig of a folder; GPT-2 and None without a config.json."""
    path = folder / "config.json"
    if not path.exists():
        return GPT2, None
    return hf_config.config_from_hf(files.read_json_object(path), str(path))


def _convert_hf(
    tensors: Mapping[str, Tensor], layout: Layout, config: GPTConfig | None, folder: Path, source: str
) -> PretrainedWeights:
    """Check tensors with Hugging Face's names, without prefix, and convert them to ours."""
    config = config or _gpt2_config_from_shapes(tensors, source)
    hf_weights.check_tensors(tensors, config, source, layout)
    if problems := config.problems():
        raise ValueError(f"{source} is not a usable model: {'; '.join(problems)}")
    tokenizer = _hf_tokenizer(folder, config.vocab_size)
    converted = hf_weights.from_hf(tensors, layout, tied=config.tie_weights)
    return PretrainedWeights(config, converted, tokenizer, source)


def _gpt2_config_from_shapes(tensors: Mapping[str, Tensor], source: str) -> GPTConfig:
    """What config.json would say: every GPT-2 has heads of width 64 and the tanh form of GELU."""
    layers = [int(match[0]) for name in tensors if (match := hf_weights.LAYER.search(name))]
    shapes = [tuple(tensors[name].shape) for name in ("wte.weight", "wpe.weight") if name in tensors]
    two_tables = [len(shape) for shape in shapes] == [2, 2] and all(map(all, shapes))
    if not two_tables or not layers or shapes[0][1] % 64:
        raise ValueError(
            f"{source}: there is no config.json beside it, and the shapes of its tensors are not those of a "
            "GPT-2; put its config.json there"
        )
    (vocab_size, n_embd), (block_size, _) = shapes
    return GPTConfig(
        block_size=block_size,
        vocab_size=vocab_size,
        n_layer=1 + max(layers),
        n_head=n_embd // 64,
        n_embd=n_embd,
        activation="gelu_tanh",
    )


def _hf_tokenizer(folder: Path, vocab_size: int) -> tokenizers.Tokenizer | None:
    """Our own if we exported the folder; GPT-2's if the folder has its vocabulary, or none of that size."""
    if (folder / weight_files.FRADIQUE_TOKENIZER_FILE).exists():
        return tokenizers.load_tokenizer(folder / weight_files.FRADIQUE_TOKENIZER_FILE)
    is_gpt2 = _fits_embedding(GPT2_VOCAB_SIZE, vocab_size) and _has_gpt2_vocabulary(folder)
    return tokenizers.GPT2Tokenizer() if is_gpt2 else None


def _has_gpt2_vocabulary(folder: Path) -> bool:
    """Whether a Hugging Face folder has GPT-2's vocabulary, or none; another may have the same size."""
    if (folder / "tokenizer.json").exists():
        model = files.read_json_object(folder / "tokenizer.json").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / "vocab.json").exists():
        vocab = files.read_json_object(folder / "vocab.json")
    else:
        return True
    if not isinstance(vocab, dict) or {*map(str, vocab.values())} != {*map(str, range(GPT2_VOCAB_SIZE))}:
        return False
    alphabet, tokens = bpe.byte_alphabet(), sorted(vocab, key=lambda token: int(vocab[token]))
    text = bytes(alphabet.get(char, 0) for token in tokens for char in token)
    return text == tokenizers.GPT2Tokenizer().decode_bytes(range(GPT2_VOCAB_SIZE))


# nanoGPT


def load_nanogpt_checkpoint(content: dict[str, Any], path: Path, source: str) -> PretrainedWeights:
    """Convert the content of nanoGPT's ckpt.pt. The tokenizer is looked for beside it and in its corpus."""
    tensors = weight_files.strip_prefixes(content["model"], path, GPT2.prefix)
    config = _nanogpt_config(content["model_args"], tensors, path)
    hf_weights.check_tensors(tensors, config, source, conv1d=False)
    train_config = content.get("config")
    dataset = train_config.get("dataset") if isinstance(train_config, dict) else None
    folders = [path.parent, *([Path("data") / dataset] if files.is_plain_name(dataset) else [])]
    tokenizer = _find_tokenizer(folders, config.vocab_size)
    return PretrainedWeights(config, hf_weights.from_hf(tensors, conv1d=False), tokenizer, source)


def _nanogpt_config(model_args: Any, tensors: Mapping[str, Tensor], path: Path) -> GPTConfig:
    """The GPTConfig of nanoGPT's model_args. Raises ValueError with all problems."""
    if not isinstance(model_args, dict):
        raise ValueError(f"{path} is not a ckpt.pt of nanoGPT: its model_args are not a dict")
    values = {"dropout": 0.0, "bias": "ln_f.bias" in tensors} | model_args  # the oldest files have neither
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


def _find_tokenizer(folders: list[Path], vocab_size: int) -> tokenizers.Tokenizer | None:
    """The tokenizer that nanoGPT's sample.py would use: the one of the corpus, or GPT-2's."""
    for folder in folders:
        if (folder / TOKENIZER_FILE).exists():
            tokenizer = tokenizers.load_tokenizer(folder / TOKENIZER_FILE)
        elif (folder / "meta.pkl").exists():
            tokenizer = tokenizers.read_meta_pkl(folder / "meta.pkl")
        else:
            continue
        return tokenizer if _fits_embedding(tokenizer.vocab_size, vocab_size) else None
    return tokenizers.GPT2Tokenizer() if _fits_embedding(GPT2_VOCAB_SIZE, vocab_size) else None


def _fits_embedding(n_tokens: int, vocab_size: int) -> bool:
    """Whether vocab_size is the number of tokens, possibly padded to a multiple of 64."""
    return vocab_size in (n_tokens, -(-n_tokens // 64) * 64)
