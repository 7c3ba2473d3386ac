"""Convert between Hugging Face's config.json of a GPT-2 or LLaMA and GPTConfig.

A setting that changes what the model computes, and that the other side does not have, raises ValueError.
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
# the values that transformers uses for keys that are not in config.json
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
GPT2_ACTIVATIONS = {  # activation_function in config.json -> activation; an export uses the first name
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}

# GPTConfig field -> the values with which GPT2LMHeadModel and LlamaForCausalLM compute the same as our model
_SUPPORTED_BY_BOTH = {
    "norm_place": ("pre",),
    "qk_norm": (False,),
    "embd_norm": (False,),
    "parallel_block": (False,),
    "prefix_len": (0,),
    "sliding_window": (0,),
    "logit_softcap": (0.0,),
    "ngram_max": (1,),
}
# name of a layout -> GPTConfig field -> the values that the class supports
SUPPORTED_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
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


def config_from_hf(hf_config: Mapping[str, Any], source: str) -> tuple[Layout, GPTConfig]:
    """The layout and the GPTConfig of the model that a config.json describes.

    hf_config: its content. source: its path, for messages. Raises ValueError with every setting that is
    invalid or not supported.
    """
    model_type = hf_config.get("model_type", "gpt2")
    if model_type == "gpt2":
        layout, values = GPT2, GPT2_DEFAULTS | dict(hf_config)
        problems = _gpt2_problems(values)
    elif model_type == "llama":
        layout, values = LLAMA, _add_llama_defaults(hf_config)
        problems = _llama_problems(values)
    else:
        supported = " and ".join(repr(layout.model_type) for layout in LAYOUTS)
        raise ValueError(
            f"{source} describes a model that is not supported: model_type = {reprlib.repr(model_type)}, and "
            f"only {supported} are supported"
        )
    if problems:
        listed = "\n  - ".join(problems)
        raise ValueError(f"{source} describes a {model_type} model that is not supported:\n  - {listed}")
    return layout, _gpt2_config(values) if layout is GPT2 else _llama_config(values)


def _size_problems(values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return [
        f"{key} = {reprlib.repr(values[key])} is not a size (a whole number above 0)"
        for key in keys
        if not is_size(values[key])
    ]


def _unsupported_values(values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """A problem for each value that is not among those in `supported`, both by their key in config.json."""
    return [
        f"{key} = {reprlib.repr(values[key])}, and only {' or '.join(map(repr, allowed))} is supported"
        for key, allowed in supported.items()
        if key in values and values[key] not in allowed
    ]


def _gpt2_problems(values: Mapping[str, Any]) -> list[str]:
    sizes = [*GPT2_SIZES.values()]
    if values["n_inner"] is not None:
        sizes.append("n_inner")
    supported = {
        "activation_function": tuple(GPT2_ACTIVATIONS),
        "layer_norm_epsilon": (NORM_EPS,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True, False),
    }
    return _size_problems(values, sizes) + _unsupported_values(values, supported)


def _gpt2_config(values: Mapping[str, Any]) -> GPTConfig:
    inner = values["n_inner"] or 0  # 0: the default, 4 * n_embd
    return GPTConfig(
        **{field: values[key] for field, key in GPT2_SIZES.items()},
        activation=GPT2_ACTIVATIONS[values["activation_function"]],
        n_inner=0 if inner == 4 * values["n_embd"] else inner,
        bias=True,
        tie_weights=bool(values["tie_word_embeddings"]),
    )


def _add_llama_defaults(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a LLaMA's config.json with a value for every key that is used here.

    rope_type and rope_theta, which are nested in some versions of transformers, get keys of their own.
    """
    values = LLAMA_DEFAULTS | dict(hf_config)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        rope = {"rope_type": rope}  # _llama_problems rejects it
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
    if not problems:  # only valid sizes can be divided
        default_head_dim = values["hidden_size"] // values["num_attention_heads"]
        supported["head_dim"] = (None, default_head_dim)
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
    """The settings of `config` that the layout's class does not support, each with the supported values."""
    problems = [
        f"{name} = {getattr(config, name)!r} (only {' or '.join(map(repr, allowed))})"
        for name, allowed in SUPPORTED_VALUES[layout.name].items()
        if getattr(config, name) not in allowed
    ]
    if layout is GPT2 and config.kv_heads != config.n_head:
        problems.append(f"n_kv_head = {config.n_kv_head} (only 0 or {config.n_head})")
    return problems


def config_to_hf(config: GPTConfig, layout: Layout) -> dict[str, Any]:
    """The content of the config.json of a model. `unsupported_settings` of the layout must be empty."""
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
        activations = [name for name, ours in GPT2_ACTIVATIONS.items() if ours == config.activation]
        return common | {
            "n_inner": None if config.inner == 4 * config.n_embd else config.inner,
            "activation_function": activations[0],
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
