"""Packed bfloat16 weights for generation on a CPU.

A decode step reads all weights from memory once, and that takes most of its time. In bfloat16 they are half
as large; packed, they are in the order in which the CPU's matrix units read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fradique.generation.kv_cache import KVCache
from fradique.nn.linear import Linear, cpu_has_bf16

if TYPE_CHECKING:
    from model import GPT, AttentionInputs, Block

# with fewer parameters the setup of a packed product takes longer than the product
MIN_PACKED_PARAMETERS = 5e6
# activations that the packed product applies to its output: our name -> oneDNN's kind and algorithm
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
NO_ACTIVATION = ("none", "")


def should_pack(model: nn.Module, device: torch.device) -> bool:
    """Whether `pack_weights` makes generation with this model faster on this device."""
    size = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" and size >= MIN_PACKED_PARAMETERS and can_pack()


def can_pack() -> bool:
    """Whether this CPU and this build of torch support bfloat16 products with packed weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return torch.backends.mkldnn.is_available() and has_operators and cpu_has_bf16()


class PackedLinear(nn.Module):
    """A linear layer for inference in bfloat16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(
        self, x: Tensor, activation: tuple[str, str] = NO_ACTIVATION, residual: Tensor | None = None
    ) -> Tensor:
        """x (..., in) -> (..., out): activation(x weightᵀ + bias), or residual + x weightᵀ + bias."""
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        kind, algorithm = activation
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [], algorithm)


class PackedBlock(nn.Module):
    """A pre-norm `Block` whose activation and residual sums are fused into its packed products."""

    def __init__(self, block: Block, activation: str) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        self.fused_activation = FUSED_ACTIVATIONS.get(activation)

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        attn, mlp = self.attn, self.mlp
        y = attn.attend(attn.c_attn(self.ln_1(x)), inputs, cache)  # (B, T, C)
        x = attn.c_proj(y, residual=x)
        if self.fused_activation is not None:
            y = mlp.c_fc(self.ln_2(x), self.fused_activation)  # (B, T, inner)
        else:
            y = mlp.activate(mlp.c_fc(self.ln_2(x)))
        return mlp.c_proj(y, residual=x)


def pack_weights(model: GPT) -> None:
    """Convert a GPT in place: all weights to bfloat16, linear layers packed. It can no longer be trained."""
    model.to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, PackedLinear(child))
    blocks = model.transformer["h"]
    if model.config.norm_place == "pre" and not model.config.parallel_block:
        for layer, block in enumerate(blocks):
            blocks[layer] = PackedBlock(block, model.config.activation)
