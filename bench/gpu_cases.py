"""Correctness rows of bench.gpu_check: functions, optimizers and whole models, compared with the CPU.

Each row returns its largest errors, as fractions of the largest expected value, and raises an AssertionError
if one exceeds its tolerance. Operations are compared with plain torch in float64, whole models with the same
model on the CPU in float32.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures import ARCHITECTURES, architecture_settings
from bench.gpu_context import DTYPES, Context, compare, full_precision, random_tensor
from fradique.nn import functional, lora
from fradique.nn.attention import attention, causal_mask
from fradique.nn.cross_entropy import linear_cross_entropy
from fradique.nn.linear import linear
from fradique.nn.positions import alibi_slopes, rope_cos_sin
from fradique.optim import optimizer
from fradique.training.model_setup import model_config
from model import GPT, GPTConfig, plain_attention

Result = dict[str, Any]
# By dtype: of an operation and its gradients, and of the loss and the gradients of a whole model.
TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2, "float16": 1e-2}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 3e-3}
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 4e-2}
QUICK_ARCHITECTURES = ("gpt2", "modern", "glm130b", "bloom")
STANDARD_ERRORS = 5.0  # of the share of elements that dropout keeps
VOCAB = 64


def compare_function(
    name: str,
    context: Context,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtypes: Sequence[str] = tuple(DTYPES),
) -> Result:
    """Compare a function of float tensors on the device with its reference in float64, and their gradients.

    inputs: on the CPU, in float64. Returns {dtype: largest error}.
    """
    errors: Result = {}
    for dtype in dtypes:
        rounded = [x.to(DTYPES[dtype]) for x in inputs]
        ours = [x.to(context.device, copy=True).requires_grad_() for x in rounded]
        exact = [x.double().requires_grad_() for x in rounded]
        with full_precision():
            actual, expected = function(*ours), reference(*exact)
            grad = random_tensor(*expected.shape, seed=9).to(DTYPES[dtype])
            actual_grads = torch.autograd.grad(actual, ours, grad.to(context.device, actual.dtype))
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        pairs = zip((actual, *actual_grads), (expected, *expected_grads), strict=True)
        errors[dtype] = max(compare(f"{name} in {dtype}", a, e, TOLERANCE[dtype]) for a, e in pairs)
    return errors


def merge(errors: Result, other: Result) -> None:
    """Keep the larger error of each dtype in `errors`."""
    for dtype, error in other.items():
        errors[dtype] = max(error, errors.get(dtype, 0.0))


# Attention


def attention_masks(T: int, S: int, heads: int) -> dict[str, Tensor | None]:
    """Masks of T queries and S keys, on the CPU: see AttentionInputs.mask in model.py."""
    causal = causal_mask(T, S, torch.device("cpu"))
    keys, queries = torch.arange(S), torch.arange(S - T, S)[:, None]
    bias = -alibi_slopes(heads, torch.device("cpu"))[:, None, None] * (queries - keys).abs()
    return {
        "causal": None,
        "sliding window": causal & (keys > queries - 9),
        "prefix": causal | (keys < 12),
        "alibi": bias.masked_fill(~causal, float("-inf"))[None],
    }


def attention_row(context: Context) -> Result:
    """Fused and explicit attention, with equal and grouped heads, all masks, and cached keys."""
    B, H, D = 2, 4, 32
    errors: Result = {}
    shapes = [(40, 40), (8, 40), (1, 40)] if context.quick else [(300, 300), (64, 300), (1, 300)]
    for (T, S), kv_heads in ((shape, kv) for shape in shapes for kv in (H, 2, 1)):
        inputs = [
            random_tensor(B, H, T, D),
            random_tensor(B, kv_heads, S, D, seed=1),
            random_tensor(B, kv_heads, S, D, seed=2),
        ]
        for kind, mask in attention_masks(T, S, H).items():
            on_device = None if mask is None else mask.to(context.device)
            for name, function in (("attention", attention), ("explicit attention", plain_attention)):
                case = f"{name} ({kind}, T={T}, S={S}, {kv_heads} key heads)"
                ours = lambda q, k, v, f=function, m=on_device: f(q, k, v, m)  # noqa: E731
                reference = lambda q, k, v, m=mask: plain_attention(q, k, v, m)  # noqa: E731
                merge(errors, compare_function(case, context, ours, reference, inputs))
    return errors


def attention_dropout_row(context: Context) -> Result:
    """Attention's dropout: with equal scores and one-hot values, the output is the dropped probabilities."""
    B, H, S, p = 16, 8, 64, 0.25
    dropped = {}
    for dtype in ("float32", "bfloat16", "float16"):
        if dtype == "float16" and not context.is_cuda:
            continue
        torch.manual_seed(1)
        q = torch.zeros(B, H, S, S, device=context.device, dtype=DTYPES[dtype]).requires_grad_()
        v = torch.eye(S, device=context.device, dtype=DTYPES[dtype]).repeat(B, H, 1, 1)
        out = attention(q, q, v, p=p).detach().double().cpu()  # (B, H, S, S): probabilities, lower triangle
        kept = out[..., causal_mask(S, S, torch.device("cpu"))]
        dropped[dtype] = check_share(f"attention in {dtype}", (kept == 0).double(), p)
        row = torch.arange(1, S + 1).double()[:, None].expand(S, S)
        scaled = (out * row * (1 - p))[out != 0]
        compare(f"probabilities that {dtype} keeps", scaled, torch.ones_like(scaled), TOLERANCE[dtype])
    return {"p": p, "dropped": dropped}


def check_share(name: str, dropped: Tensor, p: float) -> float:
    """The mean of zeros and ones, which must be p up to its standard error."""
    share, limit = dropped.mean().item(), STANDARD_ERRORS * (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(share - p) <= limit, f"{name}: dropout sets {share:.4f} to 0 instead of {p} ± {limit:.4f}"
    return round(share, 4)


# Other operations


def cross_entropy_row(context: Context) -> Result:
    """Cross-entropy of a small and of a large vocabulary, with a softcap, and ignored targets."""
    N, C = (40, 16) if context.quick else (600, 64)
    errors: Result = {}
    for V, softcap in ((65, 0.0), (65, 3.0), (5000, 0.0), (5000, 3.0)):
        targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
        targets[::7] = -1
        inputs = [random_tensor(N, C), random_tensor(V, C, seed=1) * 0.3]

        def reference(x: Tensor, w: Tensor, targets: Tensor = targets, softcap: float = softcap) -> Tensor:
            logits = x @ w.t()
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            return F.cross_entropy(logits, targets, ignore_index=-1)

        on_device = targets.to(context.device)
        ours = lambda x, w, t=on_device, c=softcap: linear_cross_entropy(x, w, t, c)  # noqa: E731
        merge(errors, compare_function(f"cross-entropy (V={V})", context, ours, reference, inputs))
    return errors


def functional_row(context: Context) -> Result:
    """RMSNorm, RoPE, all activations, linear layers, and the share of elements that dropout sets to 0."""
    B, H, T, D = 2, 4, 48, 32
    errors: Result = {}
    x, weight = random_tensor(B, H, T, D), 1 + 0.1 * random_tensor(D, seed=1)
    cos, sin = (angle.double() for angle in rope_cos_sin(torch.arange(T), D, 10000.0))

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rope(x: Tensor) -> Tensor:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def our_rope(x: Tensor) -> Tensor:
        return functional.apply_rope(x, *rope_cos_sin(torch.arange(T, device=x.device), D, 10000.0))

    cases: list[tuple[str, Callable, Callable, list[Tensor]]] = [
        ("rms_norm", lambda x, w: functional.rms_norm(x, w, 1e-5), rms_norm, [x, weight]),
        ("rope", our_rope, rope, [x]),
        ("linear", linear, lambda x, w, b: x @ w.t() + b, [x, random_tensor(24, D), random_tensor(24)]),
    ]
    exact = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "swiglu": F.silu}
    exact |= {"gelu": F.gelu, "geglu": F.gelu, "relu2": lambda x: F.relu(x) ** 2}
    cases += [(name, function, exact[name], [x]) for name, function in functional.ACTIVATIONS.items()]
    for name, ours, reference, inputs in cases:
        merge(errors, compare_function(name, context, ours, reference, inputs))
    torch.manual_seed(1)
    ones = torch.ones(1 << 16, device=context.device)
    dropped = functional.dropout(ones, 0.25, training=True).cpu()
    return errors | {"dropped": check_share("dropout", (dropped == 0).double(), 0.25)}


# Optimizers


def tiny_model(**changes: Any) -> GPT:
    """A model with random weights on the CPU."""
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{"block_size": 32, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 32} | changes
        )
    )


def updates(context: Context, device: torch.device, name: str) -> Tensor:
    """The weights after five steps of an optimizer on the same random gradients, minus those before."""
    model = tiny_model().to(device)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizers = optimizer.build_optimizers(
        model, name=name, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(5):
        for i, p in enumerate(model.parameters()):
            p.grad = random_tensor(*p.shape, seed=100 * step + i).float().to(device)
        optimizer.clip_gradients(model, 1.0)
        optimizer.assign_gradients(optimizers)
        for opt in optimizers:
            opt.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def adamw_row(context: Context) -> Result:
    """Five steps of AdamW, with clipping, beside torch's plain AdamW on the CPU."""
    model = tiny_model()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    groups = optimizer.parameter_groups(dict(model.named_parameters()), weight_decay=0.1)
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False)
    for step in range(5):
        for i, p in enumerate(model.parameters()):
            p.grad = random_tensor(*p.shape, seed=100 * step + i).float()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
    expected = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    return {"float32": compare("AdamW", updates(context, context.device, "adamw"), expected, 1e-3)}


def muon_row(context: Context) -> Result:
    """Five steps of Muon beside the CPU's, and the singular values of an orthogonalized matrix.

    The iteration runs in bfloat16, whose rounding differs between devices, or in float32 on a CPU that would
    emulate it.
    """
    expected = updates(context, torch.device("cpu"), "muon")
    error = compare("Muon", updates(context, context.device, "muon"), expected, 0.1)
    model = tiny_model().to(context.device)
    optimizers = optimizer.build_optimizers(
        model,
        name="muon",
        learning_rate=1.0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        muon_learning_rate=1.0,
        muon_momentum=0.0,
    )
    weight = model.transformer["h"][0].mlp.c_proj.weight  # (32, 128): wide, so that the update is not scaled
    before = weight.detach().clone()
    weight.grad = random_tensor(*weight.shape).float().to(context.device)
    optimizer.assign_gradients(optimizers)
    optimizers[0].step()
    values = torch.linalg.svdvals((before - weight.detach()).cpu())
    low, high = values.min().item(), values.max().item()
    assert low > 0.5 and high < 1.3, f"Muon: singular values {low:.3f} to {high:.3f} instead of about 1"
    return {"update": error, "singular_values": [round(low, 3), round(high, 3)]}


# Whole models


def architecture_config(name: str) -> GPTConfig:
    """A small config of config/arch/<name>.py."""
    flags = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=64", "--dropout=0.0"]
    flags += ["--prefix_len=8"] if name == "glm130b" else []
    return model_config(architecture_settings(name, flags), vocab_size=VOCAB)


def tokens(*shape: int, seed: int = 3) -> Tensor:
    """Random token ids, on the CPU."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(
    model: GPT, device: torch.device, dtype: str, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and all gradients in one vector. scale: of the loss in the backward pass."""
    model = model.to(device)
    idx, targets = tokens(2, 64).to(device), tokens(2, 64, seed=4).to(device)
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        _, loss = model(idx, targets, with_logits=False)
    (loss * scale).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.detach(), torch.cat(gradients) / scale


def random_model(config: GPTConfig) -> GPT:
    """A model on the CPU in which no bias is 0 and no norm weight is 1."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def compare_models(context: Context, dtype: str, configs: dict[str, GPTConfig], prepare: Callable) -> Result:
    """Compare losses and gradients of models on the device in `dtype` with those on the CPU in float32.

    prepare: changes a model before it is used.
    """
    largest = {"loss": 0.0, "gradient": 0.0}
    for name, config in configs.items():
        expected_loss, expected = loss_and_gradients(
            prepare(random_model(config)), torch.device("cpu"), "float32"
        )
        with full_precision():
            scale = 1024.0 if dtype == "float16" else 1.0  # small gradients would be 0
            loss, gradients = loss_and_gradients(prepare(random_model(config)), context.device, dtype, scale)
        error = compare(f"loss of {name} in {dtype}", loss, expected_loss, LOSS_TOLERANCE[dtype])
        largest["loss"] = max(largest["loss"], error)
        difference = (gradients.double().cpu() - expected.double()).norm() / expected.double().norm()
        limit = GRADIENT_TOLERANCE[dtype]
        assert difference <= limit, f"gradients of {name} in {dtype}: error {difference:.2g} > {limit:.2g}"
        largest["gradient"] = max(largest["gradient"], difference.item())
    return largest


def model_row(dtype: str) -> Callable[[Context], Result]:
    """The row that compares all architectures in a dtype."""

    def row(context: Context) -> Result:
        names = QUICK_ARCHITECTURES if context.quick else ARCHITECTURES
        configs = {name: architecture_config(name) for name in names}
        return compare_models(context, dtype, configs, lambda model: model)

    return row


def lora_row(context: Context) -> Result:
    """LoRA: loss and gradients of the adapters."""

    def add_lora(model: GPT) -> GPT:
        lora.add_lora(model, 4, 16.0, "c_attn,c_proj,c_fc")
        with torch.no_grad():
            for i, p in enumerate(p for name, p in model.named_parameters() if "lora_" in name):
                p.copy_(0.1 * random_tensor(*p.shape, seed=i))
        return model

    return compare_models(context, "float32", {"gpt2 with LoRA": architecture_config("gpt2")}, add_lora)


def checkpointing_row(context: Context) -> Result:
    """Gradient checkpointing: the loss and the gradients stay the same."""

    def checkpointed(model: GPT) -> GPT:
        model.gradient_checkpointing = True
        return model

    return compare_models(context, "float32", {"gpt2": architecture_config("gpt2")}, checkpointed)


def compile_row(context: Context) -> Result:
    """torch.compile beside the eager model, in float32 and in bfloat16. In a quick check without inductor."""
    errors = {}
    backend = "aot_eager" if context.quick else "inductor"
    for dtype in ("float32", "bfloat16"):
        torch._dynamo.reset()
        model = random_model(architecture_config("modern")).to(context.device)
        with full_precision(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's hints are for its own developers
            expected_loss, expected = loss_and_gradients(model, context.device, dtype)
            compiled = torch.compile(model, backend=backend)
            loss, gradients = loss_and_gradients(compiled, context.device, dtype)
        compare(f"compiled loss in {dtype}", loss, expected_loss, LOSS_TOLERANCE[dtype])
        errors[dtype] = compare(
            f"compiled gradients in {dtype}", gradients, expected, GRADIENT_TOLERANCE[dtype]
        )
    torch._dynamo.reset()
    return errors


CASES: dict[str, tuple[Callable[[Context], Result], float]] = {  # name: (function, seconds at most)
    "attention": (attention_row, 30),
    "attention dropout": (attention_dropout_row, 10),
    "cross-entropy": (cross_entropy_row, 20),
    "functional": (functional_row, 20),
    "AdamW": (adamw_row, 10),
    "Muon": (muon_row, 10),
    "models in float32": (model_row("float32"), 30),
    "models in bfloat16": (model_row("bfloat16"), 30),
    "models in float16": (model_row("float16"), 30),
    "LoRA": (lora_row, 10),
    "gradient checkpointing": (checkpointing_row, 10),
    "compile": (compile_row, 90),
}
