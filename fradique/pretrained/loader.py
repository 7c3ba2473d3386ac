"""Weights from elsewhere: run folders, Hugging Face's GPT-2 and LLaMA, nanoGPT's ckpt.pt; and out again.

`load` finds out what it was given and checks all of it before it returns any: GPTConfig fields, float32
tensors under the names of `GPT.named_parameters()`, and the tokenizer. Nothing but plain data is unpickled.

    python -m fradique.pretrained export --out_dir=out/<run> --to=<folder>
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
from fradique.pretrained import export, hf_config, hf_weights, hub, weight_files
from fradique.pretrained.hf_weights import GPT2, from_hf
from fradique.tokenizer import bpe
from fradique.tokenizer import tokenizer as tokenizers

GPT2_VOCAB = 50257


@dataclass(frozen=True)
class PretrainedWeights:
    """What `load` found."""

    config: dict[str, Any]  # GPTConfig fields
    tensors: dict[str, Tensor]  # under our names; the tied lm_head.weight is not listed
    tokenizer: tokenizers.Tokenizer | None  # None where none came with them
    source: str  # for messages


def load_weights(
    source: str, checkpoint: str = "best", warn: Callable[[str], None] = warnings.warn
) -> PretrainedWeights:
    """Weights from a run folder or one of its checkpoints, nanoGPT's ckpt.pt, or GPT-2's or LLaMA's layout: a
    folder, a `.safetensors` file, or a name on the hub.

    Of a run, `checkpoint` takes "best", "newest", or a step. Raises ValueError: what, where, what to do.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            return _load_hf(path.parent, source, path)
        return _load_pickle(path, source)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return _load_checkpoint(path, path.parent, source)
        if (path / SETTINGS_FILE).exists() or (path / "best").exists() or checkpoints.step_folders(path):
            return _load_checkpoint(_choose_checkpoint(path, checkpoint, warn), path, source)
        if (path / "ckpt.pt").exists():
            return _load_pickle(path / "ckpt.pt", source)
        if _holds_weights(path):
            return _load_hf(path, source)
    elif hub.is_hub_name(path, source):
        folder = hub.download_weights(source)
        if _holds_weights(folder):
            return _load_hf(folder, source)
    raise ValueError(
        f"{source} {'holds no weights' if path.is_dir() else 'is no file or folder that is here'}. "
        "Weights come from a run folder (out/<run>) or one of its checkpoints, from nanoGPT's ckpt.pt, from "
        "GPT-2 or LLaMA in Hugging Face's layout (a folder with config.json and model.safetensors, or a "
        f".safetensors file), or from the hub by name: {', '.join(hub.HUB_NAMES)}, owner/name"
    )


def check_tokenizer_matches(
    weights: PretrainedWeights, tokenizer: tokenizers.Tokenizer, corpus: Path
) -> None:
    """Raise ValueError where a corpus was not encoded with the tokenizer that the weights know."""
    theirs, size = weights.tokenizer, weights.config["vocab_size"]
    if theirs is not None and theirs != tokenizer:
        raise ValueError(
            f"the weights of {weights.source} were trained with another tokenizer ({theirs.kind}, "
            f"{theirs.vocab_size} tokens) than {corpus} is encoded with ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} tokens): prepare the corpus with theirs, or choose another corpus"
        )
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"{corpus} is encoded with {tokenizer.vocab_size} tokens and the weights of {weights.source} "
            f"have an embedding of {size}: they do not belong together"
        )


def _holds_weights(folder: Path) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any((folder / name).exists() for name in names)


def _load_hf(folder: Path, source: str, file: Path | None = None, content: Any = None) -> PretrainedWeights:
    """A folder in Hugging Face's layout; of its weights `file` alone, or the `content` of a pickle."""
    described = folder / "config.json"
    layout, config = GPT2, {}
    if described.exists():
        layout, config = hf_config.config_from_hf(files.read_json_object(described), str(described))
    if content is not None:
        tensors: Mapping[str, Tensor] | None = weight_files.strip_prefixes(content, file, layout.prefix)
    elif file is not None:
        tensors = weight_files.TensorFiles([file], layout.prefix)
    else:
        tensors = weight_files.open_weight_folder(folder, layout.prefix)
    if not described.exists():
        config = _config_of_shapes(tensors, source)
    hf_weights.check_tensors(tensors, config, source, layout)
    is_gpt2 = _fits(GPT2_VOCAB, config["vocab_size"]) and _has_gpt2_vocabulary(folder)
    tokenizer = tokenizers.GPT2Tokenizer() if is_gpt2 else None
    if (folder / export.FRADIQUE_TOKENIZER_FILE).exists():  # we exported it
        tokenizer = tokenizers.load_tokenizer(folder / export.FRADIQUE_TOKENIZER_FILE)
    ours = from_hf(tensors, layout, tied=config["tie_weights"])
    return PretrainedWeights(
        config | {"dropout": 0.0}, ours, tokenizer, source
    )  # dropout is for a run to set


def _config_of_shapes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What config.json would say. Every GPT-2 has heads of 64 and the tanh form of GELU."""
    layers = [int(match[0]) for name in tensors if (match := hf_weights.LAYER.search(name))]
    shapes = [tuple(tensors[name].shape) for name in ("wte.weight", "wpe.weight") if name in tensors]
    if [len(s) for s in shapes] != [2, 2] or not layers or not all(map(all, shapes)) or shapes[0][1] % 64:
        raise ValueError(
            f"{source}: there is no config.json beside it, and the shapes of its tensors do not tell which "
            "GPT-2 it is; put its config.json there"
        )
    (vocab_size, n_embd), (block_size, _) = shapes
    sizes = zip(hf_config.SIZES, (block_size, vocab_size, 1 + max(layers), n_embd // 64, n_embd), strict=True)
    return dict(sizes) | {"activation": "gelu_tanh", "bias": True, "tie_weights": True}


def _load_checkpoint(folder: Path, run: Path, source: str) -> PretrainedWeights:
    """A checkpoint folder of ours; its run folder holds the tokenizer."""
    held = checkpoints.read_checkpoint(folder, with_optimizer=False)
    tokenizer = tokenizers.load_tokenizer(run / TOKENIZER_FILE) if (run / TOKENIZER_FILE).exists() else None
    config, tensors = lora.merge_lora(held.config, held.model, str(folder))
    hf_config.check_model_config(config, tensors, str(folder / "model.json"))
    return PretrainedWeights(config, tensors, tokenizer, source)


def _choose_checkpoint(run: Path, checkpoint: str, warn: Callable[[str], None]) -> Path:
    if checkpoint == "newest":
        return checkpoints.newest_checkpoint(run, warn)
    steps = {str(int(folder.name[5:])): folder for folder in checkpoints.step_folders(run)}
    there = ({"best": run / "best"} if (run / "best").is_dir() else {}) | steps
    wanted = str(int(checkpoint)) if re.fullmatch("[0-9]{1,18}", checkpoint) else checkpoint
    if wanted not in there:
        raise ValueError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(there) or 'none yet'}")
    return there[wanted]


def _load_pickle(path: Path, source: str) -> PretrainedWeights:
    """nanoGPT's ckpt.pt; or pytorch_model.bin, which is a dict of tensors."""
    content = weight_files.load_plain_pickle(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        return _load_hf(path.parent, source, path, content)
    args, tensors = content["model_args"], weight_files.strip_prefixes(content["model"], path, GPT2.prefix)
    if not isinstance(args, dict):
        raise ValueError(f"{path} is no ckpt.pt of nanoGPT: its model_args are no dict")
    args = {"dropout": 0.0, "bias": "ln_f.bias" in tensors} | args  # the oldest have neither
    problems = hf_config.invalid_sizes(args, hf_config.SIZES)
    problems += (
        [] if isinstance(args["bias"], bool) else [f"bias = {args['bias']!r} is neither True nor False"]
    )
    problems += [
        f"nanoGPT has no {name!r}" for name in args if name not in {*hf_config.SIZES, "dropout", "bias"}
    ]
    if problems:
        raise ValueError(f"{path}: its model_args describe no nanoGPT model: {'; '.join(problems)}")
    hf_weights.check_tensors(tensors, args, source, conv1d=False)
    trained_with = content.get("config")
    dataset = trained_with.get("dataset") if isinstance(trained_with, dict) else None
    folders = [path.parent, *([Path("data") / dataset] if files.is_plain_name(dataset) else [])]
    tokenizer = _find_tokenizer(folders, args["vocab_size"])
    config = args | {"activation": "gelu"}  # nn.GELU(): the exact form
    return PretrainedWeights(config, from_hf(tensors, conv1d=False), tokenizer, source)


def _find_tokenizer(folders: list[Path], vocab_size: int) -> tokenizers.Tokenizer | None:
    """As nanoGPT's sample.py finds it: the corpus's own, or GPT-2's."""
    for folder in folders:
        if (folder / TOKENIZER_FILE).exists():
            found = tokenizers.load_tokenizer(folder / TOKENIZER_FILE)
        elif (folder / "meta.pkl").exists():
            found = tokenizers.read_meta_pkl(folder / "meta.pkl")
        else:
            continue
        return found if _fits(found.vocab_size, vocab_size) else None
    return tokenizers.GPT2Tokenizer() if _fits(GPT2_VOCAB, vocab_size) else None


def _fits(n_tokens: int, vocab_size: int) -> bool:
    """Whether an embedding of `vocab_size` is of `n_tokens`, or of so many padded to a multiple of 64."""
    return vocab_size in (n_tokens, -(-n_tokens // 64) * 64)


def _has_gpt2_vocabulary(folder: Path) -> bool:
    """Whether a Hugging Face folder has GPT-2's own vocabulary, or none: others have its size, and differ."""
    if (folder / "tokenizer.json").exists():
        model = files.read_json_object(folder / "tokenizer.json").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / "vocab.json").exists():
        vocab = files.read_json_object(folder / "vocab.json")
    else:
        return True
    if not isinstance(vocab, dict) or {*map(str, vocab.values())} != {*map(str, range(GPT2_VOCAB))}:
        return False
    alphabet, names = bpe.byte_alphabet(), sorted(vocab, key=lambda name: int(vocab[name]))
    spelt = bytes(alphabet.get(char, 0) for name in names for char in name)
    return spelt == tokenizers.GPT2Tokenizer().decode_bytes(range(GPT2_VOCAB))
