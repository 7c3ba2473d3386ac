"""TODO."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_BATCH_ELEMENTS = 1 << 24  # numbers of the matrices that Muon takes at a time


@dataclass(frozen=True)
class MatrixView:
    """One of the matrices that are stacked in a parameter: some of its rows."""

    name: str
    whole: nn.Parameter
    rows: slice
    view: nn.Parameter  # the rows, in the memory of the whole


def split_matrix(name: str, whole: nn.Parameter, rows: tuple[int, ...]) -> list[MatrixView]:
    ends = list(itertools.accumulate(rows))
    assert ends[-1] == whole.size(0), (name, rows)
    names = [name] if len(rows) == 1 else [f"{name}[{i}]" for i in range(len(rows))]
    slices = [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]
    return [
        MatrixView(part, whole, place, nn.Parameter(whole.detach()[place]))
        for part, place in zip(names, slices, strict=True)
    ]


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), for which stacked matrices (q, k, v; gate, value) are several, and
    which makes the updates of all matrices of one shape together: the same update, in fewer and larger steps.

    An orthogonal update of the stack would not be one of each of them.
    """

    def __init__(self, parts: list[MatrixView], *, lr: float, momentum: float, weight_decay: float) -> None:
        named = [(part.name, part.view) for part in parts]
        super().__init__(named, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.parts = parts

    def find_gradients(self) -> None:
        """Each part's gradient is its rows of the whole's: to be called once they are there."""
        for part in self.parts:
            grad = part.whole.grad
            part.view.grad = None if grad is None else grad[part.rows]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_sides: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_sides.setdefault(tuple(sorted(p.shape)), []).append(p)
            for sides, params in by_sides.items():
                count = max(1, MAX_BATCH_ELEMENTS // math.prod(sides))
                for start in range(0, len(params), count):
                    self._update(params[start : start + count], group)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of matrices that have the same sides, some of them lying and some standing."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, kept = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(kept, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, kept, group["momentum"])  # Nesterov's
        wide = torch.stack(
            [_as_wide(x).to(torch.bfloat16) for x in ahead]
        )  # (matrices, smaller, larger side)
        updates = orthogonalize(wide, group["ns_coefficients"], group["ns_steps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            rows, columns = p.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            p.add_(update if rows <= columns else update.t(), alpha=-rate)


def _as_wide(x: Tensor) -> Tensor:
    """A matrix with no more rows than columns: x, or its transpose."""
    return x if x.size(0) <= x.size(1) else x.t()


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Matrices (n, smaller, larger side) -> about their nearest orthogonal ones, in bfloat16: singular values
    come to lie around 1, by a quintic iteration of Newton and Schulz (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))  # (n, smaller, smaller)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
