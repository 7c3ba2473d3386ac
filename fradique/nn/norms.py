"""LayerNorm with an optional bias, and RMSNorm."""

import torch
from torch import Tensor, nn

from fradique.nn import functional

NORMS = ("layernorm", "rmsnorm")
NORM_EPS = 1e-5


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.normalized_shape = (width,)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019): layer normalization without a mean and without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # autocast may have made x bfloat16; torch has no rms_norm kernel for two dtypes
        return functional.rms_norm(x.to(self.weight.dtype), self.weight, NORM_EPS)


def make_norm(kind: str, width: int, bias: bool) -> nn.Module:
    """A norm layer of a `kind` in NORMS. RMSNorm ignores `bias`."""
    return RMSNorm(width) if kind == "rmsnorm" else LayerNorm(width, bias)
