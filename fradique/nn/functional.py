"""Dropout, activations, RMSNorm and rotary embedding (RoPE), with fast training on a CPU.

Each function equals a line of plain torch, which the tests compare it with. On CUDA and MPS they are torch's
own operations. On a CPU torch draws one random number per element for dropout, and RMSNorm and RoPE have no
kernels of their own but take many small operations.

Shapes: B batch, H heads, T tokens, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# bytes per element -> integers of the same size
INT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Dropout


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set each element to 0 with probability p, divide the others by 1 - p (Srivastava et al. 2014).

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
    """1 - p, rounded to a multiple of 1/256 below 1: dropout on a CPU compares random bytes."""
    return (256 - drop_threshold(p)) / 256


def drop_threshold(p: float) -> int:
    """Dropout on a CPU drops an element if its random byte is below this number, 1 to 255."""
    return min(255, max(1, round(256 * p)))


def _random_bytes(count: int) -> Tensor:
    """At least `count` random bytes as int64 words, (ceil(count / 8),), from torch's default generator."""
    return torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)


@torch.library.custom_op("fradique::random_bytes", mutates_args=())
def _random_bytes_op(x: Tensor) -> Tensor:
    """One random byte for each element of x, in x's shape, for compiled graphs.

    It reads only the shape of x. With x as an argument the compiler does not merge two calls into one.
    """
    return _random_bytes(x.numel()).view(torch.uint8)[: x.numel()].view(x.shape)


@_random_bytes_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def _fusible_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that inductor can fuse with its neighbours; its code for float comparisons is the fastest."""
    random_bytes = torch.ops.fradique.random_bytes(x)
    return x * (random_bytes.float() >= drop_threshold(p)) * (1 / keep_prob(p))


def dropout_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Integers of dtype's size, (shape): all bits set for elements that are kept, none for those dropped.

    One random byte per element: the bytes are shifted out of the random words, and the comparison is the sign
    bit of a difference.
    """
    width, threshold = dtype.itemsize, drop_threshold(p)
    count = math.prod(shape)
    words = _random_bytes(count).view(INT_DTYPES[width])
    mask = torch.empty(width, words.numel(), dtype=words.dtype)
    for i, row in enumerate(mask):  # row i: byte i of every word
        torch.bitwise_right_shift(words, 8 * i, out=row).bitwise_and_(255)
    mask = (
        mask.neg_().add_(threshold - 1).bitwise_right_shift_(8 * width - 1)
    )  # -1 if byte >= threshold, else 0
    return mask.flatten()[:count].view(shape)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 where `dropout_mask` has no bits set."""
    return (x.contiguous().view(mask.dtype) & mask).view(x.dtype)


class _Dropout(torch.autograd.Function):
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
    on_cpu = x.device.type == "cpu" and torch.compiler.is_compiling()
    return torch.ops.fradique.gelu(x) if on_cpu else F.gelu(x)


@torch.library.custom_op("fradique::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    """torch's kernel in a compiled graph: the code that inductor generates for a CPU is slower."""
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

    The gradient is torch's layer norm kernel with a mean of 0. Layer norm also subtracts the mean of the
    gradient, which RMSNorm does not; it is added back.
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

    x (B, H, T, D), cos and sin (T, D / 2) -> (B, H, T, D) in the wider of their dtypes.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return _ApplyRope.apply(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin)


class _ApplyRope(torch.autograd.Function):
    """RoPE; the backward pass rotates by -theta."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return _rotate_pairs(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _rotate_pairs(grad, *ctx.saved_tensors, -1.0), None, None


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (..., T, D), rotated by sign * theta."""
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


ACTIVATIONS = {
    "gelu": gelu,  # nanoGPT's: the exact form
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's approximation (Hendrycks & Gimpel 2016)
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer (So et al. 2021)
    "swiglu": F.silu,  # gated: applied to the gate, which multiplies the value (Shazeer 2020)
    "geglu": F.gelu,
}
GATED = ("swiglu", "geglu")
