"""Muon (Jordan et al. 2024) for parameters that stack several matrices, with batched updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fradique.nn.cpu_features import emulates_bf16

MAX_BATCH_ELEMENTS = 1 << 24  # total elements of the matrices in one batch; limits the memory of an update


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

    The updates are computed in bfloat16, as Jordan et al. do, or in float32 where bfloat16 is emulated.

    Orthogonalizing the whole stack would not orthogonalize the matrices in it. Matrices of the same shape are
    updated in batches: the updates equal those of torch, with fewer and larger kernels.
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
        updates = orthogonalize(batch, group["ns_coefficients"], group["ns_steps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            rows, columns = p.shape
            lr = group["lr"] * math.sqrt(max(1, rows / columns))  # torch's adjust_lr_fn="original"
            p.add_(update if rows <= columns else update.t(), alpha=-lr)


def _wide(x: Tensor) -> Tensor:
    """x (m, n) if m <= n, otherwise its transpose."""
    return x if x.size(0) <= x.size(1) else x.t()


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The nearest semi-orthogonal matrices, approximately: x (batch, m, n), m <= n -> same shape and dtype.

    The quintic Newton-Schulz iteration X <- a X + (b G + c G²) X, with G = X Xᵀ (Jordan et al. 2024), brings
    all singular values close to 1.
    """
    a, b, c = coefficients
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))  # (batch, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G²
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
