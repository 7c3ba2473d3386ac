"""TODO."""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fradique.pretrained.hf_weights import GPT2, HF_ACTIVATIONS, LAYOUTS, Layout

NORM_EPS = 1e-5  # of every norm of ours
MAX_SIZE = 1 << 40  # a size; there is no memory for more


# config.json

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
GPT2_SIZES = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
LLAMA_SIZES = {
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
}


def config_from_hf(there: Mapping[str, Any], source: str) -> tuple[Layout, dict[str, Any]]:
    """The class and the GPTConfig fields. Raises ValueError with every setting that stands in the way."""
    kind = there.get("model_type", "gpt2")
    read = {"gpt2": _from_gpt2, "llama": _from_llama}.get(kind) if isinstance(kind, str) else None
    if read is None:
        known = " or ".join(repr(layout.model_type) for layout in LAYOUTS)
        raise ValueError(
            f"{source} describes no model that this program has: model_type = {reprlib.repr(kind)}, and only "
            f"{known} will do"
        )
    config, problems = read(there)
    if problems:
        raise ValueError(
            f"{source} describes no {kind} that this program has:\n  - " + "\n  - ".join(problems)
        )
    return next(layout for layout in LAYOUTS if layout.model_type == kind), config


def invalid_sizes(there: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with those of `names` that are no whole numbers from 1 to LARGEST, a sentence each."""
    wrong = [name for name in names if type(there.get(name)) is not int or not 1 <= there[name] <= MAX_SIZE]
    return [f"{name} = {reprlib.repr(there.get(name))} is no size" for name in wrong]


def _unsupported_values(there: Mapping[str, Any], needed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name} = {reprlib.repr(there[name])}, and only {' or '.join(map(repr, values))} will do"
        for name, values in needed.items()
        if name in there and there[name] not in values
    ]


def _from_gpt2(there: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    there = GPT2_SIZES | {"activation_function": "gelu_new", "n_inner": None} | dict(there)
    problems = invalid_sizes(there, [*GPT2_SIZES, *(["n_inner"] if there["n_inner"] is not None else [])])
    problems += _unsupported_values(
        there,
        {
            "activation_function": tuple(HF_ACTIVATIONS),
            "layer_norm_epsilon": (NORM_EPS,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True, False),
        },
    )
    if problems:
        return {}, problems
    inner = there["n_inner"] or 4 * there["n_embd"]
    return dict(zip(SIZES, (there[name] for name in GPT2_SIZES), strict=True)) | {
        "activation": HF_ACTIVATIONS[there["activation_function"]],
        "n_inner": 0 if inner == 4 * there["n_embd"] else inner,
        "bias": True,
        "tie_weights": there.get("tie_word_embeddings", True),
    }, []


def _from_llama(there: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    there = LLAMA_SIZES | {"intermediate_size": 11008} | dict(there)
    there["num_key_value_heads"] = there.get("num_key_value_heads") or there["num_attention_heads"]
    rope = there.get("rope_parameters") or there.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    there["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", there.get("rope_theta", 10000.0))
    problems = invalid_sizes(there, [*LLAMA_SIZES, "intermediate_size", "num_key_value_heads"])
    head_dim = None if problems else there["hidden_size"] // there["num_attention_heads"]
    there["head_dim"] = there.get("head_dim") or head_dim
    problems += _unsupported_values(
        {"rms_norm_eps": 1e-6, "hidden_act": "silu", "mlp_bias": False} | there,
        {
            "rms_norm_eps": (NORM_EPS,),
            "hidden_act": ("silu",),
            "rope_type": ("default",),
            "head_dim": (head_dim or there["head_dim"],),
            "mlp_bias": (there.get("attention_bias", False),),
            "tie_word_embeddings": (True, False),
        },
    )
    if not _is_positive(theta):
        problems.append(f"rope_theta = {reprlib.repr(theta)} is no number above 0")
    if not isinstance(there.get("attention_bias", False), bool):
        problems.append(f"attention_bias = {reprlib.repr(there['attention_bias'])} is neither true nor false")
    if problems:
        return {}, problems
    heads, kv_heads = there["num_attention_heads"], there["num_key_value_heads"]
    return dict(zip(SIZES, (there[name] for name in LLAMA_SIZES), strict=True)) | {
        "activation": "swiglu",
        "n_inner": there["intermediate_size"],
        "n_kv_head": 0 if kv_heads == heads else kv_heads,
        "norm": "rmsnorm",
        "position": "rope",
        "rope_theta": float(theta),
        "bias": there.get("attention_bias", False),
        "tie_weights": there.get("tie_word_embeddings", False),
    }, []


def _is_positive(number: Any) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and 0 < number < math.inf and number <= MAX_SIZE


def config_to_hf(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """GPTConfig fields, all of them, -> what config.json says of the model."""
    common = {
        "architectures": [layout.name],
        "model_type": layout.model_type,
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": config["tie_weights"],
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name in transformers 4
    }
    if layout is GPT2:
        names = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config["dropout"])
        return common | {
            "n_positions": config["block_size"],
            "n_embd": config["n_embd"],
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "n_inner": None if config["n_inner"] == 4 * config["n_embd"] else config["n_inner"] or None,
            "activation_function": names[config["activation"]],
            "layer_norm_epsilon": NORM_EPS,
            **dropouts,
        }
    return common | {
        "max_position_embeddings": config["block_size"],
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_kv_head"] or config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "intermediate_size": config["n_inner"],
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "attention_bias": config["bias"],
        "mlp_bias": config["bias"],
        "attention_dropout": 0.0,
    }


DEFAULTS = {  # of GPTConfig: what runs older than a setting do not say
    "n_kv_head": 0,
    "n_inner": 0,
    "dropout": 0.0,
    "bias": True,
    "norm": "layernorm",
    "norm_place": "pre",
    "qk_norm": False,
    "embd_norm": False,
    "position": "learned",
    "rope_theta": 10000.0,
    "activation": "gelu",
    "parallel_block": False,
    "prefix_len": 0,
    "sliding_window": 0,
    "tie_weights": True,
    "logit_softcap": 0.0,
}


WIDTHS = ("vocab_size", "n_head", "n_embd", "n_kv_head", "n_inner")
RANGES = {  # what a number of GPTConfig's may be, beside a size
    "dropout": (0.0, 1.0),
    "rope_theta": (0.0, float(MAX_SIZE)),
    "logit_softcap": (0.0, float(MAX_SIZE)),
}


def check_model_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where a model.json is no GPTConfig, or tells of more than `tensors` (ours) hold.

    What it says of sizes is held to the tensors before any model of that size is built.
    """
    problems = invalid_sizes(config, ["vocab_size", *(name for name in SIZES if name in config)])
    for name, value in config.items():
        default = {"flash": True, **DEFAULTS}.get(name)
        if name in SIZES:
            continue
        if default is None:
            problems.append(f"there is no setting {reprlib.repr(name)}")
        elif name in RANGES:
            low, high = RANGES[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                problems.append(f"{name} = {reprlib.repr(value)} is no number between {low:g} and {high:g}")
        elif type(value) is not type(default) or (type(value) is int and not 0 <= value <= MAX_SIZE):
            problems.append(f"{name} = {reprlib.repr(value)} is not what it may be: such as {default!r}")
    problems = problems or _too_large(config, tensors)
    if problems:
        raise ValueError(f"{source} is damaged, or of another version:\n  - " + "\n  - ".join(problems))


def _too_large(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Which sizes are beyond what `tensors` (ours) can be of, a sentence each."""
    numbers = max(1024, sum(t.numel() for t in tensors.values()))  # so few cost nothing
    most = {"n_layer": len(tensors)} | dict.fromkeys(WIDTHS, numbers)
    found = [
        f"{name} = {config[name]}, which the tensors beside it are too few or too small for"
        for name, limit in most.items()
        if config.get(name, 0) > limit
    ]
    table = tensors.get("transformer.wte.weight")
    there = (config.get("vocab_size"), config.get("n_embd"))
    if not found and table is not None and None not in there and tuple(table.shape) != there:
        found.append(f"the embedding is {tuple(table.shape)}, and (vocab_size, n_embd) = {there}")
    return found


def unsupported_settings(config: Mapping[str, Any], layout: Layout) -> list[str]:
    """Which settings of ours the class does not have; empty where it holds the model."""
    found = []
    for name, values in layout.needs.items():
        allowed = [config[value] if value == "n_head" else value for value in values]
        if config[name] not in allowed:
            needed = " or ".join(repr(value) for value in dict.fromkeys(allowed))
            found.append(f"{name} = {config[name]!r}, where it has {needed}")
    return found
