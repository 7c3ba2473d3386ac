"""The GPT: its configuration, its parts, and the model.

A decoder-only transformer (Vaswani et al. 2017; GPT-2: Radford et al. 2019) with nanoGPT's face:
`GPT(GPTConfig(...))`, `forward(idx, targets) -> (logits, loss)`, `generate(idx, max_new_tokens)`.
It imports torch, and `fradique.kernels`, `pointwise` and `generation`, which do no more; it opens no file,
chooses no device and prints nothing.

Shapes: B batch, T time (tokens), S keys seen so far, C = n_embd, V = vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fradique.generation import generate
from fradique.generation.kv_cache import KVCache
from fradique.nn import attention, cross_entropy, functional
from fradique.nn.functional import ACTIVATIONS, GATED
from fradique.nn.linear import Linear

NORMS = ("layernorm", "rmsnorm")
NORM_PLACES = ("pre", "post", "deepnorm")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "relative", "none")
NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. `GPTConfig()` is GPT-2 124M with nanoGPT's padded vocabulary."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, and two thirds of it where the activation is gated
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    norm: str = "layernorm"  # one of NORMS
    norm_place: str = "pre"  # one of NORM_PLACES
    qk_norm: bool = False  # normalise queries and keys, head by head
    embd_norm: bool = False  # normalise the embedding (BLOOM)
    position: str = "learned"  # one of POSITIONS
    rope_theta: float = 10000.0
    activation: str = "gelu"  # a key of ACTIVATIONS
    parallel_block: bool = False  # attention and MLP side by side, on one norm
    prefix_len: int = 0  # tokens at the beginning that see one another both ways
    sliding_window: int = 0  # keys that a query sees, its own among them; 0: all
    tie_weights: bool = True  # one matrix for the embedding and the output layer
    logit_softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: they stay
    flash: bool = True  # torch's fused attention; False: the plain softmax, written out

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP. A gated one has three matrices: two thirds, to a multiple of 8, cost the same."""
        default = -(-8 * self.n_embd // 24) * 8 if self.activation in GATED else 4 * self.n_embd
        return self.n_inner or default

    def problems(self) -> list[str]:
        """What is wrong with this shape, a sentence each; empty where nothing is."""
        found = [
            f"{name} = {value} must be at least {least}"
            for names, least in ((SIZES, 1), (SIZES_OR_NONE, 0))
            for name in names
            if not (value := getattr(self, name)) >= least
        ]
        if not found:
            found += self._contradictions()
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout = {self.dropout} must be at least 0 and less than 1")
        if not self.rope_theta > 0:
            found.append(f"rope_theta = {self.rope_theta} must be above 0")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                found.append(f"{name} = {value!r} is none of {', '.join(choices)}")
        return found

    def _contradictions(self) -> list[str]:
        """Sizes that are each sound by themselves, and do not go together."""
        found, heads = [], self.n_head
        if self.n_embd % heads:
            below = self.n_embd - self.n_embd % heads
            near = f"{below} or {below + heads}" if below else f"{heads}"
            found.append(
                f"n_embd = {self.n_embd} is not divisible by n_head = {heads}: "
                f"each head takes an equal part of the width (n_embd = {near} would do)"
            )
        elif self.position == "rope" and self.head_dim % 2:
            found.append(
                f"position = 'rope' turns pairs of numbers, and n_embd / n_head = {self.head_dim} is odd: "
                "change n_embd or n_head"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            found.append(f"position = 'sinusoidal' needs an even n_embd, not {self.n_embd}")
        if heads % self.kv_heads:
            fit = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            found.append(
                f"n_head = {heads} is not a multiple of n_kv_head = {self.n_kv_head}: the queries share the "
                f"keys in equal groups (n_kv_head = {fit} would do)"
            )
        if self.prefix_len and self.sliding_window:
            found.append(
                f"prefix_len = {self.prefix_len} and sliding_window = {self.sliding_window} contradict each "
                "other: one lets tokens see further, the other less far; set one of them to 0"
            )
        if self.prefix_len >= self.block_size:
            found.append(
                f"prefix_len = {self.prefix_len} leaves nothing of block_size = {self.block_size} to predict"
            )
        return found

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields: what a settings object or a `model.json` may give."""
        return [field.name for field in fields(cls)]


SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
SIZES_OR_NONE = ("n_kv_head", "n_inner", "prefix_len", "sliding_window", "logit_softcap")  # 0: none
CHOICES = {
    "norm": NORMS,
    "norm_place": NORM_PLACES,
    "position": POSITIONS,
    "activation": tuple(ACTIVATIONS),
}


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) whose bias may be left out."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.shape = (width,)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """Division by the root mean square (Zhang & Sennrich 2019): no mean is taken away, no bias added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # what autocast made smaller is widened again: torch has no fast kernel for two dtypes, and says so
        return functional.rms_norm(x.to(self.weight.dtype), self.weight, NORM_EPS)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.norm == "rmsnorm" else LayerNorm(width, config.bias)


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers are told of the positions: which keys a query sees, and how rope turns both."""

    # bool (T, S), true where seen; or (1, n_head, T, S), added to the scores; None: causal
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None  # cosine and sine, (T, head_dim / 2) each


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself, what stands before it, and its prefix."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.attend = attention.attention if config.flash else plain_attention
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)  # of q, k, v
        self.widths = tuple(count * config.head_dim for count in self.heads)
        self.c_attn = Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_attn.stacked = self.widths  # three matrices in one, for optimizers that take them one by one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, sight: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        y = self.mix(self.c_attn(x), sight, cache)  # (B, T, C)
        return functional.dropout(self.c_proj(y), self.dropout, self.training)

    def mix(self, stacked: Tensor, sight: AttentionInputs, cache: KVCache | None) -> Tensor:
        """Queries, keys and values side by side, (B, T, sum(widths)) -> what each query reads, (B, T, C)."""
        B, T, _ = stacked.shape
        heads = stacked.view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split_with_sizes(self.heads, 1)  # (B, n_head or kv_heads, T, head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if sight.rotation is not None:
            q, k = (functional.apply_rope(part, *sight.rotation) for part in (q, k))
        if q.dtype != v.dtype:  # norms may answer in float32 where autocast is on
            q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, kv_heads, S, head_dim)
        y = self.attend(
            q, k, v, sight.mask, self.dropout if self.training else 0.0
        )  # (B, n_head, T, head_dim)
        return y.transpose(1, 2).reshape(B, T, -1)  # the heads side by side again


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √head_dim + mask) v (Vaswani et al. 2017, eq. 1), written out: the fused path's truth.

    q (B, n_head, T, head_dim); k, v (B, kv_heads, S, head_dim); mask as in `Sight`.
    """
    group = q.size(1) // k.size(1)  # queries that share a key
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, n_head, T, S)
    if mask is None:
        mask = attention.causal_mask(q.size(2), k.size(2), q.device)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v


class MLP(nn.Module):
    """Two linear layers, wider in the middle; the first gives gate and value where it is gated."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.activation in GATED
        self.c_fc = Linear(config.n_embd, config.inner * (2 if self.gated else 1), bias=config.bias)
        if self.gated:
            self.c_fc.stacked = (config.inner, config.inner)  # gate and value
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.c_proj(self.bend(self.c_fc(x))), self.dropout, self.training)

    def bend(self, x: Tensor) -> Tensor:
        """The activation of x (B, T, inner); of gate and value, (B, T, 2 inner), where it is gated."""
        if not self.gated:
            return self.activation(x)
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the stream that it reads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = None if config.parallel_block else make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.pre = config.norm_place == "pre"
        # DeepNorm weighs the stream so that many layers of post-norm can be trained (GLM-130B, §2.1)
        self.stream_weight = math.sqrt(2 * config.n_layer) if config.norm_place == "deepnorm" else 1.0

    def forward(self, x: Tensor, sight: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        if self.ln_2 is None:  # side by side: one norm, one sum (GPT-J; PaLM, §2)
            return self._add(x, self.ln_1, lambda h: self.attn(h, sight, cache) + self.mlp(h))
        x = self._add(x, self.ln_1, lambda h: self.attn(h, sight, cache))
        return self._add(x, self.ln_2, self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream x (B, T, C) with what `part` makes of it: of its norm, or normalised thereafter."""
        return x + part(norm(x)) if self.pre else norm(self.stream_weight * x + part(x))


# Positions


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(T,) -> (T, width): sine and cosine by turns, wavelengths 2π to 20000π (Vaswani et al. 2017, §3.5)."""
    angles = _angles(positions, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rope(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (T, head_dim / 2) each, for `pointwise.rotate`."""
    angles = _angles(positions, head_dim, theta)
    return angles.cos(), angles.sin()


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """position / base^(2i / width), (T, width / 2)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    return positions[:, None].float() * base**-exponents


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """(n_head,): 2^(-8/n), 2^(-16/n), … (Press et al. 2022).

    Where n is no power of 2: those of the next lower, and every other one of the next higher, as in BLOOM.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_head - power)]
    # filled there and not copied from here, which a recorded step could not do
    return torch.stack([torch.full((), slope, device=device) for slope in slopes])


RELATIVE_BUCKETS, RELATIVE_FARTHEST = 32, 128


def relative_buckets(distance: Tensor) -> Tensor:
    """How far back a key stands -> 0 to 31: exactly up to 15, then in widening steps up to 128 (T5, §2.1)."""
    exact = RELATIVE_BUCKETS // 2
    distance = distance.clamp(min=0)
    wide = (distance.clamp(min=1).float() / exact).log() / math.log(RELATIVE_FARTHEST / exact)
    far = (exact + (wide * (RELATIVE_BUCKETS - exact)).long()).clamp(max=RELATIVE_BUCKETS - 1)
    return torch.where(distance < exact, distance, far)


class GPT(nn.Module):
    """The whole model. Parameter names are nanoGPT's (`transformer.h.0.attn.c_attn.weight`, …).

    Raises ValueError, with every problem at once, where the config describes no model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.gradient_checkpointing = (
            False  # True: blocks run again in the backward pass instead of being kept
        )
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.position == "relative":  # one table for all layers, as in T5
            parts["rel"] = nn.Embedding(RELATIVE_BUCKETS, config.n_head)
        if config.embd_norm:
            parts["ln_e"] = make_norm(config, config.n_embd)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.norm_place == "pre":  # else the last block has normalised already
            parts["ln_f"] = make_norm(config, config.n_embd)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = parts["wte"].weight  # one matrix for both (Press & Wolf 2017)
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's (§2.3): N(0, 0.02²), and what is summed into the stream so much smaller that the sum keeps
        its variance. DeepNorm's: Xavier's, but for what makes values 1 / sqrt(2 n_layer) of it."""
        layers = 2 * self.config.n_layer
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.transformer["h"]:
            if self.config.norm_place == "deepnorm":
                q, k, v = block.attn.c_attn.weight.split(block.attn.widths)
                for weight in (q, k):
                    nn.init.xavier_normal_(weight)
                for weight in (v, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight):
                    nn.init.xavier_normal_(weight, gain=layers**-0.5)
            elif self.config.norm_place == "pre":
                for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(layers))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: int | None = None,
        with_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits and loss.

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats; targets of -1 do not count.
        Where nobody needs these logits (`with_logits=False`) None stands for them: that takes less memory.
        Without targets: the logits of the last position, (B, 1, V), and None. With a cache, `idx` continues
        what it holds. Of a prefix decoder the first `prefix` tokens see one another (at most prefix_len;
        where it is None, all that come with an empty cache), and the targets among them do not count.
        Raises ValueError where the tokens do not fit the block.
        """
        T = idx.size(1)
        start, seen = (0, T) if cache is None else (cache.length, cache.reach(T))
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the block of {self.config.block_size}")
        if prefix is None:
            prefix = 0 if start else T
        prefix = min(self.config.prefix_len, prefix)
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        x = self._embed(idx, positions)  # (B, T, C)
        sight = AttentionInputs(
            mask=self._mask(positions, start, seen, prefix),
            rotation=self._rotation(positions),
        )
        for block in self.transformer["h"]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, sight, use_reentrant=False)
            else:
                x = block(x, sight, cache)
        if "ln_f" in self.transformer:
            x = self.transformer["ln_f"](x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self._logits(x[:, -1:]), None
        if prefix > 1:
            targets = torch.where(positions < prefix - 1, -1, targets)
        if not with_logits:
            cap = self.config.logit_softcap
            return None, cross_entropy.linear_cross_entropy(x, self.lm_head.weight, targets, cap)
        logits = self._logits(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def _embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        x = self.transformer["wte"](idx)
        if self.config.position == "learned":
            x = x + self.transformer["wpe"](positions)
        elif self.config.position == "sinusoidal":
            # the factor lifts the tokens to the size of the sines (Vaswani et al. 2017, §3.4)
            x = x * math.sqrt(self.config.n_embd) + sinusoids(positions, self.config.n_embd).to(x.dtype)
        if self.config.embd_norm:
            x = self.transformer["ln_e"](x)
        return functional.dropout(x, self.config.dropout, self.training)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rope":
            return None
        return rope(positions, self.config.head_dim, self.config.rope_theta)

    def _mask(self, positions: Tensor, start: int, S: int, prefix: int) -> Tensor | None:
        """`Sight.mask` for queries at `positions` (T,), from `start` on, over S keys: all up to the last
        query, and the places behind them where a cache of fixed length answers with those too."""
        config, T = self.config, positions.numel()
        biased = config.position in ("alibi", "relative")
        narrow = 0 < config.sliding_window < S
        if not (biased or narrow or start < prefix - 1 or start + T < S):
            return None
        queries, keys = positions[:, None], torch.arange(S, device=positions.device)
        seen = keys <= queries  # (T, S)
        if start < prefix - 1:
            seen = seen | (keys < prefix)
        if narrow:
            seen = seen & (keys > queries - config.sliding_window)
        if not biased:
            return seen
        distance = queries - keys  # (T, S); below 0 within a prefix
        if config.position == "alibi":
            scores = -alibi_slopes(config.n_head, positions.device)[:, None, None] * distance.abs()
        else:
            scores = self.transformer["rel"](relative_buckets(distance)).permute(2, 0, 1)  # (n_head, T, S)
        return scores.masked_fill(~seen, float("-inf"))[None]

    def _logits(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, by default without the positions (the token table counts: it is the output layer)."""
        total = sum(p.numel() for p in self.parameters())
        tables = [self.transformer[name] for name in ("wpe", "rel") if name in self.transformer]
        return total - sum(table.weight.numel() for table in tables if non_embedding)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for a token of a full block: 6N + 12 L C T (PaLM, appendix B).

        N leaves out what is only looked up: the positions, and an embedding that is not the output layer too.
        T is what a token can see at most: the block, or the sliding window.
        """
        c = self.config
        multiplied = self.num_params() - (0 if c.tie_weights else self.transformer["wte"].weight.numel())
        seen = min(c.block_size, c.sliding_window or c.block_size)
        return 6 * multiplied + 12 * c.n_layer * c.n_embd * seen

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context: keep the first `block_size` positions. Raises ValueError if it would grow, or
        leave no room behind a prefix."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"a block of {self.config.block_size} cannot be cropped to {block_size}")
        cropped = replace(self.config, block_size=block_size)
        if problems := cropped.problems():
            raise ValueError("; ".join(problems))
        self.config = cropped
        if "wpe" not in self.transformer:
            return
        wpe = self.transformer["wpe"]
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone(), wpe.weight.requires_grad)
        wpe.num_embeddings = block_size

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue ids (B, T) by `max_new_tokens`: (B, T + max_new_tokens). Options as in `stream`."""
        drawn = self.stream(idx, max_new_tokens, temperature=temperature, top_k=top_k, **options)
        return torch.cat([idx, *(token[:, None] for token in drawn)], dim=1)

    def stream(self, idx: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), as each is drawn: see `generation.stream`."""
        return generate.stream(self, idx, max_new_tokens, **options)
