"""Weights from elsewhere: run folders, Hugging Face's GPT-2 and LLaMA, nanoGPT's ckpt.pt; and out again.

`load` finds out what it was given and checks all of it before it returns any: GPTConfig fields, float32
tensors under the names of `GPT.named_parameters()`, and the tokenizer. Nothing but plain data is unpickled.

    python -m fradique.pretrained export --out_dir=out/<run> --to=<folder>
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fradique import bpe, export, finetune, hub, layouts, reading, weightfiles
from fradique import checkpoint as checkpoints
from fradique import tokenizer as tokenizers
from fradique.layouts import GPT2, from_hf, to_hf
from fradique.run import SETTINGS, TOKENIZER

__all__ = ["Weights", "check_tokenizer", "from_hf", "load", "to_hf"]

GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Weights:
    """What `load` found."""

    config: dict[str, Any]  # GPTConfig fields
    tensors: dict[str, Tensor]  # under our names; the tied lm_head.weight is not listed
    tokenizer: tokenizers.Tokenizer | None  # None where none came with them
    source: str  # for messages


def load(source: str, checkpoint: str = "best", warn: Callable[[str], None] = warnings.warn) -> Weights:
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
        if (path / SETTINGS).exists() or (path / "best").exists() or checkpoints.step_folders(path):
            return _load_checkpoint(_chosen(path, checkpoint, warn), path, source)
        if (path / "ckpt.pt").exists():
            return _load_pickle(path / "ckpt.pt", source)
        if _holds_weights(path):
            return _load_hf(path, source)
    elif hub.may_have(path, source):
        folder = hub.weights(source)
        if _holds_weights(folder):
            return _load_hf(folder, source)
    raise ValueError(
        f"{source} {'holds no weights' if path.is_dir() else 'is no file or folder that is here'}. "
        "Weights come from a run folder (out/<run>) or one of its checkpoints, from nanoGPT's ckpt.pt, from "
        "GPT-2 or LLaMA in Hugging Face's layout (a folder with config.json and model.safetensors, or a "
        f".safetensors file), or from the hub by name: {', '.join(hub.NAMES)}, owner/name"
    )


def check_tokenizer(weights: Weights, tokenizer: tokenizers.Tokenizer, corpus: Path) -> None:
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


def _load_hf(folder: Path, source: str, file: Path | None = None, content: Any = None) -> Weights:
    """A folder in Hugging Face's layout; of its weights `file` alone, or the `content` of a pickle."""
    described = folder / "config.json"
    layout, config = GPT2, {}
    if described.exists():
        layout, config = layouts.config_of_json(checkpoints.read_json(described), str(described))
    if content is not None:
        tensors: Mapping[str, Tensor] | None = weightfiles.bare_tensors(content, file, layout.prefix)
    elif file is not None:
        tensors = weightfiles.TensorFiles([file], layout.prefix)
    else:
        tensors = weightfiles.stored_in(folder, layout.prefix)
    if not described.exists():
        config = _config_of_shapes(tensors, source)
    layouts.check(tensors, config, source, layout)
    is_gpt2 = _fits(GPT2_VOCAB, config["vocab_size"]) and _has_gpt2_vocabulary(folder)
    tokenizer = tokenizers.GPT2Tokenizer() if is_gpt2 else None
    if (folder / export.OUR_TOKENIZER).exists():  # we exported it
        tokenizer = tokenizers.load(folder / export.OUR_TOKENIZER)
    ours = from_hf(tensors, layout, tied=config["tie_weights"])
    return Weights(config | {"dropout": 0.0}, ours, tokenizer, source)  # dropout is for a run to set


def _config_of_shapes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What config.json would say. Every GPT-2 has heads of 64 and the tanh form of GELU."""
    layers = [int(match[0]) for name in tensors if (match := layouts.LAYER.search(name))]
    shapes = [tuple(tensors[name].shape) for name in ("wte.weight", "wpe.weight") if name in tensors]
    if [len(s) for s in shapes] != [2, 2] or not layers or not all(map(all, shapes)) or shapes[0][1] % 64:
        raise ValueError(
            f"{source}: there is no config.json beside it, and the shapes of its tensors do not tell which "
            "GPT-2 it is; put its config.json there"
        )
    (vocab_size, n_embd), (block_size, _) = shapes
    sizes = zip(layouts.SIZES, (block_size, vocab_size, 1 + max(layers), n_embd // 64, n_embd), strict=True)
    return dict(sizes) | {"activation": "gelu_tanh", "bias": True, "tie_weights": True}


def _load_checkpoint(folder: Path, run: Path, source: str) -> Weights:
    """A checkpoint folder of ours; its run folder holds the tokenizer."""
    held = checkpoints.load(folder, with_optimizer=False)
    tokenizer = tokenizers.load(run / TOKENIZER) if (run / TOKENIZER).exists() else None
    config, tensors = finetune.merged(held.config, held.model, str(folder))
    layouts.check_ours(config, tensors, str(folder / "model.json"))
    return Weights(config, tensors, tokenizer, source)


def _chosen(run: Path, checkpoint: str, warn: Callable[[str], None]) -> Path:
    if checkpoint == "newest":
        return checkpoints.newest(run, warn)
    steps = {str(int(folder.name[5:])): folder for folder in checkpoints.step_folders(run)}
    there = ({"best": run / "best"} if (run / "best").is_dir() else {}) | steps
    wanted = str(int(checkpoint)) if re.fullmatch("[0-9]{1,18}", checkpoint) else checkpoint
    if wanted not in there:
        raise ValueError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(there) or 'none yet'}")
    return there[wanted]


def _load_pickle(path: Path, source: str) -> Weights:
    """nanoGPT's ckpt.pt; or pytorch_model.bin, which is a dict of tensors."""
    content = weightfiles.plain_data(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        return _load_hf(path.parent, source, path, content)
    args, tensors = content["model_args"], weightfiles.bare_tensors(content["model"], path, GPT2.prefix)
    if not isinstance(args, dict):
        raise ValueError(f"{path} is no ckpt.pt of nanoGPT: its model_args are no dict")
    args = {"dropout": 0.0, "bias": "ln_f.bias" in tensors} | args  # the oldest have neither
    problems = layouts.no_sizes(args, layouts.SIZES)
    problems += (
        [] if isinstance(args["bias"], bool) else [f"bias = {args['bias']!r} is neither True nor False"]
    )
    problems += [
        f"nanoGPT has no {name!r}" for name in args if name not in {*layouts.SIZES, "dropout", "bias"}
    ]
    if problems:
        raise ValueError(f"{path}: its model_args describe no nanoGPT model: {'; '.join(problems)}")
    layouts.check(tensors, args, source, conv1d=False)
    trained_with = content.get("config")
    dataset = trained_with.get("dataset") if isinstance(trained_with, dict) else None
    folders = [path.parent, *([Path("data") / dataset] if reading.is_plain_name(dataset) else [])]
    tokenizer = _find_tokenizer(folders, args["vocab_size"])
    config = args | {"activation": "gelu"}  # nn.GELU(): the exact form
    return Weights(config, from_hf(tensors, conv1d=False), tokenizer, source)


def _find_tokenizer(folders: list[Path], vocab_size: int) -> tokenizers.Tokenizer | None:
    """As nanoGPT's sample.py finds it: the corpus's own, or GPT-2's."""
    for folder in folders:
        if (folder / TOKENIZER).exists():
            found = tokenizers.load(folder / TOKENIZER)
        elif (folder / "meta.pkl").exists():
            found = tokenizers.from_meta_pkl(folder / "meta.pkl")
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
        model = checkpoints.read_json(folder / "tokenizer.json").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / "vocab.json").exists():
        vocab = checkpoints.read_json(folder / "vocab.json")
    else:
        return True
    if not isinstance(vocab, dict) or {*map(str, vocab.values())} != {*map(str, range(GPT2_VOCAB))}:
        return False
    alphabet, names = bpe.byte_alphabet(), sorted(vocab, key=lambda name: int(vocab[name]))
    spelt = bytes(alphabet.get(char, 0) for name in names for char in name)
    return spelt == tokenizers.GPT2Tokenizer().decode_bytes(range(GPT2_VOCAB))


# python -m fradique.pretrained export


def main(words: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 after a user's mistake, told in one message."""
    args = _parser().parse_args(words)
    try:
        weights = load(
            args.out_dir, args.checkpoint, warn=lambda text: print(f"warning: {text}", file=sys.stderr)
        )
        folder = Path(args.to)
        layout = export.write(weights.config, weights.tensors, weights.tokenizer, folder, args.overwrite)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder} holds {args.out_dir} as a {layout.name}; transformers opens it:")
    print(f'  model = AutoModelForCausalLM.from_pretrained("{folder}")')
    print(
        f'  tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        if weights.tokenizer
        else "no tokenizer came with the weights, and none was written"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fradique.pretrained", description="Weights in and out.")
    commands = parser.add_subparsers(required=True, metavar="export")
    add = commands.add_parser(
        "export",
        help="write a run in Hugging Face's layout",
        description="Write a run as a folder that transformers opens, as a GPT-2 or a LLaMA.",
        allow_abbrev=False,
    ).add_argument
    add("--out_dir", required=True, help="the run folder, or any weights that --init_from takes")
    add("--to", required=True, help="the folder to make")
    add(
        "--checkpoint", default="best", help="which of the run's: best | newest | the number of a step (best)"
    )
    truth = {"nargs": "?", "const": True, "default": False, "type": _truth, "metavar": "True|False"}
    add("--overwrite", **truth, help="replace a model that lies in the folder")
    add("--debug", **truth, help="show the traceback of an error")
    return parser


def _truth(word: str) -> bool:
    if word not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word == "True"


if __name__ == "__main__":
    sys.exit(main())
