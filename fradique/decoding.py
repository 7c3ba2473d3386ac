"""Weights laid out for writing. To write a token all weights are read from memory once, and on a CPU that is
what it costs: in bfloat16 they are half as large, in the order in which its matrix units take them."""

import torch
from torch import Tensor, nn

from fradique.runtime import cpu_has_bf16

WORTH_PACKING = 50e6  # parameters; where there are fewer, other things take as long


def worth_packing(model: nn.Module, device: torch.device) -> bool:
    """Whether `pack` makes this model write faster here."""
    size = sum(p.numel() for p in model.parameters())
    return device.type == "cpu" and size >= WORTH_PACKING and can_pack()


def can_pack() -> bool:
    """Whether this CPU and this build of torch have bfloat16 products with weights laid out beforehand."""
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    return torch.backends.mkldnn.is_available() and there and cpu_has_bf16()


class PackedLinear(nn.Module):
    """A linear layer that can only be applied: x (..., in) bfloat16 -> (..., out)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Turn a model into one that writes, in place: all of it bfloat16, its linear layers packed."""
    model.to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
