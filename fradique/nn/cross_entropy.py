"""TODO."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fradique.nn.linear import weight_gradient

LARGE_VOCAB = 1 << 10  # tokens from which the loss and its gradient are found together, by rows
# Numbers of the logits made in one product, and of those held in float32 at once: on a CPU, in its cache.
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28, "mps": 1 << 26}
MAX_FP32_LOGITS = MAX_LOGITS | {"cpu": 1 << 19}


# Cross-entropy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Mean cross-entropy, in nats, of the logits x weightᵀ: a scalar. Targets of -1 do not count.

    x (..., C), weight (V, C), targets (...) int64. A large vocabulary's logits are held in the dtype that the
    layers compute in, and become their gradient there; float32 takes some rows at a time, half at most.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    if weight.size(0) < LARGE_VOCAB and x.size(0) * weight.size(0) <= MAX_LOGITS[x.device.type]:
        logits = F.linear(x, weight)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else it would be asked for a gradient, which is found with the loss
    return _LinearCrossEntropy.apply(x.to(dtype), weight, targets, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is found together with the loss: logits are made once, and become their own gradient,
    softmax(logits) - onehot(target), which is kept in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:  # noqa: ANN001
        # a compiler would take each part of the loop for a new one, and on a CPU be slower
        whole = torch.compiler.is_compiling() and x.device.type == "cpu"
        find = torch.ops.fradique.loss_and_gradients if whole else _loss_and_gradients
        total, count, d_x, d_weight = find(x, weight, targets, softcap, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(count, d_x, d_weight)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        count, d_x, d_weight = ctx.saved_tensors
        scale = grad / count
        for_x, for_weight = ctx.needs_input_grad[:2]
        return d_x * scale if for_x else None, d_weight * scale if for_weight else None, None, None


def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses and their number, scalars; and the gradients of that sum for x (N, C) and weight
    (V, C), empty where they are not asked for."""
    with torch.autocast(x.device.type, enabled=False):
        low, learns = weight.to(x.dtype), for_x or for_weight
        counted = (targets >= 0)[:, None]
        count, total = counted.sum(), torch.zeros((), device=x.device)
        many = x.size(0) if learns else max(1, MAX_LOGITS[x.device.type] // weight.size(0))
        few = max(1, min(-(-x.size(0) // 2), MAX_FP32_LOGITS[x.device.type] // weight.size(0)))
        for rows, their_targets in zip(x.split(many), targets[:, None].split(many), strict=True):
            logits = rows @ low.t()  # (rows, V)
            for some, target in zip(logits.split(few), their_targets.split(few), strict=True):
                total += _cross_entropy(some, target, softcap, learns)
        d_x, d_weight = x.new_empty(0), weight.new_empty(0)
        if for_x:
            d_x = (logits @ low).mul_(counted)
        if for_weight:
            d_weight = weight_gradient(logits, x * counted, weight.dtype)
    return total, count, d_x, d_weight


_loss_and_gradients_op = torch.library.custom_op(
    "fradique::loss_and_gradients", _loss_and_gradients, mutates_args=()
)


@_loss_and_gradients_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, for_x: bool, for_weight: bool):  # noqa: ANN202
    total, count = x.new_empty((), dtype=torch.float32), targets.new_empty(())
    empty = [part if wanted else part.new_empty(0) for part, wanted in ((x, for_x), (weight, for_weight))]
    return total, count, *(torch.empty_like(part) for part in empty)


def _cross_entropy(logits: Tensor, target: Tensor, softcap: float, learns: bool) -> Tensor:
    """The sum of the losses of logits (N, V), which become its gradient where it is asked for. A target
    (N, 1) of -1 has no loss; its row of the gradient is not to be used."""
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_probs = torch.log_softmax(capped, dim=-1, dtype=torch.float32)
    place = target.clamp(min=0)
    loss = -(log_probs.gather(1, place) * (target >= 0)).sum()
    if learns:
        d_logits = log_probs.exp_().scatter_add_(1, place, log_probs.new_full(place.shape, -1.0))
        logits.copy_(d_logits * (1 - (capped / softcap).square()) if softcap else d_logits)
    return loss
