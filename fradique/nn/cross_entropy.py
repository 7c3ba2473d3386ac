"""Cross-entropy computed from the last hidden states.

For a large vocabulary not all logits are stored in float32. Without a softcap the result equals
F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1); the tests compare the two.

Shapes: N tokens, C width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fradique.nn.linear import weight_gradient

# _LinearCrossEntropy is used from this V on, and for more than MAX_LOGITS logits; F.cross_entropy otherwise.
LARGE_VOCAB = 1 << 10
# By device type: the most logits for which F.cross_entropy is used, and that one matrix product of
# _LinearCrossEntropy computes if no gradient is needed
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28, "mps": 1 << 26}
# By device type: the most logits that are in float32 at a time; on a CPU they fit its cache
MAX_FP32_LOGITS = MAX_LOGITS | {"cpu": 1 << 19}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Mean cross-entropy, in nats, of the logits x weightᵀ: a scalar. Targets of -1 are ignored.

    x (..., C), weight (V, C), targets (...) int64. softcap c: logits become c tanh(logits / c); 0: off. For
    a large vocabulary the logits are stored in the dtype of the matrix product and overwritten by their
    gradient; at most half of them are in float32 at a time.
    """
    x, targets = x.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    device_type = x.device.type
    if weight.size(0) < LARGE_VOCAB and x.size(0) * weight.size(0) <= MAX_LOGITS[device_type]:
        logits = F.linear(x, weight)  # (N, V)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad is True for a parameter even under no_grad
        weight = weight.detach()
    return _LinearCrossEntropy.apply(x.to(dtype), weight, targets, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass also computes the gradients.

    It overwrites each logit by the logit's gradient in x's dtype: softmax(logits) - onehot(target), times the
    derivative of the softcap if there is one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:  # noqa: ANN001
        # compiled for a CPU, a custom operator is faster: inductor would unroll the loop over the rows
        use_custom_op = torch.compiler.is_compiling() and x.device.type == "cpu"
        compute = torch.ops.fradique.loss_and_gradients if use_custom_op else _loss_and_gradients
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        total, count, d_x, d_weight = compute(x, weight, targets, softcap, needs_x, needs_weight)
        ctx.save_for_backward(count, d_x, d_weight)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        count, d_x, d_weight = ctx.saved_tensors
        scale = grad / count
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        d_x = d_x * scale if needs_x else None
        d_weight = d_weight * scale if needs_weight else None
        return d_x, d_weight, None, None


def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses, number of targets that are not -1, and the sum's gradients for x and weight.

    x (N, C), weight (V, C), targets (N,). A gradient that is not needed is an empty tensor.
    """
    with torch.autocast(x.device.type, enabled=False):
        cast_weight = weight.to(x.dtype)
        needs_grad = needs_x or needs_weight
        valid = (targets >= 0)[:, None]  # (N, 1)
        count, total = valid.sum(), torch.zeros((), device=x.device)
        # The gradients need the logits of all N rows at once: the loop over x then has one iteration. Without
        # gradients at most MAX_LOGITS logits are computed at a time.
        rows = x.size(0) if needs_grad else max(1, MAX_LOGITS[x.device.type] // weight.size(0))
        # at most half of the rows: the float32 copy is then no larger than the logits in 16 bits
        fp32_rows = max(1, min((x.size(0) + 1) // 2, MAX_FP32_LOGITS[x.device.type] // weight.size(0)))
        for x_rows, target_rows in zip(x.split(rows), targets[:, None].split(rows), strict=True):
            logits = x_rows @ cast_weight.t()  # (rows, V)
            for chunk, target in zip(logits.split(fp32_rows), target_rows.split(fp32_rows), strict=True):
                total += _cross_entropy_(chunk, target, softcap, needs_grad)
        d_x, d_weight = x.new_empty(0), weight.new_empty(0)
        # Logits (N, V) now holds their gradient. Its rows for ignored targets are not 0: they are masked in
        # d_x and x, which are smaller.
        if needs_x:
            d_x = (logits @ cast_weight).mul_(valid)
        if needs_weight:
            d_weight = weight_gradient(logits, x * valid, weight.dtype)
    return total, count, d_x, d_weight


_loss_and_gradients_op = torch.library.custom_op(
    "fradique::loss_and_gradients", _loss_and_gradients, mutates_args=()
)


@_loss_and_gradients_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, needs_x: bool, needs_weight: bool):  # noqa: ANN202
    total, count = x.new_empty((), dtype=torch.float32), targets.new_empty(())
    d_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    d_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    return total, count, d_x, d_weight


def _cross_entropy_(logits: Tensor, target: Tensor, softcap: float, needs_grad: bool) -> Tensor:
    """Sum of the losses of logits (N, V) for target (N, 1), as a float32 scalar.

    If `needs_grad`, overwrites the logits by their gradient. A target of -1 has no loss, but its row of the
    gradient is not 0: the caller must mask it.
    """
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_probs = torch.log_softmax(capped, dim=-1, dtype=torch.float32)
    index = target.clamp(min=0)
    loss = -(log_probs.gather(1, index) * (target >= 0)).sum()
    if needs_grad:
        d_logits = torch.softmax(log_probs, dim=-1)  # their exponential; faster than exp()
        d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
        if softcap:  # the derivative of c tanh(z / c) is 1 - tanh²(z / c)
            d_logits = d_logits * (1 - (capped / softcap).square())
        logits.copy_(d_logits)
    return loss
