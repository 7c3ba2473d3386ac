"""Weights laid out for writing. To write a token all weights are read from memory once, and that is most of
what it costs: in 16 bits they are half as large, on a CPU in the order in which its matrix units take them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fradique.generation.kv_cache import KVCache
from fradique.nn.linear import Linear, cpu_has_bf16

MIN_PACKED_PARAMETERS = (
    5e6  # parameters; with fewer, setting a packed product up takes longer than the product
)
FUSED_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}  # done by the product


def should_pack(model: nn.Module, device: torch.device) -> bool:
    """Whether `pack` makes this model write faster here."""
    size = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" and size >= MIN_PACKED_PARAMETERS and can_pack()


def can_pack() -> bool:
    """Whether this CPU and this build of torch have bfloat16 products with weights laid out beforehand."""
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    return torch.backends.mkldnn.is_available() and there and cpu_has_bf16()


class PackedLinear(nn.Module):
    """A linear layer that can only be applied, in bfloat16: x (..., in) -> (..., out)."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor, activation: tuple[str, str] = ("none", "")) -> Tensor:
        """The product, and one of `FUSED` of it."""
        kind, form = activation
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [], form)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """other (..., out) and the product."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")


class PackedBlock(nn.Module):
    """A `Block` of pre-norm, whose sums and activation are done by its products."""

    def __init__(self, block: nn.Module, activation: str) -> None:
        super().__init__()
        attn, mlp = self.attn, self.mlp = block.attn, block.mlp
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.fused = FUSED_ACTIVATIONS.get(activation)
        # found once: to look for a module's parts takes a tenth of a small model's time
        self.steps = (
            block.ln_1.forward,
            attn.c_attn.forward,
            attn.mix,
            attn.c_proj.plus,
            block.ln_2.forward,
            mlp.c_fc.forward,
            mlp.c_proj.plus,
        )

    def forward(self, x: Tensor, sight: Any, cache: KVCache | None = None) -> Tensor:
        norm_1, c_attn, mix, add_read, norm_2, c_fc, add_made = self.steps
        x = add_read(mix(c_attn(norm_1(x)), sight, cache), x)
        if self.fused:
            return add_made(c_fc(norm_2(x), self.fused), x)
        return add_made(self.mlp.bend(c_fc(norm_2(x))), x)


def pack_weights(model: nn.Module) -> None:
    """Turn a GPT into one that writes, in place: all of it bfloat16, its linear layers packed."""
    model.to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, PackedLinear(child))
    config, blocks = model.config, model.transformer["h"]
    if config.norm_place == "pre" and not config.parallel_block:
        for layer, block in enumerate(blocks):
            blocks[layer] = PackedBlock(block, config.activation)
