"""Hugging Face's names and settings <-> ours, a table a model class: tensors in, tensors out.

GPT-2's and LLaMA's. Ours are those of `GPT.named_parameters()` and of `GPTConfig`.
"""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYER = re.compile(r"(?:(?<=\bh\.)|(?<=\blayers\.))[0-9]{1,9}(?=\.)")
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
HEAD = "lm_head.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORM_EPS = 1e-5  # of every norm of ours
LARGEST = 1 << 40  # a size; there is no memory for more


@dataclass(frozen=True)
class Row:
    """A tensor of ours and what it is called there, {} being the layer.

    Where there are several there, ours is all of them, one under another. The shapes are those of ours: V is
    vocab_size, T block_size, C n_embd, K kv_heads * head_dim, I the width of the MLP.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps a linear weight as (in, out)


def _row(ours: str, theirs: str, shapes: str, transposed: bool = False) -> Row:
    return Row(ours, tuple(theirs.split()), tuple(shapes.split(", ")), transposed)


@dataclass(frozen=True)
class Layout:
    """A model class of transformers."""

    name: str  # its class
    model_type: str
    prefix: str  # that names may have, but for the output layer's
    rows: tuple[Row, ...]
    needs: dict[str, tuple[Any, ...]]  # GPTConfig fields -> values that the class has

    def row_of(self, name: str, ours: bool) -> tuple[Row, str]:
        """The row of a name without prefix, and its layer or "". Raises ValueError where there is none."""
        layer = LAYER.search(name)
        pattern = LAYER.sub("{}", name, count=1)
        for row in self.rows:
            if pattern == row.ours if ours else pattern in row.theirs:
                return row, layer[0] if layer else ""
        raise ValueError(f"{name} is no tensor of a {self.name}")

    def their_name(self, name: str) -> str:
        return name if name == HEAD else self.prefix + name


ACTIVATIONS = {  # transformers' names of those that GPT-2's class takes
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
PLAIN = {  # what no class here has
    "norm_place": ("pre",),
    "qk_norm": (False,),
    "embd_norm": (False,),
    "parallel_block": (False,),
    "prefix_len": (0,),
    "sliding_window": (0,),
    "logit_softcap": (0.0,),
}

GPT2 = Layout(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    rows=(
        _row("transformer.wte.weight", "wte.weight", "V C"),
        _row("transformer.wpe.weight", "wpe.weight", "T C"),
        _row("transformer.h.{}.ln_1.weight", "h.{}.ln_1.weight", "C"),
        _row("transformer.h.{}.ln_1.bias", "h.{}.ln_1.bias", "C"),
        _row("transformer.h.{}.attn.c_attn.weight", "h.{}.attn.c_attn.weight", "3C C", transposed=True),
        _row("transformer.h.{}.attn.c_attn.bias", "h.{}.attn.c_attn.bias", "3C"),
        _row("transformer.h.{}.attn.c_proj.weight", "h.{}.attn.c_proj.weight", "C C", transposed=True),
        _row("transformer.h.{}.attn.c_proj.bias", "h.{}.attn.c_proj.bias", "C"),
        _row("transformer.h.{}.ln_2.weight", "h.{}.ln_2.weight", "C"),
        _row("transformer.h.{}.ln_2.bias", "h.{}.ln_2.bias", "C"),
        _row("transformer.h.{}.mlp.c_fc.weight", "h.{}.mlp.c_fc.weight", "I C", transposed=True),
        _row("transformer.h.{}.mlp.c_fc.bias", "h.{}.mlp.c_fc.bias", "I"),
        _row("transformer.h.{}.mlp.c_proj.weight", "h.{}.mlp.c_proj.weight", "C I", transposed=True),
        _row("transformer.h.{}.mlp.c_proj.bias", "h.{}.mlp.c_proj.bias", "C"),
        _row("transformer.ln_f.weight", "ln_f.weight", "C"),
        _row("transformer.ln_f.bias", "ln_f.bias", "C"),
        _row(HEAD, HEAD, "V C"),
    ),
    needs={
        "norm": ("layernorm",),
        "position": ("learned",),
        "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
        "n_kv_head": (0, "n_head"),
    }
    | PLAIN,
)

QKV = "layers.{}.self_attn.q_proj.* layers.{}.self_attn.k_proj.* layers.{}.self_attn.v_proj.*"
GATE_UP = "layers.{}.mlp.gate_proj.* layers.{}.mlp.up_proj.*"
LLAMA = Layout(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    rows=(
        _row("transformer.wte.weight", "embed_tokens.weight", "V C"),
        _row("transformer.h.{}.ln_1.weight", "layers.{}.input_layernorm.weight", "C"),
        _row("transformer.h.{}.attn.c_attn.weight", QKV.replace("*", "weight"), "C C, K C, K C"),
        _row("transformer.h.{}.attn.c_attn.bias", QKV.replace("*", "bias"), "C, K, K"),
        _row("transformer.h.{}.attn.c_proj.weight", "layers.{}.self_attn.o_proj.weight", "C C"),
        _row("transformer.h.{}.attn.c_proj.bias", "layers.{}.self_attn.o_proj.bias", "C"),
        _row("transformer.h.{}.mlp.c_fc.weight", GATE_UP.replace("*", "weight"), "I C, I C"),
        _row("transformer.h.{}.mlp.c_fc.bias", GATE_UP.replace("*", "bias"), "I, I"),
        _row("transformer.h.{}.mlp.c_proj.weight", "layers.{}.mlp.down_proj.weight", "C I"),
        _row("transformer.h.{}.mlp.c_proj.bias", "layers.{}.mlp.down_proj.bias", "C"),
        _row("transformer.h.{}.ln_2.weight", "layers.{}.post_attention_layernorm.weight", "C"),
        _row("transformer.ln_f.weight", "norm.weight", "C"),
        _row(HEAD, HEAD, "V C"),
    ),
    needs={"norm": ("rmsnorm",), "position": ("rope",), "activation": ("swiglu",)} | PLAIN,
)
LAYOUTS = (GPT2, LLAMA)


def from_hf(
    tensors: Mapping[str, Tensor], layout: Layout = GPT2, conv1d: bool = True, tied: bool = True
) -> dict[str, Tensor]:
    """Tensors under Hugging Face's names -> copies under ours, float32, linear weights as (out, in).

    `conv1d=False`: GPT-2's are (out, in) already, as nanoGPT keeps them. Buffers such as the causal masks,
    and the output layer where it is `tied`, are left out. Raises ValueError for a name that the class does
    not have, and for parts that are not all there.
    """
    ours: dict[str, Tensor] = {}
    bare = {name.removeprefix(layout.prefix): name for name in tensors}
    for name in bare:  # one at a time: see TensorFiles
        if BUFFER.fullmatch(name) or (tied and name == HEAD):
            continue
        row, layer = layout.row_of(name, ours=False)
        target = row.ours.format(layer)
        if target in ours:
            continue
        parts = [part.format(layer) for part in row.theirs]
        if missing := [part for part in parts if part not in bare]:
            raise ValueError(f"{', '.join(missing)} is missing beside {name}")
        turned = conv1d and row.transposed
        held = [tensors[bare[part]].t() if turned else tensors[bare[part]] for part in parts]
        shape = (sum(part.shape[0] for part in held), *held[0].shape[1:])
        ours[target] = torch.empty(shape, dtype=torch.float32)
        for place, part in zip(ours[target].split([part.shape[0] for part in held]), held, strict=True):
            place.copy_(part)
    return ours


def to_hf(
    tensors: Mapping[str, Tensor], layout: Layout = GPT2, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Tensors under our names -> under Hugging Face's, with the prefix, GPT-2's linear weights as (in, out).

    Where a tensor of ours is several there, `config` tells their sizes. An output layer that is tied is not
    listed. Raises ValueError for a name that the class does not have.
    """
    theirs = {}
    for name, tensor in tensors.items():
        row, layer = layout.row_of(name, ours=True)
        sizes = [shape[0] for shape in _shapes(row, config)] if len(row.theirs) > 1 else [tensor.shape[0]]
        for foreign, part in zip(row.theirs, tensor.split(sizes), strict=True):
            part = part.t() if row.transposed else part
            theirs[layout.their_name(foreign.format(layer))] = part.contiguous()
    return theirs


def _shapes(row: Row, config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shape of each part of a row, as linear layers keep it."""
    C = config["n_embd"]
    kv = C // config["n_head"] * (config.get("n_kv_head") or config["n_head"])
    sizes = {"V": config["vocab_size"], "T": config.get("block_size"), "C": C, "3C": 3 * C}
    sizes |= {"K": kv, "I": config.get("n_inner") or 4 * C}
    return [tuple(sizes[letter] for letter in shape.split()) for shape in row.shapes]


def expected(config: Mapping[str, Any], layout: Layout, conv1d: bool = True) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, under the foreign names without prefix, as stored there."""
    shapes = {}
    for row in layout.rows:
        if row.ours == HEAD and config.get("tie_weights", True):
            continue
        if row.ours.endswith(".bias") and not config["bias"]:
            continue
        layers = range(config["n_layer"]) if "{}" in row.ours else [""]
        for name, shape in zip(row.theirs, _shapes(row, config), strict=True):
            shape = shape[::-1] if conv1d and row.transposed else shape
            shapes |= {name.format(layer): shape for layer in layers}
    return shapes


def check(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    layout: Layout = GPT2,
    conv1d: bool = True,
) -> None:
    """Raise ValueError with every tensor that is missing, extra, of another shape or type, or not finite.

    `tensors` are named without prefix.
    """
    if config["n_layer"] > len(tensors):  # before there is a table of what each of them should hold
        raise ValueError(f"{source} cannot be used: {config['n_layer']} layers, and {len(tensors)} tensors")
    wanted, tied = expected(config, layout, conv1d), config.get("tie_weights", True)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name in tensors:
        if BUFFER.fullmatch(name) or (name == HEAD and tied):
            continue
        tensor = tensors[name]
        if name not in wanted:
            problems.append(f"{name} is no tensor of this {layout.name}")
        elif tuple(tensor.shape) != wanted[name]:
            problems.append(f"{name} is {tuple(tensor.shape)} and should be {wanted[name]}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} is of {tensor.dtype}: only plain floating-point weights are read")
        elif not all(bound.isfinite() for bound in tensor.aminmax()):  # needs no copy, as isfinite() does
            problems.append(f"{name} holds NaN or infinity")
    wte = layout.rows[0].theirs[0]
    head, table = tensors.get(HEAD), tensors.get(wte)
    untied = head is not None and table is not None and not _equal(head, table)
    if tied and untied:
        problems.append(f"{HEAD} differs from {wte}: by config.json the two are one matrix (tied)")
    if problems:
        listed = "\n  - ".join(problems)
        raise ValueError(f"{source} cannot be used, {len(problems)} problems:\n  - {listed}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


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


def config_of_json(there: Mapping[str, Any], source: str) -> tuple[Layout, dict[str, Any]]:
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


def no_sizes(there: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with those of `names` that are no whole numbers from 1 to LARGEST, a sentence each."""
    wrong = [name for name in names if type(there.get(name)) is not int or not 1 <= there[name] <= LARGEST]
    return [f"{name} = {reprlib.repr(there.get(name))} is no size" for name in wrong]


def _unlike(there: Mapping[str, Any], needed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name} = {reprlib.repr(there[name])}, and only {' or '.join(map(repr, values))} will do"
        for name, values in needed.items()
        if name in there and there[name] not in values
    ]


def _from_gpt2(there: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    there = GPT2_SIZES | {"activation_function": "gelu_new", "n_inner": None} | dict(there)
    problems = no_sizes(there, [*GPT2_SIZES, *(["n_inner"] if there["n_inner"] is not None else [])])
    problems += _unlike(
        there,
        {
            "activation_function": tuple(ACTIVATIONS),
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
        "activation": ACTIVATIONS[there["activation_function"]],
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
    problems = no_sizes(there, [*LLAMA_SIZES, "intermediate_size", "num_key_value_heads"])
    head_dim = None if problems else there["hidden_size"] // there["num_attention_heads"]
    there["head_dim"] = there.get("head_dim") or head_dim
    problems += _unlike(
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
    return plain and 0 < number < math.inf and number <= LARGEST


def to_json(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
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
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
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
    "rope_theta": (0.0, float(LARGEST)),
    "logit_softcap": (0.0, float(LARGEST)),
}


def check_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError where a model.json is no GPTConfig, or tells of more than `tensors` (ours) hold.

    What it says of sizes is held to the tensors before any model of that size is built.
    """
    problems = no_sizes(config, ["vocab_size", *(name for name in SIZES if name in config)])
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
        elif type(value) is not type(default) or (type(value) is int and not 0 <= value <= LARGEST):
            problems.append(f"{name} = {reprlib.repr(value)} is not what it may be: such as {default!r}")
    problems = problems or _beyond(config, tensors)
    if problems:
        raise ValueError(f"{source} is damaged, or of another version:\n  - " + "\n  - ".join(problems))


def _beyond(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
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


def obstacles(config: Mapping[str, Any], layout: Layout) -> list[str]:
    """Which settings of ours the class does not have; empty where it holds the model."""
    found = []
    for name, values in layout.needs.items():
        allowed = [config[value] if value == "n_head" else value for value in values]
        if config[name] not in allowed:
            needed = " or ".join(repr(value) for value in dict.fromkeys(allowed))
            found.append(f"{name} = {config[name]!r}, where it has {needed}")
    return found
