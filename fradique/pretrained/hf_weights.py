"""Convert weights between Hugging Face's GPT-2 and LLaMA and our GPT: names, transposes, stacked matrices.

A `Layout` is one table for each model class of the `transformers` library, used for import, export and
checks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model import GPTConfig

# The digits in "h.3." or "layers.3.": at most 9, because names come from files that nobody has checked.
LAYER = re.compile(r"(?:(?<=\bh\.)|(?<=\blayers\.))[0-9]{1,9}(?=\.)")
# Buffers that old versions of transformers saved with the weights: causal masks, RoPE frequencies.
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
LM_HEAD = "lm_head.weight"
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorMapping:
    """One of our parameters and the Hugging Face tensors that it consists of, concatenated along dim 0.

    "{}" in a name is the layer number. shapes: of each of `hf_names`, with linear weights as (out, in). The
    symbols: V = vocab_size, T = block_size, C = n_embd, 3C = 3 * n_embd, K = kv_heads * head_dim (the width
    of all keys or values), I = the MLP's hidden width.
    """

    name: str
    hf_names: tuple[str, ...]
    shapes: tuple[str, ...]
    transposed: bool = False  # GPT-2's Conv1D stores a linear weight as (in, out)


def _map(name: str, hf_names: str, shapes: str, transposed: bool = False) -> TensorMapping:
    """A TensorMapping. Names are separated by spaces, shapes by ", "."""
    return TensorMapping(name, tuple(hf_names.split()), tuple(shapes.split(", ")), transposed)


@dataclass(frozen=True)
class Layout:
    """How one model class of the `transformers` library names and stores its weights."""

    name: str  # of the class
    model_type: str  # in config.json
    prefix: str  # of all names but lm_head.weight; a file may lack it
    mappings: tuple[TensorMapping, ...]

    def find(self, name: str) -> tuple[TensorMapping, str]:
        """The mapping of one of our names, and the digits of its layer ("" if it is in no layer).

        Raises ValueError if the class has no such tensor.
        """
        pattern, layer = _split_layer(name)
        return self._only([m for m in self.mappings if m.name == pattern], name), layer

    def find_hf(self, hf_name: str) -> tuple[TensorMapping, str]:
        """Like `find`, for a Hugging Face name without prefix."""
        pattern, layer = _split_layer(hf_name)
        return self._only([m for m in self.mappings if pattern in m.hf_names], hf_name), layer

    def _only(self, matches: list[TensorMapping], name: str) -> TensorMapping:
        if not matches:
            raise ValueError(f"{name} is not a tensor of {self.name}")
        (match,) = matches
        return match

    def with_prefix(self, hf_name: str) -> str:
        return hf_name if hf_name == LM_HEAD else self.prefix + hf_name


def _split_layer(name: str) -> tuple[str, str]:
    """h.3.ln_1.bias -> (h.{}.ln_1.bias, 3)."""
    layer = LAYER.search(name)
    return LAYER.sub("{}", name, count=1), layer[0] if layer else ""


GPT2 = Layout(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    mappings=(
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
        _map(LM_HEAD, LM_HEAD, "V C"),
    ),
)

# * is replaced by "weight" or "bias".
QKV = "layers.{}.self_attn.q_proj.* layers.{}.self_attn.k_proj.* layers.{}.self_attn.v_proj.*"
GATE_UP = "layers.{}.mlp.gate_proj.* layers.{}.mlp.up_proj.*"
LLAMA = Layout(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    mappings=(
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
        _map(LM_HEAD, LM_HEAD, "V C"),
    ),
)
LAYOUTS = (GPT2, LLAMA)


def from_hf(
    tensors: Mapping[str, Tensor], layout: Layout = GPT2, conv1d: bool = True, tied: bool = True
) -> dict[str, Tensor]:
    """Tensors under Hugging Face's names -> float32 copies under ours, with linear weights as (out, in).

    The names may have the layout's prefix or not. conv1d: GPT-2's linear weights are stored as (in, out), as
    transformers does; False for nanoGPT's checkpoints. tied: skip lm_head.weight, which is the token
    embedding. Buffers such as causal masks are skipped. Raises ValueError for an unknown name, and if one of
    the tensors that a parameter consists of is missing.
    """
    converted: dict[str, Tensor] = {}
    full_names = {name.removeprefix(layout.prefix): name for name in tensors}
    for hf_name in full_names:
        if BUFFER.fullmatch(hf_name) or (tied and hf_name == LM_HEAD):
            continue
        mapping, layer = layout.find_hf(hf_name)
        name = mapping.name.format(layer)
        if name in converted:
            continue
        part_names = [template.format(layer) for template in mapping.hf_names]
        if missing := [part_name for part_name in part_names if part_name not in full_names]:
            raise ValueError(f"{hf_name} is there, but not {', '.join(missing)}, which {name} needs too")
        # read only now: with weight_files.TensorFiles few tensors are in memory at a time
        parts = [tensors[full_names[part_name]] for part_name in part_names]
        if conv1d and mapping.transposed:
            parts = [part.t() for part in parts]
        converted[name] = _concatenate(parts)
    return converted


def _concatenate(parts: list[Tensor]) -> Tensor:
    """torch.cat along dim 0 into a new float32 tensor, without a float32 copy of each part."""
    lengths = [part.shape[0] for part in parts]
    result = torch.empty((sum(lengths), *parts[0].shape[1:]), dtype=torch.float32)
    for target, part in zip(result.split(lengths), parts, strict=True):
        target.copy_(part)
    return result


def to_hf(tensors: Mapping[str, Tensor], config: GPTConfig, layout: Layout = GPT2) -> dict[str, Tensor]:
    """Tensors under our names -> under Hugging Face's, with prefix; the inverse of `from_hf`.

    GPT-2's linear weights become (in, out). Raises ValueError for a name that the class does not have.
    """
    converted = {}
    for name, tensor in tensors.items():
        mapping, layer = layout.find(name)
        parts = tensor.split([shape[0] for shape in _part_shapes(mapping, config)])
        for hf_name, part in zip(mapping.hf_names, parts, strict=True):
            part = part.t() if mapping.transposed else part
            converted[layout.with_prefix(hf_name.format(layer))] = part.contiguous()
    return converted


def _part_shapes(mapping: TensorMapping, config: GPTConfig) -> list[tuple[int, ...]]:
    """The shape of each of a mapping's hf_names, linear weights as (out, in)."""
    sizes = {
        "V": config.vocab_size,
        "T": config.block_size,
        "C": config.n_embd,
        "3C": 3 * config.n_embd,
        "K": config.kv_heads * config.head_dim,
        "I": config.inner,
    }
    return [tuple(sizes[symbol] for symbol in shape.split()) for shape in mapping.shapes]


def expected_shapes(config: GPTConfig, layout: Layout, conv1d: bool = True) -> dict[str, tuple[int, ...]]:
    """Hugging Face name without prefix -> shape, as stored in the file, for every tensor of the model."""
    expected = {}
    for mapping in layout.mappings:
        if mapping.name == LM_HEAD and config.tie_weights:
            continue
        if mapping.name.endswith(".bias") and not config.bias:
            continue
        layers = range(config.n_layer) if "{}" in mapping.name else [""]
        for hf_name, shape in zip(mapping.hf_names, _part_shapes(mapping, config), strict=True):
            shape = shape[::-1] if conv1d and mapping.transposed else shape
            for layer in layers:
                expected[hf_name.format(layer)] = shape
    return expected


def check_tensors(
    tensors: Mapping[str, Tensor],
    config: GPTConfig,
    source: str,
    layout: Layout = GPT2,
    conv1d: bool = True,
) -> None:
    """Raise ValueError with every tensor that cannot be used.

    That is every tensor that is missing, unexpected, of the wrong shape, not floating point or not finite,
    and lm_head if it is tied but differs from the embedding. `tensors` have Hugging Face names without
    prefix. source: the file or folder, for messages.
    """
    # checked first: the n_layer of a damaged config could make a table of shapes that fills the memory
    if config.n_layer > len(tensors):
        raise ValueError(f"{source} cannot be used: {config.n_layer} layers, but only {len(tensors)} tensors")
    expected = expected_shapes(config, layout, conv1d)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name in tensors:
        if BUFFER.fullmatch(name) or (name == LM_HEAD and config.tie_weights):
            continue
        if name not in expected:
            problems.append(f"{name} is not a tensor of this {layout.name}")
        elif problem := _tensor_problem(tensors[name], expected[name]):
            problems.append(f"{name} {problem}")
    wte = layout.find("transformer.wte.weight")[0].hf_names[0]
    if config.tie_weights and LM_HEAD in tensors and wte in tensors:
        head, embedding = tensors[LM_HEAD], tensors[wte]
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            problems.append(f"{LM_HEAD} differs from {wte}, but the config says that they are tied")
    if problems:
        listed = "\n  - ".join(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError(f"{source} cannot be used, {count}:\n  - {listed}")


def _tensor_problem(tensor: Tensor, expected: tuple[int, ...]) -> str | None:
    """Why a tensor cannot be used, or None."""
    if tuple(tensor.shape) != expected:
        return f"has shape {tuple(tensor.shape)}, expected {expected}"
    if tensor.dtype not in FLOAT_DTYPES:
        return f"has dtype {tensor.dtype}: only float16, bfloat16, float32 and float64 are supported"
    # unlike tensor.isfinite(), aminmax() needs no copy
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        return "contains NaN or infinity"
    return None
