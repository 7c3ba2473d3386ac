"""Hugging Face's names and settings <-> ours, a table a model class: tensors in, tensors out.

GPT-2's and LLaMA's. Ours are those of `GPT.named_parameters()` and of `GPTConfig`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYER = re.compile(r"(?:(?<=\bh\.)|(?<=\blayers\.))[0-9]{1,9}(?=\.)")
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
HEAD = "lm_head.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorMapping:
    """A tensor of ours and what it is called there, {} being the layer.

    Where there are several there, ours is all of them, one under another. The shapes are those of ours: V is
    vocab_size, T block_size, C n_embd, K kv_heads * head_dim, I the width of the MLP.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps a linear weight as (in, out)


def _map(ours: str, theirs: str, shapes: str, transposed: bool = False) -> TensorMapping:
    return TensorMapping(ours, tuple(theirs.split()), tuple(shapes.split(", ")), transposed)


@dataclass(frozen=True)
class Layout:
    """A model class of transformers."""

    name: str  # its class
    model_type: str
    prefix: str  # that names may have, but for the output layer's
    rows: tuple[TensorMapping, ...]
    needs: dict[str, tuple[Any, ...]]  # GPTConfig fields -> values that the class has

    def row_of(self, name: str, ours: bool) -> tuple[TensorMapping, str]:
        """The row of a name without prefix, and its layer or "". Raises ValueError where there is none."""
        layer = LAYER.search(name)
        pattern = LAYER.sub("{}", name, count=1)
        for row in self.rows:
            if pattern == row.ours if ours else pattern in row.theirs:
                return row, layer[0] if layer else ""
        raise ValueError(f"{name} is no tensor of a {self.name}")

    def their_name(self, name: str) -> str:
        return name if name == HEAD else self.prefix + name


HF_ACTIVATIONS = {  # transformers' names of those that GPT-2's class takes
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
UNSUPPORTED_BY_ALL = {  # what no class here has
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
        _map("transformer.wte.weight", "wte.weight", "V C"),
        _map("transformer.wpe.weight", "wpe.weight", "T C"),
        _map("transformer.h.{}.ln_1.weight", "h.{}.ln_1.weight", "C"),
        _map("transformer.h.{}.ln_1.bias", "h.{}.ln_1.bias", "C"),
        _map("transformer.h.{}.attn.c_attn.weight", "h.{}.attn.c_attn.weight", "3C C", transposed=True),
        _map("transformer.h.{}.attn.c_attn.bias", "h.{}.attn.c_attn.bias", "3C"),
        _map("transformer.h.{}.attn.c_proj.weight", "h.{}.attn.c_proj.weight", "C C", transposed=True),
        _map("transformer.h.{}.attn.c_proj.bias", "h.{}.attn.c_proj.bias", "C"),
        _map("transformer.h.{}.ln_2.weight", "h.{}.ln_2.weight", "C"),
        _map("transformer.h.{}.ln_2.bias", "h.{}.ln_2.bias", "C"),
        _map("transformer.h.{}.mlp.c_fc.weight", "h.{}.mlp.c_fc.weight", "I C", transposed=True),
        _map("transformer.h.{}.mlp.c_fc.bias", "h.{}.mlp.c_fc.bias", "I"),
        _map("transformer.h.{}.mlp.c_proj.weight", "h.{}.mlp.c_proj.weight", "C I", transposed=True),
        _map("transformer.h.{}.mlp.c_proj.bias", "h.{}.mlp.c_proj.bias", "C"),
        _map("transformer.ln_f.weight", "ln_f.weight", "C"),
        _map("transformer.ln_f.bias", "ln_f.bias", "C"),
        _map(HEAD, HEAD, "V C"),
    ),
    needs={
        "norm": ("layernorm",),
        "position": ("learned",),
        "activation": tuple(dict.fromkeys(HF_ACTIVATIONS.values())),
        "n_kv_head": (0, "n_head"),
    }
    | UNSUPPORTED_BY_ALL,
)

QKV = "layers.{}.self_attn.q_proj.* layers.{}.self_attn.k_proj.* layers.{}.self_attn.v_proj.*"
GATE_UP = "layers.{}.mlp.gate_proj.* layers.{}.mlp.up_proj.*"
LLAMA = Layout(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    rows=(
        _map("transformer.wte.weight", "embed_tokens.weight", "V C"),
        _map("transformer.h.{}.ln_1.weight", "layers.{}.input_layernorm.weight", "C"),
        _map("transformer.h.{}.attn.c_attn.weight", QKV.replace("*", "weight"), "C C, K C, K C"),
        _map("transformer.h.{}.attn.c_attn.bias", QKV.replace("*", "bias"), "C, K, K"),
        _map("transformer.h.{}.attn.c_proj.weight", "layers.{}.self_attn.o_proj.weight", "C C"),
        _map("transformer.h.{}.attn.c_proj.bias", "layers.{}.self_attn.o_proj.bias", "C"),
        _map("transformer.h.{}.mlp.c_fc.weight", GATE_UP.replace("*", "weight"), "I C, I C"),
        _map("transformer.h.{}.mlp.c_fc.bias", GATE_UP.replace("*", "bias"), "I, I"),
        _map("transformer.h.{}.mlp.c_proj.weight", "layers.{}.mlp.down_proj.weight", "C I"),
        _map("transformer.h.{}.mlp.c_proj.bias", "layers.{}.mlp.down_proj.bias", "C"),
        _map("transformer.h.{}.ln_2.weight", "layers.{}.post_attention_layernorm.weight", "C"),
        _map("transformer.ln_f.weight", "norm.weight", "C"),
        _map(HEAD, HEAD, "V C"),
    ),
    needs={"norm": ("rmsnorm",), "position": ("rope",), "activation": ("swiglu",)} | UNSUPPORTED_BY_ALL,
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


def _shapes(row: TensorMapping, config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shape of each part of a row, as linear layers keep it."""
    C = config["n_embd"]
    kv = C // config["n_head"] * (config.get("n_kv_head") or config["n_head"])
    sizes = {"V": config["vocab_size"], "T": config.get("block_size"), "C": C, "3C": 3 * C}
    sizes |= {"K": kv, "I": config.get("n_inner") or 4 * C}
    return [tuple(sizes[letter] for letter in shape.split()) for shape in row.shapes]


def expected_shapes(
    config: Mapping[str, Any], layout: Layout, conv1d: bool = True
) -> dict[str, tuple[int, ...]]:
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


def check_tensors(
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
    wanted, tied = expected_shapes(config, layout, conv1d), config.get("tie_weights", True)
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
