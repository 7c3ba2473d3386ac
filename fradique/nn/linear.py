"""The product with a weight, whose gradient is found fast on a CPU.

A product with a transposed matrix takes a CPU's bfloat16 units twice as long as one with the same matrix laid
out anew, and the gradient of a weight is such a product. So the narrower of its two matrices is laid out anew
first, by parts that fit the cache. Elsewhere it is torch's own.

Shapes: N rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS, MIN_WIDTH = 1 << 10, 1 << 10  # rows, and inputs or outputs, from which it is worth it
TILE = 768  # rows and columns of the parts: they fit the cache
ROW_PADDING = (
    32  # numbers left free behind each row: rows a power of 2 apart would share a place in the cache
)


class Linear(nn.Linear):
    """torch's linear layer, with the product below."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    trained = torch.is_grad_enabled() and weight.requires_grad
    if x.device.type == "cpu" and trained and not torch.compiler.is_compiling():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows = x.numel() // weight.size(1)
        if dtype == torch.bfloat16 and rows >= MIN_ROWS and max(weight.shape) >= MIN_WIDTH:
            return _Linear.apply(x.to(dtype), weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.kinds = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, low, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        x, low = ctx.saved_tensors
        kind, bias_kind = ctx.kinds
        for_x, for_weight, for_bias = ctx.needs_input_grad
        d_x = grad @ low if for_x else None
        d_weight = d_bias = None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        if for_weight:
            d_weight = weight_gradient(grad, x, kind)
        if for_bias:
            d_bias = grad.sum(0, dtype=bias_kind)
        return d_x, d_weight, d_bias


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gradᵀ x in `dtype`: grad (N, O) and x (N, I) -> (O, I)."""
    if grad.device.type != "cpu" or grad.dtype != torch.bfloat16:
        return (grad.t() @ x).to(dtype)
    if grad.size(1) <= x.size(1):
        return (contiguous_copy(grad.t()) @ x).to(dtype)
    return contiguous_copy((contiguous_copy(x.t()) @ grad).t(), dtype)


def contiguous_copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x (rows, columns), which lies transposed in memory, as a contiguous matrix; in another dtype, if one is
    given."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    rest = x.new_empty(TILE, TILE + ROW_PADDING)
    for left in range(0, x.size(1), TILE):
        for top in range(0, x.size(0), TILE):
            there = x[top : top + TILE, left : left + TILE]
            part = rest[: there.size(1), : there.size(0)].t()
            out[top : top + TILE, left : left + TILE].copy_(part.copy_(there))
    return out


def cpu_has_bf16() -> bool:
    """Whether matrix products in bfloat16 run on instructions made for them (AMX or AVX-512 BF16)."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch's own, not yet public
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
