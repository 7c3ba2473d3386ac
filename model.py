"""The GPT: its configuration, its parts, the model, and generation.

A decoder-only transformer (Vaswani et al. 2017; GPT-2: Radford et al. 2019) with nanoGPT's face:
`GPT(GPTConfig(...))`, `forward(idx, targets) -> (logits, loss)`, `generate(idx, max_new_tokens)`.
It imports torch only; it opens no file, chooses no device and prints nothing.

Shapes: B batch, T time (tokens), S keys seen so far, C = n_embd, V = vocab_size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": F.gelu,  # the exact form, with erf: nanoGPT's
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's (Hendrycks & Gimpel 2016)
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. `GPTConfig()` is GPT-2 124M with nanoGPT's padded vocabulary."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    activation: str = "gelu"  # a key of ACTIVATIONS
    flash: bool = True  # torch's fused attention; False: the plain softmax, written out

    def problems(self) -> list[str]:
        """What is wrong with this shape, a sentence each; empty where nothing is."""
        found = [
            f"{name} = {value} must be at least 1"
            for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
            if (value := getattr(self, name)) < 1
        ]
        if not found and self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            near = f"{below} or {below + self.n_head}" if below else f"{self.n_head}"
            found.append(
                f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: "
                f"each head takes an equal part of the width (n_embd = {near} would do)"
            )
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout = {self.dropout} must be at least 0 and less than 1")
        if self.activation not in ACTIVATIONS:
            found.append(f"activation = {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        return found

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields: what a settings object or a `model.json` may give."""
        return [field.name for field in fields(cls)]


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory reserved once."""

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        room: int | None = None,  # tokens; a whole block where None is given
    ) -> None:
        room = config.block_size if room is None else room
        shape = (config.n_layer, batch, config.n_head, room, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, n_head, T, head_dim) behind what is held; return all (B, n_head, S, head_dim)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) whose bias may be left out."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.flash, self.dropout = layer, config.n_head, config.flash, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, head_dim)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, n_head, S, head_dim)
        dropout = self.dropout if self.training else 0.0
        attend = fused_attention if self.flash else plain_attention
        y = attend(q, k, v, dropout)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), true where query t, which stands at position S - T + t, may look at key s."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √head_dim) v (Vaswani et al. 2017, eq. 1), written out: the truth for the fused path."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, n_head, T, S)
    scores = scores.masked_fill(~causal_mask(q.size(2), k.size(2), q.device), float("-inf"))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return weights @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """The same through torch's kernels (FlashAttention where torch has it: Dao et al. 2022)."""
    T, S = q.size(2), k.size(2)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = None if T == 1 else causal_mask(T, S, q.device)  # one new token sees every key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class MLP(nn.Module):
    """Two linear layers, four times as wide in the middle."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the stream that it reads (pre-norm)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model. Parameter names are nanoGPT's (`transformer.h.0.attn.c_attn.weight`, …).

    Raises ValueError, with every problem at once, where the config describes no model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # one matrix for both (Press & Wolf 2017)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith(
                "c_proj.weight"
            ):  # 2 n_layer sums into the stream keep its variance (GPT-2, §2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T) -> logits and loss.

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats; targets of -1 do not count.
        Without: the logits of the last position, (B, 1, V), and None. With a cache, `idx` continues what it
        holds. Raises ValueError where the tokens do not fit the block.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the block of {self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer["h"]:
            x = block(x, cache)
        x = self.transformer["ln_f"](x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, by default without the positions (the token table counts: it is the output layer)."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer["wpe"].weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for a token of a full block: 6N + 12 L C T (PaLM, appendix B)."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context: keep the first `block_size` positions. Raises ValueError if it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"a block of {self.config.block_size} cannot be cropped to {block_size}")
        self.config = replace(self.config, block_size=block_size)
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

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        n_vocab: int | None = None,
        use_cache: bool = True,
        hop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), `max_new_tokens` times, as each is drawn.

        temperature 0 takes the likeliest; what `filter_logits` takes restricts the draw. `n_vocab` keeps to
        the first ids, where the vocabulary is padded. Raises ValueError for options out of range.
        Past the block the window slides on by `hop` tokens at a time (an eighth of the block where None is
        given; 1 is nanoGPT's), so that a cache is refilled once in `hop` tokens. With and without a cache the
        windows, and so the tokens, are the same.
        """
        training, block_size = self.training, self.config.block_size
        hop = max(1, block_size // 8) if hop is None else hop
        for sound, wrong in (
            (idx.size(1) > 0, "there is no token to go on from"),
            (1 <= hop <= block_size, f"hop = {hop} must be between 1 and the block size, {block_size}"),
            (temperature >= 0, f"temperature = {temperature} must be at least 0"),
            (top_k is None or top_k > 0, f"top_k = {top_k} must be at least 1"),
            (top_p is None or top_p > 0, f"top_p = {top_p} must be above 0"),
            (min_p is None or 0 < min_p <= 1, f"min_p = {min_p} must be above 0 and at most 1"),
            (repetition_penalty > 0, f"repetition_penalty = {repetition_penalty} must be above 0"),
        ):
            if not sound:
                raise ValueError(wrong)
        room = min(block_size, idx.size(1) + max_new_tokens)  # tokens that the cache may have to hold
        cache, cached_from = None, 0
        try:
            self.eval()
            for _ in range(max_new_tokens):
                start = window_start(idx.size(1), block_size, hop)
                if use_cache and (cache is None or start != cached_from):
                    cache = cache or self._cache(idx, room)
                    cache.length, cached_from = 0, start
                fresh = idx[:, start + (cache.length if cache else 0) :]  # what the cache does not hold yet
                logits = self(fresh, cache=cache)[0][:, -1, :n_vocab].float()  # (B, V)
                logits = penalise_repetition(logits, idx, repetition_penalty)
                token = draw(logits, temperature, top_k, top_p, min_p, generator)
                idx = torch.cat([idx, token[:, None]], dim=1)
                yield token
        finally:
            self.train(training)

    def _cache(self, idx: Tensor, room: int) -> KVCache:
        """An empty cache for the rows of idx (B, T), in the dtype that the layers compute in."""
        kind = idx.device.type
        weights = self.lm_head.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights
        return KVCache(self.config, idx.size(0), idx.device, dtype, room)


def window_start(length: int, block_size: int, hop: int) -> int:
    """Where the context of `length` tokens begins: at 0, or the first multiple of `hop` that makes it fit."""
    return max(0, math.ceil((length - block_size) / hop) * hop)


def penalise_repetition(logits: Tensor, idx: Tensor, penalty: float) -> Tensor:
    """Make tokens of idx (B, T) less likely: divide positive logits, multiply negative ones (CTRL, §4.1)."""
    if penalty == 1.0:
        return logits
    n_vocab = logits.size(1)
    wide = F.pad(logits, (0, 1))  # (B, V + 1): the last column takes ids of a padded vocabulary, and goes
    idx = idx.clamp(max=n_vocab)
    seen = wide.gather(1, idx)  # (B, T)
    return wide.scatter(1, idx, torch.where(seen > 0, seen / penalty, seen * penalty))[:, :n_vocab]


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, (B,), from logits (B, V). Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no temperature overflows
    probs = F.softmax(filter_logits(logits, top_k, top_p, min_p), dim=-1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def filter_logits(
    logits: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set the logits (B, V) of tokens that may not be drawn to -inf. At least one token is always left.

    In this order, each on what the one before left: top_k, the k likeliest; top_p, the fewest whose
    probabilities reach p (Holtzman et al. 2020); min_p, those at least p times as likely as the likeliest
    (Nguyen et al. 2024).
    """
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = F.softmax(ordered, dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what stands before it suffices already
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    return logits
