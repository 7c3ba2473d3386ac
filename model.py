"""The GPT model: GPTConfig, attention, MLP, block, and GPT itself.

A decoder-only transformer (Vaswani et al. 2017; GPT-2: Radford et al. 2019) with nanoGPT's interface:
`GPT(GPTConfig(...))`, `forward(idx, targets) -> (logits, loss)`, `generate(idx, max_new_tokens)`.
The only library that it needs is torch. Importing it opens no file, chooses no device and prints nothing.

Shapes: B batch, T tokens, S keys (cached and new), C = n_embd, V = vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fradique.generation.generate import stream as stream_tokens
from fradique.generation.kv_cache import KVCache
from fradique.nn.attention import attention, causal_mask, visible_keys
from fradique.nn.cross_entropy import linear_cross_entropy
from fradique.nn.functional import ACTIVATIONS, GATED, apply_rope, dropout
from fradique.nn.linear import Linear
from fradique.nn.ngrams import NgramEmbedding
from fradique.nn.norms import NORMS, make_norm
from fradique.nn.positions import RELATIVE_BUCKETS, position_bias, rope_cos_sin, sinusoidal_embedding

NORM_PLACES = ("pre", "post", "deepnorm")
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "relative", "none")


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a model. `GPTConfig()` is GPT-2 124M with nanoGPT's padded vocabulary."""

    block_size: int = 1024  # maximum context length, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0  # grouped-query attention: number of key and value heads; 0: n_head
    n_inner: int = 0  # hidden width of the MLP; 0: 4 n_embd, or two thirds of that if the activation is gated
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2
    norm: str = "layernorm"  # one of NORMS
    norm_place: str = "pre"  # where each sublayer is normalized, one of NORM_PLACES
    qk_norm: bool = False  # normalize the queries and keys of each head
    embd_norm: bool = False  # normalize the embedding (BLOOM)
    position: str = "learned"  # positional encoding, one of POSITIONS
    rope_theta: float = 10000.0
    activation: str = "gelu"  # a key of ACTIVATIONS
    parallel_block: bool = False  # attention and MLP read the same normalized input; their outputs are added
    prefix_len: int = 0  # prefix LM: the first prefix_len tokens attend to each other in both directions
    sliding_window: int = 0  # number of last tokens that a token attends to, including itself; 0: all
    tie_weights: bool = True  # one matrix for the token embedding and the output layer
    logit_softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: off
    ngram_max: int = 1  # n-grams of 2 to ngram_max tokens have embeddings too; 1: only the tokens
    ngram_rows: int = 16384  # rows of the table for each n
    ngram_dropout: float = 0.0  # probability that a token lacks its longer n-grams, from a random length on
    flash: bool = True  # fused attention; False: plain_attention below

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Hidden width of the MLP. A gated MLP has three matrices, an ungated one two: with two thirds of the
        width, rounded up to a multiple of 8, both have about the same number of parameters."""
        default = (self.n_embd + 2) // 3 * 8 if self.activation in GATED else 4 * self.n_embd
        return self.n_inner or default

    def problems(self) -> list[str]:
        """What is wrong with this config, one sentence per problem; empty if the config is valid."""
        problems = []
        for name in POSITIVE_SIZES + NGRAM_SIZES + OPTIONAL_SIZES:
            value, minimum = getattr(self, name), 0 if name in OPTIONAL_SIZES else 1
            if not value >= minimum:  # not <: this also rejects NaN
                problems.append(f"{name} = {value} must be at least {minimum}")
        if not problems:
            problems += self._contradictions()
        for name in ("dropout", "ngram_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"{name} = {getattr(self, name)} must be at least 0 and less than 1")
        if not self.rope_theta > 0:
            problems.append(f"rope_theta = {self.rope_theta} must be above 0")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                problems.append(f"{name} = {value!r} must be one of {', '.join(choices)}")
        return problems

    def _contradictions(self) -> list[str]:
        """Settings that are in range but do not fit together."""
        problems, n_head = [], self.n_head
        if remainder := self.n_embd % n_head:
            lower = self.n_embd - remainder
            nearest = f"{lower} or {lower + n_head}" if lower else f"{n_head}"
            problems.append(
                f"n_embd = {self.n_embd} is not divisible by n_head = {n_head}: "
                f"all heads have the same width (use n_embd = {nearest})"
            )
        elif self.position == "rope" and self.head_dim % 2:
            problems.append(
                f"position = 'rope' needs an even head width, but n_embd / n_head = {self.head_dim} is odd: "
                "change n_embd or n_head"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            problems.append(f"position = 'sinusoidal' needs an even n_embd, not {self.n_embd}")
        if n_head % self.kv_heads:
            divisors = ", ".join(str(n) for n in range(1, n_head + 1) if n_head % n == 0)
            problems.append(
                f"n_head = {n_head} is not a multiple of n_kv_head = {self.n_kv_head}: each key head belongs "
                f"to the same number of query heads (use one of n_kv_head = {divisors})"
            )
        if self.prefix_len and self.sliding_window:
            problems.append(
                f"prefix_len = {self.prefix_len} and sliding_window = {self.sliding_window} contradict each "
                "other: set one of them to 0"
            )
        if self.prefix_len >= self.block_size:
            problems.append(
                f"prefix_len = {self.prefix_len} must be less than block_size = {self.block_size}"
            )
        return problems

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields, which are also names of settings and keys of `model.json`."""
        return [field.name for field in fields(cls)]


POSITIVE_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
NGRAM_SIZES = ("ngram_max", "ngram_rows")  # these too are positive
# for these, 0 means the default, or off
OPTIONAL_SIZES = ("n_kv_head", "n_inner", "prefix_len", "sliding_window", "logit_softcap")
CHOICES = {"norm": NORMS, "norm_place": NORM_PLACES, "position": POSITIONS, "activation": tuple(ACTIVATIONS)}


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of attention that depend on the positions and are the same in all layers."""

    # bool (T, S), True where the query attends to the key; float (1, n_head, T, S), a bias; None: causal
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None  # RoPE's cosine and sine, (T, head_dim / 2) each


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention: a token attends to itself, to earlier tokens, and within the prefix."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.attention = attention if config.flash else plain_attention
        self.qkv_heads = (config.n_head, config.kv_heads, config.kv_heads)
        qkv_widths = tuple(heads * config.head_dim for heads in self.qkv_heads)
        # query, key and value projections of all heads in one matrix
        self.c_attn = Linear(config.n_embd, sum(qkv_widths), config.bias, row_splits=qkv_widths)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias)
        self.q_norm = make_norm(config.norm, config.head_dim, config.bias) if config.qk_norm else None
        self.k_norm = make_norm(config.norm, config.head_dim, config.bias) if config.qk_norm else None

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y = self.attend(self.c_attn(x), inputs, cache)  # (B, T, C)
        return dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, qkv: Tensor, inputs: AttentionInputs, cache: KVCache | None) -> Tensor:
        """`forward` without the two projections: (B, T, (n_head + 2 kv_heads) head_dim) -> (B, T, C)."""
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head + 2 kv_heads, T, head_dim)
        q, k, v = heads.split_with_sizes(self.qkv_heads, 1)  # (B, n_head or kv_heads, T, head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rotation is not None:
            cos, sin = inputs.rotation
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if q.dtype != v.dtype:  # under autocast the norms and RoPE return float32
            q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, kv_heads, S, head_dim)
        p = self.dropout if self.training else 0.0
        y = self.attention(q, k, v, inputs.mask, p)  # (B, n_head, T, head_dim)
        return y.transpose(1, 2).reshape(B, T, -1)  # (B, T, C): the heads concatenated


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √head_dim + mask) v (Vaswani et al. 2017, eq. 1), without a fused kernel.

    q (B, n_head, T, head_dim); k, v (B, kv_heads, S, head_dim); mask: see AttentionInputs; p: dropout.
    """
    group = q.size(1) // k.size(1)  # query heads per key head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, n_head, T, S)
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q.device)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probs = F.dropout(F.softmax(scores, dim=-1), p, training=p > 0)
    return probs.to(v.dtype) @ v  # (B, n_head, T, S) @ (B, n_head, S, head_dim)


class MLP(nn.Module):
    """Two linear layers with an activation between them; if gated, c_fc returns both gate and value."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.activation in GATED
        fc_widths = (config.inner, config.inner) if self.gated else (config.inner,)  # gated: gate and value
        self.c_fc = Linear(config.n_embd, sum(fc_widths), config.bias, row_splits=fc_widths)
        self.c_proj = Linear(config.inner, config.n_embd, config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return dropout(self.c_proj(self.activate(self.c_fc(x))), self.dropout, self.training)

    def activate(self, x: Tensor) -> Tensor:
        """(B, T, inner), or (B, T, 2 inner) if gated: gate and value -> (B, T, inner)."""
        if not self.gated:
            return self.activation(x)
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value


class Block(nn.Module):
    """One layer: attention, then the MLP, each with a norm and a residual connection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config.norm, config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = None if config.parallel_block else make_norm(config.norm, config.n_embd, config.bias)
        self.mlp = MLP(config)
        self.pre_norm = config.norm_place == "pre"
        # DeepNorm scales the residual stream so that deep post-norm models train stably (GLM-130B, §2.1)
        self.residual_scale = math.sqrt(2 * config.n_layer) if config.norm_place == "deepnorm" else 1.0

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.ln_2 is None:  # parallel block (GPT-J; PaLM, §2)
            return self._residual(x, self.ln_1, lambda h: self.attn(h, inputs, cache) + self.mlp(h))
        x = self._residual(x, self.ln_1, lambda h: self.attn(h, inputs, cache))
        return self._residual(x, self.ln_2, self.mlp)

    def _residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + sublayer(x), (B, T, C). Pre-norm normalizes the sublayer's input; post-norm, the sum."""
        return x + sublayer(norm(x)) if self.pre_norm else norm(self.residual_scale * x + sublayer(x))


class GPT(nn.Module):
    """The whole model. Its parameters have nanoGPT's names (`transformer.h.0.attn.c_attn.weight`, ...).

    Raises ValueError with all problems of the config if the config is invalid.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.gradient_checkpointing = False  # True: recompute the blocks in the backward pass to save memory
        modules: dict[str, nn.Module] = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.position == "relative":  # one table for all layers, as in T5
            modules["rel"] = nn.Embedding(RELATIVE_BUCKETS, config.n_head)
        if config.ngram_max > 1:
            table = (config.ngram_max, config.ngram_rows, config.n_embd, config.ngram_dropout)
            modules["ngrams"] = NgramEmbedding(*table)
        if config.embd_norm:
            modules["ln_e"] = make_norm(config.norm, config.n_embd, config.bias)
        modules["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.norm_place == "pre":  # otherwise the last block ends with a norm
            modules["ln_f"] = make_norm(config.norm, config.n_embd, config.bias)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = modules["wte"].weight  # Press & Wolf 2017
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, 0.02²), as in GPT-2. Pre-norm: times 1 / √(2 n_layer) for the output projections (§2.3).

        DeepNorm: Xavier in the blocks, times 1 / √(2 n_layer) for all but the query and key projections.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        num_residuals = 2 * self.config.n_layer  # residual connections: two per block
        for block in self.transformer["h"]:
            attn, mlp = block.attn, block.mlp
            if self.config.norm_place == "deepnorm":
                q, k, v = attn.c_attn.weight.split(attn.c_attn.row_splits)
                for weight in (q, k):
                    nn.init.xavier_normal_(weight)
                for weight in (v, attn.c_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight):
                    nn.init.xavier_normal_(weight, gain=num_residuals**-0.5)
            elif self.config.norm_place == "pre":
                for weight in (attn.c_proj.weight, mlp.c_proj.weight):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(num_residuals))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: int | None = None,
        with_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits and loss.

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats; targets of -1 are ignored.
        `with_logits=False` returns None instead of the logits, which saves memory.
        Without targets: the logits of the last position, (B, 1, V), and None.
        With a cache: `idx` follows the cached tokens, and its keys and values are added to the cache.
        `prefix`: how many of the first tokens attend to each other in both directions, at most prefix_len;
        they are not predicted. Default: all of idx if the cache is empty.
        Raises ValueError if there are more tokens than block_size.
        """
        T, start = idx.size(1), 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size = {self.config.block_size}")
        if prefix is None:
            prefix = 0 if start else T
        prefix = min(self.config.prefix_len, prefix)
        S = T if cache is None else cache.num_keys(T)
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)  # (T,)
        inputs = AttentionInputs(self._mask(positions, start, S, prefix), self._rotation(positions))
        x = self._embed(idx, positions, cache)  # (B, T, C)
        for block in self.transformer["h"]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, use_reentrant=False)
            else:
                x = block(x, inputs, cache)
        if "ln_f" in self.transformer:
            x = self.transformer["ln_f"](x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self._logits(x[:, -1:]), None
        if prefix > 1:  # no loss for the tokens of the prefix: earlier positions attend to them
            targets = torch.where(positions < prefix - 1, -1, targets)
        if not with_logits:
            softcap = self.config.logit_softcap
            return None, linear_cross_entropy(x, self.lm_head.weight, targets, softcap)
        logits = self._logits(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def _embed(self, idx: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """Token ids (B, T) at `positions` (T,) -> (B, T, C)."""
        x = self.transformer["wte"](idx)
        if "ngrams" in self.transformer:
            earlier = (self.config.ngram_max - 1, 0)
            ids = F.pad(idx + 1, earlier) if cache is None else cache.update_ids(idx + 1)
            x = x + self.transformer["ngrams"](ids)
        if self.config.position == "learned":
            x = x + self.transformer["wpe"](positions)
        elif self.config.position == "sinusoidal":
            # √C scales the token embedding to the size of the sinusoids (Vaswani et al. 2017, §3.4)
            sinusoids = sinusoidal_embedding(positions, self.config.n_embd)  # (T, C)
            x = x * math.sqrt(self.config.n_embd) + sinusoids.to(x.dtype)
        if self.config.embd_norm:
            x = self.transformer["ln_e"](x)
        return dropout(x, self.config.dropout, self.training)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """`AttentionInputs.rotation` for tokens at `positions` (T,)."""
        if self.config.position != "rope":
            return None
        return rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)

    def _mask(self, positions: Tensor, start: int, S: int, prefix: int) -> Tensor | None:
        """`AttentionInputs.mask` for queries at `positions` (T,), from `start` on, and keys at 0 to S - 1.
        In a captured CUDA graph S is the cache's capacity: the mask hides the keys that are still unused."""
        config, T = self.config, positions.numel()
        has_bias = config.position in ("alibi", "relative")
        windowed = 0 < config.sliding_window < S
        sees_later_keys = start < prefix - 1  # the first query attends to later tokens of the prefix
        if not (has_bias or windowed or sees_later_keys or start + T < S):
            return None
        visible = visible_keys(positions, S, prefix if sees_later_keys else 0, config.sliding_window)
        if not has_bias:
            return visible
        distance = positions[:, None] - torch.arange(S, device=positions.device)  # negative within a prefix
        bias = position_bias(distance, config.n_head, self.transformer)  # (n_head, T, S)
        return bias.masked_fill(~visible, float("-inf"))[None]  # (1, n_head, T, S)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V)."""
        logits, softcap = self.lm_head(x), self.config.logit_softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters. `non_embedding` excludes the position tables but not `wte`, as in nanoGPT."""
        excluded = ("transformer.wpe.weight", "transformer.rel.weight") if non_embedding else ()
        return sum(p.numel() for name, p in self.named_parameters() if name not in excluded)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one token: 6N + 12 n_layer C S (PaLM, appendix B).

        N is the number of parameters without tables that are only looked up: positions, n-grams, an untied
        token embedding. S is the number of keys that a token attends to: block_size, or the sliding window.
        """
        c = self.config
        tables = ["ngrams"] if c.tie_weights else ["ngrams", "wte"]
        looked_up = [self.transformer[name].weight for name in tables if name in self.transformer]
        N = self.num_params() - sum(table.numel() for table in looked_up)
        S = min(c.block_size, c.sliding_window or c.block_size)
        return 6 * N + 12 * c.n_layer * c.n_embd * S

    def crop_block_size(self, block_size: int) -> None:
        """Reduce the context length to the first `block_size` positions.

        Raises ValueError if block_size is larger than before, or not larger than prefix_len.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size = {self.config.block_size} cannot be cropped to {block_size}")
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
        """Token ids (B, T) -> (B, T + max_new_tokens). `options`: see fradique/generation/generate.py."""
        tokens = self.stream(idx, max_new_tokens, temperature=temperature, top_k=top_k, **options)
        return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)

    def stream(self, idx: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), as soon as it is sampled."""
        return stream_tokens(self, idx, max_new_tokens, **options)
