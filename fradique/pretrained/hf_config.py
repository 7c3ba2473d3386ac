"""Hugging Face's config.json <-> GPTConfig, for GPT-2 and LLaMA.

A setting that changes what the model computes, and that the other side does not have, is an error.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from fradique.nn.norms import NORM_EPS
from fradique.pretrained.hf_weights import GPT2, LAYOUTS, LLAMA, Layout
from fradique.pretrained.model_config import is_number, is_size
from model import GPTConfig

# GPTConfig field -> key in config.json
GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
# what transformers assumes for a key that config.json does not have
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
GPT2_ACTIVATIONS = {  # activation_function -> ours; for export the first of several names is used
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}

# The values of GPTConfig fields with which our model computes what a class of transformers does.
_SUPPORTED_BY_BOTH = {
    "norm_place": ("pre",),
    "qk_norm": (False,),
    "embd_norm": (False,),
    "parallel_block": (False,),
    "prefix_len": (0,),
    "sliding_window": (0,),
    "logit_softcap": (0.0,),
}
SUPPORTED_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {  # by the name of the layout
    GPT2.name: {
        "norm": ("layernorm",),
        "position": ("learned",),
        "activation": tuple(dict.fromkeys(GPT2_ACTIVATIONS.values())),
        **_SUPPORTED_BY_BOTH,
    },
    LLAMA.name: {
        "norm": ("rmsnorm",),
        "position": ("rope",),
        "activation": ("swiglu",),
        **_SUPPORTED_BY_BOTH,
    },
}


# config.json -> GPTConfig


def config_from_hf(hf: Mapping[str, Any], source: str) -> tuple[Layout, GPTConfig]:
    """The model class and the GPTConfig of a config.json.

    Raises ValueError with every setting that is invalid or not supported.
    """
    model_type = hf.get("model_type", "gpt2")
    if model_type == "gpt2":
        layout, values = GPT2, GPT2_DEFAULTS | dict(hf)
        problems = _gpt2_problems(values)
    elif model_type == "llama":
        layout, values = LLAMA, _add_llama_defaults(hf)
        problems = _llama_problems(values)
    else:
        supported = " and ".join(repr(layout.model_type) for layout in LAYOUTS)
        raise ValueError(
            f"{source} describes a model that this program does not have: model_type = "
            f"{reprlib.repr(model_type)}, and only {supported} are supported"
        )
    if problems:
        raise ValueError(
            f"{source} describes a {model_type} model that this program does not have:\n  - "
            + "\n  - ".join(problems)
        )
    return layout, _gpt2_config(values) if layout is GPT2 else _llama_config(values)


def _size_problems(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"{name} = {reprlib.repr(values[name])} is not a size" for name in names if not is_size(values[name])
    ]


def _unsupported_values(values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name} = {reprlib.repr(values[name])}, and only {' or '.join(map(repr, allowed))} is supported"
        for name, allowed in supported.items()
        if name in values and values[name] not in allowed
    ]


def _gpt2_problems(values: Mapping[str, Any]) -> list[str]:
    inner = ["n_inner"] if values["n_inner"] is not None else []
    return _size_problems(values, [*GPT2_SIZES.values(), *inner]) + _unsupported_values(
        values,
        {
            "activation_function": tuple(GPT2_ACTIVATIONS),
            "layer_norm_epsilon": (NORM_EPS,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True, False),
        },
    )


def _gpt2_config(values: Mapping[str, Any]) -> GPTConfig:
    inner = values["n_inner"] or 0
    return GPTConfig(
        **{field: values[key] for field, key in GPT2_SIZES.items()},
        activation=GPT2_ACTIVATIONS[values["activation_function"]],
        n_inner=0 if inner == 4 * values["n_embd"] else inner,
        bias=True,
        tie_weights=bool(values["tie_word_embeddings"]),
    )


def _add_llama_defaults(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A LLaMA's config.json with every key that is read here; rope_type and rope_theta at the top level."""
    values = LLAMA_DEFAULTS | dict(hf)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    return values | {
        "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "head_dim": values.get("head_dim") or None,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
    }


def _llama_problems(values: Mapping[str, Any]) -> list[str]:
    problems = _size_problems(values, [*LLAMA_SIZES.values(), "intermediate_size", "num_key_value_heads"])
    supported: dict[str, tuple[Any, ...]] = {
        "rms_norm_eps": (NORM_EPS,),
        "hidden_act": ("silu",),
        "rope_type": ("default",),
        "mlp_bias": (values["attention_bias"],),
        "tie_word_embeddings": (True, False),
    }
    if not problems:  # None: it follows from the sizes
        supported["head_dim"] = (None, values["hidden_size"] // values["num_attention_heads"])
    problems += _unsupported_values(values, supported)
    theta, bias = values["rope_theta"], values["attention_bias"]
    if not (is_number(theta) and theta > 0):
        problems.append(f"rope_theta = {reprlib.repr(theta)} is not a number above 0")
    if not isinstance(bias, bool):
        problems.append(f"attention_bias = {reprlib.repr(bias)} is neither true nor false")
    return problems


def _llama_config(values: Mapping[str, Any]) -> GPTConfig:
    kv_heads = values["num_key_value_heads"]
    return GPTConfig(
        **{field: values[key] for field, key in LLAMA_SIZES.items()},
        activation="swiglu",
        n_inner=values["intermediate_size"],
        n_kv_head=0 if kv_heads == values["num_attention_heads"] else kv_heads,
        norm="rmsnorm",
        position="rope",
        rope_theta=float(values["rope_theta"]),
        bias=values["attention_bias"],
        tie_weights=bool(values["tie_word_embeddings"]),
    )


# GPTConfig -> config.json


def unsupported_settings(config: GPTConfig, layout: Layout) -> list[str]:
    """The settings that the class does not have, one phrase each; empty if it can hold the model."""
    problems = [
        f"{name} = {getattr(config, name)!r} (it has {' or '.join(map(repr, allowed))})"
        for name, allowed in SUPPORTED_VALUES[layout.name].items()
        if getattr(config, name) not in allowed
    ]
    if layout is GPT2 and config.kv_heads != config.n_head:
        problems.append(f"n_kv_head = {config.n_kv_head} (it has 0 or {config.n_head})")
    return problems


def config_to_hf(config: GPTConfig, layout: Layout) -> dict[str, Any]:
    """What config.json says of the model; the layout must support it."""
    sizes = GPT2_SIZES if layout is GPT2 else LLAMA_SIZES
    common = {
        "architectures": [layout.name],
        "model_type": layout.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_weights,
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",  # the key in transformers 4
    } | {key: getattr(config, field) for field, key in sizes.items()}
    if layout is GPT2:
        activations = {ours: hf_name for hf_name, ours in reversed(GPT2_ACTIVATIONS.items())}
        return common | {
            "n_inner": None if config.inner == 4 * config.n_embd else config.inner,
            "activation_function": activations[config.activation],
            "layer_norm_epsilon": NORM_EPS,
            "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }
    return common | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.inner,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": 0.0,
    }
