"""Packed bfloat16 weights for generation on a CPU.

A decode step spends most of its time on reading all weights from memory. In bfloat16 they are half as large
as in float32. Packed weights are stored in the order in which the CPU's matrix units read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fradique.generation.kv_cache import KVCache
from fradique.nn.cpu_features import cpu_has_bf16
from fradique.nn.linear import Linear

if TYPE_CHECKING:
    from model import GPT, AttentionInputs, Block

# In smaller models the overhead of calling a packed product is larger than the time that it saves.
MIN_PACKED_PARAMETERS = 5e6
# Activations that a packed product can apply to its output: a key of ACTIVATIONS -> oneDNN's name, algorithm
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
NO_ACTIVATION = ("none", "")


def should_pack(model: nn.Module, device: torch.device) -> bool:
    """Whether `pack_weights` makes generation with this model faster on this device."""
    num_parameters = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" and num_parameters >= MIN_PACKED_PARAMETERS and can_pack()


def can_pack() -> bool:
    """Whether this CPU and this build of torch support bfloat16 products with packed weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return torch.backends.mkldnn.is_available() and has_operators and cpu_has_bf16()


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, for inference in bfloat16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        batch_size = 1  # oneDNN chooses the order of the weight for an input of this many rows
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(
        self, x: Tensor, activation: tuple[str, str] = NO_ACTIVATION, residual: Tensor | None = None
    ) -> Tensor:
        """x (..., in) -> (..., out): activation(x weightᵀ + bias), or residual + x weightᵀ + bias."""
        linear_pointwise = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return linear_pointwise.binary(x, residual, self.packed_weight, self.bias, "add")
        name, algorithm = activation
        return linear_pointwise(x, self.packed_weight, self.bias, name, [], algorithm)


class PackedBlock(nn.Module):
    """A pre-norm `Block` that computes the activation and the residual sums inside its packed products."""

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
    """Convert a GPT in place: all weights to bfloat16, linear layers to PackedLinear.

    The converted model cannot be trained.
    """
    model.to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, PackedLinear(child))
    blocks = model.transformer["h"]
    if model.config.norm_place == "pre" and not model.config.parallel_block:
        for layer, block in enumerate(blocks):
            blocks[layer] = PackedBlock(block, model.config.activation)
