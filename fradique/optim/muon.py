"""Muon (Jordan et al. 2024) for parameters that stack several matrices, with batched updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fradique.nn.cpu_features import emulates_bf16

MAX_BATCH_ELEMENTS = 1 << 24  # total elements of the matrices in one batch; limits the memory of an update
# The steps of Polar Express (Amsel et al. 2025, algorithm 1) for matrices with at most so many rows: (a, b,
# c) of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X. Three steps bring all singular values from 0.01 to 1 to between
# 0.72 and 1.28; four, those from 0.003 to 1 to between 0.80 and 1.21. After division by the norm, the root
# mean square of m singular values is 1 / √m: 0.06 for 256 rows.
POLAR_EXPRESS: dict[float, tuple[tuple[float, float, float], ...]] = {
    256: ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)),
    math.inf: (
        (8.3837, -24.7659, 18.3571),
        (4.0434, -3.0114, 0.5695),
        (3.5056, -2.6267, 0.5257),
        (2.4901, -1.8343, 0.4368),
    ),
}
SAFETY = 1.01  # rounding must not bring a singular value above 1, where the first polynomial grows quickly


@dataclass(frozen=True)
class MatrixView:
    """One of the matrices stacked in a parameter: a range of the parameter's rows."""

    name: str
    parameter: nn.Parameter
    rows: slice
    view: nn.Parameter  # parameter[rows], in the same memory


def split_matrix(name: str, parameter: nn.Parameter, row_splits: Sequence[int]) -> list[MatrixView]:
    """The matrices stacked in a parameter. `row_splits`: the number of rows of each matrix.

    A view is named `<name>[<index>]`, or `<name>` if the parameter is a single matrix.
    """
    assert sum(row_splits) == parameter.size(0), (name, row_splits)
    views, start = [], 0
    for i, num_rows in enumerate(row_splits):
        rows = slice(start, start + num_rows)
        view_name = name if len(row_splits) == 1 else f"{name}[{i}]"
        views.append(MatrixView(view_name, parameter, rows, nn.Parameter(parameter.detach()[rows])))
        start += num_rows
    return views


class Muon(torch.optim.Muon):
    """torch.optim.Muon with a separate update for each stacked matrix (q, k, v; gate, value).

    Orthogonalizing the whole stack would not orthogonalize the matrices in it. Matrices of the same shape are
    updated in batches, with fewer and larger kernels. They are orthogonalized by the polynomials of Polar
    Express, of which fewer are needed than of the one in torch, and in bfloat16, as Jordan et al. do, or in
    float32 where bfloat16 is emulated.
    """

    def __init__(
        self, matrices: list[MatrixView], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        named = [(matrix.name, matrix.view) for matrix in matrices]
        super().__init__(named, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.matrices = matrices

    def assign_gradients(self) -> None:
        """Give each view its rows of the parameter's gradient. Call this after the backward pass."""
        for matrix in self.matrices:
            grad = matrix.parameter.grad
            matrix.view.grad = None if grad is None else grad[matrix.rows]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            # the key is the sorted shape, so (m, n) and (n, m) are in one batch
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, params in by_shape.items():
                batch_size = max(1, MAX_BATCH_ELEMENTS // math.prod(shape))
                for start in range(0, len(params), batch_size):
                    self._update(params[start : start + batch_size], group)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of shape (m, n) or (n, m)."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        dtype = torch.float32 if emulates_bf16(params[0].device) else torch.bfloat16
        batch = torch.stack([_wide(x).to(dtype) for x in nesterov])  # (matrices, m, n), m <= n
        updates = orthogonalize(batch)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            rows, columns = p.shape
            lr = group["lr"] * math.sqrt(max(1, rows / columns))  # torch's adjust_lr_fn="original"
            p.add_(update if rows <= columns else update.t(), alpha=-lr)


def _wide(x: Tensor) -> Tensor:
    """x (m, n) if m <= n, otherwise its transpose."""
    return x if x.size(0) <= x.size(1) else x.t()


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, approximately: x (batch, m, n), m <= n -> the same shape."""
    steps = next(steps for max_rows, steps in POLAR_EXPRESS.items() if x.size(1) <= max_rows)
    x = x / (SAFETY * torch.linalg.matrix_norm(x, keepdim=True)).clamp(min=1e-7)
    if x.dtype == torch.float32 and x.size(2) >= 2 * x.size(1):
        return _orthogonalize_wide(x, steps)
    for a, b, c in steps:
        gram = torch.bmm(x, x.transpose(1, 2))  # (batch, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G²
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _orthogonalize_wide(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """`orthogonalize` with only two products of the whole matrices: all steps together are Q(G) X.

    The polynomials P of the steps commute, so that Q is their product, and after a step G is P G P. In 16
    bits this is not accurate enough.
    """
    gram, product = torch.bmm(x, x.transpose(1, 2)), None  # (batch, m, m)
    for i, (a, b, c) in enumerate(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)  # a I + b G + c G²
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if i < len(steps) - 1:
            gram = torch.bmm(polynomial, torch.bmm(gram, polynomial))
    return torch.bmm(product, x)
