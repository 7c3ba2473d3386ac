"""Hugging Face GPT-2 names <-> ours, and nanoGPT's ckpt.pt, as one table; dicts of tensors in, dicts out.

`load` finds out what it was given and checks all of it before it returns any: GPTConfig fields, float32
tensors under the names of `GPT.named_parameters()`, and the tokenizer. Nothing but plain data is unpickled.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fradique import bpe
from fradique import checkpoint as checkpoints
from fradique import tokenizer as tokenizers
from fradique.run import SETTINGS, TOKENIZER


@dataclass(frozen=True)
class Row:
    """A tensor's two names, {} being the layer, and our shape: V is vocab_size, T block_size, C n_embd."""

    ours: str
    theirs: str  # Hugging Face's and nanoGPT's, without the prefix `transformer.` that either may have
    shape: str
    transposed: bool = False  # Hugging Face's Conv1D keeps a linear weight as (in, out)


TABLE = (
    Row("transformer.wte.weight", "wte.weight", "V C"),
    Row("transformer.wpe.weight", "wpe.weight", "T C"),
    Row("transformer.h.{}.ln_1.weight", "h.{}.ln_1.weight", "C"),
    Row("transformer.h.{}.ln_1.bias", "h.{}.ln_1.bias", "C"),
    Row("transformer.h.{}.attn.c_attn.weight", "h.{}.attn.c_attn.weight", "3C C", transposed=True),
    Row("transformer.h.{}.attn.c_attn.bias", "h.{}.attn.c_attn.bias", "3C"),
    Row("transformer.h.{}.attn.c_proj.weight", "h.{}.attn.c_proj.weight", "C C", transposed=True),
    Row("transformer.h.{}.attn.c_proj.bias", "h.{}.attn.c_proj.bias", "C"),
    Row("transformer.h.{}.ln_2.weight", "h.{}.ln_2.weight", "C"),
    Row("transformer.h.{}.ln_2.bias", "h.{}.ln_2.bias", "C"),
    Row("transformer.h.{}.mlp.c_fc.weight", "h.{}.mlp.c_fc.weight", "4C C", transposed=True),
    Row("transformer.h.{}.mlp.c_fc.bias", "h.{}.mlp.c_fc.bias", "4C"),
    Row("transformer.h.{}.mlp.c_proj.weight", "h.{}.mlp.c_proj.weight", "C 4C", transposed=True),
    Row("transformer.h.{}.mlp.c_proj.bias", "h.{}.mlp.c_proj.bias", "C"),
    Row("transformer.ln_f.weight", "ln_f.weight", "C"),
    Row("transformer.ln_f.bias", "ln_f.bias", "C"),
)
OURS, THEIRS = {row.ours: row for row in TABLE}, {row.theirs: row for row in TABLE}
LAYER = re.compile(r"(?<=\bh\.)\d+(?=\.)")
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old files carry along
HEAD = "lm_head.weight"  # the output layer, one matrix with wte
PREFIX = "transformer."

TANH = "gelu_tanh"
ACTIVATIONS = {"gelu_new": TANH, "gelu_pytorch_tanh": TANH, "gelu_fast": TANH, "gelu": "gelu"}
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
GPT2_SIZES = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
GPT2_VOCAB = 50257
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Weights:
    """What `load` found."""

    config: dict[str, Any]  # GPTConfig fields
    tensors: dict[str, Tensor]  # under our names; the tied lm_head.weight is not listed
    tokenizer: tokenizers.Tokenizer | None  # None where none came with them
    source: str  # for messages


def load(source: str, checkpoint: str = "best", warn: Callable[[str], None] = warnings.warn) -> Weights:
    """Weights from a run folder or one of its checkpoints, nanoGPT's ckpt.pt, or GPT-2's layout: a folder, a
    `.safetensors` file, or a name on the hub.

    Of a run, `checkpoint` takes "best", "newest", or a step. Raises ValueError: what, where, what to do.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            return _load_hf(path.parent, TensorFiles([path]), source)
        return _load_pickle(path, source)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return _load_checkpoint(path, path.parent, source)
        if (path / SETTINGS).exists() or (path / "best").exists() or checkpoints.step_folders(path):
            return _load_checkpoint(_chosen(path, checkpoint, warn), path, source)
        if (path / "ckpt.pt").exists():
            return _load_pickle(path / "ckpt.pt", source)
        if (tensors := _stored(path)) is not None:
            return _load_hf(path, tensors, source)
    elif _may_be_on_hub(path, source):
        folder = _from_hub(source)
        if (tensors := _stored(folder)) is not None:
            return _load_hf(folder, tensors, source)
    raise ValueError(
        f"{source} {'holds no weights' if path.is_dir() else 'is no file or folder that is here'}. "
        "Weights come from a run folder (out/<run>) or one of its checkpoints, from nanoGPT's ckpt.pt, from "
        "GPT-2 in Hugging Face's layout (a folder with config.json and model.safetensors, or a .safetensors "
        f"file), or from the hub by name: {', '.join(HUB_NAMES)}, owner/name"
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


def from_hf(tensors: Mapping[str, Tensor], conv1d: bool = True) -> dict[str, Tensor]:
    """Tensors under Hugging Face's names -> copies under ours, float32, linear weights as (out, in).

    `conv1d=False`: they are (out, in) already, as nanoGPT keeps them. The causal masks and the tied output
    layer are left out. Raises ValueError for a name that GPT-2 does not have.
    """
    ours = {}
    for name in tensors:  # one at a time: see TensorFiles
        bare = name.removeprefix(PREFIX)
        if not BUFFER.fullmatch(bare) and bare != HEAD:
            row, layer = _row(bare, THEIRS)
            tensor = tensors[name].t() if conv1d and row.transposed else tensors[name]
            ours[row.ours.format(layer)] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    return ours


def to_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names -> under Hugging Face's, with the prefix, linear weights as (in, out).

    The output layer is not listed: it is tied. Raises ValueError for a name that GPT-2 does not have.
    """
    theirs = {}
    for name, tensor in tensors.items():
        row, layer = _row(name, OURS)
        theirs[PREFIX + row.theirs.format(layer)] = tensor.t().contiguous() if row.transposed else tensor
    return theirs


def _row(name: str, rows: dict[str, Row]) -> tuple[Row, str]:
    """The row of a name and its layer ("" where it has none)."""
    layer = LAYER.search(name)
    if (row := rows.get(LAYER.sub("{}", name, count=1))) is None:
        raise ValueError(f"{name} is no tensor of a GPT-2")
    return row, layer[0] if layer else ""


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, the largest first, `transformer.` left out.

    Each look-up maps its file anew and gives a view of it, so nothing is held here: who copies them one by
    one never has more than the copies and one tensor in memory.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with _opened(file) as stored:
                self.places |= {name.removeprefix(PREFIX): (file, name) for name in stored.keys()}  # noqa: SIM118
        self.names = sorted(self.places, key=lambda name: -self[name].numel())

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self.places[name]
        with _opened(file) as stored:
            return stored.get_tensor(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            yield stored
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; copy or download it again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{file} is truncated, or a pickle or something else instead of safetensors ({error}); copy or "
            "download it again, or save the model anew with save_pretrained of transformers"
        ) from error


def _stored(folder: Path) -> Mapping[str, Tensor] | None:
    """The tensors of a Hugging Face folder: one file, several with an index, or, long ago, a pickle."""
    index, pickled = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if (folder / "model.safetensors").exists():
        return TensorFiles([folder / "model.safetensors"])
    if index.exists():
        return TensorFiles(folder / name for name in _shard_names(index))
    return _bare_tensors(_plain_data(pickled), pickled) if pickled.exists() else None


def _shard_names(index: Path) -> list[str]:
    names = checkpoints.read_json(index).get("weight_map")
    files = set(names.values()) if isinstance(names, dict) else set()
    if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise ValueError(f"{index} is damaged: its weight_map names no files of this folder")
    return sorted(files)


def _load_hf(folder: Path, tensors: Mapping[str, Tensor], source: str) -> Weights:
    if (folder / "config.json").exists():
        config = _config_of_json(checkpoints.read_json(folder / "config.json"), folder / "config.json")
    else:
        config = _config_of_shapes(tensors, source)
    config |= {"dropout": 0.0, "bias": True}  # dropout is for a run to set
    _check(tensors, config, source, conv1d=True)
    is_gpt2 = _fits(GPT2_VOCAB, config["vocab_size"]) and _has_gpt2_vocabulary(folder)
    return Weights(config, from_hf(tensors), tokenizers.GPT2Tokenizer() if is_gpt2 else None, source)


def _config_of_json(there: dict[str, Any], path: Path) -> dict[str, Any]:
    """GPTConfig fields. Raises ValueError with every setting that stands in the way."""
    there = GPT2_SIZES | {"activation_function": "gelu_new", "n_inner": None} | there
    problems = _no_sizes(there, GPT2_SIZES)
    needed = {
        "model_type": ("gpt2",),
        "activation_function": tuple(ACTIVATIONS),
        "n_inner": (None, there["n_inner"] if problems else 4 * there["n_embd"]),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    problems += [
        f"{name} = {there[name]!r}, and only {' or '.join(map(repr, values))} will do"
        for name, values in needed.items()
        if name in there and there[name] not in values
    ]
    if problems:
        raise ValueError(f"{path} describes no GPT-2 that this program has:\n  - " + "\n  - ".join(problems))
    sizes = zip(SIZES, (there[name] for name in GPT2_SIZES), strict=True)
    return dict(sizes) | {"activation": ACTIVATIONS[there["activation_function"]]}


def _no_sizes(there: dict[str, Any], names: Iterable[str]) -> list[str]:
    wrong = [name for name in names if type(there.get(name)) is not int or there[name] < 1]
    return [f"{name} = {there.get(name)!r} is no size" for name in wrong]


def _config_of_shapes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What config.json would say. Every GPT-2 has heads of 64 and the tanh form of GELU."""
    layers = [int(match[0]) for name in tensors if (match := LAYER.search(name))]
    shapes = [tuple(tensors[name].shape) for name in ("wte.weight", "wpe.weight") if name in tensors]
    if [len(shape) for shape in shapes] != [2, 2] or not layers or shapes[0][1] % 64:
        raise ValueError(
            f"{source}: there is no config.json beside it, and the shapes of its tensors do not tell which "
            "GPT-2 it is; put its config.json there"
        )
    (vocab_size, n_embd), (block_size, _) = shapes
    sizes = zip(SIZES, (block_size, vocab_size, 1 + max(layers), n_embd // 64, n_embd), strict=True)
    return dict(sizes) | {"activation": TANH}


def _check(tensors: Mapping[str, Tensor], config: dict[str, Any], source: str, conv1d: bool) -> None:
    """Raise ValueError with every tensor that is missing, extra, of another shape or type, or not finite."""
    expected = _expected(config, conv1d)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name in tensors:
        if BUFFER.fullmatch(name) or name == HEAD:
            continue
        tensor = tensors[name]
        if name not in expected:
            problems.append(f"{name} is no tensor of this GPT-2")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} is {tuple(tensor.shape)} and should be {expected[name]}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} is of {tensor.dtype}: only plain floating-point weights are read")
        elif not all(bound.isfinite() for bound in tensor.aminmax()):  # needs no copy, as isfinite() does
            problems.append(f"{name} holds NaN or infinity")
    head, wte = tensors.get(HEAD), tensors.get("wte.weight")
    if head is not None and wte is not None and not (head.dtype == wte.dtype and torch.equal(head, wte)):
        problems.append(f"{HEAD} differs from wte.weight: here the two are one matrix (tied)")
    if problems:
        listed = "\n  - ".join(problems)
        raise ValueError(f"{source} cannot be used, {len(problems)} problems:\n  - {listed}")


def _expected(config: dict[str, Any], conv1d: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, under the foreign names, as stored there."""
    C = config["n_embd"]
    sizes = {"V": config["vocab_size"], "T": config["block_size"], "C": C, "3C": 3 * C, "4C": 4 * C}
    shapes = {}
    for row in TABLE:
        shape = tuple(sizes[letter] for letter in row.shape.split())
        shape = shape[::-1] if conv1d and row.transposed else shape
        layers = range(config["n_layer"]) if "{}" in row.theirs else [""]
        if config["bias"] or not row.theirs.endswith(".bias"):
            shapes |= {row.theirs.format(layer): shape for layer in layers}
    return shapes


def _load_checkpoint(folder: Path, run: Path, source: str) -> Weights:
    """A checkpoint folder of ours; its run folder holds the tokenizer."""
    held = checkpoints.load(folder, with_optimizer=False)
    tokenizer = tokenizers.load(run / TOKENIZER) if (run / TOKENIZER).exists() else None
    return Weights(held.config, held.model, tokenizer, source)


def _chosen(run: Path, checkpoint: str, warn: Callable[[str], None]) -> Path:
    if checkpoint == "newest":
        return checkpoints.newest(run, warn)
    steps = {str(int(folder.name[5:])): folder for folder in checkpoints.step_folders(run)}
    there = ({"best": run / "best"} if (run / "best").is_dir() else {}) | steps
    wanted = str(int(checkpoint)) if checkpoint.isdecimal() else checkpoint
    if wanted not in there:
        raise ValueError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(there) or 'none yet'}")
    return there[wanted]


def _load_pickle(path: Path, source: str) -> Weights:
    """nanoGPT's ckpt.pt; or pytorch_model.bin, which is a dict of tensors."""
    content = _plain_data(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        return _load_hf(path.parent, _bare_tensors(content, path), source)
    args, tensors = content["model_args"], _bare_tensors(content["model"], path)
    if not isinstance(args, dict):
        raise ValueError(f"{path} is no ckpt.pt of nanoGPT: its model_args are no dict")
    args = {"dropout": 0.0, "bias": "ln_f.bias" in tensors} | args  # the oldest have neither
    problems = _no_sizes(args, SIZES)
    problems += (
        [] if isinstance(args["bias"], bool) else [f"bias = {args['bias']!r} is neither True nor False"]
    )
    problems += [f"nanoGPT has no {name!r}" for name in args if name not in {*SIZES, "dropout", "bias"}]
    if problems:
        raise ValueError(f"{path}: its model_args describe no nanoGPT model: {'; '.join(problems)}")
    _check(tensors, args, source, conv1d=False)
    trained_with = content.get("config")
    dataset = trained_with.get("dataset") if isinstance(trained_with, dict) else None
    folders = [path.parent, *([Path("data") / dataset] if isinstance(dataset, str) else [])]
    tokenizer = _find_tokenizer(folders, args["vocab_size"])
    config = args | {"activation": "gelu"}  # nn.GELU(): the exact form
    return Weights(config, from_hf(tensors, conv1d=False), tokenizer, source)


def _plain_data(path: Path) -> Any:
    """What torch.save wrote. Raises ValueError where it is more than plain data: that is never run."""
    try:
        with path.open("rb") as file:
            mappable = file.read(4) == b"PK\x03\x04"  # the zip format, of torch 1.6 and later
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle raises almost anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is a pickle of more than tensors and plain data: it asks for {asked[1]}, which "
                "could run code, so it was not opened; nanoGPT's ckpt.pt needs nothing of the kind"
            ) from error
        why = re.split(r"\. |\n", str(error).rpartition("WeightsUnpickler error: ")[2].strip())[0]
        raise ValueError(
            f"{path} cannot be read: it is truncated or damaged, or not written by torch.save "
            f"({type(error).__name__}: {why}); copy it again"
        ) from error


def _bare_tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()) or not state:
        raise ValueError(f"{path} holds no model: neither nanoGPT's ckpt.pt nor a dict of tensors by name")
    return {str(name).removeprefix("_orig_mod.").removeprefix(PREFIX): t for name, t in state.items()}


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


def _may_be_on_hub(path: Path, source: str) -> bool:
    """Whether it reads like a name there, and not like a misspelt path into a folder that is here."""
    is_file = path.suffix in (".safetensors", ".pt", ".bin")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not is_file and not path.parent.exists()
    return source in HUB_NAMES or bool(named)


def _from_hub(name: str) -> Path:
    """Download config.json and the weights, or find them in the cache; the folder where they lie."""
    folder = _download(name, "config.json", "tokenizer.json", "vocab.json")
    _config_of_json(checkpoints.read_json(folder / "config.json"), folder / "config.json")  # before gigabytes
    folder = _download(name, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
    return folder if any(folder.glob("*.safetensors")) else _download(name, "pytorch_model.bin")


def _download(name: str, *patterns: str) -> Path:
    import huggingface_hub  # slow to import, and few need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # its own, httpx's, requests': they differ from version to version
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {why}). Without a network, what was downloaded before is found in its "
            "cache (HF_HOME, by default ~/.cache/huggingface); or copy the model's config.json and "
            "model.safetensors into a folder and give that"
        ) from error
