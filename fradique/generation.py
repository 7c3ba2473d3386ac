"""Writing with a model, token by token: the cache of keys and values, the moving window, the draw.

Shapes: B batch, T time (tokens), S keys seen so far, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH_RECORDING = 8  # tokens; to record a step takes about as long as a few steps
RECORDED_ROWS = 16  # at most: with more the kernels take longer than to call them
SIDE_STREAMS: dict[torch.device, "torch.cuda.Stream"] = {}  # on which graphs are recorded, one a device


class Shape(Protocol):
    """What a cache needs to know of a model: a GPTConfig has it."""

    block_size: int
    n_layer: int
    kv_heads: int
    head_dim: int


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory reserved once."""

    def __init__(
        self,
        config: Shape,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        room: int | None = None,  # tokens; a whole block where None is given
    ) -> None:
        self.room = config.block_size if room is None else room
        shape = (batch, config.kv_heads, self.room, config.head_dim)
        # zeros: a place that is not filled yet may be multiplied by 0, and must not be NaN
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.length = 0  # tokens held
        self.position: Tensor | None = None  # int64 (1,): where the next token stands, instead of length

    def positions(self, T: int) -> Tensor:
        """Where the next T tokens stand, (T,)."""
        if self.position is not None:
            return self.position
        return torch.arange(self.length, self.length + T, device=self.keys[0].device)

    def reach(self, T: int) -> int:
        """How many keys `extend` answers with when T tokens come."""
        return self.room if self.position is not None else self.length + T

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, kv_heads, T, head_dim) behind what is held; return all S of them.

        Where `position` is given T is 1 and all of the room is returned: shapes and addresses stay the same
        from token to token, and a mask has to hide what is not filled yet.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.position is not None:
            return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        end = self.length + T
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)


def cuda_graph(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """`work` recorded as a CUDA graph: what plays it again, and where its result then lies."""
    with torch.cuda.device(device):
        side = SIDE_STREAMS.setdefault(device, torch.cuda.Stream(device))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # at their first calls libraries set themselves up, unrecorded
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            result = work()
    return graph.replay, result


class Recorded:
    """The step from one token to the next, recorded once and played again for each: a GPU is given all of its
    work at once, which for small batches takes less than giving it kernel by kernel."""

    def __init__(self, model: nn.Module, cache: KVCache, batch: int) -> None:
        device = cache.keys[0].device
        self.cache, self.token = cache, torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = cache.position = torch.zeros(1, dtype=torch.long, device=device)

        def step() -> Tensor:
            cache.length = 0  # where the token stands is told by the position
            return model(self.token, cache=cache, prefix=0)[0]

        try:
            self.play, self.logits = cuda_graph(step, device)
        finally:
            cache.position, cache.length = None, 0

    def __call__(self, token: Tensor) -> Tensor:
        """Logits (B, 1, V) behind a token a row, (B, 1); the next call overwrites them."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.play()
        self.cache.length += 1
        return self.logits


@torch.no_grad()
def stream(
    model: nn.Module,
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
    """Continue ids (B, T) with a GPT: yield the next token of every row, (B,), as each is drawn.

    temperature 0 takes the likeliest; what `filter_logits` takes restricts the draw. `n_vocab` keeps to
    the first ids, where the vocabulary is padded. Raises ValueError for options out of range.
    Past the block the window slides on by `hop` tokens at a time (an eighth of the block where None is
    given; 1 is nanoGPT's), so that a cache is refilled once in `hop` tokens. With and without a cache the
    windows, and so the tokens, are the same.
    """
    training, block_size = model.training, model.config.block_size
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
    window, given = -1, 0  # where the window begins, and how many tokens were there when it did
    try:
        model.eval()
        cache = _cache(model, idx, room) if use_cache else None
        recorded = None
        if cache is not None and max_new_tokens >= WORTH_RECORDING and can_record(idx):
            recorded = Recorded(model, cache, idx.size(0))
        for _ in range(max_new_tokens):
            start = window_start(idx.size(1), block_size, hop)
            if start != window:
                window, given = start, idx.size(1) - start
                if cache is not None:
                    cache.length = 0
            fresh = idx[:, start + (cache.length if cache else 0) :]  # what the cache does not hold yet
            if recorded is not None and cache.length and fresh.size(1) == 1:
                logits = recorded(fresh)
            else:
                with torch.inference_mode():  # each call costs less, which for small models is a tenth
                    logits = model(fresh, cache=cache, prefix=given)[0]
            logits = logits[:, -1, :n_vocab].float()  # (B, V)
            logits = penalise_repetition(logits, idx, repetition_penalty)
            token = draw(logits, temperature, top_k, top_p, min_p, generator)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token
    finally:
        model.train(training)


def can_record(idx: Tensor) -> bool:
    """Whether the steps of these rows are recorded: few rows, on CUDA, and no autocast to cast weights."""
    return idx.is_cuda and idx.size(0) <= RECORDED_ROWS and not torch.is_autocast_enabled("cuda")


def _cache(model: nn.Module, idx: Tensor, room: int) -> KVCache:
    """An empty cache for the rows of idx (B, T), in the dtype that the layers compute in."""
    kind = idx.device.type
    weights = model.transformer["wte"].weight.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights
    return KVCache(model.config, idx.size(0), idx.device, dtype, room)


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
    """One token id a row, (B,), from logits (B, V). Temperature 0 is greedy.

    Raises ValueError where a CPU draws from logits that are not finite.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: none overflows
    probs = F.softmax(filter_logits(logits, top_k, top_p, min_p), dim=-1)
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    # torch's own draws a number for each token of the vocabulary, which a CPU does slowly; one is enough
    edges = probs.cumsum(dim=-1)  # token t is drawn where edges[t - 1] <= u < edges[t]
    total = edges[:, -1:].contiguous()
    if not total.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or it has diverged")
    u = torch.rand(total.shape, device=logits.device, generator=generator) * total
    token = torch.searchsorted(edges, u, right=True)
    return token.minimum(torch.searchsorted(edges, total))[:, 0]  # u may have been rounded up to the total


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
