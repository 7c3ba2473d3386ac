"""Linear layers with a faster weight gradient for bfloat16 on a CPU.

The gradient of a weight is the matrix product gradᵀ x. In bfloat16 a CPU takes twice as long for this product
as for one whose first operand is contiguous. `weight_gradient` therefore first copies the transpose of the
narrower operand into a contiguous matrix. If that is x, it computes xᵀ grad and transposes the result.
Everything else is torch's own linear layer.

Shapes: N rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS, MIN_WIDTH = 1 << 10, 1 << 10  # smallest N, and smallest max(I, O), for which the copy saves time
# The copy is made in square tiles of TILE rows, which fit the CPU's cache.
TILE = 768
# Unused elements after each row of a tile. Without them the rows would be 1536 = 3 x 512 bytes apart and
# share few sets of the cache; at 1600 = 25 x 64 bytes they use all of them.
ROW_PADDING = 32


class Linear(nn.Linear):
    """nn.Linear that computes with `linear` below.

    `row_splits`: the number of rows of each matrix that is stacked in the weight (O, I), for example q, k and
    v; by default (O,), one matrix. Muon orthogonalizes the matrices separately.
    """

    row_splits: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        row_splits: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.row_splits = (out_features,) if row_splits is None else row_splits
        assert sum(self.row_splits) == out_features, (row_splits, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    needs_grad = torch.is_grad_enabled() and weight.requires_grad
    # not while compiling: the loops over the tiles would be unrolled into the graph
    if x.device.type == "cpu" and needs_grad and not torch.compiler.is_compiling():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows = x.numel() // weight.size(1)
        if dtype == torch.bfloat16 and rows >= MIN_ROWS and max(weight.shape) >= MIN_WIDTH:
            return _Linear.apply(x.to(dtype), weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x weightᵀ + bias in x's dtype; each gradient has the dtype of its tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        cast_weight = weight.to(x.dtype)
        ctx.save_for_backward(x, cast_weight)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, cast_weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        x, cast_weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = grad @ cast_weight if needs_x else None
        d_weight = d_bias = None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)  # (N, O), (N, I)
        if needs_weight:
            d_weight = weight_gradient(grad, x, ctx.weight_dtype)
        if needs_bias:
            d_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return d_x, d_weight, d_bias


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gradᵀ x in `dtype`: grad (N, O) and x (N, I) -> (O, I)."""
    if grad.device.type != "cpu" or grad.dtype != torch.bfloat16:
        return (grad.t() @ x).to(dtype)
    if grad.size(1) <= x.size(1):
        return (contiguous_copy(grad.t()) @ x).to(dtype)
    transposed = contiguous_copy(x.t()) @ grad  # (I, O)
    return contiguous_copy(transposed.t(), dtype)


def contiguous_copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a transposed view x (rows, columns) into a contiguous matrix of `dtype` (default: x's dtype).

    Each tile is first copied, in the memory layout of x, into a buffer that stays in the cache. The
    transposition then reads only the cache.
    """
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    buffer = x.new_empty(TILE, TILE + ROW_PADDING)
    for left in range(0, x.size(1), TILE):
        for top in range(0, x.size(0), TILE):
            source = x[top : top + TILE, left : left + TILE]
            tile = buffer[
                : source.size(1), : source.size(0)
            ].t()  # transposed like the source, so that this copy runs along its memory
            tile.copy_(source)
            out[top : top + TILE, left : left + TILE].copy_(tile)
    return out
