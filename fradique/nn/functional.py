"""Dropout, activations, RMSNorm and rotary embedding (RoPE), with fast training on a CPU.

Each function equals a line of plain torch; the tests compare the two. On CUDA and MPS the functions call
torch's own operations. On a CPU those are slow: dropout draws a random number for each element, and RMSNorm
and RoPE have no kernels and consist of many small operations.

Shapes: B batch, H heads, T tokens, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# bytes per element of a floating-point dtype -> the integer dtype of the same size
INT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Dropout


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set each element to 0 with probability p, and divide the others by 1 - p (Srivastava et al. 2014).

    On a CPU 1 - p is rounded to `keep_prob(p)`.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, training)
    if torch.compiler.is_compiling():
        return _fusible_dropout(x, p)
    return _Dropout.apply(x, p)


def keep_prob(p: float) -> float:
    """1 - p, rounded to a multiple of 1/256, because dropout on a CPU draws one byte for each element."""
    return (256 - drop_threshold(p)) / 256


def drop_threshold(p: float) -> int:
    """Dropout on a CPU sets an element to 0 if its random byte is below this number (1 to 255)."""
    return min(255, max(1, round(256 * p)))


def _random_bytes(count: int) -> Tensor:
    """At least `count` random bytes as int64 words, (ceil(count / 8),), from torch's default generator."""
    return torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # all int64 values


@torch.library.custom_op("fradique::random_bytes", mutates_args=())
def _random_bytes_op(x: Tensor) -> Tensor:
    """One random byte for each element of x, in x's shape, for compiled graphs.

    It uses only the shape of x. x is an argument so that the compiler does not merge two calls into one.
    """
    return _random_bytes(x.numel()).view(torch.uint8)[: x.numel()].view(x.shape)


@_random_bytes_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def _fusible_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that inductor can fuse with the operations before and after it."""
    random_bytes = torch.ops.fradique.random_bytes(x)
    # compared as floats: inductor generates faster code for that than for integers
    return x * (random_bytes.float() >= drop_threshold(p)) * (1 / keep_prob(p))


def dropout_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Integers of the given shape, as wide as dtype: -1 (all bits set) to keep an element, 0 to drop it.

    Each element has one random byte, and is kept if the byte is at least the threshold.
    """
    itemsize, threshold = dtype.itemsize, drop_threshold(p)
    count = math.prod(shape)
    words = _random_bytes(count).view(INT_DTYPES[itemsize])
    mask = torch.empty(itemsize, words.numel(), dtype=words.dtype)
    for i, row in enumerate(mask):  # row i: byte i of every word
        torch.bitwise_right_shift(words, 8 * i, out=row).bitwise_and_(255)
    mask.neg_().add_(threshold - 1)  # negative if byte >= threshold
    mask.bitwise_right_shift_(8 * itemsize - 1)  # copies the sign bit to all bits
    return mask.flatten()[:count].view(shape)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the bits of `mask`, a `dropout_mask`, are set; 0 elsewhere. Not scaled."""
    return (x.contiguous().view(mask.dtype) & mask).view(x.dtype)


class _Dropout(torch.autograd.Function):
    """Dropout on a CPU; saves the mask."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:  # noqa: ANN001
        mask = dropout_mask(x.shape, p, x.dtype)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / keep_prob(p)
        return apply_mask(x, mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        (mask,) = ctx.saved_tensors
        return apply_mask(grad, mask).mul_(ctx.scale), None


# Activations


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), the exact form with erf (Hendrycks & Gimpel 2016)."""
    compiling_for_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
    return torch.ops.fradique.gelu(x) if compiling_for_cpu else F.gelu(x)


@torch.library.custom_op("fradique::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    """F.gelu as a custom operator: compiled graphs then call torch's kernel, not inductor's slower code."""
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


# RMSNorm and rotary embedding


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019)."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    full_precision = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type != "cpu" or not needs_grad or not full_precision or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass of few operations.

    The backward pass calls torch's kernel for layer norm with a mean of 0. That kernel also subtracts the
    mean of grad · weight, which the gradient of RMSNorm does not contain: the backward pass adds it back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # noqa: ANN001
        x, weight, scale = ctx.saved_tensors
        grad, output_mask = grad.contiguous(), [True, ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, output_mask
        )
        mean = torch.mv(grad.view(-1, weight.numel()), weight).view(scale.shape).div_(weight.numel())
        return d_x.add_(mean.mul_(scale)), d_weight, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): rotates elements i and i + D / 2 as a pair, as in LLaMA.

    x (B, H, T, D), cos and sin (T, D / 2) -> (B, H, T, D), in the wider of the dtypes of x and cos.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return _ApplyRope.apply(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin)


class _ApplyRope(torch.autograd.Function):
    """RoPE; the backward pass rotates by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin, sign=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        cos, sin = ctx.saved_tensors
        return _rotate_pairs(grad, cos, sin, sign=-1.0), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (..., T, D), rotated by the angles (sign 1) or by the negative angles (sign -1)."""
    out = torch.empty_like(x)
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


ACTIVATIONS = {
    "gelu": gelu,  # the exact form, as in nanoGPT
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's approximation (Hendrycks & Gimpel 2016)
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer (So et al. 2021)
    "swiglu": F.silu,
    "geglu": F.gelu,
}
GATED = ("swiglu", "geglu")  # the MLP multiplies activation(gate) by a second projection (Shazeer 2020)
