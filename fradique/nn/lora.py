"""What of a given model is trained: layers frozen by name, and LoRA.

LoRA (Hu et al. 2022) leaves a linear layer's W (out, in) as it is and learns a difference of low rank beside
it: y = x Wᵀ + b + (alpha / rank) x Aᵀ Bᵀ, with A (rank, in) random and B (out, rank) zero at first, so that
the model begins as it was given. `merged` puts the difference into W.
"""

import math
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LORA_ALPHA = "lora_alpha"  # in model.json, where the checkpoint holds LoRA's matrices
A, B = ".lora_a", ".lora_b"


class LoRALinear(nn.Linear):
    """A linear layer, frozen, and its low-rank difference. It takes over the layer's parameters."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear's own weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: str) -> None:
    """Freeze the model and give LoRA to the linear layers of its blocks whose names end in one of `targets`.

    `targets` are parted by commas: "c_attn,mlp.c_proj". Raises ValueError where one names no such layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".h." in f".{name}"
    }
    wanted = _split_names(targets)
    matching = {t: [name for name in layers if f".{name}".endswith(f".{t}")] for t in wanted}
    if unknown := [target for target, names in matching.items() if not names] or ([] if wanted else [""]):
        there = sorted({".".join(name.split(".")[-2:]) for name in layers})
        raise ValueError(
            f"lora_targets: {', '.join(map(repr, unknown))} names no linear layer of a block; "
            f"there are {', '.join(there)} (or the last part of such a name)"
        )
    model.requires_grad_(False)
    for name in sorted({name for names in matching.values() for name in names}):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRALinear(layers[name], rank, alpha))


def merge_lora(
    config: dict[str, Any], tensors: dict[str, Tensor], source: str = "the checkpoint"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint holds, as plain weights: each W with its difference, computed in float32.

    Raises ValueError that names `source` where the parts of a difference do not fit each other.
    """
    if LORA_ALPHA not in config:
        return config, tensors
    config = dict(config)
    alpha, plain = config.pop(LORA_ALPHA), dict(tensors)
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{source}: {LORA_ALPHA} in model.json is no number above 0; use another checkpoint")
    for name in [name for name in plain if name.endswith(A)]:
        layer = name.removesuffix(A)
        a, b, w = plain.pop(name), plain.pop(layer + B, None), plain.get(f"{layer}.weight")
        if not _shapes_match(a, b, w):
            raise ValueError(f"{source}: {layer} has no weight and two matrices of LoRA that fit each other")
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + (alpha / a.size(0)) * (b @ a)
    return config, plain


def _shapes_match(a: Tensor, b: Tensor | None, w: Tensor | None) -> bool:
    """Whether they are A (rank, in), B (out, rank) and W (out, in), rank at least 1, of one type."""
    if (
        b is None
        or w is None
        or [a.dim(), b.dim(), w.dim()] != [2, 2, 2]
        or len({a.dtype, b.dtype, w.dtype}) > 1
    ):
        return False
    return a.size(0) == b.size(1) > 0 and (b.size(0), a.size(1)) == tuple(w.shape) and w.is_floating_point()


def freeze(model: nn.Module, what: str) -> None:
    """Take parameters out of training: "wte,wpe,h.0-5" or "h.0-11.attn", parted by commas.

    A name stands for all parameters under it, as they are called below `transformer.`. Raises ValueError
    where one names none.
    """
    parameters = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    unknown = []
    for part in _split_names(what):
        found = [
            parameter
            for name, parameter in parameters.items()
            if any(name == one or name.startswith(f"{one}.") for one in _expand_range(part))
        ]
        for parameter in found:
            parameter.requires_grad_(False)
        if not found:
            unknown.append(part)
    if unknown:
        layers = 1 + max((int(n.split(".")[1]) for n in parameters if n.startswith("h.")), default=-1)
        others = dict.fromkeys(name.split(".")[0] for name in parameters if not name.startswith("h."))
        raise ValueError(
            f"freeze: {', '.join(map(repr, unknown))} names nothing of this model; it has "
            f"{', '.join(others)}, h.0-{layers - 1} and parts of them such as h.0.attn"
        )


def _split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _expand_range(part: str) -> list[str]:
    """h.0-2.attn -> h.0.attn, h.1.attn, h.2.attn."""
    match = re.fullmatch(r"(h\.)([0-9]{1,9})-([0-9]{1,9})(\..+)?", part)
    if not match:
        return [part]
    head, first, last, tail = match.groups()
    return [f"{head}{layer}{tail or ''}" for layer in range(int(first), min(int(last), 9999) + 1)]


def count_trainable(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_metadata(model: nn.Module) -> dict[str, Any]:
    """What model.json says beside the shape: LoRA's alpha, where the model has LoRA."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            return {LORA_ALPHA: module.scale * module.lora_a.size(0)}
    return {}
