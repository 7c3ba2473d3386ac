"""Check the fast paths of a model's first forward and backward pass; fall back to torch's plain path.

On CUDA a run depends on kernels that no other device has: fused attention, and products in 16 bits under
autocast. Before training, the loss and the gradient norm of a few tokens are compared with those in float32
with `plain_attention`. A path that raises an error, or whose result differs, is replaced, with one warning.

Not found here: an error that makes the CUDA context unusable, such as an illegal memory access. After it
every CUDA call of the process fails, and so the run ends with that error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fradique.runtime.device import Runtime
from fradique.runtime.memory_limits import is_out_of_memory
from model import GPT, plain_attention

CHECKED_DEVICES = ("cuda",)
MAX_TOKENS = 256  # in the check; with prefix_len, the prefix and as many tokens after it
# Largest relative differences from float32. In bfloat16 a loss differs by a thousandth, a norm by hundredths.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.02, 0.2
# With dropout, the compiled model draws other random numbers than the eager one.
DROPOUT_TOLERANCE = 0.25
# Of the loss in the backward pass: small gradients would be 0 in float16. A GradScaler begins with a larger
# scale and reduces it after an overflow, but an overflow here would count as a failure.
LOSS_SCALE = 128.0


@dataclass(frozen=True)
class FirstPass:
    """The loss of a forward pass and the norm of its gradient, 0 without gradients; without sparse ones."""

    loss: float
    norm: float

    def problem(self, expected: FirstPass) -> str | None:
        """How this differs from the `expected` pass; None if it is close to it."""
        return loss_problem(self.loss, expected.loss) or (
            None
            if math.isclose(self.norm, expected.norm, rel_tol=NORM_TOLERANCE, abs_tol=1e-6)
            else f"its gradient norm is {self.norm:.4g} instead of {expected.norm:.4g}"
        )


def loss_problem(loss: float, expected: float, tolerance: float = LOSS_TOLERANCE) -> str | None:
    """How a loss differs from the `expected` one; None if it is close to it."""
    if math.isclose(loss, expected, rel_tol=tolerance, abs_tol=1e-3):
        return None
    return f"its first loss is {loss:.4g} instead of {expected:.4g}"


def check_first_pass(
    model: GPT, runtime: Runtime, idx: Tensor, targets: Tensor, warn: Callable[[str], None]
) -> Runtime:
    """Choose attention and dtype: the fastest that work. Changes the attention of `model`.

    idx, targets: a micro-batch (B, T) on the device, of which the first tokens are used. Returns the runtime,
    with dtype float32 if autocast does not work. All ranks decide alike. Draws no random numbers, and leaves
    the gradients empty. Raises an out-of-memory error unchanged.
    """
    tokens = max(MAX_TOKENS, 2 * model.config.prefix_len)
    idx, targets = idx[:1, :tokens], targets[:1, :tokens]
    in_float32 = replace(runtime, dtype=torch.float32)
    with use_plain_attention(model):
        expected = first_pass(model, in_float32, idx, targets)
    if not (math.isfinite(expected.loss) and math.isfinite(expected.norm)):
        return runtime  # the weights are broken, and no fast path is the reason
    first_problem = None
    for candidate, plain in ((runtime, False), (runtime, True), (in_float32, False), (in_float32, True)):
        problem = _find_problem(model, candidate, plain, idx, targets, expected)
        first_problem = first_problem or problem
        if runtime.max(float(problem is not None))[0] == 0.0:
            break
    changes = ["plain attention (flash=False)"] if plain else []
    changes += ["dtype=float32"] if candidate.dtype != runtime.dtype else []
    if changes:
        dtype = str(runtime.dtype).removeprefix("torch.")
        reason = first_problem or "on another rank"
        warn(f"the first step in {dtype} fails ({reason}); continuing with {' and '.join(changes)}")
    if plain:
        set_attention(model, plain_attention)
    return candidate


@torch.no_grad()
def check_inference(model: GPT, runtime: Runtime, warn: Callable[[str], None]) -> Runtime:
    """`check_first_pass` without gradients, on the tokens 0, 1, 2, ...; only on CUDA."""
    if runtime.device.type not in CHECKED_DEVICES:
        return runtime
    length = min(model.config.block_size, max(MAX_TOKENS, 2 * model.config.prefix_len))
    idx = torch.arange(length, device=runtime.device)[None] % model.config.vocab_size
    return check_first_pass(model, runtime, idx, (idx + 1) % model.config.vocab_size, warn)


def _find_problem(
    model: GPT, runtime: Runtime, plain: bool, idx: Tensor, targets: Tensor, expected: FirstPass
) -> str | None:
    """What is wrong with a dtype, and with fused or plain attention; None if they work."""
    try:
        if plain:
            with use_plain_attention(model):
                return first_pass(model, runtime, idx, targets).problem(expected)
        return first_pass(model, runtime, idx, targets).problem(expected)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    finally:
        model.zero_grad(set_to_none=True)


def first_pass(model: GPT, runtime: Runtime, idx: Tensor, targets: Tensor) -> FirstPass:
    """A forward and a backward pass without dropout."""
    was_training = model.training
    try:
        model.eval()
        with runtime.autocast():
            _, loss = model(idx, targets, with_logits=False)
        if loss.requires_grad:  # not under no_grad, or if every parameter is frozen
            (loss * LOSS_SCALE).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
        norm = nn.utils.get_total_norm(grads).item() / LOSS_SCALE
        return FirstPass(loss.item(), norm)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def set_attention(model: GPT, function: Callable[..., Tensor]) -> None:
    """Let all blocks compute attention with `function`."""
    for block in model.transformer["h"]:
        block.attn.attention = function


@contextmanager
def use_plain_attention(model: GPT) -> Iterator[None]:
    """`plain_attention` in all blocks, for the time of the context."""
    before = [block.attn.attention for block in model.transformer["h"]]
    set_attention(model, plain_attention)
    try:
        yield
    finally:
        for block, function in zip(model.transformer["h"], before, strict=True):
            block.attn.attention = function
