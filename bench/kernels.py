"""Each function with which training on a CPU is faster than with torch's own, timed beside torch's.

`python -m bench.train CONFIG --kernels` prints them in one table, for the sizes of a micro-batch of the
config. A ratio below 1 means that torch's function would be faster on this machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import machine
from fradique.nn import attention, cross_entropy, functional, linear, ngrams
from fradique.nn.cpu_features import emulates_bf16
from fradique.nn.norms import NORM_EPS
from fradique.optim import muon, optimizer
from fradique.optim.row_adagrad import RowAdagrad
from fradique.runtime.device import rows_per_pass

if TYPE_CHECKING:
    from fradique.training.trainer import Trainer

CPU = torch.device("cpu")
DROPOUT = 0.1  # if the config has none
ROUNDS, ROUND_SECONDS = 7, 0.03  # both functions run in turn, each for so long; at least once


@dataclass(frozen=True)
class Sizes:
    """The sizes of a micro-batch and of a model."""

    batch: int
    tokens: int
    width: int
    heads: int
    vocab: int
    dropout: float


def sizes_of(t: Trainer) -> Sizes:
    """The sizes of a run. Raises ValueError if it is not on a CPU: elsewhere most functions are torch's."""
    if t.runtime.device.type != "cpu":
        raise ValueError(
            f"--kernels compares the functions for a CPU: add --device=cpu, not {t.runtime.device}"
        )
    config, settings = t.model.config, t.settings
    return Sizes(
        batch=rows_per_pass(settings.batch_size, config.block_size),
        tokens=config.block_size,
        width=config.n_embd,
        heads=config.n_head,
        vocab=config.vocab_size,
        dropout=config.dropout,
    )


@dataclass(frozen=True)
class Kernel:
    """A function of this project and torch's own with the same result, both as calls without arguments.

    Those with a gradient run forward and backward.
    """

    name: str
    ours: Callable[[], Any]
    torchs: Callable[[], Any]


def measure(sizes: Sizes, rounds: int = ROUNDS, round_seconds: float = ROUND_SECONDS) -> list[dict[str, Any]]:
    """Milliseconds of each pair of functions, and how many times as fast ours is: medians over the rounds."""
    rows = []
    torch.manual_seed(0)
    for kernel in all_kernels(sizes):
        functions = (kernel.ours, kernel.torchs)
        counts = [
            max(1, round(round_seconds / min(machine.times(function, CPU, rounds=2))))
            for function in functions
        ]
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for function, count, seconds in zip(functions, counts, times, strict=True):
                repeat = lambda f=function, n=count: [f() for _ in range(n)]  # noqa: E731
                seconds.append(machine.seconds(repeat, CPU) / count)
        ours, torchs = (1000 * statistics.median(seconds) for seconds in times)
        ratio = machine.median_ratio(times[1], times[0])
        rows.append({"kernel": kernel.name, "ours_ms": ours, "torch_ms": torchs, "ratio": ratio})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure` as text."""
    lines = [f"{'kernel':<44} {'ours, ms':>9} {'torch, ms':>9} {'ratio':>6}"]
    lines += [
        f"{row['kernel']:<44} {row['ours_ms']:>9.3f} {row['torch_ms']:>9.3f} {row['ratio']:>6.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def all_kernels(sizes: Sizes) -> Iterator[Kernel]:
    """All pairs. Those in bfloat16 are left out where the CPU emulates it."""
    dtypes = [torch.float32] if emulates_bf16(CPU) else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        yield from _attention_kernels(sizes, dtype, name)
        yield from _layer_kernels(sizes, dtype, name)
    yield from _optimizer_kernels(sizes, dtypes[-1])


def trained(name: str, ours: Callable[..., Tensor], torchs: Callable[..., Tensor], *inputs: Tensor) -> Kernel:
    """A kernel whose functions compute a tensor from the same inputs, and their gradients."""
    return Kernel(name, forward_backward(ours, *inputs), forward_backward(torchs, *inputs))


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that computes function(*inputs) and its gradients for the inputs that require them."""
    wanted = [x for x in inputs if x.requires_grad]
    out = function(*inputs)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) if out.dim() else None
    return lambda: torch.autograd.grad(function(*inputs), wanted, grad)


def _random(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (std * torch.randn(*shape)).to(dtype).requires_grad_()


def _attention_kernels(sizes: Sizes, dtype: torch.dtype, name: str) -> Iterator[Kernel]:
    shape = (sizes.batch, sizes.heads, sizes.tokens, sizes.width // sizes.heads)
    q, k, v = (_random(*shape, dtype=dtype) for _ in range(3))
    for p in (0.0, sizes.dropout or DROPOUT):
        yield trained(
            f"attention, {name}" + (f", dropout {p:g}" if p else ""),
            lambda q, k, v, p=p: attention.attention(q, k, v, None, p),
            lambda q, k, v, p=p: F.scaled_dot_product_attention(q, k, v, None, p, is_causal=True),
            *(q, k, v),
        )
    if dtype == torch.float32 and shape[-1] % 2 == 0:
        angles = torch.rand(sizes.tokens, shape[-1] // 2)
        yield trained(f"RoPE, {name}", functional.apply_rope, _plain_rope, q, angles.cos(), angles.sin())


def _plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _layer_kernels(sizes: Sizes, dtype: torch.dtype, name: str) -> Iterator[Kernel]:
    C, V, N = sizes.width, sizes.vocab, sizes.batch * sizes.tokens
    x, p = _random(N, C, dtype=dtype), sizes.dropout or DROPOUT
    yield trained(
        f"dropout {p:g}, {name}",
        lambda x: functional.dropout(x, p, training=True),
        lambda x: F.dropout(x, p, training=True),
        x,
    )
    if dtype == torch.float32:
        yield trained(
            f"RMSNorm, {name}",
            lambda x, w: functional.rms_norm(x, w, NORM_EPS),
            lambda x, w: F.rms_norm(x, (C,), w, NORM_EPS),
            *(x, _random(C)),
        )
    for rows in (3 * C, 4 * C):
        weight = _random(rows, C, dtype=dtype, std=0.02)
        yield trained(f"linear layer {C} -> {rows}, {name}", linear.linear, F.linear, x, weight)
    targets = torch.randint(V, (N,))
    yield trained(
        f"cross-entropy, {V} tokens, {name}",
        lambda x, w: cross_entropy.linear_cross_entropy(x, w, targets),
        lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets),
        *(x, _random(V, C, dtype=dtype, std=0.02)),
    )


def _optimizer_kernels(sizes: Sizes, dtype: torch.dtype) -> Iterator[Kernel]:
    C = sizes.width
    linears = {
        name: nn.Linear(columns, rows, bias=False)
        for name, rows, columns in (("qkv", 3 * C, C), ("proj", C, C), ("fc", 4 * C, C), ("out", C, 4 * C))
    }
    weights = {name: module.weight for name, module in linears.items()}
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    splits = {"qkv": (C, C, C), "proj": (C,), "fc": (4 * C,), "out": (C,)}
    views = [view for name, p in weights.items() for view in muon.split_matrix(name, p, splits[name])]
    ours = muon.Muon(views, lr=1e-3, momentum=0.9, weight_decay=0.0)
    ours.assign_gradients()
    separate = [nn.Parameter(view.view.detach().clone()) for view in views]
    for copy, view in zip(separate, views, strict=True):
        copy.grad = view.view.grad.clone()
    plain = torch.optim.Muon(separate, lr=1e-3, momentum=0.9, weight_decay=0.0)
    if dtype == torch.bfloat16:  # torch.optim.Muon always computes in it
        yield Kernel(f"Muon, one layer {C} wide", ours.step, plain.step)
    grads = [weight.grad for weight in weights.values()]
    yield Kernel(
        f"norm of the gradients, one layer {C} wide",
        lambda: optimizer._norm(grads),
        lambda: nn.utils.get_total_norm(grads),
    )
    yield _ngram_kernel(sizes)


def _ngram_kernel(sizes: Sizes, ngram_max: int = 4, rows: int = 16384) -> Kernel:
    """Looking up n-grams, their gradient, and the step of their optimizer; torch's with a dense gradient."""
    ids = torch.randint(1, 1 + sizes.vocab, (sizes.batch, ngram_max - 1 + sizes.tokens))
    grad = torch.randn(sizes.batch, sizes.tokens, sizes.width)
    sparse = ngrams.NgramEmbedding(ngram_max, rows, sizes.width)
    adagrad = RowAdagrad([("ngrams.weight", sparse.weight)], lr=1e-3)
    dense = ngrams.NgramEmbedding(ngram_max, rows, sizes.width)
    dense.sparse_grad = False
    adamw = torch.optim.AdamW(dense.parameters(), lr=1e-3, fused=True)

    def step(table: ngrams.NgramEmbedding, opt: torch.optim.Optimizer) -> None:
        table(ids).backward(grad)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return Kernel(
        f"n-grams up to {ngram_max} and their optimizer",
        lambda: step(sparse, adagrad),
        lambda: step(dense, adamw),
    )
