"""Fine-tuning: freezing parameters by name, and LoRA.

LoRA (Hu et al. 2022) freezes a linear layer's weight W (out, in) and trains a low-rank update of it:
y = x Wᵀ + b + (alpha / rank) x Aᵀ Bᵀ. A (rank, in) is initialized at random and B (out, rank) with zeros, so
that the model is unchanged when training begins. `merge_lora` adds the update to W.
"""

import math
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LORA_ALPHA = "lora_alpha"  # key in model.json if the checkpoint has LoRA matrices
A_SUFFIX, B_SUFFIX = ".lora_a", ".lora_b"


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; weight and bias are those of the given layer, not copies."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear initializes its weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: str) -> None:
    """Freeze the model and add LoRA to the linear layers in its blocks whose names end in one of `targets`.

    `targets` are separated by commas: "c_attn,mlp.c_proj". Raises ValueError if a target matches no layer.
    """
    layers = {  # of the blocks: transformer.h.0.attn.c_attn, ...
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".h." in f".{name}"
    }
    suffixes = _split_names(targets)
    matches = {suffix: [name for name in layers if f".{name}".endswith(f".{suffix}")] for suffix in suffixes}
    unknown = [suffix for suffix, names in matches.items() if not names]
    if unknown or not suffixes:
        choices = sorted({".".join(name.split(".")[-2:]) for name in layers})
        raise ValueError(
            f"lora_targets: no linear layer of a block matches {', '.join(map(repr, unknown or ['']))}; "
            f"use {', '.join(choices)} (or only the last part, such as c_proj)"
        )
    model.requires_grad_(False)
    for name in sorted(set().union(*matches.values())):  # sorted: A is drawn in the same order in every run
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoRALinear(layers[name], rank, alpha))


def merge_lora(
    config: dict[str, Any], tensors: dict[str, Tensor], source: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a checkpoint without LoRA: each low-rank update is added to its weight.

    Raises ValueError naming `source` if LoRA's alpha or matrices are invalid.
    """
    if LORA_ALPHA not in config:
        return config, tensors
    config, merged = dict(config), dict(tensors)
    alpha = config.pop(LORA_ALPHA)
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:  # isinstance would accept True
        raise ValueError(
            f"{source}: {LORA_ALPHA} in model.json must be a number above 0; use another checkpoint"
        )
    for name in [name for name in merged if name.endswith(A_SUFFIX)]:
        layer = name.removesuffix(A_SUFFIX)
        lora_a, lora_b = merged.pop(name), merged.pop(layer + B_SUFFIX, None)
        weight = merged.get(f"{layer}.weight")
        if not _matrices_fit(lora_a, lora_b, weight):
            raise ValueError(f"{source}: the LoRA matrices of {layer} do not fit each other or its weight")
        merged[f"{layer}.weight"] = weight + (alpha / lora_a.size(0)) * (lora_b @ lora_a)
    return config, merged


def _matrices_fit(lora_a: Tensor, lora_b: Tensor | None, weight: Tensor | None) -> bool:
    """Whether A is (rank, in), B (out, rank), W (out, in), with rank >= 1 and one floating-point dtype."""
    if lora_b is None or weight is None or not lora_a.dim() == lora_b.dim() == weight.dim() == 2:
        return False
    if not lora_a.dtype == lora_b.dtype == weight.dtype or not weight.is_floating_point():
        return False
    (rank, width_in), (width_out, rank_b) = lora_a.shape, lora_b.shape
    return rank == rank_b and rank >= 1 and weight.shape == (width_out, width_in)


def freeze(model: nn.Module, names: str) -> None:
    """Freeze parameters by `names`, which are separated by commas: "wte,wpe,h.0-5" or "h.0-11.attn".

    A name without its `transformer.` selects a parameter or all parameters of a module. Raises ValueError if
    a name selects none.
    """
    parameters = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    unknown = []
    for pattern in _split_names(names):
        prefixes = _expand_range(pattern)
        selected = [
            parameter
            for name, parameter in parameters.items()
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        for parameter in selected:
            parameter.requires_grad_(False)
        if not selected:
            unknown.append(pattern)
    if unknown:
        n_layer = 1 + max((int(n.split(".")[1]) for n in parameters if n.startswith("h.")), default=-1)
        outside_blocks = dict.fromkeys(name.split(".")[0] for name in parameters if not name.startswith("h."))
        raise ValueError(
            f"freeze: no parameter of this model matches {', '.join(map(repr, unknown))}; use "
            f"{', '.join(outside_blocks)}, h.0-{n_layer - 1} or a module in them, such as h.0.attn"
        )


def _split_names(text: str) -> list[str]:
    """The names in a list separated by commas; empty names are ignored."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _expand_range(pattern: str) -> list[str]:
    """h.0-2.attn -> h.0.attn, h.1.attn, h.2.attn."""
    match = re.fullmatch(r"(h\.)([0-9]{1,9})-([0-9]{1,9})(\..+)?", pattern)
    if not match:
        return [pattern]
    prefix, first, last, suffix = match.groups()
    last_layer = min(int(last), 9999)  # no model has more layers; h.0-999999999 would fill the memory
    return [f"{prefix}{layer}{suffix or ''}" for layer in range(int(first), last_layer + 1)]


def count_trainable(model: nn.Module) -> int:
    """Number of parameters that are not frozen."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_metadata(model: nn.Module) -> dict[str, float]:
    """LoRA's entries of model.json: {"lora_alpha": alpha}, or empty if the model has no LoRA layers."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            return {LORA_ALPHA: module.scale * module.lora_a.size(0)}
    return {}
