"""What is done number by number, or row by row, made fast to train with on a CPU: dropout, the activation,
RMSNorm, the rotation of positions.

Each does what a line of plain torch does, and a test holds it to that line. On CUDA and MPS they are torch's
own operations. On a CPU torch's generator draws a number a mask, and what has no kernel of its own is done in
many small steps.

Shapes: B batch, H heads, T tokens, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

INT_DTYPES = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes a number -> integers as wide


# Dropout


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x with each number made 0 with probability p, the others divided by 1 - p (Srivastava et al. 2014).

    On a CPU p is rounded to `kept_share`.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    if torch.compiler.is_compiling():
        return _fusible_dropout(x, p)
    return _Dropout.apply(x, p)


def keep_prob(p: float) -> float:
    """1 - p, to a 256th, below 1: the part that dropout on a CPU keeps, and what it divides by."""
    return (256 - drop_threshold(p)) / 256


def drop_threshold(p: float) -> int:
    return min(255, max(1, round(256 * p)))


def _random_bytes(count: int) -> Tensor:
    """(at least count,) int64: `count` bytes, drawn eight at a time from torch's generator."""
    return torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)


@torch.library.custom_op("fradique::random_bytes", mutates_args=())
def _random_bytes_op(x: Tensor) -> Tensor:
    """A byte for each number of x, in its shape, for a compiled graph. That it takes x, of which it reads
    nothing but the shape, keeps the draws of two places from becoming one."""
    return _random_bytes(x.numel()).view(torch.uint8)[: x.numel()].view(x.shape)


@_random_bytes_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def _fusible_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that inductor makes one loop of, with what stands around it; it compares floats fastest."""
    draws = torch.ops.fradique.random_bytes(x)
    return x * (draws.float() >= drop_threshold(p)) * (1 / keep_prob(p))


def dropout_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Integers as wide as dtype: all bits set where a number is kept, none where it is dropped.

    A byte a number: each is cut out of the drawn words, and compared by the sign of a difference.
    """
    width, dropped = dtype.itemsize, drop_threshold(p)
    count = math.prod(shape)
    words = _random_bytes(count).view(INT_DTYPES[width])
    keep = torch.empty(width, words.numel(), dtype=words.dtype)
    for i, lane in enumerate(keep):
        torch.bitwise_right_shift(words, 8 * i, out=lane).bitwise_and_(255)
    keep = keep.neg_().add_(dropped - 1).bitwise_right_shift_(8 * width - 1)  # byte >= dropped: -1, else 0
    return keep.flatten()[:count].view(shape)


def apply_mask(x: Tensor, keep: Tensor) -> Tensor:
    return (x.contiguous().view(keep.dtype) & keep).view(x.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:  # noqa: ANN001
        keep = dropout_mask(x.shape, p, x.dtype)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / keep_prob(p)
        return apply_mask(x, keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        (keep,) = ctx.saved_tensors
        return apply_mask(grad, keep).mul_(ctx.scale), None


# The activation


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), exactly, with erf (Hendrycks & Gimpel 2016)."""
    on_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
    return torch.ops.fradique.gelu(x) if on_cpu else F.gelu(x)


@torch.library.custom_op("fradique::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    """torch's own kernel inside a compiled graph: for a CPU inductor would write a slower one."""
    return F.gelu(x)


@torch.library.custom_op("fradique::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad.contiguous(), x)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_gelu.register_autograd(
    lambda ctx, grad: _gelu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# Norm and rotation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019)."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type != "cpu" or not learns or not exact or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With a gradient in few steps: that of layer norm, which torch has as one kernel, for a mean of 0. That
    also takes away the mean of the gradient, as layer norm must: it is given back."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN001
        x, weight, scale = ctx.saved_tensors
        grad, wanted = grad.contiguous(), [True, ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, wanted
        )
        mean = torch.mv(grad.view(-1, weight.numel()), weight).view(scale.shape).div_(weight.numel())
        return d_x.add_(mean.mul_(scale)), d_weight, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): numbers i and i + D / 2 turn as a pair, as in LLaMA.

    x (B, H, T, D) -> the same shape; cos and sin of the angles (T, D / 2) -> their dtype, or x's where it is
    wider.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return _ApplyRope.apply(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin)


class _ApplyRope(torch.autograd.Function):
    """Whose gradient turns back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _rotate_pairs(grad, *ctx.saved_tensors, -1.0), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out


ACTIVATIONS = {
    "gelu": gelu,  # the exact form, with erf: nanoGPT's
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's (Hendrycks & Gimpel 2016)
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer (So et al. 2021)
    "swiglu": F.silu,  # these two are of the gate that the other half of c_fc passes through (Shazeer 2020)
    "geglu": F.gelu,
}
GATED = ("swiglu", "geglu")
