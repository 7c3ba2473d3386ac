"""Adagrad for tables of embeddings, with sparse gradients."""

import torch
from torch import Tensor


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al. 2011) with one learning rate for each row of a table.

    A row moves by lr * g / √s, where g is its gradient and s the sum of the mean squares of its gradients so
    far: a row that occurs rarely still moves far. Rows that do not occur in a batch do not change and cost
    nothing, unlike in AdamW, whose averages decay in every step. One sum for each row instead of each element
    saves memory, as in FBGEMM's row-wise Adagrad (Khudia et al. 2021).
    """

    def __init__(self, named: list[tuple[str, Tensor]], *, lr: float) -> None:
        super().__init__(named, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the rows of each table (rows, C) that have a gradient, which may be sparse."""
        assert closure is None
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group["lr"])

    def _update(self, table: Tensor, lr: float) -> None:
        if not self.state[table]:
            self.state[table]["sum"] = table.new_zeros(table.size(0))
        sums, grad = self.state[table]["sum"], table.grad
        if not grad.is_sparse:
            sums += grad.square().mean(1)
            table.addcdiv_(grad, sums.sqrt().clamp(min=1e-20)[:, None], value=-lr)
            return
        grad = grad.coalesce()  # a row that occurs several times in the batch: its gradients are added
        rows, values = grad.indices()[0], grad.values()
        new_sums = sums[rows] + values.square().mean(1)
        sums[rows] = new_sums
        table.index_add_(0, rows, values / new_sums.sqrt().clamp(min=1e-20)[:, None], alpha=-lr)
